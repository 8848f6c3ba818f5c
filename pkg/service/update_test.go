// SPDX-License-Identifier: Apache-2.0

package service

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"

	"github.com/margay-cni/margay/pkg/state"
)

// changing is a source whose snapshots share what did not change, and may have journals.
type changing struct {
	rand *rand.Rand
	now  *state.Snapshot

	journals         bool
	services, slices state.Log[state.Key]
	pods             state.Log[state.Key]
	nodes            state.Log[string]
}

// next changes a few things. A snapshot of a source with journals lacks them now and then.
func (c *changing) next() *state.Snapshot {
	c.change()
	for c.journals && c.rand.IntN(3) == 0 { // snapshots that nobody sees
		c.change()
	}
	s := *c.now
	if c.journals && c.rand.IntN(8) > 0 {
		s.Journals = state.Journals{Services: c.services.Journal(), EndpointSlices: c.slices.Journal(), Pods: c.pods.Journal(), Nodes: c.nodes.Journal()}
	}
	return &s
}

func (c *changing) change() {
	s := *c.now
	s.Services, s.EndpointSlices = maps.Clone(s.Services), maps.Clone(s.EndpointSlices)
	s.Nodes, s.Pods = maps.Clone(s.Nodes), maps.Clone(s.Pods)
	for range 1 + c.rand.IntN(3) {
		key := state.Key{Namespace: "default", Name: fmt.Sprintf("svc%d", c.rand.IntN(6))}
		switch c.rand.IntN(11) {
		case 0:
			delete(s.Services, key)
			c.services.Note(key)
		case 1, 2, 3:
			s.Services[key] = c.service(key)
			c.services.Note(key)
		case 4:
			slice := c.sliceKey(key)
			delete(s.EndpointSlices, slice)
			c.slices.Note(slice)
		case 5:
			zone := fmt.Sprintf("zone-%d", c.rand.IntN(2))
			s.Nodes[thisNode] = &state.Node{Name: thisNode, Labels: map[string]string{corev1.LabelTopologyZone: zone}}
			c.nodes.Note(thisNode)
		case 6:
			s.Pods[key] = &state.Pod{Key: key, Node: thisNode, IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 244, 0, byte(c.rand.IntN(10))})}}
			c.pods.Note(key)
		default:
			slice := c.slice(key)
			s.EndpointSlices[slice.Key] = slice
			c.slices.Note(slice.Key)
		}
	}
	c.now = &s
}

func (c *changing) sliceKey(service state.Key) state.Key {
	return state.Key{Namespace: "default", Name: fmt.Sprintf("%s-%d", service.Name, c.rand.IntN(3))}
}

// service collides with others now and then, in every kind of address.
func (c *changing) service(key state.Key) *state.Service {
	out := &state.Service{
		Key: key, Type: state.LoadBalancer, ExternalLocal: c.rand.IntN(2) == 0, InternalLocal: c.rand.IntN(3) == 0, HealthCheckNodePort: 31000,
		ClusterIPs:  []netip.Addr{netip.AddrFrom4([4]byte{10, 96, 0, byte(c.rand.IntN(8))}), netip.MustParseAddr(fmt.Sprintf("fd96::%d", c.rand.IntN(8)))},
		ExternalIPs: []netip.Addr{netip.AddrFrom4([4]byte{192, 0, 2, byte(c.rand.IntN(4))}), netip.AddrFrom4([4]byte{10, 96, 0, 1})},
	}
	out.LoadBalancerIPs = []netip.Addr{netip.AddrFrom4([4]byte{192, 0, 2, byte(c.rand.IntN(4))})}
	if c.rand.IntN(2) == 0 {
		out.LoadBalancerSourceRanges = []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}
	}
	if c.rand.IntN(3) == 0 {
		out.Balancing = []state.LoadBalancing{state.BalanceMaglev, "nonsense"}[c.rand.IntN(2)]
	}
	for i := range 1 + c.rand.IntN(3) {
		out.Ports = append(out.Ports, state.ServicePort{
			Name: []string{"web", "dns"}[c.rand.IntN(2)], Protocol: state.TCP, Port: uint16(80 + i), NodePort: uint16(30000 + c.rand.IntN(4)),
		})
	}
	return out
}

func (c *changing) slice(service state.Key) *state.EndpointSlice {
	ipv6 := c.rand.IntN(2) == 0
	if c.rand.IntN(8) == 0 { // one that changes its service
		service.Name = "svc0"
	}
	out := &state.EndpointSlice{Key: c.sliceKey(service), Service: service, IPv6: ipv6}
	for _, name := range []string{"web", "dns"} {
		out.Ports = append(out.Ports, state.SlicePort{Name: name, Protocol: state.TCP, Port: uint16(8080 + c.rand.IntN(2))})
	}
	for range c.rand.IntN(6) {
		a := netip.AddrFrom4([4]byte{10, 244, 0, byte(c.rand.IntN(10))})
		if ipv6 {
			a = netip.MustParseAddr(fmt.Sprintf("fd00:244::%d", c.rand.IntN(10)))
		}
		e := state.Endpoint{Addr: a, Ready: c.rand.IntN(3) > 0, Serving: c.rand.IntN(4) > 0, Terminating: c.rand.IntN(4) == 0}
		e.Node = []string{thisNode, "node-b", ""}[c.rand.IntN(3)]
		if c.rand.IntN(4) == 0 {
			e.ForZones = []string{"zone-1"}
		}
		out.Endpoints = append(out.Endpoints, e)
	}
	return out
}

