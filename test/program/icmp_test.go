// SPDX-License-Identifier: Apache-2.0

package program

import (
	"net/netip"
	"testing"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
	"github.com/margay-cni/margay/pkg/bpf"
)

// An ICMP error takes the way of the flow that it is about, back to who sent the packet.
func TestICMPErrors(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	families(t, f, func(t *testing.T, v6 bool) {
		open := fromPod(f.A, pkt.UDP, at(f.B.Addr(v6), podPort))
		redirected(t, f, "opens", progtest.FromPod(f.A), open, atPod(open, f.B))
		in := quotePort(atPod(open, f.B), f.B.Addr(v6), f.B.MAC, f.B.HostMAC)
		f.Check(t, progtest.Case{
			Name: "from the pod", Hook: progtest.FromPod(f.B), In: in, WantAction: progtest.Redirect, WantOut: oneHop(in, f.A),
		})

		outside := fromPod(f.A, pkt.UDP, at(of(nodetest.ClientAddrs, v6), 53))
		redirected(t, f, "opens to outside", progtest.FromPod(f.A), outside, hop(outside))
		router := map[bool]string{false: "192.0.2.254", true: "2001:db8:1::254"}[v6]
		in = quotePort(hop(outside), netip.MustParseAddr(router), routerMAC, nodeMAC)
		f.Check(t, progtest.Case{
			Name: "from a router outside", Hook: f.FromNetdev(), In: in, WantAction: progtest.Redirect, WantOut: oneHop(in, f.A),
		})
	})
}

// An error cannot carry a pod's packets past the source check and policy: its own addresses must be the sender's and the quoted
// packet's sender.
func TestICMPErrorsAreNoTunnel(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	families(t, f, func(t *testing.T, v6 bool) {
		open := fromClient(pkt.UDP, at(f.B.Addr(v6), podPort))
		redirected(t, f, "opens", f.FromNetdev(), open, atPod(open, f.B))
		arrived := atPod(open, f.B)
		valid := quotePort(arrived, f.B.Addr(v6), f.B.MAC, f.B.HostMAC)
		src, dst := pkt.L3+12, pkt.L3+16
		forged, elsewhere := f.A.Addr(v6).AsSlice(), netip.MustParseAddr("198.51.100.7").AsSlice()
		if v6 {
			src, dst = pkt.L3+8, pkt.L3+24
			elsewhere = netip.MustParseAddr("2001:db8:7::7").AsSlice()
		}
		for _, c := range []struct {
			name, reason string
			frame        []byte
		}{
			{"from another address", "spoofed_address", pkt.With(valid, src, forged...)},
			{"to somebody who has sent nothing", "no_flow", pkt.With(valid, dst, elsewhere...)},
			{"from another MAC", "no_flow", pkt.With(valid, 6, routerMAC...)},
		} {
			f.Check(t, progtest.Case{Name: c.name, Hook: progtest.FromPod(f.B), In: c.frame, WantAction: progtest.Shot, WantDrop: c.reason})
		}
		out := pkt.With(valid, 0)
		lowerTTL(out)
		f.Check(t, progtest.Case{Name: "valid", Hook: progtest.FromPod(f.B), In: valid, WantAction: progtest.Redirect, WantOut: out})
	})
}

// What from_netdev does not know it leaves to the stack, which routes it to the pod. Between two pods of the node, or of two nodes through
// the overlay, there is nobody who could have sent an error from outside.
func TestICMPErrorsFromOutsideByTheStack(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	byStack := progtest.Hook{Program: bpf.ProgToPod, Ifindex: f.A.Ifindex, Ingress: f.ClientDevice}
	families(t, f, func(t *testing.T, v6 bool) {
		router := netip.MustParseAddr(map[bool]string{false: "192.0.2.254", true: "2001:db8:1::254"}[v6])
		inside := fromPod(f.A, pkt.UDP, at(f.B.Addr(v6), podPort))
		redirected(t, f, "opens to a pod", progtest.FromPod(f.A), inside, atPod(inside, f.B))
		in := quotePort(hop(inside), router, f.A.HostMAC, f.A.MAC)
		f.Check(t, progtest.Case{Name: "about it", Hook: byStack, In: in, WantAction: progtest.Shot, WantDrop: "no_flow"})
		f.Check(t, progtest.Case{Name: "about it, from the node itself", Hook: progtest.ToPod(f.A), In: in, WantAction: progtest.OK, WantOut: in})

		outside := fromPod(f.A, pkt.UDP, at(of(nodetest.ClientAddrs, v6), 53))
		redirected(t, f, "opens to outside", progtest.FromPod(f.A), outside, hop(outside))
		in = quotePort(hop(outside), router, f.A.HostMAC, f.A.MAC)
		f.Check(t, progtest.Case{Name: "about it", Hook: byStack, In: in, WantAction: progtest.OK, WantOut: in})
	})
}

// oneHop is the frame as it arrives at the pod.
func oneHop(frame []byte, to *nodetest.Pod) []byte {
	out := pkt.With(pkt.With(frame, 0, to.MAC...), 6, to.HostMAC...)
	lowerTTL(out)
	return out
}

// lowerTTL takes one hop off, and puts it on the IPv4 header's checksum (RFC 1624).
func lowerTTL(frame []byte) {
	if frame[pkt.L3]>>4 == 6 {
		frame[pkt.L3+7]--
		return
	}
	frame[pkt.L3+8]--
	sum := uint32(frame[pkt.L3+10])<<8 + uint32(frame[pkt.L3+11]) + 0x100
	sum += sum >> 16
	frame[pkt.L3+10], frame[pkt.L3+11] = byte(sum>>8), byte(sum)
}
