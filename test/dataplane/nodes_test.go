// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/pkg/bpf"
)

// ways runs f for every way in which nodes reach each other, and both families of the packets; nothing may be dropped.
func ways(t *testing.T, f func(t *testing.T, c *nodetest.Cluster, v6 bool)) {
	clusters(t, func(t *testing.T, c *nodetest.Cluster) {
		families(t, func(t *testing.T, v6 bool) { f(t, c, v6) })
		for i, n := range c.Nodes {
			if diff := cmp.Diff(map[string]uint64{}, unexplained(n.AllDrops())); diff != "" {
				t.Errorf("node %d: drops (-want +got):\n%s", i, diff)
			}
		}
	})
}

// clusters runs f with two nodes for every way in which they reach each other.
func clusters(t *testing.T, f func(t *testing.T, c *nodetest.Cluster)) {
	for name, opts := range map[string]nodetest.ClusterOptions{
		"overlay over IPv4": {}, "overlay over IPv6": {OuterV6: true}, "direct": {Direct: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f(t, nodetest.NewCluster(t, 2, opts))
		})
	}
}

// unexplained leaves out what kernels in the namespaces send by themselves.
func unexplained(drops map[string]uint64) map[string]uint64 {
	for _, reason := range []string{"multicast", "invalid_nd", "invalid_arp"} {
		delete(drops, reason)
	}
	return drops
}

// node is a pod's, node's or client's namespace with what it is called by itself.
type party struct {
	ns   *netnstest.NS
	addr netip.Addr
}

// wantTalk asks over TCP and UDP, and pings.
func wantTalk(t *testing.T, what string, from party, to netip.AddrPort, want string) {
	t.Helper()
	for network := range protocols {
		got, err := nodetest.Ask(t, from.ns, network, to)
		wantAnswer(t, what+", "+network, got, err, want+" "+from.addr.String())
	}
	from.ns.Do(func() {
		if out, err := exec.Command("ping", "-n", "-c1", "-W1", to.Addr().String()).CombinedOutput(); err != nil {
			t.Errorf("%s: ping: %v\n%s", what, err, out)
		}
	})
}

func TestPodsOfTwoNodes(t *testing.T) {
	t.Parallel()
	ways(t, func(t *testing.T, c *nodetest.Cluster, v6 bool) {
		n0, n1 := c.Nodes[0], c.Nodes[1]
		suffix := fmt.Sprintf("%v", v6)[:1]
		a, b := n0.AddPod("a"+suffix), n1.AddPod("b"+suffix)
		nodetest.Serve(t, b.NS, "b", 8080)
		nodetest.Serve(t, n1.NS, "node1", 9090)
		nodetest.Serve(t, n0.NS, "node0", 9090)
		pa, pb := party{a.NS, a.Addr(v6)}, party{b.NS, b.Addr(v6)}
		node0 := party{n0.NS, family(n0.Addrs, v6)}
		wantTalk(t, "pod to pod", pa, netip.AddrPortFrom(pb.addr, 8080), "b")
		wantTalk(t, "pod to the other node", pa, netip.AddrPortFrom(family(n1.Addrs, v6), 9090), "node1")
		wantTalk(t, "node to the other's pod", node0, netip.AddrPortFrom(pb.addr, 8080), "b")
		wantTalk(t, "pod to its own node", pa, netip.AddrPortFrom(family(n0.Addrs, v6), 9090), "node0")
	})
}

// TestNodePortOnAnotherNode: the client asks node 0, the only pod is on node 1, and sees the client's own address.
func TestNodePortOnAnotherNode(t *testing.T) {
	t.Parallel()
	for name, flags := range map[string]uint32{"tunnel": 0, "dsr": bpf.ServiceDSR} {
		t.Run(name, func(t *testing.T) {
			ways(t, func(t *testing.T, c *nodetest.Cluster, v6 bool) {
				suffix := fmt.Sprintf("%v", v6)[:1]
				b := c.Nodes[1].AddPod("b" + suffix)
				nodetest.Serve(t, b.NS, "b", 8080)
				id := uint32(0)
				for _, proto := range protocols {
					id++
					any := family([]netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}, v6)
					c.AddService(id, bpf.NewFrontendKey(proto, any, 30080), flags, netip.AddrPortFrom(b.Addr(v6), 8080))
				}
				for network := range protocols {
					for i, n := range c.Nodes {
						got, err := nodetest.Ask(t, c.Client, network, netip.AddrPortFrom(family(n.Addrs, v6), 30080))
						client := family([]netip.Addr{netip.MustParseAddr("192.0.2.100"), netip.MustParseAddr("2001:db8:1::100")}, v6)
						if i == 1 {
							client = family([]netip.Addr{netip.MustParseAddr("192.1.2.100"), netip.MustParseAddr("2001:db8:1:1::100")}, v6)
						}
						wantAnswer(t, fmt.Sprintf("%s to node %d", network, i), got, err, "b "+client.String())
					}
				}
			})
		})
	}
}

