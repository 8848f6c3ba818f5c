// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"slices"
)

// Cells at fixed places; see the package comment.
const (
	headerCell   = 0
	countersCell = 1
	journalCell  = 2
	// maxChanged is how many cells one transaction may change. The most that a call needs is an Add that gives maxAddrs addresses back
	// and takes as many others: about 11 cells for each pair, two leases and a handful of others.
	maxChanged   = 192
	journalEntry = 4 + cellSize // cell number, content
	firstCell    = journalCell + 1 + (maxChanged*journalEntry+cellSize-1)/cellSize

	bucketsPerCell = cellSize / 4

	layoutVersion        = 1
	headerMagic          = "margayip"
	journalMagic  uint32 = 0x6c6e726a
)

// layout is the header's content: where the tables are and under which circumstances they count.
type layout struct {
	bootID      [16]byte
	fingerprint uint64 // of the plan; 0: made without one
	ranges      uint32
	addrCap     uint32 // records and buckets of the address table, a multiple of bucketsPerCell
	leaseCap    uint32
}

func (l *layout) rangesAt() uint32       { return firstCell }
func (l *layout) addrBucketsAt() uint32  { return l.rangesAt() + l.ranges }
func (l *layout) addrsAt() uint32        { return l.addrBucketsAt() + l.addrCap/bucketsPerCell }
func (l *layout) leaseBucketsAt() uint32 { return l.addrsAt() + l.addrCap }
func (l *layout) leasesAt() uint32       { return l.leaseBucketsAt() + l.leaseCap/bucketsPerCell }
func (l *layout) size() int64            { return int64(l.leasesAt()+l.leaseCap*leaseCells) * cellSize }

func (l *layout) encode() *cell {
	var c cell
	copy(c[0:], headerMagic)
	le.PutUint32(c[8:], layoutVersion)
	copy(c[16:], l.bootID[:])
	le.PutUint64(c[32:], l.fingerprint)
	le.PutUint32(c[40:], l.ranges)
	le.PutUint32(c[44:], l.addrCap)
	le.PutUint32(c[48:], l.leaseCap)
	le.PutUint32(c[12:], crc32.ChecksumIEEE(c[16:]))
	return &c
}

func decodeLayout(c *cell) (l layout, ok bool) {
	if string(c[0:8]) != headerMagic || le.Uint32(c[8:]) != layoutVersion || le.Uint32(c[12:]) != crc32.ChecksumIEEE(c[16:]) {
		return l, false
	}
	return layout{
		bootID:      [16]byte(c[16:32]),
		fingerprint: le.Uint64(c[32:]),
		ranges:      le.Uint32(c[40:]),
		addrCap:     le.Uint32(c[44:]),
		leaseCap:    le.Uint32(c[48:]),
	}, true
}

// pool is how one table's records are used. Records above high were never used; the others that are free hang in a list.
type pool struct {
	used, free, high uint32
}

// tx is one transaction on the state: it reads cells from the file and changes copies of them, which commit writes. An error of the
// device or a contradiction in the state sticks in err, as in bufio.Writer: reads then give empty cells, and commit refuses.
type tx struct {
	layout
	dev   device
	cells map[uint32]*cachedCell
	err   error

	reads, writes int // device operations, for tests of what a call costs
}

type cachedCell struct {
	cell
	changed bool
}

func newTx(dev device, l layout) *tx {
	return &tx{layout: l, dev: dev, cells: map[uint32]*cachedCell{}}
}

func (t *tx) fail(err error) {
	if t.err == nil {
		t.err = err
	}
}

// load returns cell n as this transaction sees it.
func (t *tx) load(n uint32) *cachedCell {
	if c, ok := t.cells[n]; ok {
		return c
	}
	c := &cachedCell{}
	t.reads++
	if _, err := t.dev.ReadAt(c.cell[:], int64(n)*cellSize); err != nil {
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("%w: it ends before cell %d", errDamaged, n)
		}
		t.fail(err)
		return &cachedCell{}
	}
	t.cells[n] = c
	return c
}

// read returns cell n, not to be changed.
func (t *tx) read(n uint32) *cell {
	return &t.load(n).cell
}

