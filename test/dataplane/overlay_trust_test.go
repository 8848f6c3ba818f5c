// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/pkg/bpf"
)

// A pod's port may have the number of some service's NodePort: what another node's pods send to it is for that pod.
func TestPodPortIsNoNodePort(t *testing.T) {
	t.Parallel()
	ways(t, func(t *testing.T, c *nodetest.Cluster, v6 bool) {
		name := map[bool]string{false: "4", true: "6"}[v6]
		a, b, other := c.Nodes[0].AddPod("a"+name), c.Nodes[1].AddPod("b"+name), c.Nodes[1].AddPod("o"+name)
		nodetest.Serve(t, b.NS, "asked", 30080)
		nodetest.Serve(t, other.NS, "service", 8080)
		id := uint32(0)
		for _, proto := range protocols {
			id++
			any := family([]netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}, v6)
			c.AddService(id, bpf.NewFrontendKey(proto, any, 30080), 0, netip.AddrPortFrom(other.Addr(v6), 8080))
		}
		for network := range protocols {
			got, err := nodetest.Ask(t, a.NS, network, netip.AddrPortFrom(b.Addr(v6), 30080))
			wantAnswer(t, network, got, err, "asked "+a.Addr(v6).String())
		}
	})
}

// A client that asks another node under the address of the pod's node is not that node: policy judges it by the address.
func TestForwardedSourceIsNotTheHost(t *testing.T) {
	t.Parallel()
	c := nodetest.NewCluster(t, 2, nodetest.ClusterOptions{})
	n0, n1 := c.Nodes[0], c.Nodes[1]
	a := n0.AddPod("a")
	pod := newWire(t, a.NS)
	n0.IdentifyPod(a, identityA, bpf.PolicyNone, policyB)
	families(t, func(t *testing.T, v6 bool) {
		vip := netip.AddrPortFrom(family(vips, v6), 80)
		c.AddService(7, bpf.NewFrontendKey(unix.IPPROTO_UDP, vip.Addr(), vip.Port()), 0, netip.AddrPortFrom(a.Addr(v6), 8080))
		send := func(src netip.Addr, payload string) {
			frame := pkt.Packet{Kind: pkt.UDP, TTL: 64, SrcMAC: a.HostMAC, DstMAC: a.MAC, Src: netip.AddrPortFrom(src, 4000), Dst: vip,
				Payload: []byte(payload)}.Bytes()
			encapsulate(t, n1.NS, n1.Addrs[0], n0.Addrs[0], nodetest.OverlayVNI+bpf.VNIForwarded, frame)
		}
		before := dropsOf(n0, "policy")
		send(family(n0.Addrs, v6), "as the pod's node")
		if pod.sees("as the pod's node") || dropsOf(n0, "policy") != before+1 {
			t.Errorf("it arrived, or drops = %v lack one of policy", n0.AllDrops())
		}
		n0.Identify(netip.PrefixFrom(family(n0.Addrs, v6), family(n0.Addrs, v6).BitLen()), bpf.IdentityHost)
		n0.AllowPort(policyB, bpf.Ingress, bpf.IdentityHost, unix.IPPROTO_UDP, 8080, 1)
		send(family(n0.Addrs, v6), "as a node that a rule allows")
		if !pod.sees("as a node that a rule allows") {
			t.Errorf("it did not arrive; drops = %v", n0.AllDrops())
		}
	})
}
