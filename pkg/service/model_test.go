// SPDX-License-Identifier: Apache-2.0

package service

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/margay-cni/margay/pkg/state"
)

// oracle answers one question about one frontend the slow way, straight from the rows: which backends may this traffic use, and if none,
// is it dropped or refused?
func oracle(s *state.Snapshot, svc *state.Service, port state.ServicePort, f family, local bool) seen {
	var candidates []state.Endpoint // I5, I7
	var backends []netip.AddrPort
	for _, name := range []string{"a", "b", "c"} {
		slice := s.EndpointSlices[state.Key{Namespace: svc.Namespace, Name: svc.Name + "-" + name}]
		if slice == nil || slice.IPv6 != bool(f) {
			continue
		}
		for _, sp := range slice.Ports {
			for _, e := range slice.Endpoints {
				if sp.Name != port.Name || sp.Protocol != port.Protocol {
					continue
				}
				b := netip.AddrPortFrom(e.Addr, sp.Port)
				if i := slices.Index(backends, b); i < 0 {
					candidates, backends = append(candidates, e), append(backends, b)
				} else if candidates[i].Terminating && !e.Terminating {
					candidates[i] = e
				}
			}
		}
	}
	where := func(keep func(state.Endpoint) bool) []netip.AddrPort {
		var out []netip.AddrPort
		for i, e := range candidates {
			if keep(e) {
				out = append(out, backends[i])
			}
		}
		return out
	}
	isReady := func(e state.Endpoint) bool { return e.Ready }
	isDraining := func(e state.Endpoint) bool { return e.Serving && e.Terminating && !e.Ready }
	here := func(f func(state.Endpoint) bool) func(state.Endpoint) bool {
		return func(e state.Endpoint) bool { return f(e) && e.Node == thisNode }
	}
	var got []netip.AddrPort
	if local { // S3
		if got = where(here(isReady)); len(got) == 0 {
			got = where(here(isDraining))
		}
	} else { // S2, S4
		forNode := func(e state.Endpoint) bool { return e.Ready && slices.Contains(e.ForNodes, thisNode) }
		forZone := func(e state.Endpoint) bool { return e.Ready && slices.Contains(e.ForZones, "zone-1") }
		noNodes := func(e state.Endpoint) bool { return e.Ready && len(e.ForNodes) == 0 }
		noZones := func(e state.Endpoint) bool { return e.Ready && len(e.ForZones) == 0 }
		switch {
		case len(where(noNodes)) == 0 && len(where(forNode)) > 0:
			got = where(forNode)
		case len(where(noZones)) == 0 && len(where(forZone)) > 0:
			got = where(forZone)
		default:
			got = where(isReady)
		}
		if len(got) == 0 {
			got = where(isDraining)
		}
	}
	switch usable := len(where(isReady)) + len(where(isDraining)); { // S5
	case len(got) > 0:
		slices.SortFunc(got, netip.AddrPort.Compare)
		return forward(got)
	case usable > 0:
		return seen{Verdict: "drop"}
	}
	return seen{Verdict: "refuse"}
}

func drawEndpoint(t *rapid.T, f family) state.Endpoint {
	hint := func(values ...string) []string {
		return rapid.SampledFrom([][]string{nil, nil, {values[0]}, {values[1]}, values}).Draw(t, "hint")
	}
	return state.Endpoint{
		Addr:        f.pod(rapid.IntRange(1, 6).Draw(t, "pod")),
		Node:        rapid.SampledFrom([]string{"", thisNode, "node-b", "node-c"}).Draw(t, "node"),
		Ready:       rapid.Bool().Draw(t, "ready"),
		Serving:     rapid.Bool().Draw(t, "serving"),
		Terminating: rapid.Bool().Draw(t, "terminating"),
		ForNodes:    hint(thisNode, "node-b"),
		ForZones:    hint("zone-1", "zone-2"),
	}
}

// drawWorld makes up to four services, of one or both families, with up to three slices each.
func drawWorld(t *rapid.T) *state.Snapshot {
	s := world()
	for n := 1; n <= 4; n++ {
		if !rapid.Bool().Draw(t, "service exists") {
			continue
		}
		key := state.Key{Namespace: "web", Name: fmt.Sprintf("svc-%d", n)}
		svc := &state.Service{
			Key:           key,
			InternalLocal: rapid.Bool().Draw(t, "internal local"),
			ExternalLocal: rapid.Bool().Draw(t, "external local"),
			Ports:         []state.ServicePort{{Name: "http", Protocol: state.TCP, Port: 80}, {Name: "dns", Protocol: state.UDP, Port: 80}},
		}
		for i := range svc.Ports {
			if rapid.Bool().Draw(t, "NodePort") {
				svc.Ports[i].NodePort = uint16(30000 + n)
			}
		}
		for _, f := range rapid.SampledFrom([][]family{{false}, {true}, {false, true}}).Draw(t, "families") {
			svc.ClusterIPs = append(svc.ClusterIPs, f.vip(n))
			if rapid.Bool().Draw(t, "external address") {
				svc.ExternalIPs = append(svc.ExternalIPs, f.outside(n))
			}
		}
		s.Services[key] = svc
		for _, suffix := range []string{"a", "b", "c"} {
			f := family(rapid.Bool().Draw(t, "slice family"))
			slice := f.slice(key.Name+"-"+suffix, rapid.SliceOfN(rapid.Custom(func(t *rapid.T) state.Endpoint { return drawEndpoint(t, f) }), 0, 5).Draw(t, "endpoints")...)
			slice.Service = key
			slice.Ports = []state.SlicePort{
				{Name: "http", Protocol: state.TCP, Port: rapid.SampledFrom([]uint16{8080, 9090}).Draw(t, "port")},
				{Name: "dns", Protocol: rapid.SampledFrom([]state.Protocol{state.UDP, state.TCP}).Draw(t, "protocol"), Port: 53},
			}
			s.EndpointSlices[slice.Key] = slice
		}
	}
	return s
}

