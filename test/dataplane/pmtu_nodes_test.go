// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/pkg/bpf"
)

// outers are the families of the overlay and who encapsulates, and the MTU that is left of 1500.
var outers = []struct {
	name string
	opts nodetest.ClusterOptions
	mtu  int
}{
	{"overlay over IPv4", nodetest.ClusterOptions{}, 1450},
	{"overlay over IPv4, by the device", nodetest.ClusterOptions{Device: true}, 1450},
	{"overlay over IPv6", nodetest.ClusterOptions{OuterV6: true}, 1430},
}

// forwarded runs f for a NodePort at node 0 whose only backend, port 8080 of b, is on node 1.
func forwarded(t *testing.T, flags uint32, f func(t *testing.T, c *nodetest.Cluster, b *nodetest.Pod, at netip.AddrPort, mtu int)) {
	for _, outer := range outers {
		t.Run(outer.name, func(t *testing.T) {
			t.Parallel()
			c := nodetest.NewCluster(t, 2, outer.opts)
			b := c.Nodes[1].AddPod("b")
			families(t, func(t *testing.T, v6 bool) {
				any := family([]netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}, v6)
				for _, proto := range protocols {
					id := uint32(proto)
					if v6 {
						id += 300
					}
					c.AddService(id, bpf.NewFrontendKey(proto, any, 30080), flags, netip.AddrPortFrom(b.Addr(v6), 8080))
				}
				f(t, c, b, netip.AddrPortFrom(family(c.Nodes[0].Addrs, v6), 30080), outer.mtu)
			})
			for i, n := range c.Nodes {
				if drops := n.AllDrops(); drops["nat"] != 0 || drops["no_flow"] != 0 {
					t.Errorf("node %d: drops = %v, want none as nat or no_flow", i, drops)
				}
			}
		})
	}
}

// Corner case A11: the error of a pod on another node reaches the client through the node that it asked, and from that node's address.
func TestRow11_ClosedPortOnAnotherNode(t *testing.T) {
	t.Parallel()
	for name, flags := range map[string]uint32{"tunnel": 0, "dsr": bpf.ServiceDSR} {
		t.Run(name, func(t *testing.T) {
			forwarded(t, flags, func(t *testing.T, c *nodetest.Cluster, _ *nodetest.Pod, at netip.AddrPort, _ int) {
				conn, err := nodetest.Dial(t, c.Client, "udp", at, 0)
				wantNoError(t, "socket", err)
				option(t, conn, at.Addr().Is6(), unix.IP_RECVERR, unix.IPV6_RECVERR, 1)
				if _, err := conn.Ask(); !errors.Is(err, unix.ECONNREFUSED) {
					t.Fatalf("error = %v, want ECONNREFUSED", err)
				}
				if errno, from := offender(t, conn); errno != unix.ECONNREFUSED || from != at.Addr() {
					t.Errorf("%v from %s, want ECONNREFUSED from %s", errno, from, at.Addr())
				}
			})
		})
	}
}

// A process of a node hears of a closed port of another node's pod, though its own node keeps no flows of it.
func TestClosedPortOfAnotherNodesPod(t *testing.T) {
	t.Parallel()
	forwarded(t, 0, func(t *testing.T, c *nodetest.Cluster, b *nodetest.Pod, at netip.AddrPort, _ int) {
		_, err := nodetest.Ask(t, c.Nodes[0].NS, "udp", netip.AddrPortFrom(b.Addr(at.Addr().Is6()), 9999))
		if !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("error = %v, want ECONNREFUSED", err)
		}
	})
}

