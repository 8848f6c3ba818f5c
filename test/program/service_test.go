// SPDX-License-Identifier: Apache-2.0

package program

import (
	"net/netip"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/bpf/object"
)

func TestClusterIP(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
			f.ClearFlows(t)
			backend := at(f.B.Addr(v6), podPort)
			open := fromPod(f.A, kind, at(of(vips, v6), vipPort))
			arrived := with(atPod(open, f.B), open.Src, backend)
			name := kind.String()
			redirected(t, f, name+" opens", progtest.FromPod(f.A), open, arrived)
			service := id(t, f, bpf.NewFrontendKey(kind.Proto(v6), of(vips, v6), vipPort))
			seen := bpf.FlowTCPSyn
			if kind != pkt.TCP {
				seen = 0
			}
			flowTable(t, f, map[bpf.FlowKey]bpf.Flow{
				key(open): {
					InIfindex: uint32(f.A.Ifindex), OutIfindex: uint32(f.B.Ifindex), InMac: [6]byte(f.A.MAC),
					DstMac: [6]byte(f.B.MAC), SrcMac: [6]byte(f.B.HostMAC), Action: bpf.FlowToPod, Tcp: seen,
					Flags: bpf.FlowInPod | bpf.FlowService | bpf.FlowNAT, ServiceId: service, Xlate: key(arrived),
				},
				key(arrived).Reverse(): {
					InIfindex: uint32(f.B.Ifindex), OutIfindex: uint32(f.A.Ifindex), InMac: [6]byte(f.B.MAC),
					DstMac: [6]byte(f.A.MAC), SrcMac: [6]byte(f.A.HostMAC), Action: bpf.FlowToPod,
					Flags: bpf.FlowInPod | bpf.FlowService | bpf.FlowNAT | bpf.FlowReply, ServiceId: service, Xlate: key(open).Reverse(),
				},
			})
			back := answer(arrived)
			redirected(t, f, name+" is answered", progtest.FromPod(f.B), back, with(atPod(back, f.A), open.Dst, open.Src))
			redirected(t, f, name+" goes on", progtest.FromPod(f.A), data(open), with(atPod(data(open), f.B), open.Src, backend))
		}
	})
}

// A UDP packet without checksum stays one.
func TestUDPWithoutChecksum(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	families(t, f, func(t *testing.T, v6 bool) {
		if v6 {
			t.Skip("IPv6 has no UDP without checksum (RFC 8200 section 8.1)")
		}
		// The NIC's sum of such a packet is not kept up: no kernel looks at it where the checksum is zero.
		f.Flags = 0
		open := fromPod(f.A, pkt.UDP, at(of(vips, v6), vipPort))
		open.NoChecksum = true
		arrived := with(atPod(open, f.B), open.Src, at(f.B.Addr(v6), podPort))
		redirected(t, f, "opens", progtest.FromPod(f.A), open, arrived)
		back := answer(arrived)
		redirected(t, f, "is answered", progtest.FromPod(f.B), back, with(atPod(back, f.A), open.Dst, open.Src))
	})
}

// The pod sees the client's own address; the answers leave by the NIC with the node's, one hop later.
func TestNodePort(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
			f.ClearFlows(t)
			name := kind.String()
			backend := at(f.B.Addr(v6), podPort)
			open := fromClient(kind, at(of(nodetest.NodeAddrs, v6), nodePort))
			arrived := with(atPod(open, f.B), open.Src, backend)
			redirected(t, f, name+" opens", f.FromNetdev(), open, arrived)
			back := answer(arrived)
			redirected(t, f, name+" is answered", progtest.FromPod(f.B), back, with(hop(back), open.Dst, open.Src))
			redirected(t, f, name+" goes on", f.FromNetdev(), data(open), with(atPod(data(open), f.B), open.Src, backend))
			got, _ := f.Flow(t, key(back))
			if got.Action != bpf.FlowToNetdev || got.OutIfindex != uint32(f.ClientDevice) {
				t.Errorf("%s: answers' entry: action %s by device %d, want to_netdev by %d", name, object.FlowActionName(got.Action), got.OutIfindex, f.ClientDevice)
			}
			// The same port on an address that serves no NodePorts is the host's.
			other := fromClient(kind, at(of(nodetest.ClientAddrs, v6), nodePort))
			passed(t, f, name+" to another address", f.FromNetdev(), other, other)
		}
	})
}

