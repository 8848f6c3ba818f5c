// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/pkg/state"
)

// flowWorld draws services and what they are asked from.
type flowWorld struct {
	lab    *flowLab
	askers []asker // of both families: one whose address has the wrong family is never drawn for it
}

func newFlowWorld(l *flowLab) *flowWorld {
	w := &flowWorld{lab: l, askers: []asker{{pod: l.nodes[0].A}, {pod: l.nodes[0].B}, {node: l.nodes[0].Node}}}
	for _, a := range append(addrs("198.51.100.77", "2001:db8:e::77"), nodetest.ClientAddrs...) {
		w.askers = append(w.askers, asker{client: a})
	}
	return w
}

// place draws an address that endpoints can have, and its node: pods and the nodes themselves.
func (w *flowWorld) place(t *rapid.T, ipv6 bool) (netip.Addr, string) {
	node := rapid.IntRange(0, 1).Draw(t, "node")
	f := w.lab.nodes[node]
	own := f.Addrs[map[bool]int{true: 1}[ipv6]]
	return rapid.SampledFrom([]netip.Addr{f.A.Addr(ipv6), f.B.Addr(ipv6), own}).Draw(t, "place"), labNode(node)
}

func (w *flowWorld) endpoint(t *rapid.T, ipv6 bool) state.Endpoint {
	a, node := w.place(t, ipv6)
	hint := func(values ...string) []string {
		return rapid.SampledFrom([][]string{nil, nil, values[:1], values[1:], values}).Draw(t, "hint")
	}
	return state.Endpoint{
		Addr: a, Node: rapid.SampledFrom([]string{node, node, node, ""}).Draw(t, "named node"),
		Ready:   rapid.SampledFrom([]bool{true, true, true, false}).Draw(t, "ready"),
		Serving: rapid.SampledFrom([]bool{true, true, false}).Draw(t, "serving"), Terminating: rapid.Bool().Draw(t, "terminating"),
		ForNodes: hint(labNode(0), labNode(1)), ForZones: hint("zone-0", "zone-1"),
	}
}

