// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/internal/testutil/firewalltest"
	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/netfilter"
)

// clusterModes are how two nodes reach each other.
var clusterModes = []struct {
	name string
	opts nodetest.ClusterOptions
}{
	{"overlay over IPv4", nodetest.ClusterOptions{}},
	{"overlay over IPv6", nodetest.ClusterOptions{OuterV6: true}},
	{"direct", nodetest.ClusterOptions{Direct: true}},
}

// hardened is two nodes with firewalls: pods a and peer on node 0 and b on node 1, each a server, and services whose only backend is near
// or far as seen from node 0.
type hardened struct {
	*nodetest.Cluster
	plain      *plainHost
	a, peer, b *nodetest.Pod
}

// Ports of the services, at the ClusterIP and, plus 30000, as NodePorts.
const (
	nearPort = 80 + iota
	farPort
	farDSRPort
	farHostPort // the backend is a process of the node itself
)

func newHardened(t *testing.T, opts nodetest.ClusterOptions, f firewalltest.Firewall) *hardened {
	t.Helper()
	h := &hardened{Cluster: nodetest.NewCluster(t, 2, opts)}
	n0, n1 := h.Nodes[0], h.Nodes[1]
	h.a, h.peer, h.b = n0.AddPod("a"), n0.AddPod("peer"), n1.AddPod("b")
	for name, ns := range map[string]*netnstest.NS{"a": h.a.NS, "peer": h.peer.NS, "b": h.b.NS} {
		nodetest.Serve(t, ns, name, 8080)
	}
	nodetest.Serve(t, n0.NS, "node0", firewalltest.OpenPort)
	nodetest.Serve(t, n1.NS, "node1", firewalltest.OpenPort)
	nodetest.Serve(t, h.Client, "outside", outsidePort)
	n1.Masquerade(n1.Addrs...)
	id := uint32(0)
	for _, proto := range protocols {
		for i, unspecified := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
			for port, to := range map[uint16]netip.AddrPort{
				nearPort: netip.AddrPortFrom(h.peer.Addrs[i], 8080), farPort: netip.AddrPortFrom(h.b.Addrs[i], 8080),
				farDSRPort: netip.AddrPortFrom(h.b.Addrs[i], 8080), farHostPort: netip.AddrPortFrom(n1.Addrs[i], firewalltest.OpenPort),
			} {
				flags := uint32(0)
				if port == farDSRPort {
					flags = bpf.ServiceDSR
				}
				h.AddService(id+1, bpf.NewFrontendKey(proto, vips[i], port), flags, to)
				h.AddService(id+2, bpf.NewFrontendKey(proto, unspecified, 30000+port), flags, to)
				id += 2
			}
		}
	}

	// The conditions, each shown to bite what is not Margay's.
	h.plain = newPlainHost(t, h.Cluster)
	h.plain.wantForwarding(t, h.Cluster, true)
	h.plain.wantForeign(t, true)
	f.Harden(t, n0.NS, h.a.NS, h.peer.NS)
	f.Harden(t, n1.NS, h.b.NS)
	h.plain.wantForwarding(t, h.Cluster, false)
	h.plain.wantForeign(t, false)
	return h
}

// wantForwarded asserts every walk on which Margay carries the packets.
func (h *hardened) wantForwarded(t *testing.T, v6 bool) {
	t.Helper()
	client := family(nodetest.ClientAddrs, v6)
	a, b := party{h.a.NS, h.a.Addr(v6)}, party{h.b.NS, h.b.Addr(v6)}
	wantTalk(t, "pod to pod on its node", a, netip.AddrPortFrom(h.peer.Addr(v6), 8080), "peer")
	wantTalk(t, "pod to pod on the other node", a, netip.AddrPortFrom(b.addr, 8080), "b")
	wantTalk(t, "and the other way", b, netip.AddrPortFrom(a.addr, 8080), "a")
	wantTalk(t, "pod to outside", a, outside(v6), "outside")
	vip := family(vips, v6)
	for network := range protocols {
		// The client's address on that node's network, which its UDP server answers from.
		onItsNetwork := family([]netip.Addr{netip.MustParseAddr("192.1.2.100"), netip.MustParseAddr("2001:db8:1:1::100")}, v6)
		got, err := nodetest.Ask(t, b.ns, network, netip.AddrPortFrom(onItsNetwork, outsidePort))
		wantAnswer(t, "pod to outside with its node's address, "+network, got, err, "outside "+family(h.Nodes[1].Addrs, v6).String())
		for _, ask := range []struct {
			what string
			from party
			to   netip.AddrPort
			want string
		}{
			{"pod to a service, backend on its node", a, netip.AddrPortFrom(vip, nearPort), "peer"},
			{"pod to a service, backend on the other node", a, netip.AddrPortFrom(vip, farPort), "b"},
			{"pod on the other node to a service", b, netip.AddrPortFrom(vip, nearPort), "peer"},
			{"client to a NodePort, local backend", party{h.Client, client}, netip.AddrPortFrom(family(h.Nodes[0].Addrs, v6), 30000+nearPort), "peer"},
			{"client to a NodePort, remote backend", party{h.Client, client}, netip.AddrPortFrom(family(h.Nodes[0].Addrs, v6), 30000+farPort), "b"},
			{"client to a NodePort, remote backend, DSR", party{h.Client, client}, netip.AddrPortFrom(family(h.Nodes[0].Addrs, v6), 30000+farDSRPort), "b"},
		} {
			got, err := nodetest.Ask(t, ask.from.ns, network, ask.to)
			wantAnswer(t, ask.what+", "+network, got, err, ask.want+" "+ask.from.addr.String())
		}
	}
}

