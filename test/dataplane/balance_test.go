// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/pkg/bpf"
)

// change rewrites one frontend of a node.
func change(t *testing.T, n *nodetest.Node, k bpf.FrontendKey, f func(*bpf.Service)) {
	t.Helper()
	var s bpf.Service
	wantNoError(t, "read the frontend", n.DP.Maps.Services.Lookup(k, &s))
	f(&s)
	n.Put(n.DP.Maps.Services, k, s)
}

// answers counts who answers n new connections, in turn to each of the frontends.
func answers(t *testing.T, ns *netnstest.NS, network string, n int, to ...netip.AddrPort) map[string]int {
	t.Helper()
	seen := map[string]int{}
	for i := range n {
		got, err := nodetest.Ask(t, ns, network, to[i%len(to)])
		wantNoError(t, network+" to "+to[i%len(to)].String(), err)
		name, _, _ := strings.Cut(got, " ")
		seen[name]++
	}
	return seen
}

// Contract row V11 with real sockets: a pod and a client outside each stay with one backend over ClusterIP and NodePort, and choose anew when
// it leaves.
func TestV11_SessionAffinity(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a := n.AddPod("a")
	var pods []*nodetest.Pod
	for _, name := range []string{"b", "c", "d", "e"} {
		p := n.AddPod(name)
		nodetest.Serve(t, p.NS, name, 8080)
		pods = append(pods, p)
	}
	id := uint32(0)
	families(t, func(t *testing.T, v6 bool) {
		for network, proto := range protocols {
			id++
			var backends []netip.AddrPort
			for _, p := range pods {
				backends = append(backends, netip.AddrPortFrom(p.Addr(v6), 8080))
			}
			vip, port := netip.AddrPortFrom(family(vips, v6), 80), netip.AddrPortFrom(family(nodetest.NodeAddrs, v6), 30080)
			frontends := []bpf.FrontendKey{
				bpf.NewFrontendKey(proto, vip.Addr(), 80),
				bpf.NewFrontendKey(proto, family([]netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}, v6), 30080),
			}
			for _, k := range frontends {
				n.AddService(id, k, backends...)
				change(t, n, k, func(s *bpf.Service) { s.Affinity = 10800 })
			}
			for what, client := range map[string]struct {
				ns   *netnstest.NS
				addr netip.Addr
				to   []netip.AddrPort
			}{
				"a pod":            {a.NS, a.Addr(v6), []netip.AddrPort{vip, port}},
				"a client outside": {n.Client, family(nodetest.ClientAddrs, v6), []netip.AddrPort{port, vip}},
			} {
				seen := answers(t, client.ns, network, 12, client.to...)
				if len(seen) != 1 {
					t.Errorf("%s: 12 connections of %s answered by %v, want one pod", network, what, seen)
				}
				var had bpf.Affinity
				wantNoError(t, "look up the affinity", n.DP.Maps.Affinity.Lookup(bpf.NewAffinityKey(client.addr, id), &had))
				left := bpf.NewServiceBackend(id, had.AddrPort())
				n.Put(n.DP.Maps.ServiceBackends, left, bpf.ServiceBackendServing)
				// The lists are one backend shorter: what left is replaced by the first.
				for slot, b := range backends {
					if b == had.AddrPort() {
						n.Put(n.DP.Maps.Backends, bpf.BackendKey{List: id, Slot: uint32(slot)}, bpf.NewBackend(backends[(slot+1)%len(backends)]))
					}
				}
				again := answers(t, client.ns, network, 12, client.to...)
				for name := range again {
					if len(again) != 1 || seen[name] != 0 {
						t.Errorf("%s: after %v left, connections of %s answered by %v, want one other pod", network, seen, what, again)
					}
				}
				for slot, b := range backends {
					n.Put(n.DP.Maps.Backends, bpf.BackendKey{List: id, Slot: uint32(slot)}, bpf.NewBackend(b))
					n.Put(n.DP.Maps.ServiceBackends, bpf.NewServiceBackend(id, b), bpf.ServiceBackendServing|bpf.ServiceBackendCluster)
				}
			}
		}
	})
}

