// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
)

// order is what one Add asks of the state.
type order struct {
	plan *plan
	// wanted holds, for each range set, the address asked for, or the zero Addr for any.
	wanted   []netip.Addr
	lease    Lease // without addresses
	now      time.Duration
	cooldown time.Duration
	strict   bool
	// maxReleased is how many released addresses a range remembers before it reuses the oldest although some were never leased: it
	// bounds the state of a range that is larger than any node's number of pods, such as a /64.
	maxReleased uint32
}

// fulfil carries out o and returns the addresses, one for each range set, and whether they were the attachment's already.
//
// A second Add of an attachment means that the first one's answer never arrived (the runtime was killed or gave up waiting) or that the
// container was started again without a Del. Both want their addresses back. Only when another network namespace still lives on the
// lease would that put one address into two places, so then it is an error.
func (t *tx) fulfil(o *order) (addrs []netip.Addr, repeated bool, err error) {
	l := o.lease
	no, old, before, behind := t.findLease(l.ContainerID, l.IfName)
	if no != 0 {
		same := old.ns == l.ns && old.ns != nsID{} || old.Netns == l.Netns && (old.ns == nsID{} || l.ns == nsID{})
		if !same && old.netnsExists() {
			return nil, false, failf(types.ErrInvalidEnvironmentVariables,
				"container %s interface %s already holds %s for network namespace %s, which still exists: DEL it first",
				l.ContainerID, l.IfName, joinAddrs(old.Addresses), old.Netns)
		}
		if o.fits(old.Addresses) {
			if same {
				return old.Addresses, true, t.err
			}
			l.Addresses = old.Addresses
			b, err := l.encode(behind)
			if err != nil {
				return nil, false, err
			}
			t.setLeaseBytes(no, b)
			return old.Addresses, true, t.err
		}
		t.release(no, &old, before, behind, o.now)
	}
	var records []uint32
	for set := range o.plan.sets {
		no, a, err := t.pick(o, set)
		if err != nil {
			return nil, false, err
		}
		records = append(records, no)
		l.Addresses = append(l.Addresses, a)
	}
	if no, err = t.insertLease(&l); err != nil {
		return nil, false, err
	}
	for _, rec := range records {
		r := t.addr(rec)
		r.lease = no
		t.setAddr(rec, r)
	}
	return l.Addresses, false, t.err
}

// fits says whether addresses held from an earlier Add are what this one would give: one of each set, and the wanted ones.
func (o *order) fits(held []netip.Addr) bool {
	if len(held) != len(o.plan.sets) {
		return false
	}
	for set, a := range held {
		id := o.plan.find(a)
		if id < 0 || o.plan.setOf(id) != set || o.wanted[set].IsValid() && o.wanted[set] != a {
			return false
		}
	}
	return true
}

// pick leases one address of the set: the wanted one, else one that was never leased, else the one released longest ago.
func (t *tx) pick(o *order, set int) (uint32, netip.Addr, error) {
	if a := o.wanted[set]; a.IsValid() {
		no, err := t.pickWanted(a, uint32(o.plan.find(a)))
		return no, a, err
	}
	best, oldest := uint32(0), addrRecord{}
	for _, i := range o.plan.sets[set] {
		id := uint32(i)
		q := t.rangeRecord(id)
		if q.head != 0 {
			if r := t.addr(q.head); best == 0 || r.released < oldest.released {
				best, oldest = q.head, r
			}
			if q.released >= o.maxReleased && o.now-t.addr(q.head).released >= o.cooldown {
				continue
			}
		}
		if a, ok := t.fresh(&o.plan.ranges[i], &q); ok {
			q.held++
			t.setRange(id, q)
			return t.insertAddr(addrRecord{addr: a, state: leased, rangeNo: id + 1}), a, t.err
		}
	}
	if t.err != nil {
		return 0, netip.Addr{}, t.err
	}
	if best == 0 || o.strict && o.now-oldest.released < o.cooldown {
		return 0, netip.Addr{}, t.exhausted(o, set)
	}
	t.reuse(best, oldest)
	return best, oldest.addr, t.err
}