// ranges draws source ranges: none, everything, some client's or pod's, or those of one family only.
func (w *flowWorld) ranges(t *rapid.T) (out []netip.Prefix) {
	drawn := rapid.SampledFrom([][]string{
		nil, nil, {"0.0.0.0/0", "10.0.0.0/8"}, {"198.51.100.0/24", "2001:db8:e::/48"}, {"10.244.0.10/32"}, {"fd00:244::/32"}, {"192.0.2.100/32", "fd00:244::b/128"},
	}).Draw(t, "source ranges")
	for _, p := range drawn {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

func (w *flowWorld) service(t *rapid.T, n int) *state.Service {
	some := func(what string, from ...string) []netip.Addr {
		return addrs(rapid.SampledFrom([][]string{nil, from[:1], from[1:2], from[:2], from}).Draw(t, what)...)
	}
	svc := &state.Service{
		Key: state.Key{Namespace: "default", Name: fmt.Sprintf("svc%d", n)}, Type: state.LoadBalancer,
		InternalLocal: rapid.Bool().Draw(t, "internal local"), ExternalLocal: rapid.Bool().Draw(t, "external local"),
		AffinitySeconds: rapid.SampledFrom([]uint32{0, 0, 10800}).Draw(t, "affinity"),
		Balancing:       rapid.SampledFrom([]state.LoadBalancing{state.BalanceRandom, state.BalanceMaglev}).Draw(t, "balancing"),
		Return:          rapid.SampledFrom([]state.ServiceReturn{state.ReturnTunnel, state.ReturnDSR}).Draw(t, "return"),
		ExternalIPs:     some("external", "198.51.100.1", "2001:db8:e::1", w.lab.nodes[0].Addrs[0].String(), "10.96.0.2"),
		LoadBalancerIPs: some("balancer", "203.0.113.1", "2001:db8:f::1", "198.51.100.1"), LoadBalancerSourceRanges: w.ranges(t),
		ClusterIPs: addrs(rapid.SampledFrom([][]string{
			{fmt.Sprintf("10.96.0.%d", n)}, {fmt.Sprintf("fd00:96::%d", n)}, {fmt.Sprintf("10.96.0.%d", n), fmt.Sprintf("fd00:96::%d", n)},
		}).Draw(t, "cluster addresses")...),
	}
	for i, p := range []state.ServicePort{{Name: "web", Protocol: state.TCP, Port: 80}, {Name: "tls", Protocol: state.TCP, Port: 443}, {Name: "dns", Protocol: state.UDP, Port: 80}, {Name: "sig", Protocol: state.SCTP, Port: 80}} {
		if rapid.Bool().Draw(t, "NodePort") {
			p.NodePort = uint16(30000 + 10*n + i)
		}
		if i == 0 || rapid.IntRange(0, 3).Draw(t, "port exists") > 0 {
			svc.Ports = append(svc.Ports, p)
		}
	}
	return svc
}

// addEndpoints gives a service up to two slices in each family.
func (w *flowWorld) addEndpoints(t *rapid.T, s *state.Snapshot, svc state.Key) {
	for _, ipv6 := range []bool{false, true} {
		for i := range rapid.SampledFrom([]int{0, 1, 2, 2}).Draw(t, "slices") {
			slice := &state.EndpointSlice{Key: state.Key{Namespace: "default", Name: fmt.Sprintf("%s-%v-%d", svc.Name, ipv6, i)}, Service: svc, IPv6: ipv6}
			slice.Ports = []state.SlicePort{
				{Name: "web", Protocol: state.TCP, Port: rapid.SampledFrom([]uint16{8080, 9090}).Draw(t, "port")}, {Name: "tls", Protocol: state.TCP, Port: 8443},
				{Name: "dns", Protocol: rapid.SampledFrom([]state.Protocol{state.UDP, state.UDP, state.TCP}).Draw(t, "protocol"), Port: 53},
				{Name: "sig", Protocol: state.SCTP, Port: 2905},
			}
			for range rapid.SampledFrom([]int{0, 1, 2, 3, 4}).Draw(t, "endpoints") {
				slice.Endpoints = append(slice.Endpoints, w.endpoint(t, ipv6))
			}
			s.EndpointSlices[slice.Key] = slice
		}
	}
}

// draw makes up to four services. After the first time those before stay often, or get other endpoints.
func (w *flowWorld) draw(t *rapid.T, before *state.Snapshot) *state.Snapshot {
	s := w.lab.snapshot()
	for n := 1; n <= 4; n++ {
		key := state.Key{Namespace: "default", Name: fmt.Sprintf("svc%d", n)}
		svc := before.Services[key]
		if svc == nil || rapid.IntRange(0, 2).Draw(t, "service is new") == 0 {
			svc = w.service(t, n)
		}
		if rapid.IntRange(0, 3).Draw(t, "service exists") == 0 {
			continue
		}
		s.Services[key] = svc
		if before.Services[key] == nil || rapid.Bool().Draw(t, "endpoints are new") {
			w.addEndpoints(t, s, key)
			continue
		}
		for _, slice := range before.EndpointSlices {
			if slice.Service == key {
				s.EndpointSlices[slice.Key] = slice
			}
		}
	}
	return s
}

// question draws a packet: mostly to something that a service has, else to any of the addresses with any of the ports.
func (w *flowWorld) question(t *rapid.T, s *state.Snapshot, port uint16) (asker, pkt.Packet) {
	all := append(addrs("10.96.0.1", "10.96.0.2", "10.96.0.9", "fd00:96::1", "fd00:96::3", "fd00:96::9", "198.51.100.1", "2001:db8:e::1", "203.0.113.1", "2001:db8:f::1"), w.lab.nodes[0].Addrs...)
	all = append(all, w.lab.nodes[1].Addrs...)
	ports := []uint16{80, 443, 81, 30010, 30021}
	if len(s.Services) > 0 && rapid.IntRange(0, 9).Draw(t, "known") > 0 {
		m := flowModel{snapshot: s}
		svc := rapid.SampledFrom(m.sorted()).Draw(t, "service")
		p := rapid.SampledFrom(svc.Ports).Draw(t, "service port")
		all, ports = slices.Concat(svc.ClusterIPs, svc.ExternalIPs, svc.LoadBalancerIPs), []uint16{p.Port}
		if p.NodePort != 0 && rapid.Bool().Draw(t, "by NodePort") {
			all, ports = append(slices.Clone(w.lab.nodes[0].Addrs), w.lab.nodes[1].Addrs...), []uint16{p.NodePort}
		}
	}
	to := netip.AddrPortFrom(rapid.SampledFrom(all).Draw(t, "to"), rapid.SampledFrom(ports).Draw(t, "to port"))
	kind := rapid.SampledFrom([]pkt.Kind{pkt.TCP, pkt.UDP, pkt.SCTP}).Draw(t, "kind")
	a := rapid.SampledFrom(slices.DeleteFunc(slices.Clone(w.askers), func(a asker) bool { return !w.mayAsk(s, a, to, kind) })).Draw(t, "asker")
	return a, a.opens(kind, port, to)
}

// mayAsk says whether a packet of that kind comes to the first node's programs at all: the node's own only where a service is concerned.
func (w *flowWorld) mayAsk(s *state.Snapshot, a asker, to netip.AddrPort, kind pkt.Kind) bool {
	if a.node == nil {
		return a.pod != nil || a.client.Is6() == to.Addr().Is6()
	}
	m := flowModel{snapshot: s, addrs: [2][]netip.Addr{w.lab.nodes[0].Addrs, w.lab.nodes[1].Addrs}}
	return m.find(to, flowProtocols[kind], a) != nil || m.expectNobodys(to.Addr()).verdict != "not a service's"
}

// flowInUse is a flow that reached a backend.
type flowInUse struct {
	asker   asker
	opens   pkt.Packet
	hit     *modelHit
	backend netip.AddrPort
}

// agrees asks with a packet that opens a flow, or one whose flow has to be opened anew, and holds what comes of it against the model.
func (w *flowWorld) agrees(t *rapid.T, tb testing.TB, m *flowModel, a asker, p pkt.Packet) (flowInUse, bool) {
	want, got := m.expect(a, p), w.lab.ask(tb, a, p)
	if got.Verdict != want.verdict || got.Reason != want.reason || want.verdict == "backend" && !slices.Contains(want.backends, got.Backend) {
		t.Fatalf("%s from %v to %v: %+v, want %s %s %v", p.Kind, p.Src, p.Dst, got, want.verdict, want.reason, want.backends)
	}
	if got.Verdict != "backend" {
		return flowInUse{}, false
	}
	if sees := m.sees(a, p, got.Backend); got.Source != sees {
		t.Fatalf("%s from %v to %v: %v sees %v, want %v", p.Kind, p.Src, p.Dst, got.Backend, got.Source, sees)
	}
	w.lab.translatedThere(tb, p, got)
	w.lab.answered(tb, p, got)
	m.note(want.hit, p, got.Backend)
	return flowInUse{a, p, want.hit, got.Backend}, true
}

// stays sends a packet of a flow and requires the backend that it has.
func (w *flowWorld) stays(t *rapid.T, tb testing.TB, f flowInUse, p pkt.Packet) {
	if got := w.lab.ask(tb, f.asker, p); got.Backend != f.backend {
		t.Fatalf("%s from %v to %v goes on to %+v, want %v", p.Kind, p.Src, p.Dst, got, f.backend)
	}
}

// goesOn turns the packet that opened a flow into one from the middle of it.
func goesOn(p pkt.Packet) pkt.Packet {
	if p.Kind == pkt.TCP {
		p.Flags, p.Seq, p.Ack = pkt.ACK|pkt.PSH, p.Seq+1, 1
	}
	p.Payload = []byte("data data")
	return p
}

// TestRandomServicesAgreeWithTheRows asks random services with random packets, changes the services under the flows, and holds every
// outcome against the model. A failure prints the seed with which rapid repeats it (-rapid.seed).
func TestRandomServicesAgreeWithTheRows(t *testing.T) {
	t.Parallel()
	w := newFlowWorld(newFlowLab(t))
	counts := map[string]int{}
	rapid.Check(t, func(r *rapid.T) {
		w.lab.afresh(t)
		s := w.draw(r, state.NewSnapshot())
		w.lab.give(t, s)
		m := &flowModel{snapshot: s, last: map[modelClient]netip.AddrPort{}}
		for i, f := range w.lab.nodes {
			m.addrs[i] = f.Addrs
		}
		var flows []flowInUse
		for i := range rapid.IntRange(8, 24).Draw(r, "packets") {
			a, p := w.question(r, s, uint16(4000+i))
			f, ok := w.agrees(r, t, m, a, p)
			counts[m.expect(a, p).verdict]++
			if ok {
				w.stays(r, t, f, goesOn(p))
				flows = append(flows, f)
			}
		}
		m.snapshot = w.draw(r, s)
		w.lab.give(t, m.snapshot)
		for _, f := range flows {
			w.afterChange(r, t, m, f, counts)
		}
		w.chooseAlike(r, t, m, flows, counts)
	})
	t.Logf("outcomes: %v", counts)
	for _, what := range []string{"backend", "refuse", "drop", "not a service's", "stayed", "moved", "by hash"} {
		if counts[what] == 0 && !t.Failed() {
			t.Errorf("no packet was %q: the test does not reach what it is about; all: %v", what, counts)
		}
	}
}

// afterChange is what a flow does once the services have changed: it stays where its backend serves, and a UDP flow, like a connection that
// is opened again, finds another backend where it does not (rows S6, U1, U2).
func (w *flowWorld) afterChange(r *rapid.T, t testing.TB, m *flowModel, f flowInUse, counts map[string]int) {
	mine := f.hit.modelPort(f.opens.Dst)
	now := m.find(f.opens.Dst, f.hit.port.Protocol, f.asker)
	// Which of two services that claim one address the flow belongs to from now on is not what this test is about.
	if f.opens.Kind == pkt.UDP && now != nil && now.modelPort(f.opens.Dst) != mine {
		counts["another's"]++
		return
	}
	if m.serves(mine, f.hit.port.Protocol, f.backend) {
		w.stays(r, t, f, goesOn(f.opens))
		counts["stayed"]++
		return
	}
	switch f.opens.Kind {
	case pkt.UDP:
		w.agrees(r, t, m, f.asker, goesOn(f.opens))
		counts["moved"]++
	case pkt.TCP:
		w.agrees(r, t, m, f.asker, f.opens)
		counts["moved"]++
	}
}

// chooseAlike asks Maglev services twice, without flows in between: the hash alone decides.
func (w *flowWorld) chooseAlike(r *rapid.T, t testing.TB, m *flowModel, flows []flowInUse, counts map[string]int) {
	for _, f := range flows {
		want := m.expect(f.asker, f.opens)
		if want.verdict != "backend" || want.hit.service.Balancing != state.BalanceMaglev || want.hit.service.AffinitySeconds != 0 {
			continue
		}
		w.lab.nodes[0].ClearFlows(t)
		first, _ := w.agrees(r, t, m, f.asker, f.opens)
		w.lab.nodes[0].ClearFlows(t)
		w.stays(r, t, first, f.opens)
		counts["by hash"]++
	}
}
