// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/netfilter"
)

// outsidePort is where the external client serves, for what pods and nodes ask outside.
const outsidePort = 7070

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
)

func newHardened(t *testing.T, opts nodetest.ClusterOptions, f firewall) *hardened {
	t.Helper()
	h := &hardened{Cluster: nodetest.NewCluster(t, 2, opts)}
	n0, n1 := h.Nodes[0], h.Nodes[1]
	h.a, h.peer, h.b = n0.AddPod("a"), n0.AddPod("peer"), n1.AddPod("b")
	for name, ns := range map[string]*netnstest.NS{"a": h.a.NS, "peer": h.peer.NS, "b": h.b.NS} {
		nodetest.Serve(t, ns, name, 8080)
	}
	nodetest.Serve(t, n0.NS, "node0", ownPort)
	nodetest.Serve(t, n1.NS, "node1", ownPort)
	nodetest.Serve(t, h.Client, "outside", outsidePort)
	id := uint32(0)
	for _, proto := range protocols {
		for i, unspecified := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
			for port, backend := range map[uint16]*nodetest.Pod{nearPort: h.peer, farPort: h.b, farDSRPort: h.b} {
				flags := uint32(0)
				if port == farDSRPort {
					flags = bpf.ServiceDSR
				}
				to := netip.AddrPortFrom(backend.Addrs[i], 8080)
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
	harden(t, f, n0.NS, h.a.NS, h.peer.NS)
	harden(t, f, n1.NS, h.b.NS)
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
	wantTalk(t, "pod to outside", a, netip.AddrPortFrom(client, outsidePort), "outside")
	vip := family(vips, v6)
	for network := range protocols {
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
	wantTalk(t, "pod to its node", a, netip.AddrPortFrom(node0.addr, ownPort), "node0")
	wantTalk(t, "pod to the other node", a, netip.AddrPortFrom(family(n1.Addrs, v6), ownPort), "node1")
	wantTalk(t, "node to its pod", node0, netip.AddrPortFrom(a.addr, 8080), "a")
	wantTalk(t, "node to the other's pod", node0, netip.AddrPortFrom(h.b.Addr(v6), 8080), "b")
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

// TestForwardDropStrictRPFilter is row 24: neither a firewall on the node that forwards nothing nor strict reverse path filtering stops
// pods, with conntrack at work and without.
func TestForwardDropStrictRPFilter(t *testing.T) {
	t.Parallel()
	for _, f := range firewalls {
		for _, mode := range clusterModes {
			if f.once && mode.opts != (nodetest.ClusterOptions{}) {
				continue
			}
			t.Run(f.name+"/"+mode.name, func(t *testing.T) {
				t.Parallel()
				h := newHardened(t, mode.opts, f)
				families(t, func(t *testing.T, v6 bool) {
					h.wantForwarded(t, v6)
					h.wantOwn(t, v6)
				})
				h.wantNoDrops(t)
				for i, n := range h.Nodes {
					if used := tracked(t, n.NS) > 0; used != f.conntrack {
						t.Errorf("conntrack is in use on node %d: %v, want %v", i, used, f.conntrack)
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
			h := newHardened(t, mode.opts, firewalls[1])
			limit := limitConntrack(t)
			for _, n := range h.Nodes {
				fillConntrack(t, n.NS, limit)
			}
			families(t, func(t *testing.T, v6 bool) {
				node0, outside := h.Nodes[0], netip.AddrPortFrom(family(nodetest.ClientAddrs, v6), outsidePort)
				if got, err := nodetest.Ask(t, node0.NS, "udp", outside); err == nil {
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
				if got := tracked(t, n.NS); got < limit {
					t.Errorf("connections that conntrack knows on node %d = %d, want still %d", i, got, limit)
				}
			}
			h.wantNoDrops(t)
		})
	}
}

const (
	conntrackMax   = "/proc/sys/net/netfilter/nf_conntrack_max"
	conntrackCount = "/proc/sys/net/netfilter/nf_conntrack_count"
)

// tracked returns how many connections conntrack knows in a namespace.
func tracked(t *testing.T, ns *netnstest.NS) (n int) {
	t.Helper()
	ns.Do(func() { n = readNumber(t, conntrackCount) })
	return n
}

func readNumber(t *testing.T, path string) int {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, "read a setting", err)
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	must(t, "read a setting", err)
	return n
}

// limitConntrack lowers the number of connections that conntrack knows in any one namespace, until the test ends, and returns it. It leaves
// room for what the machine itself has open. Tests in other processes wait for each other at a lock on the setting.
func limitConntrack(t *testing.T) int {
	t.Helper()
	f, err := os.OpenFile(conntrackMax, os.O_RDWR, 0)
	must(t, "open the machine's limit, which the first network namespace only may write", err)
	t.Cleanup(func() { f.Close() }) // and with it the lock
	must(t, "lock the machine's limit", unix.Flock(int(f.Fd()), unix.LOCK_EX))
	before, limit := readNumber(t, conntrackMax), readNumber(t, conntrackCount)+200
	set := func(n int) error { return os.WriteFile(conntrackMax, []byte(strconv.Itoa(n)), 0) }
	t.Cleanup(func() {
		if err := set(before); err != nil {
			t.Errorf("put the machine's limit back to %d: %v", before, err)
		}
	})
	must(t, "lower the machine's limit", set(limit))
	return limit
}

// fillConntrack opens connections inside a namespace, which stay open, until conntrack has no room there: established ones, which make no
// room for others.
func fillConntrack(t *testing.T, ns *netnstest.NS, limit int) {
	t.Helper()
	ns.Do(func() {
		server, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, "listen", err)
		t.Cleanup(func() { server.Close() })
		must(t, "empty the table", netlink.ConntrackTableFlush(netlink.ConntrackTable))
		for i := 0; readNumber(t, conntrackCount) < limit; i++ {
			if i > 2*limit {
				t.Fatalf("after %d connections conntrack knows %d, want %d", i, readNumber(t, conntrackCount), limit)
			}
			c, err := net.Dial("tcp", server.Addr().String())
			must(t, "connect", err)
			accepted, err := server.Accept()
			must(t, "accept", err)
			t.Cleanup(func() { c.Close(); accepted.Close() })
		}
	})
}
