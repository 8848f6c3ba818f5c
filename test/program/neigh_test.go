// SPDX-License-Identifier: Apache-2.0

package program

import (
	"net"
	"net/netip"
	"testing"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
	"github.com/margay-cni/margay/pkg/bpf"
)

// A pod that asks for any neighbour gets its host-side device's MAC.
func TestNeighboursAreAnswered(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	own := f.A.Addr(false)
	for _, target := range []netip.Addr{f.B.Addr(false), netip.MustParseAddr("169.254.1.1")} {
		f.Check(t, progtest.Case{
			Name: "ARP for " + target.String(), Hook: progtest.FromPod(f.A), In: pkt.ARPRequest(f.A.MAC, own, target),
			WantAction: progtest.Redirect, WantOut: pkt.ARPReply(f.A.HostMAC, target, f.A.MAC, own),
		})
	}
	own = f.A.Addr(true)
	for _, target := range []netip.Addr{f.B.Addr(true), netip.MustParseAddr("fe80::1")} {
		for _, option := range []bool{false, true} {
			f.Check(t, progtest.Case{
				Name: "ND for " + target.String(), Hook: progtest.FromPod(f.A), In: pkt.Solicitation(f.A.MAC, own, target, option),
				WantAction: progtest.Redirect, WantOut: pkt.Advertisement(f.A.HostMAC, target, f.A.MAC, own),
			})
		}
	}
}

// The pod's answers to its node pass; the node's own questions pass too.
func TestNeighboursOfTheNode(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	node4, node6 := nodetest.NodeAddrs[0], nodetest.NodeAddrs[1]
	for _, c := range []progtest.Case{
		{Name: "pod's ARP reply", Hook: progtest.FromPod(f.A), In: pkt.ARPReply(f.A.MAC, f.A.Addr(false), f.A.HostMAC, node4)},
		{Name: "pod's advertisement", Hook: progtest.FromPod(f.A), In: pkt.Advertisement(f.A.MAC, f.A.Addr(true), f.A.HostMAC, node6)},
		{Name: "node's ARP request", Hook: progtest.ToPod(f.A), In: pkt.ARPRequest(f.A.HostMAC, node4, f.A.Addr(false))},
		{Name: "node's solicitation", Hook: progtest.ToPod(f.A), In: pkt.Solicitation(f.A.HostMAC, node6, f.A.Addr(true), true)},
	} {
		f.Check(t, c)
	}
}

// An interface that another plugin made keeps its own neighbours, behind the same checks.
func TestNeighboursOfAdoptedPod(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	f.Register(f.A, bpf.Endpoint{Identity: bpf.IdentityPodUnknown, Flags: bpf.EndpointAdopted})
	for _, c := range []progtest.Case{
		{Name: "ARP request", Hook: progtest.FromPod(f.A), In: pkt.ARPRequest(f.A.MAC, f.A.Addr(false), f.B.Addr(false))},
		{Name: "solicitation", Hook: progtest.FromPod(f.A), In: pkt.Solicitation(f.A.MAC, f.A.Addr(true), f.B.Addr(true), true)},
		{
			Name: "ARP request of another", Hook: progtest.FromPod(f.A), In: pkt.ARPRequest(f.A.MAC, f.B.Addr(false), f.A.Addr(false)),
			WantAction: progtest.Shot, WantDrop: "invalid_arp",
		},
		{
			Name: "advertisement of another's address", Hook: progtest.FromPod(f.A),
			In:         pkt.With(pkt.Advertisement(f.A.MAC, f.A.Addr(true), f.A.HostMAC, nodetest.NodeAddrs[1]), pkt.L4v6+8, addrBytes(f.B.Addr(true))...),
			WantAction: progtest.Shot, WantDrop: "invalid_nd",
		},
	} {
		f.Check(t, c)
	}
}

// neighbourDrops are the cases of ARP and ND for TestDropReasons.
func neighbourDrops(t *testing.T, f *progtest.Fixture, seen seenReasons) {
	t.Helper()
	own4, own6 := f.A.Addr(false), f.A.Addr(true)
	request := pkt.ARPRequest(f.A.MAC, own4, f.B.Addr(false))
	solicitation := pkt.Solicitation(f.A.MAC, own6, f.B.Addr(true), true)
	advertisement := pkt.Advertisement(f.A.MAC, own6, f.A.HostMAC, nodetest.NodeAddrs[1])
	other := net.HardwareAddr{2, 0, 0, 0, 0, 9}
	for _, c := range []struct {
		name, reason string
		frame        []byte
	}{
		{"ARP cut short", "truncated", request[:pkt.L3+27]},
		{"ARP over something else", "invalid_arp", pkt.With(request, pkt.L3+1, 6)},
		{"ARP for IPv6", "invalid_arp", pkt.With(request, pkt.L3+2, 0x86, 0xdd)},
		{"ARP with long MACs", "invalid_arp", pkt.With(request, pkt.L3+4, 8)},
		{"ARP with long addresses", "invalid_arp", pkt.With(request, pkt.L3+5, 16)},
		{"reverse ARP", "invalid_arp", pkt.With(request, pkt.L3+7, 3)},
		{"ARP from another MAC", "invalid_arp", pkt.With(request, pkt.L3+8, other...)},
		{"ARP from another pod's address", "invalid_arp", pkt.ARPRequest(f.A.MAC, f.B.Addr(false), own4)},
		{"ARP announcement", "invalid_arp", pkt.ARPRequest(f.A.MAC, own4, own4)},
		{"ARP reply for another pod", "invalid_arp", pkt.ARPReply(f.A.MAC, f.B.Addr(false), f.A.HostMAC, nodetest.NodeAddrs[0])},
		{"solicitation cut short", "invalid_nd", solicitation[:pkt.L4v6+23]},
		{"solicitation from another MAC", "invalid_nd", pkt.With(solicitation, 6, other...)},
		{"solicitation from another pod's address", "invalid_nd", pkt.Solicitation(f.A.MAC, f.B.Addr(true), own6, true)},
		{"duplicate address detection", "invalid_nd", pkt.Solicitation(f.A.MAC, netip.IPv6Unspecified(), own6, false)},
		{"solicitation of the own address", "invalid_nd", pkt.Solicitation(f.A.MAC, own6, own6, true)},
		{"solicitation behind an extension header", "invalid_nd", pkt.WithOptions(solicitation, 0)},
		{"advertisement from another pod's address", "invalid_nd", pkt.Advertisement(f.A.MAC, f.B.Addr(true), f.A.HostMAC, nodetest.NodeAddrs[1])},
		{"advertisement of another pod's address", "invalid_nd", pkt.With(advertisement, pkt.L4v6+8, addrBytes(f.B.Addr(true))...)},
		{"router solicitation", "invalid_nd", pkt.RouterSolicitation(f.A.MAC, own6)},
		{"redirect", "invalid_nd", pkt.With(solicitation, pkt.L4v6, 137)},
		{"router advertisement", "invalid_nd", pkt.With(solicitation, pkt.L4v6, 134)},
	} {
		seen[c.reason] = true
		f.Check(t, progtest.Case{Name: c.name, Hook: progtest.FromPod(f.A), In: c.frame, WantAction: progtest.Shot, WantDrop: c.reason})
	}
}
