// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"maps"
	"net/netip"
	"slices"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/service"
	"github.com/margay-cni/margay/pkg/state"
)

// A round after one change looks at what changed and at nothing else: the compiler says which parts of its result are others, and each
// service map's mirror remembers where the kernel is behind. A full compare forgets that and looks at everything.

// takeServiceCIDRs takes over the ranges that the snapshot names, unless others are configured. What the service maps should hold is made anew
// when they change, which is rare.
func (p *pipeline) takeServiceCIDRs(s *state.Snapshot) {
	if p.cidrsGiven {
		return
	}
	var cidrs []netip.Prefix
	for _, c := range s.ServiceCIDRs {
		cidrs = append(cidrs, c.Prefixes...)
	}
	slices.SortFunc(cidrs, netip.Prefix.Compare)
	if cidrs = slices.Compact(cidrs); !slices.Equal(cidrs, p.serviceCIDRs) {
		p.serviceCIDRs, p.serviceResult = cidrs, nil
	}
}

// takeServices makes a compilation what the service maps should hold.
func (p *pipeline) takeServices(r *service.Result, c *service.Changes) {
	if p.serviceResult != r {
		p.serviceResult, p.wantService = r, newServiceMaps(r, p.serviceCIDRs...)
		p.forgetServices()
		p.servicesNamed = false
		p.frontendsSeen++
		return
	}
	w, m := &p.wantService, &p.m
	for f := range c.Frontends {
		s, ok := r.Frontends[f]
		k := bpf.NewFrontendKey(uint8(f.Protocol), f.Addr, f.Port)
		if _, was := w.services[k]; was != ok {
			p.frontendsSeen++
		}
		p.servicesNamed = p.servicesNamed && ok && w.services[k].Id == s.ID
		set(m.services, w.services, k, newService(s), ok)
	}
	for list, before := range c.Lists {
		p.takeList(list, before, r)
	}
	for id, before := range c.LocalBackends {
		p.takeLocal(id, before, r.LocalBackends[id])
	}
	for b := range c.Serving {
		in, ok := r.Serving[b]
		set(m.members, w.members, bpf.NewServiceBackend(b.Service, b.Backend), membership(in), ok)
	}
	for s := range c.SourceRanges {
		_, ok := r.SourceRanges[s]
		set(m.ranges, w.ranges, bpf.NewSourceRangeKey(s.Service, s.Prefix), 1, ok)
	}
	for a := range c.ClusterAddrs {
		_, ok := r.ClusterAddrs[a]
		p.takeClusterAddr(a, ok)
	}
}

// takeList takes over one list and its Maglev table.
func (p *pipeline) takeList(list uint32, before service.ListBefore, r *service.Result) {
	now := r.Lists[list]
	for slot := range max(len(before.Slots), len(now)) {
		var b bpf.Backend
		if slot < len(now) {
			b = bpf.NewBackend(now[slot])
		}
		set(p.m.backends, p.wantService.backends, bpf.BackendKey{List: list, Slot: uint32(slot)}, b, slot < len(now))
	}
	old, fresh := serviceMaps{maglev: map[bpf.MaglevKey]bpf.MaglevChunk{}}, serviceMaps{maglev: map[bpf.MaglevKey]bpf.MaglevChunk{}}
	old.addTables(map[uint32]service.Table{list: before.Table})
	fresh.addTables(map[uint32]service.Table{list: r.Tables[list]})
	replaceAll(p.m.maglev, p.wantService.maglev, old.maglev, fresh.maglev)
}

// takeLocal takes over the backends that are found by their hashes.
func (p *pipeline) takeLocal(id uint32, before, now []netip.AddrPort) {
	old, fresh := serviceMaps{backends: map[bpf.BackendKey]bpf.Backend{}}, serviceMaps{backends: map[bpf.BackendKey]bpf.Backend{}}
	old.addByHash(id, before)
	fresh.addByHash(id, now)
	replaceAll(p.m.backends, p.wantService.backends, old.backends, fresh.backends)
}

// takeClusterAddr takes over a cluster address that is one, or is none any more; then it may still be one of the ranges'.
func (p *pipeline) takeClusterAddr(a netip.Addr, active bool) {
	one := serviceMaps{addrs: map[bpf.ServiceAddrKey]uint32{}}
	actives := map[netip.Addr]struct{}{}
	if active {
		actives[a] = struct{}{}
	}
	one.addAddrs(actives, p.serviceCIDRs)
	k := bpf.NewServiceAddrKey(netip.PrefixFrom(a, a.BitLen()))
	v, ok := one.addrs[k]
	set(p.m.addrs, p.wantService.addrs, k, v, ok)
}

