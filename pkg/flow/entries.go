// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"errors"
	"fmt"
	"reflect"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

const (
	// batchEntries is how many entries one system call copies: at most about 700 KiB of flows.
	batchEntries = 4096
	// maxBatchEntries bounds the growth of a batch when one hash bucket holds more than the batch.
	maxBatchEntries = 1 << 17
)

// errNoBatches says that the kernel cannot read the map in batches.
var errNoBatches = errors.New("no batched reading")

// Entries calls visit for the entries of a hash map or LPM trie, read in batches. The map may change meanwhile: an entry that is
// there all the time is visited once, others once or not at all. It stops early, without an error, when visit returns false, and
// after twice the map's capacity in any case. K and V must have the layout of the map's key and value.
func Entries[K, V any](m *ebpf.Map, visit func(K, V) bool) error {
	var (
		keys   []K
		values []V
	)
	grow := func(size int) (any, any) {
		keys, values = make([]K, size), make([]V, size)
		return keys, values
	}
	err := batches(m, grow, func(n int) bool {
		for i := range n {
			if !visit(keys[i], values[i]) {
				return false
			}
		}
		return true
	})
	if errors.Is(err, errNoBatches) {
		return entriesOneByOne(m, visit)
	}
	return err
}

// Count returns how many entries a hash map or LPM trie of any layout has.
func Count(m *ebpf.Map) (int, error) {
	total := 0
	array := func(bytes uint32, size int) any {
		return reflect.MakeSlice(reflect.SliceOf(reflect.ArrayOf(int(bytes), reflect.TypeFor[byte]())), size, size).Interface()
	}
	err := batches(m,
		func(size int) (any, any) { return array(m.KeySize(), size), array(m.ValueSize(), size) },
		func(n int) bool { total += n; return true })
	if errors.Is(err, errNoBatches) {
		return countOneByOne(m)
	}
	return total, err
}

// batches reads m. grow makes the slices to read into and each is told how many of their elements a batch has filled.
func batches(m *ebpf.Map, grow func(size int) (keys, values any), each func(n int) bool) error {
	size := min(batchEntries, int(m.MaxEntries()))
	keys, values := grow(size)
	var cursor ebpf.MapBatchCursor
	for seen := 0; seen < 2*int(m.MaxEntries()); {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		switch {
		case errors.Is(err, unix.ENOSPC) && size < maxBatchEntries:
			size *= 2
			keys, values = grow(size)
			continue
		case errors.Is(err, ebpf.ErrNotSupported) && seen == 0:
			return errNoBatches
		case err != nil && !errors.Is(err, ebpf.ErrKeyNotExist):
			return fmt.Errorf("read map %s: %w", m, err)
		}
		if !each(n) || err != nil || n == 0 {
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

// countOneByOne is Count for maps without batch operations.
func countOneByOne(m *ebpf.Map) (int, error) {
	var key any
	n := 0
	for limit := 2 * int(m.MaxEntries()); n < limit; n++ {
		next, err := m.NextKeyBytes(key)
		if err != nil {
			return n, fmt.Errorf("count the entries of map %s: %w", m, err)
		}
		if next == nil {
			break
		}
		key = next
	}
	return n, nil
}
