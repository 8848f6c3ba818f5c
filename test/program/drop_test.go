// SPDX-License-Identifier: Apache-2.0

package program

import (
	"maps"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/gopacket/gopacket/layers"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/bpf/object"
)

// notByOnePacket lists the reasons that no case below provokes, and why.
var notByOnePacket = map[string]string{
	"policy_pending":       "TestPendingPolicy",
	"source_is_local":      "TestFlowBelongsToItsSender, TestFromNetdev",
	"flow_table":           "the kernel has to run out of memory",
	"redirect":             "reserved: the kernel redirects after the program has ended",
	"invalid_config":       "arrays of one entry always have it",
	"nat_collision":        "a random choice of ports would have to find each of them taken",
	"nat":                  "the kernel has to refuse to write the packet",
	"service_unknown_port": "TestV9_UnknownPortAndUnallocatedAddress",
	"service_unallocated":  "TestV9_UnknownPortAndUnallocatedAddress",
	"source_range":         "TestV10_SourceRanges",
	"overlay_source":       "TestRow20_TunnelSpoofing",
	"overlay_vni":          "TestRow20_TunnelSpoofing",
	"not_encapsulated":     "TestNotEncapsulated",
	"no_source_port":       "TestMasqueradeWhenEveryPortIsUsed, TestMasqueradeExhaustion",
	"no_egress_address":    "TestMasqueradeWithoutEgressAddress",
	"too_big":              "TestRow12_TooBig",
	"fragment_lost":        "TestHeldFragmentIsLost",
}

// A mutation is a valid packet with one field changed, and what the drop must be called.
type mutation struct {
	name   string
	reason string
	frame  func(valid pkt.Packet) []byte
}

// set changes bytes of the valid frame.
func set(off int, value ...byte) func(pkt.Packet) []byte {
	return func(p pkt.Packet) []byte { return pkt.With(p.Bytes(), off, value...) }
}

// change changes a field of the valid packet, whose checksums follow.
func change(f func(p *pkt.Packet)) func(pkt.Packet) []byte {
	return func(p pkt.Packet) []byte { f(&p); return p.Bytes() }
}

// cut ends the frame after n bytes.
func cut(n int) func(pkt.Packet) []byte {
	return func(p pkt.Packet) []byte { return p.Bytes()[:n] }
}

var mac6 = netip.MustParseAddr("::ffff:10.244.0.10") // IPv4-mapped

// malformed are the mutations that from_pod and to_pod drop alike, by family: the packet itself is wrong. (A frame without a whole IP
// header is none of them: newer kernels do not run a program on it.)
func malformed(v6 bool) []mutation {
	both := []mutation{
		{"another EtherType", "unknown_ethertype", set(12, 0x88, 0xcc)},
		{"a VLAN tag", "unknown_ethertype", set(12, 0x81, 0x00)},
	}
	if v6 {
		return append(both, []mutation{
			{"version 5", "truncated", set(pkt.L3, 0x50)},
			{"no whole TCP header", "truncated", cut(pkt.L4v6 + 19)},
			{"extension header beyond the end", "truncated", func(p pkt.Packet) []byte {
				return pkt.With(pkt.WithOptions(p.Bytes(), 0), pkt.L4v6+1, 20)
			}},
			{"first fragment without a whole TCP header", "fragment", tinyFirst},
			{"encryption header", "extension_header", set(pkt.L3+6, 50)},
			{"two fragment headers", "extension_header", func(p pkt.Packet) []byte {
				first := pkt.Fragment(p.Bytes(), 1, 24)[0]
				return pkt.WithOptions(first, 44)
			}},
			{"later fragment of an unknown protocol", "extension_header", func(p pkt.Packet) []byte {
				return pkt.With(pkt.Fragment(p.Bytes(), 1, 8)[1], pkt.L4v6, 47)
			}},
			{"unknown protocol", "extension_header", set(pkt.L3+6, 47)},
			{"ICMP over IPv6", "extension_header", set(pkt.L3+6, 1)},
			{"no next header", "extension_header", set(pkt.L3+6, 59)},
			{"five extension headers", "extension_header", func(p pkt.Packet) []byte {
				frame := p.Bytes()
				for range 5 {
					frame = pkt.WithOptions(frame, 60)
				}
				return frame
			}},
			{"multicast", "multicast", change(func(p *pkt.Packet) { p.Dst = at(netip.MustParseAddr("ff02::1:2"), 547) })},
			{"IPv4-mapped destination", "spoofed_address", set(pkt.L3+24, addrBytes(mac6)...)},
			{"multicast listener report", "icmp_type", icmp(143)},
			{"node information query", "icmp_type", icmp(139)},
			{"echo reply that nobody asked for", "no_flow", change(func(p *pkt.Packet) { p.Kind = pkt.Pong })},
			{"error about a packet that nobody sent", "no_flow", func(p pkt.Packet) []byte { return p.Error(1, 4, p.Reply().Bytes()) }},
		}...)
	}
	return append(both, []mutation{
		{"version 5", "truncated", set(pkt.L3, 0x55)},
		{"header of four words", "truncated", set(pkt.L3, 0x44)},
		{"header longer than the packet", "truncated", set(pkt.L3, 0x4f)},
		{"no whole TCP header", "truncated", cut(pkt.L4v4 + 19)},
		{"GRE", "unknown_protocol", set(pkt.L3+9, 47)},
		{"ICMPv6 over IPv4", "unknown_protocol", set(pkt.L3+9, 58)},
		{"first fragment without a whole TCP header", "fragment", tinyFirst},
		{"later fragment of an unknown protocol", "unknown_protocol", func(p pkt.Packet) []byte {
			return pkt.With(pkt.Fragment(p.Bytes(), 1, 8)[1], pkt.L3+9, 47)
		}},
		{"multicast", "multicast", change(func(p *pkt.Packet) { p.Dst = at(netip.MustParseAddr("224.0.0.251"), 5353) })},
		{"broadcast", "multicast", change(func(p *pkt.Packet) { p.Dst = at(netip.MustParseAddr("255.255.255.255"), 67) })},
		{"timestamp request", "icmp_type", icmp(13)},
		{"redirect", "icmp_type", icmp(5)},
		{"echo reply that nobody asked for", "no_flow", change(func(p *pkt.Packet) { p.Kind = pkt.Pong })},
		{"error about a packet that nobody sent", "no_flow", func(p pkt.Packet) []byte { return p.Error(3, 3, p.Reply().Bytes()) }},
	}...)
}

