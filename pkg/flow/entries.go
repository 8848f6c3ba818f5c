// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

const (
	// batchEntries is how many entries one system call copies: at most about 700 KiB of flows.
	batchEntries = 4096
	// maxBatchEntries bounds the growth of a batch when one hash bucket holds more than the batch.
	maxBatchEntries = 1 << 17
)

// Entries calls visit for the entries of a hash map or LPM trie, read in batches. The map may change meanwhile: an entry that is
// there all the time is visited once, others once or not at all. It stops early, without an error, when visit returns false, and
// after twice the map's capacity in any case. K and V must have the layout of the map's key and value.
func Entries[K, V any](m *ebpf.Map, visit func(K, V) bool) error {
	size := min(batchEntries, int(m.MaxEntries()))
	keys, values := make([]K, size), make([]V, size)
	var cursor ebpf.MapBatchCursor
	for seen := 0; seen < 2*int(m.MaxEntries()); {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		switch {
		case errors.Is(err, unix.ENOSPC) && size < maxBatchEntries:
			size *= 2
			keys, values = make([]K, size), make([]V, size)
			continue
		case errors.Is(err, ebpf.ErrNotSupported) && seen == 0:
			return entriesOneByOne(m, visit)
		case err != nil && !errors.Is(err, ebpf.ErrKeyNotExist):
			return fmt.Errorf("read map %s: %w", m, err)
		}
		for i := range n {
			if !visit(keys[i], values[i]) {
				return nil
			}
		}
		if err != nil || n == 0 {
			return nil
		}
		seen += n
	}
	return nil
}

// entriesOneByOne is Entries for maps without batch operations.
func entriesOneByOne[K, V any](m *ebpf.Map, visit func(K, V) bool) error {
	var (
		key   K
		value V
	)
	it := m.Iterate()
	for it.Next(&key, &value) {
		if !visit(key, value) {
			return nil
		}
	}
	// An aborted iteration means that the map changed under it: what was seen is still true.
	if err := it.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return fmt.Errorf("read map %s: %w", m, err)
	}
	return nil
}
