// SPDX-License-Identifier: Apache-2.0

package service

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	"github.com/margay-cni/margay/pkg/state"
)

// piece is what one service has in the result, by its keys there.
type piece struct {
	service  *state.Service
	ports    []portKey
	claims   []claim
	ids      []uint32
	lists    []uint32
	members  []Member
	ranges   []SourceRange
	addrs    []netip.Addr
	checks   []state.HealthCheck
	problems []Problem
	// unserved says that a port got no service id: it may get one as soon as another one is free.
	unserved bool
}

// increment is what Update keeps from one call to the next.
type increment struct {
	result *Result
	// began is set once everything has been compiled.
	began  bool
	pieces map[state.Key]*piece
	// slices are those of the last snapshot, by themselves and by service.
	slices   map[state.Key]*state.EndpointSlice
	byTarget sliceIndex
	// claims are all claims on each frontend, the holder's first.
	claims map[Frontend][]claim
	// addrs counts the services that have a cluster address.
	addrs map[netip.Addr]int
	// checks and problems are of the services that have any; lost are the claims on frontends that others hold.
	checks   map[state.Key][]state.HealthCheck
	problems map[state.Key][]Problem
	lost     map[Frontend][]claim

	zone      string
	here      location
	nodeAddrs []netip.Addr

	// journals are those of the last snapshot. unserved are the services that lack a service id: they are tried each time.
	journals state.Journals
	unserved map[state.Key]struct{}
}

// Changes are the keys of a Result that an Update may have changed; every other one is as it was. Before holds what is gone and cannot be
// derived from the keys.
type Changes struct {
	Frontends     map[Frontend]struct{}
	Lists         map[uint32]ListBefore
	LocalBackends map[uint32][]netip.AddrPort
	Serving       map[Member]struct{}
	SourceRanges  map[SourceRange]struct{}
	ClusterAddrs  map[netip.Addr]struct{}
}

// ListBefore is what a list was before an Update.
type ListBefore struct {
	Slots []netip.AddrPort
	Table Table
}

func newChanges() *Changes {
	return &Changes{
		Frontends: map[Frontend]struct{}{}, Lists: map[uint32]ListBefore{}, LocalBackends: map[uint32][]netip.AddrPort{},
		Serving: map[Member]struct{}{}, SourceRanges: map[SourceRange]struct{}{}, ClusterAddrs: map[netip.Addr]struct{}{},
	}
}

// Update is Compile for whoever follows a source: it compiles the services anew whose object, or one of whose slices, is another one than
// at the last call (sources share what did not change), and all of them when the node itself has changed. The result is the same value
// each time, changed in place; it equals what Compile would have returned. After a Compile or Import everything is compiled anew, into
// another result.
func (c *Compiler) Update(s *state.Snapshot) (*Result, *Changes) {
	if c.last == nil {
		c.last = newIncrement(len(s.Services))
	}
	in := c.last
	changes := newChanges()
	dirty := in.dirty(c, s)
	r := &run{compiler: c, here: in.here, zone: in.zone, nodeAddrs: in.nodeAddrs, slices: in.byTarget}
	old := map[state.Key]*piece{}
	for _, key := range dirty {
		if p := in.pieces[key]; p != nil {
			old[key] = p
			in.take(p, changes)
			delete(in.pieces, key)
		}
	}
	used := map[portKey]bool{}
	for _, key := range dirty {
		if svc := s.Services[key]; svc != nil {
			p, out := r.piece(svc, used)
			in.add(key, p, out, changes)
		}
	}
	r.used = used
	r.releaseOld(old, !in.began)
	in.began = true
	in.place(changes)
	in.collect()
	return in.result, changes
}

func newIncrement(services int) *increment {
	return &increment{
		result: newResult(services), pieces: make(map[state.Key]*piece, services),
		slices: map[state.Key]*state.EndpointSlice{}, byTarget: sliceIndex{}, claims: make(map[Frontend][]claim, services),
		addrs: make(map[netip.Addr]int, services), checks: map[state.Key][]state.HealthCheck{},
		problems: map[state.Key][]Problem{}, lost: map[Frontend][]claim{}, unserved: map[state.Key]struct{}{},
	}
}

