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

// podAddrs are n addresses of a family, all of pod B: backends that the programs can send to.
func podAddrs(t *testing.T, f *progtest.Fixture, n int, v6 bool) (addrs []netip.Addr) {
	t.Helper()
	a := netip.MustParseAddr(map[bool]string{false: "10.244.1.1", true: "fd00:244:0:1::1"}[v6])
	for range n {
		must(t, f.DP.PutEndpoint(a, bpf.Endpoint{
			Ifindex: uint32(f.B.Ifindex), Identity: bpf.IdentityPodUnknown, Mac: [6]byte(f.B.MAC), HostMac: [6]byte(f.B.HostMAC),
		}))
		addrs = append(addrs, a)
		a = a.Next()
	}
	return addrs
}

// balanced is a service port with many backends, reached by a ClusterIP and a NodePort.
type balanced struct {
	t        *testing.T
	f        *progtest.Fixture
	v6       bool
	kind     pkt.Kind
	backends []netip.AddrPort
	service  bpf.Service
	vip      netip.AddrPort
	port     netip.AddrPort
}

func newBalanced(t *testing.T, f *progtest.Fixture, v6 bool, kind pkt.Kind, id uint32, backends int) *balanced {
	t.Helper()
	b := &balanced{t: t, f: f, v6: v6, kind: kind, vip: at(of(vips, v6), vipPort), port: at(of(nodetest.NodeAddrs, v6), nodePort)}
	for _, a := range podAddrs(t, f, backends, v6) {
		b.backends = append(b.backends, at(a, podPort))
	}
	proto := kind.Proto(v6)
	f.AddService(id, bpf.NewFrontendKey(proto, b.vip.Addr(), b.vip.Port()), b.backends...)
	must(t, f.DP.Maps.Services.Lookup(bpf.NewFrontendKey(proto, b.vip.Addr(), b.vip.Port()), &b.service))
	b.change(func(*bpf.Service) {})
	return b
}

// change changes both frontends.
func (b *balanced) change(change func(*bpf.Service)) {
	b.t.Helper()
	change(&b.service)
	for _, to := range []netip.AddrPort{b.vip, at(of(unspecified, b.v6), nodePort)} {
		b.f.Put(b.f.DP.Maps.Services, bpf.NewFrontendKey(b.kind.Proto(b.v6), to.Addr(), to.Port()), b.service)
	}
}

// from is the packet that opens a flow from a port, by pod A or by the client outside.
func (b *balanced) from(outside bool, to netip.AddrPort, port uint16) (progtest.Hook, pkt.Packet) {
	if outside {
		p := fromClient(b.kind, to)
		p.Src = at(p.Src.Addr(), port)
		return b.f.FromNetdev(), p
	}
	p := fromPod(b.f.A, b.kind, to)
	p.Src = at(p.Src.Addr(), port)
	return progtest.FromPod(b.f.A), p
}

// chosen is the backend that the program finds for the packet.
func (b *balanced) chosen(hook progtest.Hook, p pkt.Packet) netip.AddrPort {
	b.t.Helper()
	r := b.f.Run(b.t, hook, p.Bytes())
	flow, ok := b.f.Flow(b.t, key(p))
	if r.Action != progtest.Redirect || !ok {
		b.t.Fatalf("%v to %v: action %d, drops %v, entry %v, want redirect and an entry", p.Src, p.Dst, r.Action, r.Drops, ok)
	}
	return flow.Xlate.Destination()
}

// spread counts the backends of n new flows from one client to the two frontends in turn.
func (b *balanced) spread(outside bool, n int) map[netip.AddrPort]int {
	b.t.Helper()
	b.f.ClearFlows(b.t)
	seen := map[netip.AddrPort]int{}
	for i := range n {
		hook, p := b.from(outside, []netip.AddrPort{b.vip, b.port}[i%2], uint16(20000+i))
		seen[b.chosen(hook, p)]++
	}
	return seen
}

