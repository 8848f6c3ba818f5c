// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/pkg/bpf"
)

// resettable are the connections of a pod by ClusterIP and of an outside client by NodePort to one backend.
type resettable map[string]*nodetest.Conn

// connections opens them on the client's node and asks once on each. The services have the ids 1 and 2.
func connections(t *testing.T, pod, client *netnstest.NS, node netip.Addr, v6 bool) resettable {
	t.Helper()
	out := resettable{}
	for what, from := range map[string]*netnstest.NS{"pod": pod, "outside client": client} {
		to := netip.AddrPortFrom(family(vips, v6), 80)
		if what != "pod" {
			to = netip.AddrPortFrom(node, 30080)
		}
		c, err := nodetest.Dial(t, from, "tcp", to, 0)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		out[what] = c
	}
	out.wantAnswers(t, "at the start")
	return out
}

func (r resettable) wantAnswers(t *testing.T, when string) {
	t.Helper()
	for what, c := range r {
		if got, err := c.Ask(); err != nil {
			t.Errorf("%s: the connection of the %s = %q, %v, want it to go on", when, what, got, err)
		}
	}
}

func (r resettable) wantResets(t *testing.T, when string) {
	t.Helper()
	for what, c := range r {
		if got, err := c.Ask(); !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
			t.Errorf("%s: the connection of the %s = %q, %v, want a reset", when, what, got, err)
		}
	}
}

// frontends are the ClusterIP and the NodePort of one family.
func frontends(v6 bool, proto uint8) []bpf.FrontendKey {
	return []bpf.FrontendKey{
		bpf.NewFrontendKey(proto, family(vips, v6), 80),
		bpf.NewFrontendKey(proto, family([]netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}, v6), 30080),
	}
}

// Corner case A8: a pod that ends without a goodbye. Its clients get a reset with their next segment, whether the plugin's DEL tells
// of it or the pod has only lost its device and its place in the service.
func TestA8_VanishedBackendResets(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	client := n.AddPod("client")
	families(t, func(t *testing.T, v6 bool) {
		for when, tell := range map[string]func(*nodetest.Pod, netip.AddrPort){
			"after DEL":                 func(p *nodetest.Pod, _ netip.AddrPort) { n.Unregister(p) },
			"after it left the service": func(_ *nodetest.Pod, b netip.AddrPort) { n.Leave(1, b); n.Leave(2, b) },
		} {
			b := n.AddPod("b" + when[len(when)-3:] + familyLetter(v6))
			nodetest.Serve(t, b.NS, "b", 8080)
			backend := netip.AddrPortFrom(b.Addr(v6), 8080)
			for i, f := range frontends(v6, unix.IPPROTO_TCP) {
				n.AddService(uint32(i+1), f, backend)
			}
			conns := connections(t, client.NS, n.Client, family(n.Addrs, v6), v6)
			n.Vanish(b)
			before := n.AllDrops()["service_no_backend"]
			tell(b, backend)
			conns.wantResets(t, when)
			if got := n.AllDrops()["service_no_backend"] - before; got < 2 {
				t.Errorf("%s: service_no_backend counted %d times, want both resets", when, got)
			}
		}
	})
}

func familyLetter(v6 bool) string {
	if v6 {
		return "6"
	}
	return "4"
}

// The same on another node, by every way to it and back. Before that the backend drains: it leaves its service, and connections go on.
func TestA8_VanishedRemoteBackendResets(t *testing.T) {
	t.Parallel()
	for name, flags := range map[string]uint32{"tunnel": 0, "dsr": bpf.ServiceDSR} {
		t.Run(name, func(t *testing.T) {
			clusters(t, func(t *testing.T, c *nodetest.Cluster) {
				client := c.Nodes[0].AddPod("client")
				families(t, func(t *testing.T, v6 bool) {
					b := c.Nodes[1].AddPod("b" + familyLetter(v6))
					nodetest.Serve(t, b.NS, "b", 8080)
					backend := netip.AddrPortFrom(b.Addr(v6), 8080)
					for i, f := range frontends(v6, unix.IPPROTO_TCP) {
						c.AddService(uint32(i+1), f, flags, backend)
					}
					conns := connections(t, client.NS, c.Client, family(c.Nodes[0].Addrs, v6), v6)
					for _, n := range c.Nodes {
						n.Leave(1, backend)
						n.Leave(2, backend)
					}
					conns.wantAnswers(t, "after it left the service")
					c.Nodes[1].Vanish(b)
					c.Nodes[1].Unregister(b)
					conns.wantResets(t, "after it vanished")
				})
			})
		})
	}
}

