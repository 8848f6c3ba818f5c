// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"net/netip"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/service"
)

// addTables adds the Maglev tables, cut into what one map entry holds. Positions behind a table's end stay zero; nothing reads them.
func (w *serviceMaps) addTables(tables map[uint32]service.Table) {
	for list, t := range tables {
		for first := 0; first < len(t.Slots); first += bpf.MaglevSlots {
			var chunk bpf.MaglevChunk
			copy(chunk.Slot[:], t.Slots[first:])
			w.maglev[bpf.MaglevKey{List: list, Size: t.Size, Chunk: uint16(first / bpf.MaglevSlots)}] = chunk
		}
	}
}

// addAddrs adds the services' cluster addresses and the ranges that they are from.
func (w *serviceMaps) addAddrs(active map[netip.Addr]struct{}, ranges []netip.Prefix) {
	for _, p := range ranges {
		w.addrs[bpf.NewServiceAddrKey(p)] = bpf.ServiceAddrRange
	}
	for a := range active {
		if !a.IsUnspecified() {
			w.addrs[bpf.NewServiceAddrKey(netip.PrefixFrom(a, a.BitLen()))] = bpf.ServiceAddrActive
		}
	}
}

// membership is the value of service_backends.
func membership(m service.Membership) uint32 {
	flags := bpf.ServiceBackendServing
	if m.Cluster {
		flags |= bpf.ServiceBackendCluster
	}
	if m.Local {
		flags |= bpf.ServiceBackendLocal
	}
	return flags
}

// tableID names one Maglev table.
type tableID struct {
	list uint32
	size uint8
}

// putTables writes the Maglev tables and returns those that the kernel does not hold as they should be. A table of a new size is written
// beside the one in use; in one of the same size every entry is right before and after, because it names slots that are there. Where a
// list's backend could not be written, its table waits.
func (p *pipeline) putTables() (unfinished map[tableID]bool) {
	incomplete := map[uint32]bool{}
	for k := range p.m.backends.missing(p.wantService.backends) {
		incomplete[k.List] = true
	}
	unfinished = map[tableID]bool{}
	for k, v := range p.m.maglev.missing(p.wantService.maglev) {
		if incomplete[k.List] || !p.m.maglev.put(k, v) {
			unfinished[tableID{k.List, k.Size}] = true
		}
	}
	return unfinished
}

// tabled reports whether the kernel holds every table that the service would use.
func tabled(s bpf.Service, unfinished map[tableID]bool) bool {
	for scope, list := range s.List {
		if s.Maglev[scope] != 0 && unfinished[tableID{list, s.Maglev[scope]}] {
			return false
		}
	}
	return true
}

// removeTables takes back the entries of tables that no frontend in the kernel uses any more.
func (p *pipeline) removeTables() {
	surplus := p.m.maglev.surplus(p.wantService.maglev)
	if len(surplus) == 0 {
		return
	}
	used := map[tableID]bool{}
	for _, s := range p.m.services.have {
		for scope, list := range s.List {
			used[tableID{list, s.Maglev[scope]}] = true
		}
	}
	for _, k := range surplus {
		if !used[tableID{k.List, k.Size}] {
			p.m.maglev.remove(k)
		}
	}
}

// named adds to counted the slots that the kernel's tables still name although they should not.
func (p *pipeline) named(counted map[uint32]uint32) {
	for k, v := range p.m.maglev.have {
		if want, ok := p.wantService.maglev[k]; ok && want == v {
			continue
		}
		for _, slot := range v.Slot {
			counted[k.List] = max(counted[k.List], uint32(slot)+1)
		}
	}
}

// removeRanges takes back source ranges, but for those of frontends that are limited in the kernel and should not be any more: without them
// they would be closed.
func (p *pipeline) removeRanges() {
	surplus := p.m.ranges.surplus(p.wantService.ranges)
	if len(surplus) == 0 {
		return
	}
	limited := map[uint32]bool{}
	for k, have := range p.m.services.have {
		if want := p.wantService.services[k]; have.Flags&^want.Flags&bpf.ServiceSourceRanges != 0 {
			limited[have.Id] = true
		}
	}
	for _, k := range surplus {
		if !limited[k.ServiceId] {
			p.m.ranges.remove(k)
		}
	}
}