// agrees checks a result against the oracle, and that nothing is there that the oracle does not know.
func agrees(t *rapid.T, s *state.Snapshot, r *Result) {
	expected := 0
	check := func(what string, frontend Frontend, want [2]seen) {
		expected++
		svc, ok := r.Frontends[frontend]
		if !ok {
			t.Fatalf("%s %v is missing", what, frontend)
		}
		for scope := range want {
			list := slices.SortedFunc(slices.Values(r.Lists[svc.Lists[scope]]), netip.AddrPort.Compare)
			got := seen{Backends: list, Verdict: "forward"}
			if svc.Counts[scope] == 0 {
				got = seen{Verdict: map[bool]string{true: "drop", false: "refuse"}[svc.DropEmpty[scope]]}
			}
			if diff := cmp.Diff(want[scope], got, ignoreOrder); diff != "" {
				t.Fatalf("%s %v scope %d (-want +got):\n%s", what, frontend, scope, diff)
			}
			for _, b := range list {
				if _, serving := r.Serving[Member{Service: svc.ID, Backend: b}]; !serving {
					t.Fatalf("%s %v: backend %v is not in Serving", what, frontend, b)
				}
			}
		}
	}
	for _, svc := range s.Services {
		for _, a := range svc.ClusterIPs {
			f := family(a.Is6())
			for _, p := range svc.Ports {
				inside := oracle(s, svc, p, f, svc.InternalLocal)
				outside := [2]seen{External: oracle(s, svc, p, f, svc.ExternalLocal), Internal: oracle(s, svc, p, f, false)}
				check("cluster address", Frontend{Addr: a, Port: p.Port, Protocol: p.Protocol}, [2]seen{inside, inside})
				if p.NodePort != 0 {
					check("NodePort", Frontend{Addr: f.unspecified(), Port: p.NodePort, Protocol: p.Protocol}, outside)
				}
				for _, e := range ofFamily(svc.ExternalIPs, bool(f)) {
					check("external address", Frontend{Addr: e, Port: p.Port, Protocol: p.Protocol}, outside)
				}
			}
		}
	}
	if len(r.Frontends) != expected {
		t.Fatalf("%d frontends, want %d: %v", len(r.Frontends), expected, frontendNames(r))
	}
}

// TestCompileAgreesWithTheRows walks one compiler through random snapshots and holds every result against the oracle, and every step
// against the promises about numbers and slots.
func TestCompileAgreesWithTheRows(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := NewCompiler(thisNode)
		var before *Result
		for range rapid.IntRange(1, 4).Draw(t, "steps") {
			s := drawWorld(t)
			r := c.Compile(s)
			agrees(t, s, r)
			numbersAreUnique(t, r)
			if before != nil {
				numbersStay(t, before, r)
			}
			again := c.Compile(s)
			if diff := cmp.Diff(r, again, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
				t.Fatalf("compiling the same snapshot again changes (-first +second):\n%s", diff)
			}
			before = r
		}
	})
}

func numbersAreUnique(t *rapid.T, r *Result) {
	type owner struct {
		name state.Key
		port string
		v6   bool
	}
	ids, lists := map[uint32]owner{}, map[uint32]owner{}
	for f, s := range r.Frontends {
		o := owner{s.Name, s.PortName, f.Addr.Is6()}
		for m, n := range map[*map[uint32]owner][]uint32{&ids: {s.ID}, &lists: s.Lists[:]} {
			for _, n := range n {
				if had, ok := (*m)[n]; n == 0 || ok && had != o {
					t.Fatalf("number %d belongs to %v and %v", n, had, o)
				}
				(*m)[n] = o
			}
		}
	}
	if len(lists) != len(r.Lists) {
		t.Fatalf("%d lists for frontends that use %d", len(r.Lists), len(lists))
	}
}

// numbersStay checks that what exists before and after keeps its numbers, and that a list changes in as few slots as can be.
func numbersStay(t *rapid.T, before, after *Result) {
	for f, was := range before.Frontends {
		if is, ok := after.Frontends[f]; ok && is.ID != was.ID {
			t.Fatalf("%v had id %d, now %d", f, was.ID, is.ID)
		}
	}
	for n, was := range before.Lists {
		is, ok := after.Lists[n]
		if !ok {
			continue
		}
		added, removed, written := 0, 0, 0
		for i, b := range is {
			if !slices.Contains(was, b) {
				added++
			}
			if i >= len(was) || was[i] != b {
				written++
			}
		}
		for _, b := range was {
			if !slices.Contains(is, b) {
				removed++
			}
		}
		if written > max(added, removed) {
			t.Fatalf("list %d: %v became %v: %d slots written for %d added and %d removed", n, was, is, written, added, removed)
		}
	}
}
