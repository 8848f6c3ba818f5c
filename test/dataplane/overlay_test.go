// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/pkg/bpf"
)

// encapsulate sends a frame to a node's VXLAN port, as whoever holds the namespace and the address may.
func encapsulate(t *testing.T, ns *netnstest.NS, from, to netip.Addr, vni uint32, frame []byte) {
	t.Helper()
	ns.Do(func() {
		c, err := net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0)),
			net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, nodetest.OverlayPort)))
		wantNoError(t, "open a UDP socket", err)
		defer c.Close()
		header := binary.BigEndian.AppendUint32([]byte{0x08, 0, 0, 0}, vni<<8) // RFC 7348 §5
		_, err = c.Write(append(header, frame...))
		wantNoError(t, "send", err)
	})
}

// dropsOf returns how often a node dropped for a reason, named as in docs/drop-reasons.md.
func dropsOf(n *nodetest.Node, reason string) uint64 { return n.AllDrops()[reason] }

// TestRow20_TunnelSpoofing: what comes encapsulated is believed only from a node, under our network numbers, and from those that the node
// speaks for.
func TestRow20_TunnelSpoofing(t *testing.T) {
	t.Parallel()
	for name, opts := range map[string]nodetest.ClusterOptions{"over IPv4": {}, "over IPv6": {OuterV6: true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := nodetest.NewCluster(t, 2, opts)
			n0, n1 := c.Nodes[0], c.Nodes[1]
			a, b, other := n0.AddPod("a"), n1.AddPod("b"), n0.AddPod("o")
			pod := newWire(t, a.NS)
			outer := func(n *nodetest.Node) netip.Addr { return family(n.Addrs, opts.OuterV6) }
			families(t, func(t *testing.T, v6 bool) {
				client := family(nodetest.ClientAddrs, v6)
				vip := netip.AddrPortFrom(family(vips, v6), 80)
				c.AddService(7, bpf.NewFrontendKey(unix.IPPROTO_UDP, vip.Addr(), vip.Port()), 0, netip.AddrPortFrom(a.Addr(v6), 8080))
				toPod := netip.AddrPortFrom(a.Addr(v6), 8080)
				for i, tc := range []struct {
					name   string
					ns     *netnstest.NS
					from   netip.Addr
					vni    uint32
					inner  netip.Addr
					dst    netip.AddrPort
					reason string // empty: it arrives
				}{
					{"a pod's packet from its node", n1.NS, outer(n1), bpf.VNIPods, b.Addr(v6), toPod, ""},
					{"the node's own packet", n1.NS, outer(n1), bpf.VNIPods, family(n1.Addrs, v6), toPod, ""},
					{"from an address that is no node's", c.Client, family(nodetest.ClientAddrs, opts.OuterV6), bpf.VNIPods, b.Addr(v6), toPod, "overlay_source"},
					{"from a pod of the node itself", other.NS, other.Addr(opts.OuterV6), bpf.VNIPods, b.Addr(v6), toPod, "overlay_source"},
					{"another network number", n1.NS, outer(n1), 100, b.Addr(v6), toPod, "overlay_vni"},
					{"a client's address among the pods", n1.NS, outer(n1), bpf.VNIPods, client, toPod, "overlay_source"},
					{"a local pod's address", n1.NS, outer(n1), bpf.VNIPods, other.Addr(v6), toPod, "source_is_local"},
					{"this node's address", n1.NS, outer(n1), bpf.VNIPods, family(n0.Addrs, v6), toPod, "overlay_source"},
					{"forwarded service traffic", n1.NS, outer(n1), bpf.VNIForwarded, client, vip, ""},
					{"forwarded under a pod's address", n1.NS, outer(n1), bpf.VNIForwarded, b.Addr(v6), vip, "overlay_source"},
					{"forwarded under a local pod's address", n1.NS, outer(n1), bpf.VNIForwarded, other.Addr(v6), vip, "source_is_local"},
					{"forwarded by nobody", c.Client, family(nodetest.ClientAddrs, opts.OuterV6), bpf.VNIForwarded, client, vip, "overlay_source"},
					{"forwarded to no service", n1.NS, outer(n1), bpf.VNIForwarded, client, netip.AddrPortFrom(family(vips, v6), 81), "no_flow"},
					{"for nobody here", n1.NS, outer(n1), bpf.VNIPods, b.Addr(v6), netip.AddrPortFrom(client, 81), "no_route"},
				} {
					payload := fmt.Sprintf("%s %v", tc.name, v6)
					frame := pkt.Packet{Kind: pkt.UDP, TTL: 64, SrcMAC: b.HostMAC, DstMAC: b.MAC,
						Src: netip.AddrPortFrom(tc.inner, uint16(4000+i)), Dst: tc.dst, Payload: []byte(payload)}.Bytes()
					before := dropsOf(n0, tc.reason)
					encapsulate(t, tc.ns, tc.from, outer(n0), nodetest.OverlayVNI+tc.vni, frame)
					if got := pod.sees(payload); got != (tc.reason == "") {
						t.Errorf("%s: the pod got it: %v", tc.name, got)
					}
					if tc.reason != "" && dropsOf(n0, tc.reason) != before+1 {
						t.Errorf("%s: drops = %v, want one more of %s", tc.name, n0.AllDrops(), tc.reason)
					}
				}
			})
		})
	}
}