// snapshotOf copies what Update changes in place.
func snapshotOf(r *Result) *Result {
	return &Result{
		Frontends: maps.Clone(r.Frontends), Lists: maps.Clone(r.Lists), Tables: maps.Clone(r.Tables), Serving: maps.Clone(r.Serving),
		LocalBackends: maps.Clone(r.LocalBackends), SourceRanges: maps.Clone(r.SourceRanges), ClusterAddrs: maps.Clone(r.ClusterAddrs),
	}
}

// TestUpdateEqualsCompile: on random sequences of changes, Update gives what Compile gives, number by number, and its Changes cover all that
// differs from the time before, with journals and without. Few ids are there to give, so that they run out and come back.
func TestUpdateEqualsCompile(t *testing.T) {
	addrs := cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	addrPorts := cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })
	prefixes := cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })
	opts := cmp.Options{addrs, addrPorts, prefixes, cmpopts.EquateEmpty()}
	for seed := range uint64(60) {
		source := &changing{rand: rand.New(rand.NewPCG(seed, 1)), now: state.NewSnapshot(), journals: seed%2 == 0}
		whole, part := NewCompiler(thisNode), NewCompiler(thisNode)
		whole.ids.max, part.ids.max = 14, 14
		before := newResult(0)
		for step := range 40 {
			s := source.next()
			want := whole.Compile(s)
			got, changes := part.Update(s)
			if diff := cmp.Diff(want, got, opts); diff != "" {
				t.Fatalf("seed %d, step %d: Compile() and Update() differ (-want +got):\n%s", seed, step, diff)
			}
			if diff := cmp.Diff(whole.Export(), part.Export(), opts); diff != "" {
				t.Fatalf("seed %d, step %d: numbers differ (-want +got):\n%s", seed, step, diff)
			}
			checkChanges(t, before, got, changes)
			if t.Failed() {
				t.Fatalf("seed %d, step %d", seed, step)
			}
			before = snapshotOf(got)
		}
	}
}

// checkChanges requires that every key that differs is among the changes, and what was before with it.
func checkChanges(t *testing.T, before, now *Result, c *Changes) {
	t.Helper()
	covers(t, "Frontends", before.Frontends, now.Frontends, c.Frontends)
	covers(t, "Serving", before.Serving, now.Serving, c.Serving)
	covers(t, "SourceRanges", before.SourceRanges, now.SourceRanges, c.SourceRanges)
	covers(t, "ClusterAddrs", before.ClusterAddrs, now.ClusterAddrs, c.ClusterAddrs)
	coversSlices(t, "Lists", before.Lists, now.Lists, c.Lists, func(b ListBefore) []netip.AddrPort { return b.Slots })
	coversSlices(t, "LocalBackends", before.LocalBackends, now.LocalBackends, c.LocalBackends, func(b []netip.AddrPort) []netip.AddrPort { return b })
	for n, b := range c.Lists {
		if b.Table.Size != before.Tables[n].Size || len(b.Table.Slots) != len(before.Tables[n].Slots) {
			t.Errorf("the table of list %d before = %+v, want %+v", n, b.Table, before.Tables[n])
		}
	}
}

func covers[K, V comparable](t *testing.T, what string, before, now map[K]V, changes map[K]struct{}) {
	t.Helper()
	for k := range union(before, now) {
		b, inBefore := before[k]
		n, inNow := now[k]
		if _, told := changes[k]; !told && (inBefore != inNow || b != n) {
			t.Errorf("%s: %v changed from %v to %v without a word", what, k, b, n)
		}
	}
}

func coversSlices[B any](
	t *testing.T, what string, before, now map[uint32][]netip.AddrPort, changes map[uint32]B, slots func(B) []netip.AddrPort,
) {
	t.Helper()
	for k := range union(before, now) {
		was, told := changes[k]
		if !told && !cmp.Equal(before[k], now[k], cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })) {
			t.Errorf("%s: %d changed from %v to %v without a word", what, k, before[k], now[k])
		}
		if told && fmt.Sprint(slots(was)) != fmt.Sprint(before[k]) {
			t.Errorf("%s: %d was %v, want %v", what, k, slots(was), before[k])
		}
	}
}

func union[K comparable, V any](a, b map[K]V) map[K]struct{} {
	out := map[K]struct{}{}
	for k := range a {
		out[k] = struct{}{}
	}
	for k := range b {
		out[k] = struct{}{}
	}
	return out
}