// The node at which a client asks remembers its backend, also when that is on another node.
func TestV11_AffinityOnTheEntryNode(t *testing.T) {
	t.Parallel()
	c := nodetest.NewCluster(t, 2, nodetest.ClusterOptions{})
	b, d := c.Nodes[0].AddPod("b"), c.Nodes[1].AddPod("d")
	nodetest.Serve(t, b.NS, "b", 8080)
	nodetest.Serve(t, d.NS, "d", 8080)
	id := uint32(0)
	families(t, func(t *testing.T, v6 bool) {
		for network, proto := range protocols {
			id++
			k := bpf.NewFrontendKey(proto, family([]netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}, v6), 30080)
			c.AddService(id, k, 0, netip.AddrPortFrom(b.Addr(v6), 8080), netip.AddrPortFrom(d.Addr(v6), 8080))
			change(t, c.Nodes[0], k, func(s *bpf.Service) { s.Affinity = 60 })
			port := netip.AddrPortFrom(family(c.Nodes[0].Addrs, v6), 30080)
			names := map[string]bool{}
			for range 40 { // until both have been chosen: fails once in 2^39 runs
				seen := answers(t, c.Client, network, 3, port)
				if len(seen) != 1 {
					t.Fatalf("%s: three connections answered by %v, want one pod", network, seen)
				}
				for name := range seen {
					names[name] = true
				}
				if len(names) == 2 {
					break
				}
				wantNoError(t, "forget the affinity", c.Nodes[0].DP.Maps.Affinity.Delete(bpf.NewAffinityKey(family(nodetest.ClientAddrs, v6), id)))
			}
			if len(names) != 2 {
				t.Errorf("%s: only %v were ever chosen, want both pods", network, names)
			}
			var none bpf.Affinity
			if err := c.Nodes[1].DP.Maps.Affinity.Lookup(bpf.NewAffinityKey(family(nodetest.ClientAddrs, v6), id), &none); err == nil {
				t.Errorf("%s: the backend's node remembers the client too", network)
			}
		}
	})
}

// Contract row V9 with real sockets.
func TestV9_UnknownPortAndUnallocatedAddress(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a, b := n.AddPod("a"), n.AddPod("b")
	nodetest.Serve(t, b.NS, "b", 8080)
	addServices(n, b)
	families(t, func(t *testing.T, v6 bool) {
		vip := family(vips, v6)
		n.Put(n.DP.Maps.ServiceAddrs, bpf.NewServiceAddrKey(netip.PrefixFrom(vip, vip.BitLen()-8).Masked()), bpf.ServiceAddrRange)
		n.Put(n.DP.Maps.ServiceAddrs, bpf.NewServiceAddrKey(netip.PrefixFrom(vip, vip.BitLen())), bpf.ServiceAddrActive)
		for network := range protocols {
			for what, ns := range map[string]*netnstest.NS{"a pod": a.NS, "a client outside": n.Client} {
				got, err := nodetest.Ask(t, ns, network, netip.AddrPortFrom(vip, 80))
				if err != nil || !strings.HasPrefix(got, "b ") {
					t.Errorf("%s from %s to the service = %q, %v, want an answer of b", network, what, got, err)
				}
				before := n.AllDrops()
				if _, err := nodetest.Ask(t, ns, network, netip.AddrPortFrom(vip, 81)); !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("%s from %s to another port: %v, want ECONNREFUSED", network, what, err)
				}
				var timeout net.Error
				if _, err := nodetest.Ask(t, ns, network, netip.AddrPortFrom(vip.Next(), 80)); !errors.As(err, &timeout) || !timeout.Timeout() {
					t.Errorf("%s from %s to an unallocated address: %v, want no answer", network, what, err)
				}
				after := n.AllDrops()
				for _, reason := range []string{"service_unknown_port", "service_unallocated"} {
					if after[reason] <= before[reason] {
						t.Errorf("%s from %s: %s is not counted", network, what, reason)
					}
				}
			}
		}
	})
}

// Contract row V10 with real sockets: a load balancer address with ranges, for the client outside and for a pod.
func TestV10_SourceRanges(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a, b := n.AddPod("a"), n.AddPod("b")
	nodetest.Serve(t, b.NS, "b", 8080)
	addServices(n, b)
	balancers := []netip.Addr{netip.MustParseAddr("10.97.0.10"), netip.MustParseAddr("fd00:97::10")}
	id := uint32(100)
	families(t, func(t *testing.T, v6 bool) {
		for network, proto := range protocols {
			id++
			k := bpf.NewFrontendKey(proto, family(balancers, v6), 80)
			n.AddService(id, k, netip.AddrPortFrom(b.Addr(v6), 8080))
			change(t, n, k, func(s *bpf.Service) { s.Flags |= bpf.ServiceSourceRanges })
			sources := map[string]struct {
				ns   *netnstest.NS
				addr netip.Addr
			}{"a pod": {a.NS, a.Addr(v6)}, "a client outside": {n.Client, family(nodetest.ClientAddrs, v6)}}
			for allowed, source := range sources {
				r := bpf.NewSourceRangeKey(id, netip.PrefixFrom(source.addr, source.addr.BitLen()))
				n.Put(n.DP.Maps.SourceRanges, r, uint32(1))
				for what, from := range sources {
					got, err := nodetest.Ask(t, from.ns, network, netip.AddrPortFrom(family(balancers, v6), 80))
					if what == allowed {
						wantAnswer(t, network+" from "+what, got, err, "b "+from.addr.String())
					} else if err == nil {
						t.Errorf("%s from %s, where only %s may ask: %q, want no answer", network, what, allowed, got)
					}
					got, err = nodetest.Ask(t, from.ns, network, netip.AddrPortFrom(family(vips, v6), 80))
					wantAnswer(t, network+" from "+what+" to the ClusterIP", got, err, "b "+from.addr.String())
				}
				wantNoError(t, "take the range back", n.DP.Maps.SourceRanges.Delete(r))
			}
		}
	})
	if n.AllDrops()["source_range"] == 0 {
		t.Error("source_range is not counted")
	}
}