// dirty returns the services to compile anew, sorted, and takes note of the snapshot's slices and of the node. Where the snapshot's journals
// say what has changed since the last one, nothing else is looked at.
func (in *increment) dirty(c *Compiler, s *state.Snapshot) []state.Key {
	dirty := map[state.Key]struct{}{}
	in.noteSlices(s, dirty)
	all := in.noteNode(c, s)
	look := func(key state.Key) {
		svc, p := s.Services[key], in.pieces[key]
		if svc == nil && p != nil || svc != nil && (p == nil || p.service != svc) {
			dirty[key] = struct{}{}
		}
	}
	changed, known := s.Journals.Services.Since(in.journals.Services)
	in.journals = s.Journals
	for key := range in.unserved {
		dirty[key] = struct{}{}
	}
	switch {
	case all:
		for key := range s.Services {
			dirty[key] = struct{}{}
		}
	case known:
		for _, key := range changed {
			look(key)
		}
		return slices.SortedFunc(maps.Keys(dirty), compareKeys)
	}
	for key := range s.Services {
		look(key)
	}
	for key := range in.pieces {
		look(key)
	}
	return slices.SortedFunc(maps.Keys(dirty), compareKeys)
}

// noteSlices takes over the snapshot's slices and adds the services to dirty whose slices are not the same as before.
func (in *increment) noteSlices(s *state.Snapshot, dirty map[state.Key]struct{}) {
	if changed, known := s.Journals.EndpointSlices.Since(in.journals.EndpointSlices); known {
		for _, key := range changed {
			in.noteSlice(key, s.EndpointSlices[key], dirty)
		}
		return
	}
	for key, now := range s.EndpointSlices {
		in.noteSlice(key, now, dirty)
	}
	if len(in.slices) > len(s.EndpointSlices) {
		for key := range in.slices {
			in.noteSlice(key, s.EndpointSlices[key], dirty)
		}
	}
}

// noteSlice takes over one slice, nil for one that is gone.
func (in *increment) noteSlice(key state.Key, now *state.EndpointSlice, dirty map[state.Key]struct{}) {
	before := in.slices[key]
	if before == now {
		return
	}
	if before != nil {
		dirty[in.drop(before)] = struct{}{}
	}
	if now == nil {
		delete(in.slices, key)
		return
	}
	dirty[now.Service] = struct{}{}
	in.slices[key] = now
	group := append(slices.Clip(in.byTarget[now.Service]), now)
	slices.SortFunc(group, func(a, b *state.EndpointSlice) int { return cmp.Compare(a.Name, b.Name) })
	in.byTarget[now.Service] = group
}

// drop takes a slice out of its service's group and returns the service.
func (in *increment) drop(slice *state.EndpointSlice) state.Key {
	group := slices.DeleteFunc(slices.Clone(in.byTarget[slice.Service]), func(e *state.EndpointSlice) bool { return e == slice })
	if len(group) == 0 {
		delete(in.byTarget, slice.Service)
	} else {
		in.byTarget[slice.Service] = group
	}
	return slice.Service
}

// noteNode takes over what the snapshot says of this node and reports whether it is something else than before.
func (in *increment) noteNode(c *Compiler, s *state.Snapshot) bool {
	if in.began && s.Journals.Pods.Same(in.journals.Pods) && s.Journals.Nodes.Same(in.journals.Nodes) {
		return false
	}
	zone, here, addrs := c.place(s)
	same := in.began && zone == in.zone && slices.Equal(addrs, in.nodeAddrs) &&
		slices.Equal(here.ranges, in.here.ranges) && maps.Equal(here.addrs, in.here.addrs)
	in.zone, in.here, in.nodeAddrs = zone, here, addrs
	return !same
}

// piece compiles one service into a result of its own, and adds its ports to used.
func (r *run) piece(svc *state.Service, used map[portKey]bool) (*piece, *Result) {
	r.result, r.claims, r.unserved, r.used = newResult(1), nil, false, map[portKey]bool{}
	r.compileService(svc)
	p := &piece{service: svc, claims: r.claims, unserved: r.unserved, checks: r.result.HealthChecks, problems: r.result.Problems}
	for key := range r.used {
		p.ports = append(p.ports, key)
		used[key] = true
	}
	return p, r.result
}