// tinyFirst is the packet's first fragment, which ends within the TCP header. A driver has padded it.
func tinyFirst(p pkt.Packet) []byte {
	return append(pkt.Fragment(p.Bytes(), 1, 16)[0], make([]byte, 64)...)
}

// icmp makes the packet an ICMP or ICMPv6 message of a type.
func icmp(typ byte) func(pkt.Packet) []byte {
	return func(p pkt.Packet) []byte {
		p.Kind = pkt.Ping
		l4 := pkt.L4v4
		if p.V6() {
			l4 = pkt.L4v6
		}
		return pkt.With(p.Bytes(), l4, typ)
	}
}

func addrBytes(a netip.Addr) []byte {
	b := a.As16()
	return b[:]
}

// seenReasons collects what the cases provoke.
type seenReasons map[string]bool

func (s seenReasons) run(t *testing.T, f *progtest.Fixture, hook progtest.Hook, valid pkt.Packet, mutations []mutation) {
	t.Helper()
	for _, m := range mutations {
		s[m.reason] = true
		f.Check(t, progtest.Case{Name: m.name, Hook: hook, In: m.frame(valid), WantAction: progtest.Shot, WantDrop: m.reason})
	}
}

func TestDropReasons(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	f.IdentifyPod(f.A, identityA, bpf.PolicyNone, bpf.PolicyNone)
	f.IdentifyPod(f.B, identityB, bpf.PolicyNone, isolated)
	loopback := []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}
	unreachable := []netip.Addr{netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("2001:db8:dead::1")}
	seen := seenReasons{}
	for i, v6 := range []bool{false, true} {
		f.AllowPort(isolated, bpf.Ingress, identityA, pkt.TCP.Proto(v6), podPort, rule)
		service(f, uint32(1000*i+1000), at(of(vips, v6), vipPort), at(f.B.Addr(v6), podPort))
		service(f, uint32(1000*i+1400), at(of(vips, v6), 1))
		f.Put(f.DP.Maps.Services, bpf.NewFrontendKey(pkt.TCP.Proto(v6), of(vips, v6), 2), bpf.Service{Id: 9, Flags: bpf.ServiceDropInternal})
		blackhole(t, f, of(unreachable, v6))

		valid := fromPod(f.A, pkt.TCP, at(f.B.Addr(v6), podPort))
		seen.run(t, f, progtest.FromPod(f.A), valid, malformed(v6))
		seen.run(t, f, progtest.ToPod(f.B), valid, malformed(v6))
		seen.run(t, f, progtest.FromPod(f.A), valid, []mutation{
			{"another pod's address", "spoofed_address", change(func(p *pkt.Packet) { p.Src = at(f.B.Addr(v6), sport) })},
			{"the node's address", "spoofed_address", change(func(p *pkt.Packet) { p.Src = at(of(nodetest.NodeAddrs, v6), sport) })},
			{"an address of nobody", "spoofed_address", change(func(p *pkt.Packet) { p.Src = at(of(unreachable, v6), sport) })},
			{"another MAC", "spoofed_mac", change(func(p *pkt.Packet) { p.SrcMAC = routerMAC })},
			{"a port that policy does not allow", "policy", change(func(p *pkt.Packet) { p.Dst = at(p.Dst.Addr(), podPort+1) })},
			{"a reset for a service without endpoints", "service_no_backend", change(func(p *pkt.Packet) { p.Dst, p.Flags = at(of(vips, v6), 1), pkt.RST })},
			{"a service without endpoints here", "service_no_local", change(func(p *pkt.Packet) { p.Dst = at(of(vips, v6), 2) })},
			{"an unreachable address", "no_route", change(func(p *pkt.Packet) { p.Dst = at(of(unreachable, v6), 443) })},
			{"the node's loopback address", "no_route", change(func(p *pkt.Packet) { p.Dst = at(of(loopback, v6), 443) })},
		})
	}
	neighbourDrops(t, f, seen)

	reasons, err := object.DropReasons()
	must(t, err)
	for _, r := range reasons {
		name := object.DropReasonName(r)
		if why := notByOnePacket[name]; !seen[name] && why == "" {
			t.Errorf("no packet provokes the drop reason %s, and notByOnePacket does not say why", name)
		} else if seen[name] && why != "" {
			t.Errorf("a packet provokes the drop reason %s: take it out of notByOnePacket", name)
		}
		delete(seen, name)
	}
	if len(seen) != 0 {
		t.Errorf("reasons that do not exist: %v", slices.Sorted(maps.Keys(seen)))
	}
}