// change returns cell n to be changed.
func (t *tx) change(n uint32) *cell {
	c := t.load(n)
	c.changed = true
	return &c.cell
}

// commit makes the transaction happen: once the journal is written, the next holder of the lock would finish what is left here.
func (t *tx) commit() error {
	changed := t.changed()
	if t.err != nil {
		return t.err
	}
	if len(changed) == 0 {
		return nil
	}
	if len(changed) > maxChanged {
		return fmt.Errorf("a transaction changes %d cells, the journal holds %d", len(changed), maxChanged)
	}
	journal := make([]byte, cellSize, cellSize+len(changed)*journalEntry)
	for _, n := range changed {
		journal = le.AppendUint32(journal, n)
		journal = append(journal, t.cells[n].cell[:]...)
	}
	le.PutUint32(journal[0:], journalMagic)
	le.PutUint32(journal[4:], uint32(len(changed)))
	le.PutUint32(journal[8:], crc32.ChecksumIEEE(journal[cellSize:]))
	t.writes++
	if _, err := t.dev.WriteAt(journal, journalCell*cellSize); err != nil {
		// A torn journal is no journal. Should this write not have been torn, it is the call that its caller was told has failed.
		return fmt.Errorf("write journal: %w", errors.Join(err, clearJournal(t.dev)))
	}
	if err := t.apply(changed); err != nil {
		return err
	}
	t.writes++
	return clearJournal(t.dev)
}

// changed lists the changed cells in ascending order.
func (t *tx) changed() []uint32 {
	var out []uint32
	for n := range maps.Keys(t.cells) {
		if t.cells[n].changed {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return out
}

// apply writes the changed cells to their places, neighbours in one write.
func (t *tx) apply(changed []uint32) error {
	for len(changed) > 0 {
		first, n := changed[0], 0
		var run []byte
		for n < len(changed) && changed[n] == first+uint32(n) {
			c := t.cells[changed[n]]
			c.changed = false
			run = append(run, c.cell[:]...)
			n++
		}
		t.writes++
		if _, err := t.dev.WriteAt(run, int64(first)*cellSize); err != nil {
			return fmt.Errorf("write state: %w", err)
		}
		changed = changed[n:]
	}
	return nil
}

func clearJournal(dev device) error {
	var none [12]byte
	if _, err := dev.WriteAt(none[:], journalCell*cellSize); err != nil {
		return fmt.Errorf("clear journal: %w", err)
	}
	return nil
}

// recoverJournal finishes the transaction of a caller that was killed after its journal was complete, and drops a torn one.
func recoverJournal(dev device, l layout) error {
	var head cell
	if _, err := dev.ReadAt(head[:], journalCell*cellSize); err != nil {
		return fmt.Errorf("read journal: %w", err)
	}
	count := le.Uint32(head[4:])
	if le.Uint32(head[0:]) == 0 && count == 0 {
		return nil
	}
	if le.Uint32(head[0:]) != journalMagic || count > maxChanged {
		return clearJournal(dev)
	}
	entries := make([]byte, count*journalEntry)
	if _, err := dev.ReadAt(entries, (journalCell+1)*cellSize); err != nil {
		return fmt.Errorf("read journal: %w", err)
	}
	if crc32.ChecksumIEEE(entries) != le.Uint32(head[8:]) {
		return clearJournal(dev)
	}
	for entry := range slices.Chunk(entries, journalEntry) {
		at := int64(le.Uint32(entry)) * cellSize
		if at >= l.size() {
			return fmt.Errorf("%w: the journal names a cell behind its end", errDamaged)
		}
		if _, err := dev.WriteAt(entry[4:], at); err != nil {
			return fmt.Errorf("repeat journal: %w", err)
		}
	}
	return clearJournal(dev)
}

// image is a state in memory, as it is put together for a new file.
type image []byte

func (m image) ReadAt(p []byte, at int64) (int, error)  { return copy(p, m[at:]), nil }
func (m image) WriteAt(p []byte, at int64) (int, error) { return copy(m[at:], p), nil }

// flush writes the changes without a journal and forgets all cells: for an image, which nobody sees before it is complete.
func (t *tx) flush() error {
	changed := t.changed()
	if t.err != nil {
		return t.err
	}
	err := t.apply(changed)
	clear(t.cells)
	return err
}