// TestNotEncapsulated: an address of another node's pod, from outside and bare, is nobody's.
func TestNotEncapsulated(t *testing.T) {
	t.Parallel()
	c := nodetest.NewCluster(t, 2, nodetest.ClusterOptions{})
	n0, n1 := c.Nodes[0], c.Nodes[1]
	a, b := n0.AddPod("a"), n1.AddPod("b")
	pod, outside := newWire(t, a.NS), newWire(t, c.Client)
	families(t, func(t *testing.T, v6 bool) {
		sendAs := func(mac net.HardwareAddr, src netip.Addr, payload string) {
			outside.send(pkt.Packet{Kind: pkt.UDP, TTL: 64, SrcMAC: mac, DstMAC: nodeMAC(t, n0),
				Src: netip.AddrPortFrom(src, 4000), Dst: netip.AddrPortFrom(a.Addr(v6), 8080), Payload: []byte(payload)}.Bytes())
		}
		send := func(src netip.Addr, payload string) { sendAs(outside.HardwareAddr, src, payload) }
		before := dropsOf(n0, "not_encapsulated")
		send(b.Addr(v6), "as another node's pod")
		if pod.sees("as another node's pod") || dropsOf(n0, "not_encapsulated") != before+1 {
			t.Errorf("it arrived, or drops = %v lack one of not_encapsulated", n0.AllDrops())
		}
		// One MAC at both ends is how the node itself marks what it has translated.
		before = dropsOf(n0, "not_encapsulated")
		sendAs(nodeMAC(t, n0), b.Addr(v6), "as the node's own")
		if pod.sees("as the node's own") || dropsOf(n0, "not_encapsulated") != before+1 {
			t.Errorf("it arrived, or drops = %v lack one of not_encapsulated", n0.AllDrops())
		}
		send(family(nodetest.ClientAddrs, v6), "as itself")
		if !pod.sees("as itself") {
			t.Error("the same packet under the client's own address did not arrive")
		}
	})
}