// blackhole adds a route that leads nowhere to the node.
func blackhole(t *testing.T, f *progtest.Fixture, a netip.Addr) {
	t.Helper()
	f.NS.Do(func() {
		must(t, netlink.RouteAdd(&netlink.Route{
			Dst: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}, Type: unix.RTN_BLACKHOLE,
		}))
	})
}

// from_netdev passes what is not ours as it is, however odd, and counts nothing.
func TestFromNetdev(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	for _, v6 := range []bool{false, true} {
		valid := fromClient(pkt.TCP, at(f.B.Addr(v6), podPort))
		for _, m := range malformed(v6) {
			if m.name == "echo reply that nobody asked for" {
				continue // it is for a pod
			}
			f.Check(t, progtest.Case{Name: m.name, Hook: f.FromNetdev(), In: m.frame(valid), WantAction: progtest.OK})
		}
		dropped(t, f, "echo reply to a pod that did not ask", f.FromNetdev(), fromClient(pkt.Pong, at(f.B.Addr(v6), 0)), "no_flow")
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP, pkt.SCTP, pkt.Ping, pkt.Pong} {
			host := fromClient(kind, at(of(nodetest.NodeAddrs, v6), 22))
			passed(t, f, "to the node", f.FromNetdev(), host, host)
		}
		for name, src := range map[string]netip.Addr{"a pod": f.A.Addr(v6), "the node": of(nodetest.NodeAddrs, v6)} {
			forged := with(valid, at(src, sport), valid.Dst)
			dropped(t, f, "from "+name+", it says", f.FromNetdev(), forged, "source_is_local")
			// One MAC at both ends is how the node marks what it has translated: for itself, but never from itself.
			forged = with(fromClient(pkt.UDP, at(of(nodetest.NodeAddrs, v6), 22)), at(src, sport), at(of(nodetest.NodeAddrs, v6), 22))
			forged.SrcMAC = forged.DstMAC
			dropped(t, f, "translated already, from "+name+", it says", f.FromNetdev(), forged, "source_is_local")
		}
	}
	arp := pkt.ARPRequest(routerMAC, nodetest.ClientAddrs[0], nodetest.NodeAddrs[0])
	f.Check(t, progtest.Case{Name: "ARP", Hook: f.FromNetdev(), In: arp, WantAction: progtest.OK})
	nd := pkt.Solicitation(routerMAC, nodetest.ClientAddrs[1], nodetest.NodeAddrs[1], true)
	f.Check(t, progtest.Case{Name: "ND", Hook: f.FromNetdev(), In: nd, WantAction: progtest.OK})
	if flows := f.AllFlows(t); len(flows) != 0 {
		t.Errorf("flows = %v, want none", flows)
	}
}

// quotePort is the ICMP error "port unreachable" of a packet's receiver.
func quotePort(about pkt.Packet, by netip.Addr, srcMAC, dstMAC net.HardwareAddr) []byte {
	p := pkt.Packet{SrcMAC: srcMAC, DstMAC: dstMAC, Src: at(by, 0), Dst: at(about.Src.Addr(), 0), TTL: 64}
	if about.V6() {
		return p.Error(layers.ICMPv6TypeDestinationUnreachable, layers.ICMPv6CodePortUnreachable, about.Bytes())
	}
	return p.Error(layers.ICMPv4TypeDestinationUnreachable, layers.ICMPv4CodePort, about.Bytes())
}