// TestRow15_HostNetworkBackendOnAnotherNode: the backend is a process of node 1 itself. It sees the client's own address, and its answer,
// which its node would send straight to the client, goes back the way that it has to, also past a strict reverse path filter.
func TestRow15_HostNetworkBackendOnAnotherNode(t *testing.T) {
	t.Parallel()
	for name, flags := range map[string]uint32{"tunnel": 0, "dsr": bpf.ServiceDSR} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ways(t, func(t *testing.T, c *nodetest.Cluster, v6 bool) {
				n1 := c.Nodes[1]
				nodetest.Serve(t, n1.NS, "node1", 8080)
				n1.NS.Do(func() { strictRPFilter(t) })
				server := netip.AddrPortFrom(family(n1.Addrs, v6), 8080)
				id := uint32(0)
				for _, proto := range protocols {
					id++
					unspecified := family([]netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}, v6)
					c.AddService(id, bpf.NewFrontendKey(proto, unspecified, 30080), flags, server)
				}
				client := party{c.Client, family(nodetest.ClientAddrs, v6)}
				for network := range protocols {
					conn, err := nodetest.Dial(t, client.ns, network, netip.AddrPortFrom(family(c.Nodes[0].Addrs, v6), 30080), 0)
					if err != nil {
						t.Fatalf("%s: %v", network, err)
					}
					for range 3 {
						got, err := conn.Ask()
						wantAnswer(t, network+" to the host-network backend", got, err, "node1 "+client.addr.String())
					}
				}
				client.addr = family([]netip.Addr{netip.MustParseAddr("192.1.2.100"), netip.MustParseAddr("2001:db8:1:1::100")}, v6)
				wantTalk(t, "to it directly", client, server, "node1")
			})
		})
	}
}

// A node that asks another one's NodePort may be led back to itself. As a client that reaches itself (row V12) it sees the address that it
// asked; a pod of its own sees the node.
func TestNodeIsLedBackToItself(t *testing.T) {
	t.Parallel()
	for name, flags := range map[string]uint32{"tunnel": 0, "dsr": bpf.ServiceDSR} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ways(t, func(t *testing.T, c *nodetest.Cluster, v6 bool) {
				n1 := c.Nodes[1]
				pod := n1.AddPod("p" + fmt.Sprintf("%v", v6)[:1])
				nodetest.Serve(t, n1.NS, "node1", 8080)
				nodetest.Serve(t, pod.NS, "pod", 8080)
				n1.NS.Do(func() { strictRPFilter(t) })
				asked, itself := family(c.Nodes[0].Addrs, v6), family(n1.Addrs, v6)
				unspecified := family([]netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}, v6)
				id := uint32(0)
				for network, proto := range protocols {
					c.AddService(id+1, bpf.NewFrontendKey(proto, unspecified, 30080), flags, netip.AddrPortFrom(itself, 8080))
					c.AddService(id+2, bpf.NewFrontendKey(proto, unspecified, 30081), flags, netip.AddrPortFrom(pod.Addr(v6), 8080))
					id += 2
					for port, want := range map[uint16]string{30080: "node1 " + asked.String(), 30081: "pod " + itself.String()} {
						conn, err := nodetest.Dial(t, n1.NS, network, netip.AddrPortFrom(asked, port), 0)
						if err != nil {
							t.Fatalf("%s to %d: %v", network, port, err)
						}
						for range 3 {
							got, err := conn.Ask()
							wantAnswer(t, fmt.Sprintf("%s to %d", network, port), got, err, want)
						}
					}
				}
			})
		})
	}
}

// strictRPFilter sets the reverse path filter of every device in the calling thread's namespace (IPv6 has none).
func strictRPFilter(t *testing.T) {
	t.Helper()
	files, err := filepath.Glob("/proc/sys/net/ipv4/conf/*/rp_filter")
	if err != nil || len(files) == 0 {
		t.Fatalf("reverse path filters: %v, %v", files, err)
	}
	for _, file := range files {
		wantNoError(t, "set "+file, os.WriteFile(file, []byte("1"), 0))
	}
}

// TestAdoptedPodToAnotherNode: what a pod sends whose interface another plugin made goes by the host's stack, and by its routes into the
// overlay, where the destination says which node.
func TestAdoptedPodToAnotherNode(t *testing.T) {
	t.Parallel()
	ways(t, func(t *testing.T, c *nodetest.Cluster, v6 bool) {
		suffix := fmt.Sprintf("%v", v6)[:1]
		a, b := c.Nodes[0].AddPod("a"+suffix), c.Nodes[1].AddPod("b"+suffix)
		c.Nodes[0].Register(a, bpf.Endpoint{Identity: bpf.IdentityPodUnknown, Flags: bpf.EndpointAdopted})
		nodetest.Serve(t, b.NS, "b", 8080)
		wantTalk(t, "adopted pod to pod", party{a.NS, a.Addr(v6)}, netip.AddrPortFrom(b.Addr(v6), 8080), "b")
	})
}