// entry is the client's affinity.
func (b *balanced) entry(client netip.Addr) (a bpf.Affinity, ok bool) {
	b.t.Helper()
	err := b.f.Affinity.Lookup(bpf.NewAffinityKey(client, b.service.Id), &a)
	return a, err == nil
}

// age makes the client's affinity that many seconds old.
func (b *balanced) age(client netip.Addr, seconds uint32) bpf.Affinity {
	b.t.Helper()
	a, ok := b.entry(client)
	if !ok {
		b.t.Fatalf("%v has no affinity", client)
	}
	a.LastUsed = monotonic(b.t) - seconds
	b.f.Put(b.f.Affinity, bpf.NewAffinityKey(client, b.service.Id), a)
	return a
}

// Contract row V11: one backend for a client, whichever frontend it asks, from a pod and from outside, until the timeout has passed
// without a new connection.
func TestV11_SessionAffinity(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	number := uint32(100)
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP, pkt.SCTP} {
			number++
			b := newBalanced(t, f, v6, kind, number, 20)
			for _, outside := range []bool{false, true} {
				client := map[bool]netip.Addr{false: f.A.Addr(v6), true: of(nodetest.ClientAddrs, v6)}[outside]
				what := kind.String() + map[bool]string{false: " from a pod", true: " from outside"}[outside]

				b.change(func(s *bpf.Service) { s.Affinity = 0 })
				if seen := b.spread(outside, 40); len(seen) < 5 {
					t.Errorf("%s without affinity: 40 connections to %d backends of 20, want many", what, len(seen))
				}
				if _, ok := b.entry(client); ok {
					t.Errorf("%s without affinity: it is remembered", what)
				}

				// Switched on, it holds for new connections.
				b.change(func(s *bpf.Service) { s.Affinity = 100 })
				seen := b.spread(outside, 20)
				a, _ := b.entry(client)
				if len(seen) != 1 || seen[a.AddrPort()] != 20 {
					t.Fatalf("%s: 20 connections to %v, remembered %v, want one backend", what, seen, a.AddrPort())
				}

				// It slides: nearly too old, it is used and as good as new.
				b.age(client, 95)
				again := b.spread(outside, 1)
				now, _ := b.entry(client)
				if again[a.AddrPort()] != 1 || monotonic(t)-now.LastUsed > 2 {
					t.Errorf("%s after 95 of 100 s: to %v, last used %d s ago, want %v, just now", what, again, monotonic(t)-now.LastUsed, a.AddrPort())
				}
				// A packet of a connection that is open does not renew it.
				hook, open := b.from(outside, b.vip, 20000)
				b.age(client, 50)
				b.f.Run(t, hook, data(open).Bytes())
				if now, _ := b.entry(client); monotonic(t)-now.LastUsed < 49 {
					t.Errorf("%s: a packet of an old connection renewed the affinity", what)
				}

				// Too old, every connection is a new choice.
				others := map[netip.AddrPort]int{}
				for i := range 20 {
					b.age(client, 101) // not 100: the programs' clock may be a tick behind, and so in the second before
					hook, p := b.from(outside, b.vip, uint16(30000+i))
					others[b.chosen(hook, p)]++
				}
				if len(others) < 3 {
					t.Errorf("%s after the timeout: 20 connections to %v, want many backends", what, others)
				}

				// Switched off, it holds for no new connection.
				b.change(func(s *bpf.Service) { s.Affinity = 0 })
				if seen := b.spread(outside, 40); len(seen) < 5 {
					t.Errorf("%s with affinity switched off: 40 connections to %d backends of 20, want many", what, len(seen))
				}
			}
		}
	})
}

