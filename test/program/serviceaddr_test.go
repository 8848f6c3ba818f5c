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

var serviceCIDRs = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd00:96::/112")}

// Contract row V9: a port that a ClusterIP does not have is refused, an address of the range that no service has is dropped, and neither
// follows the default route.
func TestV9_UnknownPortAndUnallocatedAddress(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	families(t, f, func(t *testing.T, v6 bool) {
		complete := f.Flags
		host := func(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
		unallocated := of(otherVIPs, v6).Next()
		cidr := serviceCIDRs[map[bool]int{true: 1}[v6]]
		f.Put(f.DP.Maps.ServiceAddrs, bpf.NewServiceAddrKey(cidr), bpf.ServiceAddrRange)
		f.Put(f.DP.Maps.ServiceAddrs, bpf.NewServiceAddrKey(host(of(vips, v6))), bpf.ServiceAddrActive)
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP, pkt.SCTP, pkt.Ping} {
			for _, from := range []struct {
				hook progtest.Hook
				open func(to netip.AddrPort) pkt.Packet
			}{
				{progtest.FromPod(f.A), func(to netip.AddrPort) pkt.Packet { return fromPod(f.A, kind, to) }},
				{f.FromNetdev(), func(to netip.AddrPort) pkt.Packet { return fromClient(kind, to) }},
			} {
				f.Flags = 0 // the sum of a NIC is not kept up in an answer
				unknown := from.open(at(of(vips, v6), vipPort+1))
				c := progtest.Case{
					Name: kind.String() + " to an unknown port", Hook: from.hook, In: unknown.Bytes(), WantDrop: "service_unknown_port",
					WantAction: progtest.Redirect,
				}
				if kind == pkt.Ping {
					c.WantAction = progtest.Shot
				} else {
					c.WantOut = refusal(unknown)
				}
				f.Check(t, c)
				f.Flags = complete
				dropped(t, f, kind.String()+" to an unallocated address", from.hook, from.open(at(unallocated, vipPort)), "service_unallocated")
				if kind != pkt.Ping {
					known := from.open(at(of(vips, v6), vipPort))
					redirected(t, f, kind.String()+" to the service", from.hook, known, with(atPod(known, f.B), known.Src, at(f.B.Addr(v6), podPort)))
				}
			}
		}
		rst := fromPod(f.A, pkt.TCP, at(of(vips, v6), vipPort+1))
		rst.Flags = pkt.RST
		dropped(t, f, "a reset is not answered", progtest.FromPod(f.A), rst, "service_unknown_port")
		// Another address is nobody's business here.
		outside := fromPod(f.A, pkt.TCP, at(of(nodetest.ClientAddrs, v6), 443))
		redirected(t, f, "to outside", progtest.FromPod(f.A), outside, hop(outside))
		node := fromClient(pkt.TCP, at(of(nodetest.NodeAddrs, v6), 22))
		passed(t, f, "to the node", f.FromNetdev(), node, node)
	})
}

// An external address that is a pod's takes its service's port from the pod, and no other (row V9 is about ClusterIPs).
func TestV9_PodAddressAsExternalAddress(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP, pkt.SCTP} {
			var s bpf.Service
			must(t, f.DP.Maps.Services.Lookup(bpf.NewFrontendKey(kind.Proto(v6), of(vips, v6), vipPort), &s))
			f.Put(f.DP.Maps.Services, bpf.NewFrontendKey(kind.Proto(v6), f.A.Addr(v6), vipPort), s)
			known := fromClient(kind, at(f.A.Addr(v6), vipPort))
			redirected(t, f, kind.String()+" to the service", f.FromNetdev(), known, with(atPod(known, f.B), known.Src, at(f.B.Addr(v6), podPort)))
			unknown := fromClient(kind, at(f.A.Addr(v6), vipPort+1))
			redirected(t, f, kind.String()+" to another port", f.FromNetdev(), unknown, atPod(unknown, f.A))
		}
	})
}