// wantOwn asserts the walks on which a node's stack is one end: its firewall has its say there, and allows them.
func (h *hardened) wantOwn(t *testing.T, v6 bool) {
	t.Helper()
	n0, n1 := h.Nodes[0], h.Nodes[1]
	a, node0 := party{h.a.NS, h.a.Addr(v6)}, party{n0.NS, family(n0.Addrs, v6)}
	wantTalk(t, "pod to its node", a, netip.AddrPortFrom(node0.addr, firewalltest.OpenPort), "node0")
	wantTalk(t, "pod to the other node", a, netip.AddrPortFrom(family(n1.Addrs, v6), firewalltest.OpenPort), "node1")
	wantTalk(t, "node to its pod", node0, netip.AddrPortFrom(a.addr, 8080), "a")
	wantTalk(t, "node to the other's pod", node0, netip.AddrPortFrom(h.b.Addr(v6), 8080), "b")
	for network := range protocols {
		got, err := nodetest.Ask(t, h.Client, network, netip.AddrPortFrom(node0.addr, 30000+farHostPort))
		wantAnswer(t, "client to a NodePort, backend on the other node itself, "+network, got, err, "node1 "+family(nodetest.ClientAddrs, v6).String())
	}
	// A packet without hops left is the stack's to answer, which it does before its rules about forwarding.
	a.ns.Do(func() {
		out, err := exec.Command("ping", "-n", "-c1", "-W1", "-t1", h.b.Addr(v6).String()).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "Time to live exceeded") && !strings.Contains(string(out), "Hop limit") {
			t.Errorf("ping with one hop: %v, want the node's answer\n%s", err, out)
		}
	})
}

// wantNoDrops asserts that Margay itself dropped nothing.
func (h *hardened) wantNoDrops(t *testing.T) {
	t.Helper()
	for i, n := range h.Nodes {
		if diff := cmp.Diff(map[string]uint64{}, unexplained(n.AllDrops())); diff != "" {
			t.Errorf("node %d: drops (-want +got):\n%s", i, diff)
		}
	}
}

// TestRow24_ForwardDropStrictRPFilter: neither a firewall on the node that forwards nothing nor strict reverse path filtering stops pods,
// with conntrack at work and without.
func TestRow24_ForwardDropStrictRPFilter(t *testing.T) {
	t.Parallel()
	for _, f := range []firewalltest.Firewall{firewalltest.WithoutConntrack, firewalltest.NFTables, firewalltest.IPTables} {
		for _, mode := range clusterModes {
			if f.Name == firewalltest.IPTables.Name && mode.opts != (nodetest.ClusterOptions{}) {
				continue // the hooks are those of nftables
			}
			t.Run(f.Name+"/"+mode.name, func(t *testing.T) {
				t.Parallel()
				h := newHardened(t, mode.opts, f)
				families(t, func(t *testing.T, v6 bool) {
					h.wantForwarded(t, v6)
					h.wantOwn(t, v6)
				})
				h.wantNoDrops(t)
				for i, n := range h.Nodes {
					if used := firewalltest.Tracked(t, n.NS) > 0; used != f.Conntrack {
						t.Errorf("conntrack is in use on node %d: %v, want %v", i, used, f.Conntrack)
					}
				}
			})
		}
	}
}

// TestForwardDropStrictRPFilterFullConntrack: what the node forwards for pods needs no room in the conntrack table, and the overlay that
// carries it needs none with our rules. A full table drops the node's own new connections; that is between the node and its rules.
//
// The limit is the machine's, so no other test runs meanwhile.
func TestForwardDropStrictRPFilterFullConntrack(t *testing.T) {
	for _, mode := range clusterModes {
		t.Run(mode.name, func(t *testing.T) {
			h := newHardened(t, mode.opts, firewalltest.NFTables)
			limit := firewalltest.LimitConntrack(t)
			for _, n := range h.Nodes {
				firewalltest.FillConntrack(t, n.NS, limit)
			}
			families(t, func(t *testing.T, v6 bool) {
				if got, err := nodetest.Ask(t, h.Nodes[0].NS, "udp", outside(v6)); err == nil {
					t.Errorf("the node's own new connection with a full table = %q, want no answer", got)
				}
				got, err := nodetest.Ask(t, h.a.NS, "udp", netip.AddrPortFrom(h.b.Addr(v6), 8080))
				if (err == nil) != mode.opts.Direct {
					t.Errorf("pod to pod on the other node without the rules = %q, %v; want an answer: %v", got, err, mode.opts.Direct)
				}
			})
			for _, n := range h.Nodes {
				n.NS.Do(func() {
					_, err := netfilter.EnsureNotrack(nodetest.OverlayPort)
					must(t, "keep conntrack away from the overlay", err)
				})
			}
			families(t, h.wantForwarded)
			for i, n := range h.Nodes {
				if got := firewalltest.Tracked(t, n.NS); got < limit {
					t.Errorf("connections that conntrack knows on node %d = %d, want still %d", i, got, limit)
				}
			}
			h.wantNoDrops(t)
		})
	}
}
