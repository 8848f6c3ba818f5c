// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/link"
	"github.com/margay-cni/margay/pkg/service"
	"github.com/margay-cni/margay/pkg/state"
)

// flowLab is two nodes whose service maps hold what the agent compiles, and the shipped programs to send packets through. Packets are
// asked at the first node; the second one has the maps that its own agent would write.
type flowLab struct {
	nodes   [2]*progtest.Fixture
	compile [2]*service.Compiler
	results [2]*service.Result
	maps    [2]serviceMaps
	// hostHook is from_host at the first node: what its own sockets send to services.
	hostHook progtest.Hook
}

// labCIDRs are the ranges that cluster addresses are taken from.
var labCIDRs = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd00:96::/112")}

// The MACs of the network outside.
var labRouterMAC, labNodeMAC = net.HardwareAddr{2, 0, 0, 0, 0, 1}, net.HardwareAddr{2, 0, 0, 0, 0, 2}

func labNode(i int) string { return fmt.Sprintf("node-%d", i) }

func newFlowLab(t testing.TB) *flowLab {
	t.Helper()
	l := &flowLab{}
	_, l.nodes[0], l.nodes[1] = progtest.NewCluster(t, nodetest.ClusterOptions{Direct: true, Device: true})
	l.nodes[0].ServeHost()
	l.nodes[0].NS.Do(func() {
		device, err := net.InterfaceByName(link.ServiceDevice)
		if err != nil {
			t.Fatal(err)
		}
		l.hostHook = progtest.Hook{Program: bpf.ProgFromHost, Ifindex: device.Index}
	})
	return l
}

// afresh forgets what was compiled, all flows and all affinities. The second node gives other numbers than the first: they are its own.
func (l *flowLab) afresh(t testing.TB) {
	t.Helper()
	for i := range l.nodes {
		l.compile[i] = service.NewCompiler(labNode(i))
		l.maps[i] = serviceMaps{}
		l.nodes[i].ClearFlows(t)
		fill(t, l.nodes[i].Affinity, map[bpf.AffinityKey]bpf.Affinity{})
	}
	l.compile[1].Compile(manyServices(7))
}

// snapshot has the lab's two nodes, each in a zone of its own.
func (l *flowLab) snapshot() *state.Snapshot {
	s := state.NewSnapshot()
	for i, f := range l.nodes {
		s.Nodes[labNode(i)] = &state.Node{
			Name: labNode(i), Addresses: f.Addrs, PodCIDRs: f.PodRanges(),
			Labels: map[string]string{"topology.kubernetes.io/zone": fmt.Sprintf("zone-%d", i)},
		}
	}
	return s
}

// give compiles a snapshot for each node, and brings the kernel's maps to it as an agent does: services that lose a serving backend have
// their epoch raised.
func (l *flowLab) give(t testing.TB, s *state.Snapshot) {
	t.Helper()
	for i, f := range l.nodes {
		l.results[i] = l.compile[i].Compile(s)
		want := newServiceMaps(l.results[i], labCIDRs...)
		fill(t, f.DP.Maps.Services, want.services)
		fill(t, f.DP.Maps.Backends, want.backends)
		fill(t, f.DP.Maps.ServiceBackends, want.members)
		fill(t, f.DP.Maps.Maglev, want.maglev)
		fill(t, f.DP.Maps.SourceRanges, want.ranges)
		fill(t, f.DP.Maps.ServiceAddrs, want.addrs)
		raise := map[uint32]struct{}{}
		for m := range l.maps[i].members {
			if _, ok := want.members[m]; !ok {
				raise[m.ServiceId] = struct{}{}
			}
		}
		if err := f.DP.RaiseServiceEpochs(sortedKeys(raise)...); err != nil {
			t.Fatal(err)
		}
		l.maps[i] = want
	}
}