// set makes k's wanted entry v, or none, and has the mirror look at it if that is new.
func set[K, V comparable](m *mirror[K, V], want map[K]V, k K, v V, wanted bool) {
	before, was := want[k]
	switch {
	case wanted && (!was || before != v):
		want[k] = v
	case !wanted && was:
		delete(want, k)
	default:
		return
	}
	m.touch(k)
}

// replaceAll makes the wanted entries of old those of fresh.
func replaceAll[K, V comparable](m *mirror[K, V], want, old, fresh map[K]V) {
	for k, v := range old {
		if _, stays := fresh[k]; !stays {
			set(m, want, k, v, false)
		}
	}
	for k, v := range fresh {
		set(m, want, k, v, true)
	}
}

// compareServices finds where the kernel's service maps are not what they should be; settleServices forgets what was written.
func (p *pipeline) compareServices() {
	p.m.services.compare(p.wantService.services)
	p.m.backends.compare(p.wantService.backends)
	p.m.members.compare(p.wantService.members)
	p.m.maglev.compare(p.wantService.maglev)
	p.m.ranges.compare(p.wantService.ranges)
	p.m.addrs.compare(p.wantService.addrs)
}

func (p *pipeline) settleServices() {
	p.m.services.settle(p.wantService.services)
	p.m.backends.settle(p.wantService.backends)
	p.m.members.settle(p.wantService.members)
	p.m.maglev.settle(p.wantService.maglev)
	p.m.ranges.settle(p.wantService.ranges)
	p.m.addrs.settle(p.wantService.addrs)
}

// forgetServices has the next round compare all of the service maps.
func (p *pipeline) forgetServices() {
	p.m.services.differ, p.m.backends.differ, p.m.members.differ = nil, nil, nil
	p.m.maglev.differ, p.m.ranges.differ, p.m.addrs.differ = nil, nil, nil
}

// mergedPods is a snapshot's pods together with those of the records.
type mergedPods struct {
	of         policyInputs
	pods       map[state.Key]*state.Pod
	namespaces map[string]*state.Namespace
	log        state.Log[state.Key]
}

// merge joins the snapshot with the pods of the records that can be judged. As long as neither the snapshot's pods nor these change, the
// merged ones are the same, which a journal says.
func (p *pipeline) merge(s *state.Snapshot, announced []localPod, waiting int) *state.Snapshot {
	m := &p.withRecords
	of := policyInputs{s, p.records, waiting}
	if !m.of.samePods(of) {
		merged := state.MergePods(s, p.node, asPods(announced))
		m.of, m.pods, m.namespaces = of, nil, nil
		if merged == s {
			return s
		}
		m.pods, m.namespaces = merged.Pods, merged.Namespaces
		m.log.Forget()
	}
	m.of = of // a later journal, which says more about what comes next
	if m.pods == nil {
		return s
	}
	out := *s
	out.Pods, out.Namespaces = m.pods, m.namespaces
	out.Journals.Pods, out.Journals.Namespaces = m.log.Journal(), state.Journal[string]{}
	return &out
}

// policyInputs are what policies were compiled from.
type policyInputs struct {
	snapshot *state.Snapshot
	records  []*endpoint.Record
	waiting  int // pods of records that the source has not told of
}

// same reports whether policies compiled from these inputs are good for others too: the objects are the identical ones.
func (a policyInputs) same(b policyInputs) bool {
	if !a.samePods(b) {
		return false
	}
	s, t := a.snapshot, b.snapshot
	return identical(s.Nodes, t.Nodes, s.Journals.Nodes, t.Journals.Nodes) &&
		identical(s.NetworkPolicies, t.NetworkPolicies, s.Journals.NetworkPolicies, t.Journals.NetworkPolicies) &&
		identical(s.ClusterNetworkPolicies, t.ClusterNetworkPolicies, s.Journals.ClusterNetworkPolicies, t.Journals.ClusterNetworkPolicies)
}

// samePods reports whether the pods, their records and their namespaces are the identical ones.
func (a policyInputs) samePods(b policyInputs) bool {
	if a.snapshot == nil || a.waiting != b.waiting || len(a.records) != len(b.records) || (len(a.records) > 0 && &a.records[0] != &b.records[0]) {
		return false
	}
	s, t := a.snapshot, b.snapshot
	return identical(s.Pods, t.Pods, s.Journals.Pods, t.Journals.Pods) &&
		identical(s.Namespaces, t.Namespaces, s.Journals.Namespaces, t.Journals.Namespaces)
}

// identical reports whether two snapshots have the identical objects of a kind; old and fresh are their journals.
func identical[K comparable, T any](a, b map[K]*T, old, fresh state.Journal[K]) bool {
	keys, known := fresh.Since(old)
	if !known {
		return maps.Equal(a, b)
	}
	return !slices.ContainsFunc(keys, func(k K) bool { return a[k] != b[k] })
}