// TestRow19_Hairpin: a pod reaches itself and sees the service address as its client, so that the answer comes back for translation.
func TestRow19_Hairpin(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
			for _, frontend := range []netip.AddrPort{at(of(vips, v6), vipPort), at(of(nodetest.NodeAddrs, v6), nodePort)} {
				f.ClearFlows(t)
				open := fromPod(f.B, kind, frontend)
				arrived := with(atPod(open, f.B), at(frontend.Addr(), sport), at(f.B.Addr(v6), podPort))
				redirected(t, f, kind.String()+" opens", progtest.FromPod(f.B), open, arrived)
				back := answer(arrived)
				redirected(t, f, kind.String()+" is answered", progtest.FromPod(f.B), back, with(atPod(back, f.B), open.Dst, open.Src))
			}
		}
	})
}

// One client port to one backend by two services: the second gets another port, and its answers find back.
func TestPortCollision(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
			f.ClearFlows(t)
			backend := at(f.B.Addr(v6), podPort)
			first := fromPod(f.A, kind, at(of(vips, v6), vipPort))
			redirected(t, f, kind.String()+" first", progtest.FromPod(f.A), first, with(atPod(first, f.B), first.Src, backend))
			for _, to := range []netip.AddrPort{at(of(otherVIPs, v6), vipPort), backend} {
				second := fromPod(f.A, kind, to)
				r := f.Run(t, progtest.FromPod(f.A), second.Bytes())
				port := sourcePort(r.Out)
				if r.Action != progtest.Redirect || port == sport || port < 1024 {
					t.Fatalf("%s to %s: action %d, source port %d, want redirect and another unprivileged port", kind, to, r.Action, port)
				}
				arrived := with(atPod(second, f.B), at(f.A.Addr(v6), port), backend)
				redirected(t, f, kind.String()+" second again", progtest.FromPod(f.A), data(second), with(atPod(data(second), f.B), arrived.Src, backend))
				back := answer(arrived)
				redirected(t, f, kind.String()+" second answered", progtest.FromPod(f.B), back, with(atPod(back, f.A), to, second.Src))
			}
			back := answer(with(atPod(first, f.B), first.Src, backend))
			redirected(t, f, kind.String()+" first answered", progtest.FromPod(f.B), back, with(atPod(back, f.A), first.Dst, first.Src))
		}
	})
}

func sourcePort(frame []byte) uint16 {
	switch l := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.Default).TransportLayer().(type) {
	case *layers.TCP:
		return uint16(l.SrcPort)
	case *layers.UDP:
		return uint16(l.SrcPort)
	}
	return 0
}

// refusal is the golden answer to a packet for a service without endpoints: through the device that it came from, MACs exchanged.
func refusal(in pkt.Packet) []byte {
	out := pkt.Packet{SrcMAC: in.DstMAC, DstMAC: in.SrcMAC, Kind: in.Kind, Src: in.Dst, Dst: in.Src, TTL: 64}
	headers, quote := pkt.L4v4+20, pkt.L4v4+8
	if in.V6() {
		headers, quote = pkt.L4v6+20, pkt.L4v6+8
	}
	if in.Kind == pkt.TCP {
		out.Flags = pkt.RST
		if in.Flags&pkt.ACK != 0 {
			out.Seq = in.Ack
		} else {
			out.Flags |= pkt.ACK
			out.Ack = in.Seq + uint32(len(in.Payload))
			if in.Flags&pkt.SYN != 0 {
				out.Ack++
			}
			if in.Flags&pkt.FIN != 0 {
				out.Ack++
			}
		}
		return out.Bytes()[:headers]
	}
	if in.V6() {
		return out.Error(layers.ICMPv6TypeDestinationUnreachable, layers.ICMPv6CodePortUnreachable, in.Bytes()[:quote])
	}
	return out.Error(layers.ICMPv4TypeDestinationUnreachable, layers.ICMPv4CodePort, in.Bytes()[:quote])
}

