// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"bytes"
	"net/netip"
	"os"
	"os/exec"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/pkg/pins"
)

const outsidePort = 4430

// masquerading is a node that masquerades, with a server outside.
func masquerading(t *testing.T) *nodetest.Node {
	n := nodetest.New(t)
	n.Masquerade(nodetest.NodeAddrs...)
	nodetest.Serve(t, n.Client, "outside", outsidePort)
	return n
}

func outside(v6 bool) netip.AddrPort {
	return netip.AddrPortFrom(family(nodetest.ClientAddrs, v6), outsidePort)
}

// asNode is what the server outside answers to whom it takes for the node.
func asNode(v6 bool) string { return "outside " + family(nodetest.NodeAddrs, v6).String() }

func ping(t *testing.T, ns *netnstest.NS, to netip.Addr, args ...string) {
	t.Helper()
	ns.Do(func() {
		out, err := exec.Command("ping", append([]string{"-n", "-W2", to.String()}, args...)...).CombinedOutput()
		if err != nil {
			t.Errorf("ping %s: %v\n%s", to, err, out)
		}
	})
}

// A pod's traffic to the outside has the node's address, and goes on when the routes have changed. The node's connection tracking has no
// part in it.
func TestMasquerade(t *testing.T) {
	t.Parallel()
	n := masquerading(t)
	a := n.AddPod("a")
	seen := newWire(t, n.Client)
	families(t, func(t *testing.T, v6 bool) {
		for network := range protocols {
			conn, err := nodetest.Dial(t, a.NS, network, outside(v6), 0)
			wantNoError(t, network, err)
			for range 2 {
				got, err := conn.Ask()
				wantAnswer(t, network, got, err, asNode(v6))
				wantNoError(t, "raise the route epoch", n.DP.RaiseRouteEpoch())
			}
		}
		ping(t, a.NS, outside(v6).Addr(), "-c2", "-i0.2", "-p", "6d6172676179")
		if addr := a.Addr(v6).AsSlice(); seen.sees(string(addr)) {
			t.Errorf("the pod's address was seen outside")
		}
	})
	n.NS.Do(func() {
		table, err := os.ReadFile("/proc/thread-self/net/nf_conntrack")
		if err == nil && len(bytes.TrimSpace(table)) != 0 {
			t.Errorf("connection tracking has entries:\n%s", table)
		}
	})
	if drops := n.AllDrops(); drops["no_source_port"]+drops["no_egress_address"]+drops["nat_collision"] != 0 {
		t.Errorf("drops = %v", drops)
	}
}

// Two pods and the node itself, each with the same source port to the same server, at the same time.
func TestMasqueradeSharesPorts(t *testing.T) {
	t.Parallel()
	n := masquerading(t)
	a, b := n.AddPod("a"), n.AddPod("b")
	families(t, func(t *testing.T, v6 bool) {
		for network := range protocols {
			var conns []*nodetest.Conn
			for _, ns := range []*netnstest.NS{a.NS, b.NS, n.NS} {
				conn, err := nodetest.Dial(t, ns, network, outside(v6), 4000)
				wantNoError(t, network, err)
				conns = append(conns, conn)
				// All three, each time another one has come.
				for range 2 {
					for _, c := range conns {
						got, err := c.Ask()
						wantAnswer(t, network, got, err, asNode(v6))
					}
				}
			}
		}
	})
}

// The node was first: a pod with the same source port gets another one, and the node's connection goes on.
func TestMasqueradeYieldsToTheNode(t *testing.T) {
	t.Parallel()
	n := masquerading(t)
	a := n.AddPod("a")
	families(t, func(t *testing.T, v6 bool) {
		for network := range protocols {
			var conns []*nodetest.Conn
			for _, ns := range []*netnstest.NS{n.NS, a.NS} {
				conn, err := nodetest.Dial(t, ns, network, outside(v6), 5000)
				wantNoError(t, network, err)
				conns = append(conns, conn)
			}
			for range 2 {
				for _, c := range conns {
					got, err := c.Ask()
					wantAnswer(t, network, got, err, asNode(v6))
				}
			}
		}
	})
}

