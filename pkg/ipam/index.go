// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"fmt"
	"net/netip"
	"time"
)

// The two pools lie one behind the other in the counters cell.
const (
	leasePool = 0
	addrPool  = 12
)

func (t *tx) pool(at int) pool {
	c := t.read(countersCell)
	return pool{used: le.Uint32(c[at:]), free: le.Uint32(c[at+4:]), high: le.Uint32(c[at+8:])}
}

func (t *tx) setPool(at int, p pool) {
	c := t.change(countersCell)
	le.PutUint32(c[at:], p.used)
	le.PutUint32(c[at+4:], p.free)
	le.PutUint32(c[at+8:], p.high)
}

// take returns a free record's number. The caller has made sure that there is one (store.grow).
func (t *tx) take(at int, capacity uint32, chainOf func(no uint32) uint32) uint32 {
	p := t.pool(at)
	no := p.free
	if no != 0 {
		p.free = chainOf(no)
	} else {
		p.high++
		no = p.high
	}
	p.used++
	if no > capacity || p.free > capacity {
		t.damaged("free list leads to record %d of %d", no, capacity)
		return 0
	}
	t.setPool(at, p)
	return no
}

// give puts a record back; the caller has written the old head of the free list, which give returns, into it as its chain.
func (t *tx) give(at int, no uint32) (chain uint32) {
	p := t.pool(at)
	if p.used == 0 {
		t.damaged("more records are freed than were used")
		return 0
	}
	chain = p.free
	p.free = no
	p.used--
	t.setPool(at, p)
	return chain
}

func (t *tx) damaged(format string, args ...any) {
	t.fail(fmt.Errorf("%w: %s", errDamaged, fmt.Sprintf(format, args...)))
}

// bucket returns the first record number of the hash's bucket in the table whose buckets start at cell at.
func (t *tx) bucket(at, capacity uint32, hash uint64) (cellNo uint32, offset int) {
	b := uint32(hash % uint64(capacity))
	return at + b/bucketsPerCell, int(b%bucketsPerCell) * 4
}

func (t *tx) addr(no uint32) addrRecord {
	if no == 0 || no > t.addrCap {
		t.damaged("address record %d of %d", no, t.addrCap)
		return addrRecord{}
	}
	r, ok := decodeAddr(t.read(t.addrsAt() + no - 1))
	if !ok {
		t.damaged("address record %d has a wrong checksum", no)
	}
	return r
}

func (t *tx) setAddr(no uint32, r addrRecord) {
	if no == 0 || no > t.addrCap {
		t.damaged("address record %d of %d", no, t.addrCap)
		return
	}
	r.encode(t.change(t.addrsAt() + no - 1))
}

// findAddr returns a's record, or number 0.
func (t *tx) findAddr(a netip.Addr) (uint32, addrRecord) {
	cellNo, offset := t.bucket(t.addrBucketsAt(), t.addrCap, hashAddr(a))
	no := le.Uint32(t.read(cellNo)[offset:])
	for range t.addrCap {
		if no == 0 || t.err != nil {
			return 0, addrRecord{}
		}
		r := t.addr(no)
		if r.state == 0 {
			t.damaged("free address record %d is in use", no)
			return 0, r
		}
		if r.addr == a {
			return no, r
		}
		no = r.chain
	}
	t.damaged("bucket of address %s has no end", a)
	return 0, addrRecord{}
}

func (t *tx) insertAddr(r addrRecord) uint32 {
	no := t.take(addrPool, t.addrCap, func(no uint32) uint32 { return t.addr(no).chain })
	if t.err != nil {
		return 0
	}
	cellNo, offset := t.bucket(t.addrBucketsAt(), t.addrCap, hashAddr(r.addr))
	c := t.change(cellNo)
	r.chain = le.Uint32(c[offset:])
	le.PutUint32(c[offset:], no)
	t.setAddr(no, r)
	return no
}

func (t *tx) removeAddr(no uint32, r addrRecord) {
	cellNo, offset := t.bucket(t.addrBucketsAt(), t.addrCap, hashAddr(r.addr))
	if at := le.Uint32(t.read(cellNo)[offset:]); at == no {
		le.PutUint32(t.change(cellNo)[offset:], r.chain)
	} else {
		for range t.addrCap {
			before := t.addr(at)
			if t.err != nil {
				return
			}
			if before.chain == no {
				before.chain = r.chain
				t.setAddr(at, before)
				break
			}
			at = before.chain
		}
	}
	t.setAddr(no, addrRecord{chain: t.give(addrPool, no)})
}

// rangeRecord returns the record of the range with this number (not number + 1, as address records have it).
func (t *tx) rangeRecord(id uint32) rangeRecord {
	if id >= t.ranges {
		t.damaged("range %d of %d", id, t.ranges)
		return rangeRecord{}
	}
	return decodeRange(t.read(t.rangesAt() + id))
}