// TestChosenBackendTravels: node 0 knows one backend, node 1 has two. Node 1 takes the one that node 0 has chosen, so both compute the
// same hash, in C and in Go.
func TestChosenBackendTravels(t *testing.T) {
	t.Parallel()
	c := nodetest.NewCluster(t, 2, nodetest.ClusterOptions{})
	n0, n1 := c.Nodes[0], c.Nodes[1]
	b1, b2 := n1.AddPod("b1"), n1.AddPod("b2")
	nodetest.Serve(t, b1.NS, "b1", 8080)
	nodetest.Serve(t, b2.NS, "b2", 8080)
	families(t, func(t *testing.T, v6 bool) {
		one, two := netip.AddrPortFrom(b1.Addr(v6), 8080), netip.AddrPortFrom(b2.Addr(v6), 8080)
		frontend := bpf.NewFrontendKey(unix.IPPROTO_TCP, family(nodetest.NodeAddrs, v6), 30080)
		id := uint32(3)
		if v6 {
			id++ // a service port has one in each family
		}
		c.AddService(id, frontend, 0, one, two)
		n0.AddService(id, frontend, two)
		for range 20 {
			got, err := nodetest.Ask(t, c.Client, "tcp", netip.AddrPortFrom(family(n0.Addrs, v6), 30080))
			wantAnswer(t, "the backend that node 0 chose", got, err, "b2 "+family(nodetest.ClientAddrs, v6).String())
		}
		// The chosen one is gone from node 1: any other serves, so that nothing waits for node 0 to learn of it.
		if err := n1.DP.Maps.Backends.Delete(bpf.BackendKey{List: bpf.BackendByHash | id, Slot: bpf.BackendHash(two)}); err != nil {
			t.Fatal(err)
		}
		n1.AddService(id, frontend, one)
		got, err := nodetest.Ask(t, c.Client, "tcp", netip.AddrPortFrom(family(n0.Addrs, v6), 30080))
		wantAnswer(t, "another backend of node 1", got, err, "b1 "+family(nodetest.ClientAddrs, v6).String())
	})
}

// TestPolicyBetweenNodes: both ends judge by the identity of the pod, and of the client, wherever it is.
func TestPolicyBetweenNodes(t *testing.T) {
	t.Parallel()
	for name, opts := range map[string]nodetest.ClusterOptions{"overlay": {}, "direct": {Direct: true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := nodetest.NewCluster(t, 2, opts)
			n0, n1 := c.Nodes[0], c.Nodes[1]
			a, b := n0.AddPod("a"), n1.AddPod("b")
			nodetest.Serve(t, b.NS, "b", 8080)
			for _, p := range a.Addrs {
				n1.Identify(netip.PrefixFrom(p, p.BitLen()), identityA)
			}
			for _, p := range b.Addrs {
				n0.Identify(netip.PrefixFrom(p, p.BitLen()), identityB)
			}
			families(t, func(t *testing.T, v6 bool) {
				server := netip.AddrPortFrom(b.Addr(v6), 8080)
				ask := func(ns *netnstest.NS, to netip.AddrPort) error {
					_, err := nodetest.Ask(t, ns, "tcp", to)
					return err
				}
				vip := bpf.NewFrontendKey(unix.IPPROTO_TCP, family(n0.Addrs, v6), 30080)
				c.AddService(5, vip, 0, server)
				nodePort := netip.AddrPortFrom(family(n0.Addrs, v6), 30080)

				n1.IdentifyPod(b, identityB, bpf.PolicyNone, policyB)
				n1.AllowPort(policyB, bpf.Ingress, identityA, unix.IPPROTO_TCP, 8080, 1)
				wantNoError(t, "the pod whose identity is allowed", ask(a.NS, server))
				before := dropsOf(n1, "policy")
				if ask(c.Client, nodePort) == nil || dropsOf(n1, "policy") == before {
					t.Errorf("a client that is not allowed came in through the other node; drops = %v", n1.AllDrops())
				}
				n1.Identify(netip.PrefixFrom(family(nodetest.ClientAddrs, v6), family(nodetest.ClientAddrs, v6).BitLen()), 77)
				n1.AllowPort(policyB, bpf.Ingress, 77, unix.IPPROTO_TCP, 8080, 2)
				wantNoError(t, "the client whose address is allowed", ask(c.Client, nodePort))

				n0.IdentifyPod(a, identityA, policyA, bpf.PolicyNone)
				before = dropsOf(n0, "policy")
				if ask(a.NS, server) == nil || dropsOf(n0, "policy") == before {
					t.Errorf("the pod's own egress policy was not judged; drops = %v", n0.AllDrops())
				}
				allow := n0.AllowPort(policyA, bpf.Egress, identityB, unix.IPPROTO_TCP, 8080, 3)
				wantNoError(t, "the pod whose egress is allowed", ask(a.NS, server))
				wantNoError(t, "take the rule away", n0.DP.Maps.Policy.Delete(&allow))
				n0.IdentifyPod(a, identityA, bpf.PolicyNone, bpf.PolicyNone)
				n1.IdentifyPod(b, identityB, bpf.PolicyNone, bpf.PolicyNone)
			})
		})
	}
}