// Pings with one identifier from a pod and from the node.
func TestMasqueradeSharesEchoIdentifiers(t *testing.T) {
	t.Parallel()
	n := masquerading(t)
	a, b := n.AddPod("a"), n.AddPod("b")
	families(t, func(t *testing.T, v6 bool) {
		for _, ns := range []*netnstest.NS{a.NS, b.NS, n.NS, a.NS} {
			ping(t, ns, outside(v6).Addr(), "-c2", "-i0.2", "-e", "4711")
		}
	})
}

// A server on the node itself behind a service: clients outside and pods reach it, it sees their own addresses, and a client may use one
// port for both ways to it.
func TestHostBackend(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a := n.AddPod("a")
	nodetest.Serve(t, n.NS, "node", 9100)
	addServicesOn(n, 9100, nodetest.NodeAddrs)
	families(t, func(t *testing.T, v6 bool) {
		node := family(nodetest.NodeAddrs, v6)
		for network := range protocols {
			for _, from := range []struct {
				ns     *netnstest.NS
				client netip.Addr
				to     []netip.AddrPort
			}{
				{n.Client, family(nodetest.ClientAddrs, v6), []netip.AddrPort{netip.AddrPortFrom(node, 30080), netip.AddrPortFrom(node, 9100)}},
				{a.NS, a.Addr(v6), []netip.AddrPort{
					netip.AddrPortFrom(family(vips, v6), 80), netip.AddrPortFrom(node, 30080), netip.AddrPortFrom(node, 9100),
				}},
			} {
				var conns []*nodetest.Conn
				for _, to := range from.to {
					conn, err := nodetest.Dial(t, from.ns, network, to, 4000)
					wantNoError(t, network+" to "+to.String(), err)
					conns = append(conns, conn)
				}
				for range 2 {
					for _, c := range conns {
						got, err := c.Ask()
						wantAnswer(t, network+" to "+c.RemoteAddr().String(), got, err, "node "+from.client.String())
					}
					wantNoError(t, "raise the route epoch", n.DP.RaiseRouteEpoch())
				}
			}
		}
	})
}

// to_netdev takes a packet that came in on a device for one that is done with. So every packet that a pod's program redirects to the
// network must say which that was, and every packet of the node's own must not.
func TestRedirectedPacketsHaveAnIngressDevice(t *testing.T) {
	t.Parallel()
	n := masquerading(t)
	a := n.AddPod("a")
	var seen *ebpf.Map
	n.NS.Do(func() {
		seen = countIngressDevices(t, n.ClientDevice)
	})
	count := func(ifindex uint32) (packets uint64) {
		wantNoError(t, "read", seen.Lookup(ifindex, &packets))
		return packets
	}
	families(t, func(t *testing.T, v6 bool) {
		for network := range protocols {
			before := []uint64{count(uint32(a.Ifindex)), count(0)}
			_, err := nodetest.Ask(t, a.NS, network, outside(v6))
			wantNoError(t, network+" of the pod", err)
			// One datagram, or what a connection takes.
			if sent := count(uint32(a.Ifindex)) - before[0]; sent == 0 || network == "udp" && sent != 1 {
				t.Errorf("%s: %d packets said that they came in on the pod's device", network, sent)
			}
			_, err = nodetest.Ask(t, n.NS, network, outside(v6))
			wantNoError(t, network+" of the node", err)
			if count(0) == before[1] {
				t.Errorf("%s: no packet of the node passed for its own", network)
			}
		}
	})
}

// countIngressDevices puts a program in the place of to_netdev that counts IP packets by skb->ingress_ifindex, up to 255.
func countIngressDevices(t *testing.T, ifindex int) *ebpf.Map {
	t.Helper()
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 256})
	wantNoError(t, "map", err)
	t.Cleanup(func() { m.Close() })
	const ingressIfindex = 36 // offset in struct __sk_buff
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, ingressIfindex, asm.Word),
		asm.StoreMem(asm.RFP, -4, asm.R2, asm.Word),
		asm.LoadMapPtr(asm.R1, m.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.Mov.Imm(asm.R1, 1),
		asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("out"),
		asm.Return(),
	}})
	wantNoError(t, "load", err)
	t.Cleanup(func() { prog.Close() })
	wantNoError(t, "attach", netlink.FilterReplace(&netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: ifindex, Parent: netlink.HANDLE_MIN_EGRESS, Handle: pins.FilterHandle, Priority: pins.FilterPriority, Protocol: unix.ETH_P_ALL,
		},
		Fd: prog.FD(), Name: "count", DirectAction: true,
	}))
	return m
}