// Contract row V10: source ranges limit the load balancer address, for clients outside and for pods, and nothing else.
func TestV10_SourceRanges(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	balancers := []netip.Addr{netip.MustParseAddr("203.0.113.10"), netip.MustParseAddr("2001:db8:cafe::10")}
	families(t, f, func(t *testing.T, v6 bool) {
		host := func(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
		network := func(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()-8).Masked() }
		client, pod := of(nodetest.ClientAddrs, v6), f.A.Addr(v6)
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP, pkt.SCTP} {
			proto := kind.Proto(v6)
			var s bpf.Service
			must(t, f.DP.Maps.Services.Lookup(bpf.NewFrontendKey(proto, of(vips, v6), vipPort), &s))
			limited := s
			limited.Flags |= bpf.ServiceSourceRanges
			f.Put(f.DP.Maps.Services, bpf.NewFrontendKey(proto, of(balancers, v6), vipPort), limited)
			other := bpf.NewSourceRangeKey(s.Id+1, netip.PrefixFrom(of(unspecified, v6), 0))
			f.Put(f.DP.Maps.SourceRanges, other, uint32(1))
			for _, tt := range []struct {
				name            string
				ranges          []netip.Prefix
				byClient, byPod bool
			}{
				{"none of its own", nil, false, false},
				{"the client", []netip.Prefix{host(client)}, true, false},
				{"the client's network and the pod", []netip.Prefix{network(client), host(pod)}, true, true},
				{"the pods' network", []netip.Prefix{network(pod)}, false, true},
				{"the client's neighbour", []netip.Prefix{host(client.Next())}, false, false},
			} {
				for _, p := range tt.ranges {
					f.Put(f.DP.Maps.SourceRanges, bpf.NewSourceRangeKey(s.Id, p), uint32(1))
				}
				f.ClearFlows(t)
				for _, from := range []struct {
					hook progtest.Hook
					open func(netip.AddrPort) pkt.Packet
					may  bool
				}{
					{f.FromNetdev(), func(to netip.AddrPort) pkt.Packet { return fromClient(kind, to) }, tt.byClient},
					{progtest.FromPod(f.A), func(to netip.AddrPort) pkt.Packet { return fromPod(f.A, kind, to) }, tt.byPod},
				} {
					open := from.open(at(of(balancers, v6), vipPort))
					arrived := with(atPod(open, f.B), open.Src, at(f.B.Addr(v6), podPort))
					if from.may {
						redirected(t, f, kind.String()+", "+tt.name, from.hook, open, arrived)
					} else {
						dropped(t, f, kind.String()+", "+tt.name, from.hook, open, "source_range")
					}
					f.ClearFlows(t)
					for _, to := range []netip.AddrPort{at(of(vips, v6), vipPort), at(of(nodetest.NodeAddrs, v6), nodePort)} {
						open := from.open(to)
						redirected(t, f, "another frontend", from.hook, open, with(atPod(open, f.B), open.Src, at(f.B.Addr(v6), podPort)))
						f.ClearFlows(t)
					}
				}
				for _, p := range tt.ranges {
					must(t, f.DP.Maps.SourceRanges.Delete(bpf.NewSourceRangeKey(s.Id, p)))
				}
			}
		}
	})
}

// An open connection outlives a range that shuts it out (the ranges are asked for new ones only, as by kube-proxy).
func TestV10_OpenConnectionsStay(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	families(t, f, func(t *testing.T, v6 bool) {
		to := at(of(vips, v6), vipPort)
		open := fromPod(f.A, pkt.TCP, to)
		arrived := with(atPod(open, f.B), open.Src, at(f.B.Addr(v6), podPort))
		redirected(t, f, "opens", progtest.FromPod(f.A), open, arrived)
		k := bpf.NewFrontendKey(pkt.TCP.Proto(v6), to.Addr(), to.Port())
		var s bpf.Service
		must(t, f.DP.Maps.Services.Lookup(k, &s))
		limited := s
		limited.Flags |= bpf.ServiceSourceRanges
		f.Put(f.DP.Maps.Services, k, limited)
		redirected(t, f, "goes on", progtest.FromPod(f.A), data(open), with(atPod(data(open), f.B), open.Src, arrived.Dst))
		must(t, f.DP.RaiseServiceEpochs(s.Id))
		redirected(t, f, "goes on, judged again", progtest.FromPod(f.A), data(open), with(atPod(data(open), f.B), open.Src, arrived.Dst))
		another := open
		another.Src = at(open.Src.Addr(), sport+1)
		dropped(t, f, "a new one", progtest.FromPod(f.A), another, "source_range")
		f.Put(f.DP.Maps.Services, k, s)
	})
}
