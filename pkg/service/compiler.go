// SPDX-License-Identifier: Apache-2.0

package service

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/margay-cni/margay/pkg/state"
)

// Compiler turns snapshots into results. It remembers the numbers it gave and the order of the slots. Not safe for concurrent use.
type Compiler struct {
	// DefaultReturn is the way back for services that name none; the zero value is the tunnel. Set it before Compile.
	DefaultReturn state.ServiceReturn
	// DefaultBalancing is how backends are chosen for services that say nothing; the zero value is at random. Set it before Compile.
	DefaultBalancing state.LoadBalancing

	node       string
	ids, lists allocator
	ports      map[portKey]*port
	// moves grows when the slots of a list change.
	moves uint64
	// last is what Update goes on from; nil: it compiles everything.
	last *increment
}

// NewCompiler returns a compiler for the node of that name, with no numbers given yet.
func NewCompiler(node string) *Compiler {
	return &Compiler{
		node:  node,
		ids:   allocator{next: 1, max: MaxServiceID},
		lists: allocator{next: 1, max: MaxList},
		ports: map[portKey]*port{},
	}
}

// Compile computes this node's services from a snapshot. What cannot be served is left out and named in the result's Problems.
func (c *Compiler) Compile(s *state.Snapshot) *Result {
	r := &run{
		compiler: c,
		slices:   indexSlices(s),
		used:     make(map[portKey]bool, len(c.ports)),
		result:   newResult(len(s.Services)),
	}
	c.last = nil
	r.zone, r.here, r.nodeAddrs = c.place(s)
	for _, key := range slices.SortedFunc(maps.Keys(s.Services), compareKeys) {
		r.compileService(s.Services[key])
	}
	r.placeFrontends()
	r.releaseUnused()
	slices.SortStableFunc(r.result.Problems, func(a, b Problem) int { return compareKeys(a.Service, b.Service) })
	return r.result
}

// newResult is an empty result with room for that many services.
func newResult(services int) *Result {
	return &Result{
		Frontends:     make(map[Frontend]Service, services),
		Lists:         make(map[uint32][]netip.AddrPort, services),
		Tables:        map[uint32]Table{},
		Serving:       map[Member]Membership{},
		LocalBackends: map[uint32][]netip.AddrPort{},
		SourceRanges:  map[SourceRange]struct{}{},
		ClusterAddrs:  make(map[netip.Addr]struct{}, services),
	}
}

// place is where the compiler's node is, what is on it, and its own addresses.
func (c *Compiler) place(s *state.Snapshot) (zone string, here location, addrs []netip.Addr) {
	here = addrsOf(s, c.node)
	if n := s.Nodes[c.node]; n != nil {
		zone, addrs = n.Labels[corev1.LabelTopologyZone], n.Addresses
	}
	return zone, here, addrs
}

// run is one compilation.
type run struct {
	compiler *Compiler
	zone     string
	// here are this node's own addresses and its pods'.
	here location
	// nodeAddrs are this node's own addresses, primary first.
	nodeAddrs []netip.Addr
	// maglev says that the service at hand asks for consistent hashing.
	maglev bool
	slices sliceIndex
	used   map[portKey]bool
	// freed are list numbers to be released at the end: none is used twice in one compilation.
	freed  []uint32
	claims []claim
	// unserved says that a port of the service at hand got no service id.
	unserved bool
	result   *Result
}

func (r *run) problem(service state.Key, format string, args ...any) {
	r.result.Problems = append(r.result.Problems, Problem{Service: service, Message: fmt.Sprintf(format, args...)})
}

func (r *run) compileService(svc *state.Service) {
	r.maglev = choice(r, svc, state.AnnotationLoadBalancing, svc.Balancing, r.compiler.DefaultBalancing,
		state.BalanceRandom, state.BalanceMaglev) == state.BalanceMaglev
	for _, a := range svc.ClusterIPs {
		r.result.ClusterAddrs[a.Unmap()] = struct{}{}
	}
	base := Service{Name: svc.Key, AffinitySeconds: svc.AffinitySeconds, DSR: r.wayBack(svc) == state.ReturnDSR}
	for _, port := range svc.Ports {
		for _, ipv6 := range []bool{false, true} {
			// A service takes part in a family only through a cluster address (row I4).
			if len(ofFamily(svc.ClusterIPs, ipv6)) > 0 {
				r.compilePort(svc, base, port, ipv6)
			}
		}
	}
	r.addHealthChecks(svc)
}

// wayBack is the way that the answers of a service's backends on other nodes take.
func (r *run) wayBack(svc *state.Service) state.ServiceReturn {
	return choice(r, svc, state.AnnotationServiceReturn, svc.Return, r.compiler.DefaultReturn, state.ReturnTunnel, state.ReturnDSR)
}

// choice is what an annotation says, or the agent's default where it says nothing, or something that is neither a nor b.
func choice[T interface {
	~string
	Known() bool
}](r *run, svc *state.Service, annotation string, value, byDefault, a, b T) T {
	if value != "" && !value.Known() {
		r.problem(svc.Key, "annotation %s is %q, want %q or %q: the agent's default holds", annotation, string(value), string(a), string(b))
		return byDefault
	}
	return cmp.Or(value, byDefault)
}