func (t *tx) setRange(id uint32, r rangeRecord) {
	if id >= t.ranges {
		t.damaged("range %d of %d", id, t.ranges)
		return
	}
	r.encode(t.change(t.rangesAt() + id))
}

// enqueue puts address record no at the end of its range's queue of released ones.
func (t *tx) enqueue(no uint32, now time.Duration) {
	r := t.addr(no)
	q := t.rangeRecord(r.rangeNo - 1)
	r.state, r.released, r.lease = released, now, 0
	r.prev, r.next = q.tail, 0
	if q.tail != 0 {
		tail := t.addr(q.tail)
		tail.next = no
		t.setAddr(q.tail, tail)
	} else {
		q.head = no
	}
	q.tail = no
	q.released++
	t.setAddr(no, r)
	t.setRange(r.rangeNo-1, q)
}

// dequeue takes an address out of its range's queue, wherever in it it is. The caller stores the record that it returns.
func (t *tx) dequeue(r addrRecord) addrRecord {
	q := t.rangeRecord(r.rangeNo - 1)
	if r.prev != 0 {
		prev := t.addr(r.prev)
		prev.next = r.next
		t.setAddr(r.prev, prev)
	} else {
		q.head = r.next
	}
	if r.next != 0 {
		next := t.addr(r.next)
		next.prev = r.prev
		t.setAddr(r.next, next)
	} else {
		q.tail = r.prev
	}
	q.released--
	t.setRange(r.rangeNo-1, q)
	r.prev, r.next = 0, 0
	return r
}

// leaseBytes returns a lease record, free or not.
func (t *tx) leaseBytes(no uint32) (b [leaseSize]byte) {
	if no == 0 || no > t.leaseCap {
		t.damaged("lease record %d of %d", no, t.leaseCap)
		return b
	}
	first := t.leasesAt() + (no-1)*leaseCells
	for i := range uint32(leaseCells) {
		copy(b[i*cellSize:], t.read(first + i)[:])
	}
	return b
}

func (t *tx) setLeaseBytes(no uint32, b [leaseSize]byte) {
	first := t.leasesAt() + (no-1)*leaseCells
	for i := range uint32(leaseCells) {
		copy(t.change(first + i)[:], b[i*cellSize:])
	}
}

func (t *tx) lease(no uint32) (Lease, uint32) {
	b := t.leaseBytes(no)
	l, chain, ok := decodeLease(b[:])
	if !ok {
		t.damaged("lease record %d has a wrong checksum", no)
	}
	return l, chain
}

// setLeaseChain changes nothing but the link, and with it only the record's first cell.
func (t *tx) setLeaseChain(no, chain uint32) {
	le.PutUint32(t.change(t.leasesAt() + (no-1)*leaseCells)[leaseChain:], chain)
}

// findLease returns the attachment's lease, or number 0, with its neighbours in the bucket: the record before it (0: the bucket
// itself) and the one behind.
func (t *tx) findLease(containerID, ifName string) (no uint32, l Lease, before, behind uint32) {
	cellNo, offset := t.bucket(t.leaseBucketsAt(), t.leaseCap, hashOwner(containerID, ifName))
	no = le.Uint32(t.read(cellNo)[offset:])
	for range t.leaseCap {
		if no == 0 || t.err != nil {
			return 0, Lease{}, 0, 0
		}
		if l, behind = t.lease(no); l.ContainerID == containerID && l.IfName == ifName {
			return no, l, before, behind
		}
		before, no = no, behind
	}
	t.damaged("bucket of a lease has no end")
	return 0, Lease{}, 0, 0
}

func (t *tx) insertLease(l *Lease) (uint32, error) {
	no := t.take(leasePool, t.leaseCap, func(no uint32) uint32 {
		b := t.leaseBytes(no)
		return le.Uint32(b[leaseChain:])
	})
	if t.err != nil {
		return 0, t.err
	}
	cellNo, offset := t.bucket(t.leaseBucketsAt(), t.leaseCap, hashOwner(l.ContainerID, l.IfName))
	c := t.change(cellNo)
	b, err := l.encode(le.Uint32(c[offset:]))
	if err != nil {
		return 0, err
	}
	le.PutUint32(c[offset:], no)
	t.setLeaseBytes(no, b)
	return no, nil
}

// removeLease takes the record that findLease found out of its bucket and frees it. Only its first cell is cleared: without the
// magic number the rest means nothing.
func (t *tx) removeLease(no uint32, l *Lease, before, behind uint32) {
	if before != 0 {
		t.setLeaseChain(before, behind)
	} else {
		cellNo, offset := t.bucket(t.leaseBucketsAt(), t.leaseCap, hashOwner(l.ContainerID, l.IfName))
		le.PutUint32(t.change(cellNo)[offset:], behind)
	}
	*t.change(t.leasesAt() + (no-1)*leaseCells) = cell{}
	t.setLeaseChain(no, t.give(leasePool, no))
}