// Contract row V11: a backend that left the list, though it still serves, is no longer chosen, and the choice that follows holds.
func TestV11_AffinityToABackendThatLeft(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	families(t, f, func(t *testing.T, v6 bool) {
		b := newBalanced(t, f, v6, pkt.TCP, 7, 10)
		b.change(func(s *bpf.Service) { s.Affinity = 100 })
		member := func(ap netip.AddrPort, flags uint32) {
			f.Put(f.DP.Maps.ServiceBackends, bpf.NewServiceBackend(7, ap), flags)
		}
		for _, tt := range []struct {
			name        string
			service     uint32 // flags
			outside     bool
			left, stays uint32 // flags of the member
		}{
			{"cluster list", 0, false, bpf.ServiceBackendServing, bpf.ServiceBackendServing | bpf.ServiceBackendCluster},
			{"cluster list, outside", 0, true, bpf.ServiceBackendServing | bpf.ServiceBackendLocal, bpf.ServiceBackendServing | bpf.ServiceBackendCluster},
			{"internal policy Local", bpf.ServiceInternalLocal, false, bpf.ServiceBackendServing | bpf.ServiceBackendCluster, bpf.ServiceBackendServing | bpf.ServiceBackendLocal},
			{"internal policy Local, outside", bpf.ServiceInternalLocal, true, bpf.ServiceBackendServing | bpf.ServiceBackendCluster, bpf.ServiceBackendServing | bpf.ServiceBackendLocal},
			{"external policy Local, outside", bpf.ServiceExternalLocal, true, bpf.ServiceBackendServing | bpf.ServiceBackendCluster, bpf.ServiceBackendServing | bpf.ServiceBackendLocal},
			{"external policy Local, a pod", bpf.ServiceExternalLocal, false, bpf.ServiceBackendServing | bpf.ServiceBackendLocal, bpf.ServiceBackendServing | bpf.ServiceBackendCluster},
			{"not serving at all", 0, false, 0, bpf.ServiceBackendServing | bpf.ServiceBackendCluster},
		} {
			b.change(func(s *bpf.Service) { s.Flags = tt.service })
			for _, ap := range b.backends {
				member(ap, tt.stays)
			}
			seen := b.spread(tt.outside, 10)
			if len(seen) != 1 {
				t.Fatalf("%s: 10 connections to %v, want one backend", tt.name, seen)
			}
			for left := range seen {
				member(left, tt.left)
				if tt.left == 0 {
					must(t, f.DP.Maps.ServiceBackends.Delete(bpf.NewServiceBackend(7, left)))
				}
			}
			// The list still has it: at random it may be chosen again, once in ten.
			others := map[netip.AddrPort]int{}
			for i := range 20 {
				hook, p := b.from(tt.outside, b.vip, uint16(31000+i))
				others[b.chosen(hook, p)]++
			}
			for left := range seen {
				if delete(others, left); len(others) != 1 {
					t.Errorf("%s: after %v left, connections went to %v, want one other backend for all that found it", tt.name, left, others)
				}
			}
		}
	})
}

// What is not let pass must not change where another client goes: a forged source, or a client that policy denies.
func TestV11_AffinityBelongsToItsClient(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	f.IdentifyPod(f.A, identityA, isolated, bpf.PolicyNone)
	families(t, f, func(t *testing.T, v6 bool) {
		b := newBalanced(t, f, v6, pkt.UDP, 9, 10)
		b.change(func(s *bpf.Service) { s.Affinity = 100 })
		forged := fromPod(f.A, pkt.UDP, b.vip)
		forged.Src = at(of(nodetest.ClientAddrs, v6), sport)
		dropped(t, f, "forged", progtest.FromPod(f.A), forged, "spoofed_address")
		denied := fromPod(f.A, pkt.UDP, b.vip)
		dropped(t, f, "denied", progtest.FromPod(f.A), denied, "policy")
		for _, client := range []netip.Addr{forged.Src.Addr(), denied.Src.Addr()} {
			if a, ok := b.entry(client); ok {
				t.Errorf("%v has an affinity to %v, want none", client, a.AddrPort())
			}
		}
	})
}
