// SPDX-License-Identifier: Apache-2.0

package program

import (
	"flag"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
	"github.com/margay-cni/margay/pkg/bpf"
)

// TestMain lets more tests run at a time than there are processors: making a node is mostly waiting for the kernel.
func TestMain(m *testing.M) {
	flag.Parse()
	if f := flag.Lookup("test.parallel"); f.Value.String() == f.DefValue {
		if err := f.Value.Set("8"); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

const (
	sport    = 4000  // clients'
	podPort  = 8080  // servers'
	vipPort  = 80    // ClusterIP's
	nodePort = 30080 // NodePort's
)

var (
	vips        = []netip.Addr{netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("fd00:96::10")}
	otherVIPs   = []netip.Addr{netip.MustParseAddr("10.96.0.11"), netip.MustParseAddr("fd00:96::11")}
	unspecified = []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}

	// MACs of the network outside; the programs must not care.
	routerMAC = net.HardwareAddr{2, 0, 0, 0, 0, 1}
	nodeMAC   = net.HardwareAddr{2, 0, 0, 0, 0, 2}
)

// of picks the address of one family from a pair.
func of(pair []netip.Addr, v6 bool) netip.Addr {
	if v6 {
		return pair[1]
	}
	return pair[0]
}

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

// families runs f for IPv4 and IPv6, each with packets as virtual devices and, where the kernel can, as NICs deliver them (CHECKSUM_NONE,
// CHECKSUM_COMPLETE). Every run starts without flows.
func families(t *testing.T, f *progtest.Fixture, test func(t *testing.T, v6 bool)) {
	for _, v6 := range []bool{false, true} {
		for _, complete := range []bool{false, true} {
			name := map[bool]string{false: "IPv4", true: "IPv6"}[v6] + map[bool]string{true: ", NIC's sum"}[complete]
			t.Run(name, func(t *testing.T) {
				f.Flags = 0
				if complete {
					f.RequireChecksumComplete(t)
				}
				f.ClearFlows(t)
				test(t, v6)
			})
		}
	}
}

// kinds are what opens a flow and can be translated, TCP with its SYN.
var kinds = []pkt.Kind{pkt.TCP, pkt.UDP, pkt.SCTP, pkt.Ping}

// fromPod is the packet that opens a flow from a pod.
func fromPod(p *nodetest.Pod, kind pkt.Kind, dst netip.AddrPort) pkt.Packet {
	out := pkt.Packet{
		SrcMAC: p.MAC, DstMAC: p.HostMAC, Kind: kind, TTL: 64, Src: at(p.Addr(dst.Addr().Is6()), sport), Dst: dst, Payload: []byte("margay!"),
	}
	if kind == pkt.TCP {
		out.Flags, out.Seq, out.Payload = pkt.SYN, 1000, nil
	}
	return out
}

// fromClient is the packet that opens a flow from outside.
func fromClient(kind pkt.Kind, dst netip.AddrPort) pkt.Packet {
	out := fromPod(&nodetest.Pod{Addrs: nodetest.ClientAddrs}, kind, dst)
	out.SrcMAC, out.DstMAC = routerMAC, nodeMAC
	return out
}

// data turns a packet of a flow into one from the middle of it.
func data(p pkt.Packet) pkt.Packet {
	if p.Kind == pkt.TCP {
		p.Flags, p.Seq, p.Ack = pkt.ACK|pkt.PSH, p.Seq+1, 1
	}
	p.Payload = []byte("data data")
	return p
}

// hop is the packet one hop later.
func hop(p pkt.Packet) pkt.Packet {
	p.TTL--
	return p
}

// atPod is the packet one hop later, as it arrives at the pod's device.
func atPod(p pkt.Packet, to *nodetest.Pod) pkt.Packet {
	p.SrcMAC, p.DstMAC = to.HostMAC, to.MAC
	return hop(p)
}

// with gives the packet other ends. Ping keeps its identifier, whatever the ports.
func with(p pkt.Packet, src, dst netip.AddrPort) pkt.Packet {
	if p.Kind == pkt.Ping || p.Kind == pkt.Pong {
		src = at(src.Addr(), p.Src.Port())
	}
	p.Src, p.Dst = src, dst
	return p
}

// answer is what the pod's server sends back for what arrived at it.
func answer(arrived pkt.Packet) pkt.Packet {
	return arrived.Reply()
}

// key is the flow key of a packet.
func key(p pkt.Packet) bpf.FlowKey {
	dst := p.Dst
	if p.Kind == pkt.Ping || p.Kind == pkt.Pong {
		dst = at(dst.Addr(), p.Src.Port())
	}
	return bpf.NewFlowKey(p.Kind.Proto(p.V6()), p.Src, dst)
}

// redirected checks a packet that the program sends on by itself.
func redirected(t *testing.T, f *progtest.Fixture, name string, h progtest.Hook, in, want pkt.Packet) {
	t.Helper()
	f.Check(t, progtest.Case{Name: name, Hook: h, In: in.Bytes(), WantAction: progtest.Redirect, WantOut: want.Bytes()})
}

// passed checks a packet that goes, or goes on, to the stack.
func passed(t *testing.T, f *progtest.Fixture, name string, h progtest.Hook, in, want pkt.Packet) {
	t.Helper()
	f.Check(t, progtest.Case{Name: name, Hook: h, In: in.Bytes(), WantAction: progtest.OK, WantOut: want.Bytes()})
}

// dropped checks a packet that is dropped for one reason.
func dropped(t *testing.T, f *progtest.Fixture, name string, h progtest.Hook, in pkt.Packet, reason string) {
	t.Helper()
	f.Check(t, progtest.Case{Name: name, Hook: h, In: in.Bytes(), WantAction: progtest.Shot, WantDrop: reason})
}

// service adds a service with these backends for TCP, UDP and SCTP; its id is proto plus base.
func service(f *progtest.Fixture, base uint32, frontend netip.AddrPort, backends ...netip.AddrPort) {
	for _, k := range []pkt.Kind{pkt.TCP, pkt.UDP, pkt.SCTP} {
		proto := k.Proto(false)
		f.AddService(base+uint32(proto), bpf.NewFrontendKey(proto, frontend.Addr(), frontend.Port()), backends...)
	}
}

// servicesOn adds the ClusterIP and the NodePort of both families with the pod as their only backend.
func servicesOn(f *progtest.Fixture, p *nodetest.Pod) {
	for i, v6 := range []bool{false, true} {
		service(f, uint32(1000*i+1000), at(of(vips, v6), vipPort), at(p.Addr(v6), podPort))
		service(f, uint32(1000*i+1300), at(of(otherVIPs, v6), vipPort), at(p.Addr(v6), podPort))
		service(f, uint32(1000*i+1600), at(of(unspecified, v6), nodePort), at(p.Addr(v6), podPort))
	}
}

// id finds the service id of a frontend.
func id(t *testing.T, f *progtest.Fixture, k bpf.FrontendKey) uint32 {
	t.Helper()
	var s bpf.Service
	if err := f.DP.Maps.Services.Lookup(&k, &s); err != nil {
		t.Fatal(err)
	}
	return s.Id
}

// must fails the test where a map or a namespace refuses.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