// fill makes the map hold exactly this.
func fill[K, V comparable](t testing.TB, m *ebpf.Map, want map[K]V) {
	t.Helper()
	var k K
	var v V
	have := map[K]V{}
	it := m.Iterate()
	for it.Next(&k, &v) {
		have[k] = v
	}
	if err := it.Err(); err != nil {
		t.Fatalf("read map %s: %v", m, err)
	}
	for k := range have {
		if _, ok := want[k]; !ok {
			if err := m.Delete(k); err != nil {
				t.Fatalf("delete from map %s: %v", m, err)
			}
		}
	}
	for k, v := range want {
		if had, ok := have[k]; ok && had == v {
			continue
		}
		if err := m.Put(k, v); err != nil {
			t.Fatalf("write map %s: %v", m, err)
		}
	}
}

// asker is who sends a packet at the first node: a pod of it, the node itself, or a client outside.
type asker struct {
	pod    *nodetest.Pod
	node   *nodetest.Node
	client netip.Addr
}

// inside says whether the asker is on the node.
func (a asker) inside() bool { return a.pod != nil || a.node != nil }

func (a asker) addr(v6 bool) netip.Addr {
	if a.pod != nil {
		return a.pod.Addr(v6)
	}
	if a.node != nil {
		return a.node.Addrs[map[bool]int{true: 1}[v6]]
	}
	return a.client
}

// opens is the first packet of a flow of the asker's.
func (a asker) opens(kind pkt.Kind, port uint16, to netip.AddrPort) pkt.Packet {
	p := pkt.Packet{
		SrcMAC: labRouterMAC, DstMAC: labNodeMAC, Kind: kind, TTL: 64, Src: netip.AddrPortFrom(a.addr(to.Addr().Is6()), port), Dst: to, Payload: []byte("margay!"),
	}
	if a.pod != nil {
		p.SrcMAC, p.DstMAC = a.pod.MAC, a.pod.HostMAC
	}
	if a.node != nil && slices.Contains(a.node.Addrs, to.Addr()) {
		// By the loopback device.
		p.SrcMAC, p.DstMAC = make(net.HardwareAddr, 6), make(net.HardwareAddr, 6)
	}
	if kind == pkt.TCP {
		p.Flags, p.Seq, p.Payload = pkt.SYN, 1000, nil
	}
	return p
}

// outcome is where a packet ended.
type outcome struct {
	// Verdict is "backend", "refuse", "drop", or "not a service's": forwarded as it is.
	Verdict string
	// Reason is the drop reason of what was refused or dropped.
	Reason string
	// Backend has got the packet, and Source is whom it sees.
	Backend, Source netip.AddrPort
	// Forwarded says that the backend's node translates.
	Forwarded bool
}

// ask sends the packet through the first node's program. What the flow's entry says is held against the packet that came out.
func (l *flowLab) ask(t testing.TB, a asker, p pkt.Packet) outcome {
	t.Helper()
	f := l.nodes[0]
	hook := f.FromNetdev()
	if a.pod != nil {
		hook = progtest.FromPod(a.pod)
	} else if a.node != nil {
		hook = l.hostHook
	}
	r := f.Run(t, hook, p.Bytes())
	for reason := range r.Drops {
		return outcome{Verdict: map[bool]string{true: "refuse", false: "drop"}[r.Action == progtest.Redirect], Reason: reason}
	}
	out := p
	entry, ok := f.Flow(t, bpf.NewFlowKey(p.Kind.Proto(p.V6()), p.Src, p.Dst))
	got := outcome{Verdict: "not a service's"}
	if ok && entry.Flags&bpf.FlowService != 0 {
		got = outcome{Verdict: "backend", Backend: ends(entry.Xlate.Dst, entry.Xlate.Dport), Source: ends(entry.Xlate.Src, entry.Xlate.Sport)}
		out.Src, out.Dst = got.Source, got.Backend
		if entry.BackendPort != 0 {
			// Another node translates.
			out.Src, out.Dst = p.Src, p.Dst
			got.Backend, got.Forwarded = ends(entry.Backend, entry.BackendPort), true
		}
	}
	if src, dst := endsOf(t, r.Out); r.Action == progtest.Shot || src != out.Src || dst != out.Dst {
		t.Fatalf("from %v to %v: action %d, the packet that came out is from %v to %v, want from %v to %v", p.Src, p.Dst, r.Action, src, dst, out.Src, out.Dst)
	}
	if err := pkt.VerifyChecksums(r.Out); err != nil {
		t.Fatalf("from %v to %v: %v\n%s", p.Src, p.Dst, err, pkt.Dump(r.Out))
	}
	return got
}