// compilePort compiles one port in one family; base is what all of the service's frontends have in common.
func (r *run) compilePort(svc *state.Service, base Service, sp state.ServicePort, ipv6 bool) {
	key := portKey{service: svc.Key, port: sp.Name, protocol: sp.Protocol, ipv6: ipv6}
	if r.used[key] {
		r.problem(svc.Key, "port %q with %s is there twice", sp.Name, sp.Protocol)
		return
	}
	p, ok := r.port(key)
	if !ok {
		r.problem(svc.Key, "all %d service ids are in use: port %d is not served", MaxServiceID, sp.Port)
		return
	}
	chosen := selectEndpoints(mergeEndpoints(r.slices[svc.Key], sp, ipv6, r.compiler.node), r.compiler.node, r.zone, r.here)
	chosen.members(p.id, r.result.Serving)
	if len(chosen.here) > 0 {
		r.result.LocalBackends[p.id] = chosen.here
	}
	outside, problems := outsideAddrs(svc, sp, ipv6)
	for _, message := range problems {
		r.problem(svc.Key, "%s", message)
	}
	restricted := r.addSourceRanges(p.id, svc, ipv6)
	// Outside addresses need the cluster list whatever their policy is: traffic that starts on this node uses it (row V4).
	r.update(&p.cluster, chosen.cluster, !svc.InternalLocal || len(outside) > 0)
	r.update(&p.local, chosen.local, svc.InternalLocal || (svc.ExternalLocal && len(outside) > 0))
	byPolicy := map[bool]*list{false: &p.cluster, true: &p.local}

	base.ID, base.PortName = p.id, sp.Name
	base.InternalLocal = svc.InternalLocal
	inside := base.with(byPolicy[svc.InternalLocal], byPolicy[svc.InternalLocal], chosen.any)
	for _, a := range ofFamily(svc.ClusterIPs, ipv6) {
		if a.IsUnspecified() {
			r.problem(svc.Key, "cluster address %s cannot be served", a)
			continue
		}
		r.claim(netip.AddrPortFrom(a, sp.Port), sp.Protocol, clusterIP, inside)
	}
	base.InternalLocal, base.ExternalLocal = false, svc.ExternalLocal
	for _, o := range outside {
		base.SourceRanges = restricted && o.kind == loadBalancerIP
		r.claim(o.addr, sp.Protocol, o.kind, base.with(byPolicy[svc.ExternalLocal], &p.cluster, chosen.any))
	}
}

// port returns what is remembered of a service port, numbering it when it is new.
func (r *run) port(key portKey) (*port, bool) {
	p := r.compiler.ports[key]
	if p == nil {
		id, ok := r.compiler.ids.take()
		if !ok {
			r.unserved = true
			return nil, false
		}
		p = &port{id: id}
		r.compiler.ports[key] = p
	}
	r.used[key] = true
	return p, true
}

// update gives a list its new backends, a number if it needs one, and takes that back when nobody uses the list any more.
func (r *run) update(l *list, backends []netip.AddrPort, wanted bool) {
	if !wanted {
		r.free(l)
		return
	}
	if l.number == 0 {
		// Lists cannot be used up: there are fewer service ports than a list number has values by far.
		l.number, _ = r.compiler.lists.take()
	}
	before := l.slots
	l.slots = assignSlots(before, backends)
	if !same(before, l.slots) {
		r.compiler.moves++
	}
	r.result.Lists[l.number] = l.slots
	switch {
	case !r.maglev:
		l.table = Table{}
	case l.table.Size == 0 || !same(before, l.slots):
		l.table = newTable(l.slots)
	}
	if l.table.Size != 0 {
		r.result.Tables[l.number] = l.table
	}
}

// same reports whether two lists are the identical slice.
func same(a, b []netip.AddrPort) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0])
}

// free marks a list as unused.
func (r *run) free(l *list) {
	if l.number != 0 {
		r.freed = append(r.freed, l.number)
		*l = list{}
	}
}

// releaseUnused takes back the numbers that nothing uses any more, in an order that depends on nothing but names.
func (r *run) releaseUnused() {
	r.release(slices.SortedFunc(maps.Keys(r.compiler.ports), portKey.compare))
}

// release takes back the numbers of those of the ports that this compilation does not use, and of its unused lists.
func (r *run) release(ports []portKey) {
	c := r.compiler
	for _, key := range ports {
		if !r.used[key] {
			p := c.ports[key]
			c.ids.release(p.id)
			r.free(&p.cluster)
			r.free(&p.local)
			delete(c.ports, key)
		}
	}
	for _, n := range r.freed {
		c.lists.release(n)
	}
}

// with returns s with a list for each scope.
func (s Service) with(external, internal *list, anyEndpoint bool) Service {
	for scope, l := range [2]*list{External: external, Internal: internal} {
		s.Lists[scope] = l.number
		s.Counts[scope] = uint32(len(l.slots))
		s.Tables[scope] = l.table.Size
		s.DropEmpty[scope] = anyEndpoint && len(l.slots) == 0
	}
	return s
}

func (r *run) claim(a netip.AddrPort, proto state.Protocol, k kind, s Service) {
	r.claims = append(r.claims, claim{frontend: Frontend{Addr: a.Addr(), Port: a.Port(), Protocol: proto}, kind: k, service: s})
}

func compareKeys(a, b state.Key) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}
