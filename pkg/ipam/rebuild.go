// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"cmp"
	"math/bits"
	"net/netip"
	"slices"
)

// The smallest tables: enough for the pods of most nodes, and a file of less than 100 KiB.
const (
	minLeases = 128
	minAddrs  = 256
)

// records is what a state is made from: everything else in it is index.
type records struct {
	leases   []Lease
	released []addrRecord // in order of release
}

// salvage collects the intact records of a state file, whatever its header and index say.
func salvage(data []byte) *records {
	r := &records{}
	for at := firstCell * cellSize; at+cellSize <= len(data); at += cellSize {
		switch le.Uint32(data[at:]) {
		case leaseMagic:
			if at+leaseSize > len(data) {
				continue
			}
			if l, _, ok := decodeLease(data[at : at+leaseSize]); ok {
				r.leases = append(r.leases, l)
				at += leaseSize - cellSize // its other cells may look like anything
			}
		case addrMagic:
			if a, ok := decodeAddr((*cell)(data[at:])); ok && a.state == released {
				r.released = append(r.released, a)
			}
		}
	}
	r.settle()
	return r
}

// settle sees to it that every attachment and every address occurs once. In a state that was only read by this package they do; after
// damage the younger lease is right, because the older one cannot have been there when the younger was made.
func (r *records) settle() {
	type owner struct{ containerID, ifName string }
	owners, held := map[owner]bool{}, map[netip.Addr]bool{}
	slices.SortStableFunc(r.leases, func(a, b Lease) int { return b.Time.Compare(a.Time) })
	r.leases = slices.DeleteFunc(r.leases, func(l Lease) bool {
		o := owner{l.ContainerID, l.IfName}
		if owners[o] || slices.ContainsFunc(l.Addresses, func(a netip.Addr) bool { return held[a] }) {
			return true
		}
		owners[o] = true
		for _, a := range l.Addresses {
			held[a] = true
		}
		return false
	})
	slices.SortStableFunc(r.released, func(a, b addrRecord) int { return cmp.Compare(a.released, b.released) })
	r.released = slices.DeleteFunc(r.released, func(a addrRecord) bool {
		again := held[a.addr]
		held[a.addr] = true
		return again
	})
}

// build puts a state together in memory: for the ranges of p, or for none if p is nil (then the next Add makes it anew).
func (r *records) build(p *plan, bootID [16]byte) (image, layout, error) {
	if r == nil {
		r = &records{}
	}
	if p == nil {
		p = &plan{}
	}
	addrs := len(r.released)
	for _, l := range r.leases {
		addrs += len(l.Addresses)
	}
	l := layout{bootID: bootID, ranges: uint32(len(p.ranges)), addrCap: room(addrs+maxAddrs, minAddrs), leaseCap: room(len(r.leases)+1, minLeases)}
	if len(p.ranges) > 0 {
		l.fingerprint = p.fingerprint()
	}
	img := make(image, l.size())
	t := newTx(img, l)
	*t.change(headerCell) = *l.encode()

	known := map[netip.Addr]bool{}
	queues := make([]rangeRecord, len(p.ranges))
	for _, lease := range r.leases {
		if err := r.buildLease(t, p, lease, queues, known); err != nil {
			return nil, l, err
		}
	}
	for i, q := range queues {
		q.start, q.end = p.ranges[i].start, p.ranges[i].end
		t.setRange(uint32(i), q)
	}
	for _, a := range r.released {
		id := p.find(a.addr)
		if id < 0 {
			continue
		}
		known[a.addr] = true
		t.enqueue(t.insertAddr(addrRecord{addr: a.addr, state: released, rangeNo: uint32(id) + 1}), a.released)
		if err := t.flush(); err != nil {
			return nil, l, err
		}
	}
	for i, rng := range p.ranges {
		q := t.rangeRecord(uint32(i))
		q.cursor = firstUnknown(rng, known)
		t.setRange(uint32(i), q)
	}
	return img, l, t.flush()
}

// buildLease adds a lease and its addresses.
func (r *records) buildLease(t *tx, p *plan, lease Lease, queues []rangeRecord, known map[netip.Addr]bool) error {
	no, err := t.insertLease(&lease)
	if err != nil {
		return err
	}
	for _, a := range lease.Addresses {
		id := p.find(a)
		if id >= 0 {
			queues[id].held++
		}
		known[a] = true
		t.insertAddr(addrRecord{addr: a, state: leased, rangeNo: uint32(id + 1), lease: no})
	}
	return t.flush()
}

// firstUnknown is where the range's cursor starts.
func firstUnknown(r addrRange, known map[netip.Addr]bool) netip.Addr {
	a, ok := r.next(r.start)
	for ok && known[a] {
		if a == r.end {
			return netip.Addr{}
		}
		a, ok = r.next(a.Next())
	}
	if !ok {
		return netip.Addr{}
	}
	return a
}

// room is a table size with space for at least half as many records again, so that growing costs little for each lease.
func room(n, least int) uint32 {
	n = max(n+n/2, least)
	return 1 << bits.Len(uint(n-1))
}
