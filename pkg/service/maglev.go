// SPDX-License-Identifier: Apache-2.0

package service

import (
	"encoding/binary"
	"hash/fnv"
	"net/netip"
	"slices"
)

// tableSizes are the sizes that a Maglev table may have: primes, so that every step walks through the whole table, each the largest below a
// power of two. The programs have the same (maglev_sizes in bpf/lib/maglev.h), and a size is named by its index. The first stands for
// no table.
var tableSizes = [...]uint32{0, 251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521, 131071, 262139, 524287, 1048573}

// TableSizes returns the sizes that a Maglev table may have, by the number that Table.Size gives.
func TableSizes() []uint32 { return slices.Clone(tableSizes[:]) }

const (
	// positionsPerBackend is how many positions of the table a backend gets at least, while there are sizes large enough. With so many, shares
	// differ by about one per cent.
	positionsPerBackend = 100
	// maxTableBackends is how many backends a table can name: its slots have 16 bits, one value of which marks a free position.
	maxTableBackends = 1<<16 - 1
	freePosition     = 1<<16 - 1
)

// Table is the Maglev table of a list: a flow's hash is a position in it, and what stands there is the slot of its backend.
type Table struct {
	// Size is the index of TableSizes.
	Size uint8
	// Slots has one slot of the list for each position.
	Slots []uint16
}

// tableSize returns the index of the size for that many backends, 0 for none: one backend needs no choice.
func tableSize(backends int) uint8 {
	if backends < 2 || backends > maxTableBackends {
		return 0
	}
	for i, size := range tableSizes {
		if int(size) >= positionsPerBackend*backends {
			return uint8(i)
		}
	}
	return uint8(len(tableSizes) - 1)
}

// newTable computes the table of a list (Eisenbud et al., "Maglev", NSDI 2016, §3.4): in turn, each backend takes the next free position
// in an order of its own. Order and turn follow from the addresses alone, so every node that has these backends has them at the same
// positions, whatever the slots are, and when one comes or goes few others move.
func newTable(slots []netip.AddrPort) Table {
	t := Table{Size: tableSize(len(slots))}
	if t.Size == 0 {
		return t
	}
	size := tableSizes[t.Size]
	t.Slots = slices.Repeat([]uint16{freePosition}, int(size))
	turns := make([]turn, len(slots))
	for slot, b := range slots {
		turns[slot] = newTurn(b, uint16(slot), size)
	}
	slices.SortFunc(turns, func(a, b turn) int { return slots[a.slot].Compare(slots[b.slot]) })
	for left := size; ; {
		for i := range turns {
			turns[i].take(t.Slots)
			if left--; left == 0 {
				return t
			}
		}
	}
}

// turn is a backend's way through the table: from the next position in steps, modulo the size.
type turn struct {
	slot       uint16
	next, step uint32
}

func newTurn(b netip.AddrPort, slot uint16, size uint32) turn {
	h := fnv.New64a()
	a := b.Addr().As16()
	h.Write(a[:])
	h.Write(binary.BigEndian.AppendUint16(nil, b.Port()))
	// FNV leaves what neighbouring addresses have in common in the upper bits: the finalizer of MurmurHash3 spreads it.
	x := h.Sum64()
	x = (x ^ x>>33) * 0xff51afd7ed558ccd
	x = (x ^ x>>33) * 0xc4ceb9fe1a85ec53
	x ^= x >> 33
	return turn{slot: slot, next: uint32(x>>32) % size, step: uint32(x)%(size-1) + 1}
}

// take gives the backend the first free position on its way. There must be one.
func (t *turn) take(table []uint16) {
	for table[t.next] != freePosition {
		t.advance(uint32(len(table)))
	}
	table[t.next] = t.slot
}

func (t *turn) advance(size uint32) {
	if t.next += t.step; t.next >= size {
		t.next -= size
	}
}