// A whole node vanishes: who has a connection to its pods hears of it when the cluster does. Where the node's pods are reached by the
// kernel's routes, their addresses look like anybody's once it has gone; only masquerade tells that they were the cluster's.
func TestA8_VanishedNodeResets(t *testing.T) {
	t.Parallel()
	clusters(t, func(t *testing.T, c *nodetest.Cluster) {
		n, other := c.Nodes[0], c.Nodes[1]
		n.Masquerade(n.Addrs...)
		client, b := n.AddPod("client"), other.AddPod("b")
		nodetest.Serve(t, b.NS, "b", 8080)
		var all []resettable
		for i, v6 := range []bool{false, true} {
			backend := netip.AddrPortFrom(b.Addr(v6), 8080)
			for j, f := range frontends(v6, unix.IPPROTO_TCP) {
				c.AddService(uint32(2*i+j+1), f, 0, backend)
			}
			all = append(all, connections(t, client.NS, c.Client, family(n.Addrs, v6), v6))
		}
		other.Vanish(b)
		for i, v6 := range []bool{false, true} {
			for j := range 2 {
				n.Leave(uint32(2*i+j+1), netip.AddrPortFrom(b.Addr(v6), 8080))
			}
		}
		n.Forget(other)
		for _, conns := range all {
			conns.wantResets(t, "after the node has gone")
		}
	})
}

// Rows S2 and S3 as flows see them: a backend that terminates leaves the lists while it still serves. Connections to it go on, new ones
// go to another node's pod or this one's.
func TestS2_TerminatingBackendDrains(t *testing.T) {
	t.Parallel()
	clusters(t, func(t *testing.T, c *nodetest.Cluster) {
		client, here, there := c.Nodes[0].AddPod("client"), c.Nodes[0].AddPod("here"), c.Nodes[1].AddPod("there")
		nodetest.Serve(t, here.NS, "here", 8080)
		nodetest.Serve(t, there.NS, "there", 8080)
		families(t, func(t *testing.T, v6 bool) {
			for _, tt := range []struct{ leaves, stays *nodetest.Pod }{{here, there}, {there, here}} {
				for i, f := range frontends(v6, unix.IPPROTO_TCP) {
					c.AddService(uint32(i+1), f, 0, netip.AddrPortFrom(tt.leaves.Addr(v6), 8080))
				}
				old := connections(t, client.NS, c.Client, family(c.Nodes[0].Addrs, v6), v6)
				for i, f := range frontends(v6, unix.IPPROTO_TCP) {
					c.AddService(uint32(i+1), f, 0, netip.AddrPortFrom(tt.stays.Addr(v6), 8080))
					for _, n := range c.Nodes {
						if err := n.DP.RaiseServiceEpochs(uint32(i + 1)); err != nil {
							t.Fatal(err)
						}
					}
				}
				for what, conn := range old {
					got, err := conn.Ask()
					if name := got[:min(len(got), len(tt.leaves.Name))]; err != nil || name != tt.leaves.Name {
						t.Errorf("the old connection of the %s = %q, %v, want %s", what, got, err, tt.leaves.Name)
					}
				}
				for what, conn := range connections(t, client.NS, c.Client, family(c.Nodes[0].Addrs, v6), v6) {
					got, err := conn.Ask()
					if name := got[:min(len(got), len(tt.stays.Name))]; err != nil || name != tt.stays.Name {
						t.Errorf("a new connection of the %s = %q, %v, want %s", what, got, err, tt.stays.Name)
					}
				}
			}
		})
	})
}