// translatedThere holds what the second node makes of a packet that the first one has forwarded, and chosen a backend for, against that
// choice: the same backend, or one with the same hash.
func (l *flowLab) translatedThere(t testing.TB, p pkt.Packet, got outcome) {
	t.Helper()
	if !got.Forwarded {
		return
	}
	proto := p.Kind.Proto(p.V6())
	s, ok := l.maps[1].services[bpf.NewFrontendKey(proto, p.Dst.Addr(), p.Dst.Port())]
	if !ok {
		nodePort := netip.IPv4Unspecified()
		if p.V6() {
			nodePort = netip.IPv6Unspecified()
		}
		s = l.maps[1].services[bpf.NewFrontendKey(proto, nodePort, p.Dst.Port())]
	}
	b, ok := l.maps[1].backends[bpf.BackendKey{List: bpf.BackendByHash | s.Id, Slot: bpf.BackendHash(got.Backend)}]
	if !ok || b.AddrPort() != got.Backend && bpf.BackendHash(b.AddrPort()) != bpf.BackendHash(got.Backend) {
		t.Fatalf("from %v to %v: the first node chose %v, the second finds %v, %v", p.Src, p.Dst, got.Backend, b.AddrPort(), ok)
	}
}

// answered sends the backend's answer back, from a pod of the first node, and checks that it reaches the asker in the frontend's name.
func (l *flowLab) answered(t testing.TB, p pkt.Packet, got outcome) {
	t.Helper()
	f := l.nodes[0]
	for _, pod := range []*nodetest.Pod{f.A, f.B} {
		if got.Verdict != "backend" || pod.Addr(p.V6()) != got.Backend.Addr() {
			continue
		}
		arrived := p
		arrived.SrcMAC, arrived.DstMAC, arrived.Src, arrived.Dst = pod.HostMAC, pod.MAC, got.Source, got.Backend
		r := f.Run(t, progtest.FromPod(pod), arrived.Reply().Bytes())
		if src, dst := endsOf(t, r.Out); r.Action != progtest.Redirect || src != p.Dst || dst != p.Src {
			t.Fatalf("answer of %v to %v, who asked %v: action %d, drops %v, it is from %v to %v", got.Backend, p.Src, p.Dst, r.Action, r.Drops, src, dst)
		}
	}
}

func ends(a bpf.Addr, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(a.Netip(), bpf.Port16(port))
}

// endsOf reads a frame's addresses and ports.
func endsOf(t testing.TB, frame []byte) (src, dst netip.AddrPort) {
	t.Helper()
	p := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.DecodeOptions{Lazy: true, NoCopy: true})
	if p.NetworkLayer() == nil || p.TransportLayer() == nil {
		t.Fatalf("no addresses or ports in\n%s", pkt.Dump(frame))
	}
	network, transport := p.NetworkLayer().NetworkFlow(), p.TransportLayer().TransportFlow()
	end := func(address, port gopacket.Endpoint) netip.AddrPort {
		a, _ := netip.AddrFromSlice(address.Raw())
		raw := port.Raw()
		return netip.AddrPortFrom(a, uint16(raw[0])<<8|uint16(raw[1]))
	}
	return end(network.Src(), transport.Src()), end(network.Dst(), transport.Dst())
}