// fresh moves the range's cursor over what is leased or reserved to the next address never leased. Every known address is passed once
// in the life of the cursor.
func (t *tx) fresh(r *addrRange, q *rangeRecord) (netip.Addr, bool) {
	for q.cursor.IsValid() && t.err == nil {
		a, ok := r.next(q.cursor)
		if !ok {
			break
		}
		if q.cursor = a.Next(); a == r.end {
			q.cursor = netip.Addr{}
		}
		if no, _ := t.findAddr(a); no == 0 && t.err == nil {
			return a, true
		}
	}
	q.cursor = netip.Addr{}
	return netip.Addr{}, false
}

// reuse leases an address from the queue of released ones.
func (t *tx) reuse(no uint32, r addrRecord) {
	r = t.dequeue(r)
	r.state = leased
	t.setAddr(no, r)
	if t.err == nil {
		q := t.rangeRecord(r.rangeNo - 1)
		q.held++
		t.setRange(r.rangeNo-1, q)
	}
}

// pickWanted leases a of range id if it is not held, whether it is cooling down or not: who names an address knows why.
func (t *tx) pickWanted(a netip.Addr, id uint32) (uint32, error) {
	no, r := t.findAddr(a)
	switch {
	case t.err != nil:
		return 0, t.err
	case no == 0:
		q := t.rangeRecord(id)
		q.held++
		t.setRange(id, q)
		return t.insertAddr(addrRecord{addr: a, state: leased, rangeNo: id + 1}), t.err
	case r.state == released:
		t.reuse(no, r)
		return no, t.err
	}
	holder, _ := t.lease(r.lease)
	if t.err != nil {
		return 0, t.err
	}
	return 0, failf(types.ErrTryAgainLater, "requested address %s is held by %s", a, &holder)
}

// release ends a lease. Its addresses queue up for reuse; those that are in no range any more are forgotten.
func (t *tx) release(no uint32, l *Lease, before, behind uint32, now time.Duration) {
	for _, a := range l.Addresses {
		rec, r := t.findAddr(a)
		if t.err != nil {
			return
		}
		if rec == 0 || r.state != leased || r.lease != no {
			t.damaged("address %s is not held by its lease", a)
			return
		}
		if r.rangeNo == 0 {
			t.removeAddr(rec, r)
			continue
		}
		q := t.rangeRecord(r.rangeNo - 1)
		q.held--
		t.setRange(r.rangeNo-1, q)
		t.enqueue(rec, now)
	}
	t.removeLease(no, l, before, behind)
}

// exhausted describes a set in which nothing is left. Its ranges have no address that was never leased, so what is not leased is in the
// queue, and it is there only if strictCooldown holds it back.
func (t *tx) exhausted(o *order, set int) error {
	var each []string
	for _, i := range o.plan.sets[set] {
		q := t.rangeRecord(uint32(i))
		r := o.plan.ranges[i]
		each = append(each, fmt.Sprintf("%s: %d leases held of %s addresses, %d cooling down", r, q.held, r.size(), q.released))
	}
	if t.err != nil {
		return t.err
	}
	return failf(types.ErrTryAgainLater, "no free address in range %s", strings.Join(each, "; "))
}

// match finds the range set of every requested address.
func (p *plan) match(requested []netip.Addr) ([]netip.Addr, error) {
	wanted := make([]netip.Addr, len(p.sets))
	for _, a := range requested {
		id := p.find(a)
		if id < 0 {
			if i := slices.IndexFunc(p.ranges, func(r addrRange) bool { return r.subnet.Contains(a) }); i >= 0 {
				return nil, failf(types.ErrInvalidNetworkConfig, "requested address %s is reserved or outside range %s", a, p.ranges[i])
			}
			return nil, failf(types.ErrInvalidNetworkConfig, "requested address %s is in none of the ranges", a)
		}
		set := p.setOf(id)
		if wanted[set].IsValid() {
			return nil, failf(types.ErrInvalidNetworkConfig, "requested addresses %s and %s are in the same range set", wanted[set], a)
		}
		wanted[set] = a
	}
	return wanted, nil
}

func joinAddrs(addrs []netip.Addr) string {
	var out []string
	for _, a := range addrs {
		out = append(out, a.String())
	}
	return strings.Join(out, ", ")
}

// String names the holder for an error message.
func (l *Lease) String() string {
	s := fmt.Sprintf("container %s interface %s", l.ContainerID, l.IfName)
	if l.PodName != "" {
		s += fmt.Sprintf(" (pod %s/%s)", l.PodNamespace, l.PodName)
	}
	return s
}