// Corner case A12: a client's packets that do not fit the overlay are answered by the node that it asked, from the address that it asked,
// and the pod's answers by the pod's node.
func TestRow12_NodePortOnAnotherNode(t *testing.T) {
	t.Parallel()
	forwarded(t, 0, func(t *testing.T, c *nodetest.Cluster, b *nodetest.Pod, at netip.AddrPort, mtu int) {
		v6 := at.Addr().Is6()
		nodetest.Serve(t, b.NS, "b", 8080)
		conn, err := nodetest.Dial(t, c.Client, "udp", at, 0)
		wantNoError(t, "socket", err)
		option(t, conn, v6, unix.IP_MTU_DISCOVER, unix.IPV6_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
		option(t, conn, v6, unix.IP_RECVERR, unix.IPV6_RECVERR, 1)
		wantNoError(t, "deadline", conn.SetDeadline(time.Now().Add(nodetest.Timeout)))
		_, err = conn.Write(make([]byte, 1400+outerRoom(v6)))
		wantNoError(t, "send", err)
		if n, err := conn.Read(make([]byte, 2000)); !errors.Is(err, unix.EMSGSIZE) {
			t.Fatalf("read %d bytes, %v, want EMSGSIZE", n, err)
		}
		if errno, from := offender(t, conn); errno != unix.EMSGSIZE || from != at.Addr() {
			t.Errorf("%v from %s, want EMSGSIZE from %s", errno, from, at.Addr())
		}
		if got := pathMTU(t, conn); got != mtu {
			t.Errorf("path MTU = %d, want %d", got, mtu)
		}
		got, err := conn.Ask()
		wantAnswer(t, "one that fits", got, err, fmt.Sprintf("b %s", clientOf(v6)))
	})
}

// outerRoom fills a datagram of 1400 bytes up to the client's MTU of 1500.
func outerRoom(v6 bool) int {
	if v6 {
		return 1500 - 40 - 8 - 1400
	}
	return 1500 - 20 - 8 - 1400
}

func clientOf(v6 bool) netip.Addr {
	return family([]netip.Addr{netip.MustParseAddr("192.0.2.100"), netip.MustParseAddr("2001:db8:1::100")}, v6)
}

// Corner case A12: streams in both directions through a node that forwards, with segments that fit neither way of the overlay.
func TestRow12_StreamThroughAnotherNode(t *testing.T) {
	t.Parallel()
	forwarded(t, 0, func(t *testing.T, c *nodetest.Cluster, b *nodetest.Pod, at netip.AddrPort, mtu int) {
		before := c.Nodes[1].AllDrops()["too_big"]
		if got := fetch(t, c.Client, at, b.NS); got != mtu {
			t.Errorf("path MTU of the pod's socket = %d, want %d", got, mtu)
		}
		if c.Nodes[1].AllDrops()["too_big"] == before {
			t.Error("nothing that the pod sent was too big")
		}
		// Who knows the path MTU advertises segments that fit: forgotten, the other direction has to find it as well.
		ip(t, b.NS, "route flush cache\n-6 route flush cache")
		before = c.Nodes[0].AllDrops()["too_big"]
		l := listen(t, b.NS, "8080")
		defer l.Close()
		conn, err := nodetest.Dial(t, c.Client, "tcp", at, 0)
		wantNoError(t, "connect", err)
		accepted, err := l.Accept()
		wantNoError(t, "accept", err)
		defer accepted.Close()
		if got := transfer(t, conn.Conn, accepted); got != mtu {
			t.Errorf("path MTU of the client's socket = %d, want %d", got, mtu)
		}
		if c.Nodes[0].AllDrops()["too_big"] == before {
			t.Error("nothing that the client sent was too big")
		}
	})
}

// Between pods of two nodes: the pod's own node answers.
func TestRow12_PodOnAnotherNode(t *testing.T) {
	t.Parallel()
	for _, outer := range outers {
		t.Run(outer.name, func(t *testing.T) {
			t.Parallel()
			c := nodetest.NewCluster(t, 2, outer.opts)
			a, b := c.Nodes[0].AddPod("a"), c.Nodes[1].AddPod("b")
			families(t, func(t *testing.T, v6 bool) {
				got := fetch(t, a.NS, netip.AddrPortFrom(b.Addr(v6), 8080), b.NS)
				if got != outer.mtu {
					t.Errorf("path MTU = %d, want %d", got, outer.mtu)
				}
				if c.Nodes[1].AllDrops()["too_big"] == 0 {
					t.Error("nothing was too big")
				}
			})
		})
	}
}

// Corner case A12: the pod's answer fits the overlay, but not the device that it would leave the entry node by. That node's answer goes back
// through the overlay, and the pod's node translates it. (Here the same device carries the overlay: the entry's MTU is set by hand.)
func TestRow12_AnswerTooBigForTheEntryNode(t *testing.T) {
	t.Parallel()
	forwarded(t, 0, func(t *testing.T, c *nodetest.Cluster, b *nodetest.Pod, at netip.AddrPort, _ int) {
		v6 := at.Addr().Is6()
		client, err := nodetest.Dial(t, c.Client, "udp", at, 4000)
		wantNoError(t, "socket", err)
		pod, err := nodetest.Dial(t, b.NS, "udp", netip.AddrPortFrom(clientOf(v6), 4000), 8080)
		wantNoError(t, "socket", err)
		defer pod.Close()
		_, err = client.Write([]byte("question"))
		wantNoError(t, "send", err)
		wantNoError(t, "deadline", pod.SetDeadline(time.Now().Add(nodetest.Timeout)))
		_, err = pod.Read(make([]byte, 100))
		wantNoError(t, "receive", err)
		narrowEntries(t, c.Nodes[0])
		option(t, pod, v6, unix.IP_MTU_DISCOVER, unix.IPV6_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
		option(t, pod, v6, unix.IP_RECVERR, unix.IPV6_RECVERR, 1)
		_, err = pod.Write(make([]byte, 1350))
		wantNoError(t, "send", err)
		if n, err := pod.Read(make([]byte, 2000)); !errors.Is(err, unix.EMSGSIZE) {
			t.Fatalf("read %d bytes, %v, want EMSGSIZE", n, err)
		}
		if errno, from := offender(t, pod); errno != unix.EMSGSIZE || from != clientOf(v6) {
			t.Errorf("%v from %s, want EMSGSIZE from %s", errno, from, clientOf(v6))
		}
		if got := pathMTU(t, pod); got != narrow {
			t.Errorf("path MTU of the pod's socket = %d, want %d", got, narrow)
		}
	})
}

// narrowEntries sets the MTU of every flow that leaves the node by a device.
func narrowEntries(t *testing.T, n *nodetest.Node) {
	t.Helper()
	entries := map[bpf.FlowKey]bpf.Flow{}
	var key bpf.FlowKey
	var entry bpf.Flow
	it := n.DP.Maps.Flows.Iterate()
	for it.Next(&key, &entry) {
		if entry.Action == bpf.FlowToNetdev {
			entry.Mtu = narrow
			entries[key] = entry
		}
	}
	wantNoError(t, "read flows", it.Err())
	for key, entry := range entries {
		wantNoError(t, "write flow", n.DP.Maps.Flows.Put(&key, &entry))
	}
}
