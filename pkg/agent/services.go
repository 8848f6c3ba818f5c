// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/bpf"
)

// planServices returns the epochs that the round has to raise: of the services that lose a serving backend, or an address to another
// service; and that of the outside when an address becomes a service for UDP, whose clients may have sent there before (row U2).
// TCP needs no epoch for that: every SYN is looked at.
func (p *pipeline) planServices(hold bool) raise {
	var out raise
	ids := map[uint32]struct{}{}
	for k, want := range p.m.services.missing(p.wantService.services) {
		have, known := p.m.services.have[k]
		if k.Proto != unix.IPPROTO_UDP || have.Id == want.Id {
			continue
		}
		if known {
			ids[have.Id] = struct{}{}
		}
		out.Outside = out.Outside || !known
	}
	if !hold {
		for _, k := range p.m.members.surplus(p.wantService.members) {
			ids[k.ServiceId] = struct{}{}
		}
	}
	out.Services = sortedKeys(ids)
	return out
}

// applyServices brings the service maps to what they should hold. At no instant does a frontend count a backend that is not there: lists
// grow before the frontends that count them, and shrink by what the kernel's frontends actually count. The lists by hash
// (BACKEND_BY_HASH) are written with the others; no frontend counts them, so what they should not hold goes with the last deletes.
//
// What a frontend refers to is there before it: its Maglev tables after the backends that these name, its source ranges, without which it
// is closed to all. What says that an address has no such port (service_addrs) comes after the frontends that it has.
//
// With hold nothing is taken back: frontends, lists and members that the snapshot does not explain stay.
func (p *pipeline) applyServices(hold bool) {
	want := &p.wantService
	// Members before lists: a slot that changes in place is in use at once, and its backend must then be in the set.
	for k, v := range p.m.members.missing(want.members) {
		p.m.members.put(k, v)
	}
	for k, v := range p.m.backends.missing(want.backends) {
		p.m.backends.put(k, v)
	}
	unfinished := p.putTables()
	for k, v := range p.m.ranges.missing(want.ranges) {
		p.m.ranges.put(k, v)
	}
	for k, v := range p.m.services.missing(want.services) {
		if p.yields(k) || !p.backed(v) || !tabled(v, unfinished) || (hold && p.empties(k, v)) {
			continue
		}
		p.m.services.put(k, v)
	}
	for k, v := range p.m.addrs.missing(want.addrs) {
		p.m.addrs.put(k, v)
	}
	if !hold {
		for _, k := range p.m.services.surplus(want.services) {
			p.m.services.remove(k)
		}
		for _, k := range p.m.addrs.surplus(want.addrs) {
			p.m.addrs.remove(k)
		}
		p.removeRanges()
		p.removeTables()
		for _, k := range p.m.members.surplus(want.members) {
			p.m.members.remove(k)
		}
	}
	p.raiseServices()
	p.raiseOutside()
	if hold {
		return
	}
	surplus := p.m.backends.surplus(want.backends)
	if len(surplus) == 0 {
		return
	}
	counted := p.counted(surplus)
	p.named(counted)
	for _, k := range surplus {
		if k.Slot >= counted[k.List] {
			p.m.backends.remove(k)
		}
	}
}

// backed reports whether the kernel holds every backend that the service would count.
func (p *pipeline) backed(s bpf.Service) bool {
	for scope := range s.List {
		for slot := range s.Count[scope] {
			k := bpf.BackendKey{List: s.List[scope], Slot: slot}
			if have, ok := p.m.backends.have[k]; !ok || have != p.wantService.backends[k] {
				return false
			}
		}
	}
	return true
}

// empties reports whether v would leave a frontend that has backends without any.
func (p *pipeline) empties(k bpf.FrontendKey, v bpf.Service) bool {
	have := p.m.services.have[k]
	for scope := range v.Count {
		if have.Count[scope] > 0 && v.Count[scope] == 0 {
			return true
		}
	}
	return false
}

// counted returns how many slots of the entries' lists the kernel's frontends count.
func (p *pipeline) counted(entries []bpf.BackendKey) map[uint32]uint32 {
	counted := map[uint32]uint32{}
	for _, k := range entries {
		counted[k.List] = 0
	}
	for _, s := range p.m.services.have {
		for scope, list := range s.List {
			if n, asked := counted[list]; asked && s.Count[scope] > n {
				counted[list] = s.Count[scope]
			}
		}
	}
	return counted
}

// raiseServices raises the outstanding service epochs. Those of services that still have members they should not have stay outstanding: a
// flow checked now would find the leaver in the set and trust it for good.
func (p *pipeline) raiseServices() {
	left := map[uint32]struct{}{}
	for _, k := range p.m.members.surplus(p.wantService.members) {
		left[k.ServiceId] = struct{}{}
	}
	var now, later []uint32
	for _, id := range p.raise.Services {
		if _, ok := left[id]; ok {
			later = append(later, id)
		} else {
			now = append(now, id)
		}
	}
	if len(now) == 0 {
		return
	}
	if err := p.epochs.RaiseServiceEpochs(now...); err != nil {
		p.fault("service_epochs", err)
		return
	}
	p.round.Raised.Services = len(now)
	p.raise.Services = later
}

// raiseOutside raises the outstanding epoch of the outside. Frontends that could not be written ask for it again.
func (p *pipeline) raiseOutside() {
	if !p.raise.Outside {
		return
	}
	if err := p.epochs.RaiseEndpointEpochs(int(bpf.EpochSlotOutside)); err != nil {
		p.fault("endpoint_epochs", err)
		return
	}
	p.raise.Outside = false
}
