// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
)

// verify reads the whole state and fails the test where its parts contradict each other.
func verify(t testing.TB, c *Config) {
	t.Helper()
	s, err := openStore(t.Context(), c, nil)
	if errors.Is(err, errNoState) {
		return
	}
	if err != nil {
		t.Fatalf("open state: %v", err)
	}
	defer s.close()
	tx := newTx(s.dev, s.layout)
	v := &verifier{tx: tx, addrs: map[netip.Addr]uint32{}}
	v.leases()
	v.addresses()
	for id := range tx.ranges {
		v.queue(id)
	}
	if tx.err != nil {
		v.errs = append(v.errs, tx.err)
	}
	if err := errors.Join(v.errs...); err != nil {
		t.Fatalf("state contradicts itself: %v", err)
	}
}

type verifier struct {
	tx    *tx
	addrs map[netip.Addr]uint32 // leased address: lease record
	errs  []error
}

func (v *verifier) errorf(format string, args ...any) {
	v.errs = append(v.errs, fmt.Errorf(format, args...))
}

// leases looks at every lease record: found through its bucket, or in the free list.
func (v *verifier) leases() {
	p, used := v.tx.pool(leasePool), uint32(0)
	for no := uint32(1); no <= p.high; no++ {
		b := v.tx.leaseBytes(no)
		l, _, ok := decodeLease(b[:])
		if !ok {
			continue
		}
		used++
		if found, _, _, _ := v.tx.findLease(l.ContainerID, l.IfName); found != no {
			v.errorf("lease record %d of %s is found as %d", no, &l, found)
		}
		for _, a := range l.Addresses {
			if other, ok := v.addrs[a]; ok {
				v.errorf("address %s is in lease records %d and %d", a, other, no)
			}
			v.addrs[a] = no
		}
	}
	if used != p.used {
		v.errorf("%d lease records, counter says %d", used, p.used)
	}
	free := uint32(0)
	for no := p.free; no != 0 && free <= p.high; free++ {
		b := v.tx.leaseBytes(no)
		no = le.Uint32(b[leaseChain:])
	}
	if free+used != p.high {
		v.errorf("%d lease records free, %d used, %d in all", free, used, p.high)
	}
}

func (v *verifier) addresses() {
	p, used, seen := v.tx.pool(addrPool), uint32(0), 0
	for no := uint32(1); no <= p.high; no++ {
		r := v.tx.addr(no)
		if r.state == 0 {
			continue
		}
		used++
		if found, _ := v.tx.findAddr(r.addr); found != no {
			v.errorf("address record %d of %s is found as %d", no, r.addr, found)
		}
		if r.state == leased {
			seen++
			if v.addrs[r.addr] != r.lease {
				v.errorf("address %s says lease %d, but lease %d has it", r.addr, r.lease, v.addrs[r.addr])
			}
		}
	}
	if used != p.used || seen != len(v.addrs) {
		v.errorf("%d address records, counter says %d; %d leased, leases have %d", used, p.used, seen, len(v.addrs))
	}
	free := uint32(0)
	for no := p.free; no != 0 && free <= p.high; free++ {
		no = v.tx.addr(no).chain
	}
	if free+used != p.high {
		v.errorf("%d address records free, %d used, %d in all", free, used, p.high)
	}
}

func (v *verifier) queue(id uint32) {
	q := v.tx.rangeRecord(id)
	held, n, prev := uint32(0), uint32(0), uint32(0)
	var times []int64
	for no := q.head; no != 0 && n <= v.tx.addrCap; n++ {
		r := v.tx.addr(no)
		if r.state != released || r.prev != prev || r.rangeNo != id+1 {
			v.errorf("range %d: queued address %s: state %d, before %d want %d, range %d", id, r.addr, r.state, r.prev, prev, r.rangeNo)
		}
		times = append(times, int64(r.released))
		prev, no = no, r.next
	}
	if prev != q.tail || n != q.released {
		v.errorf("range %d: queue ends at %d with %d addresses, record says %d and %d", id, prev, n, q.tail, q.released)
	}
	if !slices.IsSorted(times) {
		v.errorf("range %d: queue is not in order of release: %v", id, times)
	}
	for no := uint32(1); no <= v.tx.pool(addrPool).high; no++ {
		if r := v.tx.addr(no); r.state == leased && r.rangeNo == id+1 {
			held++
		}
	}
	if held != q.held {
		v.errorf("range %d: %d leased, record says %d", id, held, q.held)
	}
}