func TestServiceWithoutEndpointsRefuses(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	for i, v6 := range []bool{false, true} {
		service(f, uint32(1000*i+1000), at(of(vips, v6), vipPort))
		service(f, uint32(1000*i+1600), at(of(unspecified, v6), nodePort))
	}
	tests := []struct {
		name   string
		kind   pkt.Kind
		change func(p *pkt.Packet)
	}{
		{"SYN", pkt.TCP, func(p *pkt.Packet) {}},
		{"SYN, sequence number wraps", pkt.TCP, func(p *pkt.Packet) { p.Seq = 0xffffffff }},
		{"SYN with payload", pkt.TCP, func(p *pkt.Packet) { p.Payload = []byte("fast open") }},
		{"data of a connection that nobody knows", pkt.TCP, func(p *pkt.Packet) { *p = data(*p) }},
		{"FIN without ACK", pkt.TCP, func(p *pkt.Packet) { p.Flags, p.Payload = pkt.FIN, []byte("odd") }},
		{"datagram", pkt.UDP, func(p *pkt.Packet) {}},
		{"empty datagram", pkt.UDP, func(p *pkt.Packet) { p.Payload = nil }},
		{"long datagram", pkt.UDP, func(p *pkt.Packet) { p.Payload = make([]byte, 1000) }},
		{"SCTP", pkt.SCTP, func(p *pkt.Packet) {}},
	}
	// The sum of a NIC is not kept up: the answer goes out again, where nobody asks for it.
	for _, v6 := range []bool{false, true} {
		for _, tt := range tests {
			for _, from := range []struct {
				hook progtest.Hook
				in   pkt.Packet
			}{
				{progtest.FromPod(f.A), fromPod(f.A, tt.kind, at(of(vips, v6), vipPort))},
				{progtest.FromPod(f.A), fromPod(f.A, tt.kind, at(of(nodetest.NodeAddrs, v6), nodePort))},
				{f.FromNetdev(), fromClient(tt.kind, at(of(nodetest.NodeAddrs, v6), nodePort))},
			} {
				tt.change(&from.in)
				f.Check(t, progtest.Case{
					Name: tt.name + " from " + from.in.Src.String(), Hook: from.hook, In: from.in.Bytes(),
					WantAction: progtest.Redirect, WantOut: refusal(from.in), WantDrop: "service_no_backend",
				})
			}
		}
		rst := fromPod(f.A, pkt.TCP, at(of(vips, v6), vipPort))
		rst.Flags = pkt.RST
		dropped(t, f, "a reset is not answered", progtest.FromPod(f.A), rst, "service_no_backend")
	}
	if flows := f.AllFlows(t); len(flows) != 0 {
		t.Errorf("refused packets left flows: %v", flows)
	}
}

// A TCP header with options, and IP options, do not disturb the reset.
func TestRefusalOfPacketWithOptions(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	for i, v6 := range []bool{false, true} {
		service(f, uint32(1000*i+1000), at(of(vips, v6), vipPort))
		in := fromPod(f.A, pkt.TCP, at(of(vips, v6), vipPort))
		f.Check(t, progtest.Case{
			Name: "SYN behind options", Hook: progtest.FromPod(f.A), In: pkt.WithOptions(in.Bytes(), 0),
			WantAction: progtest.Redirect, WantOut: refusal(in), WantDrop: "service_no_backend",
		})
	}
}
