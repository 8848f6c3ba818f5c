// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/flow"
)

// TestNodes: the maps alone say how nodes are reached; names and this node's own part come from files that may be missing.
func TestNodes(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *testNode) {
		n.addNodes(t)
		pin[uint32, bpf.NodeState](t, n, "node_state", ebpf.Array, 1, 0)
		n.golden(t, "nodes-bare", "nodes")
		own := netip.PrefixFrom(n.client, n.client.BitLen()-8).Masked()
		n.put(t, "routes", bpf.NewRouteKey(own), bpf.Route{Flags: bpf.RouteLocal})
		n.put(t, "node_addrs", bpf.NewAddr(n.external), bpf.NodeAddrLocal|bpf.NodeAddrNodePort)
		n.put(t, "nodes", uint32(2), bpf.Node{Addr: bpf.NewAddr(n.otherNode), Local: bpf.NewAddr(n.external), Mtu: 1430, Ifindex: loopback})
		n.put(t, "node_state", uint32(0), bpf.NodeState{
			Flags: bpf.NodeMasquerade, OverlayIfindex: loopback, Vni: 28000, OverlayPort: bpf.Port16(8472),
		})
		n.write(t, flow.NodesFile, `{"2":"worker-2"}`)
		told, err := json.Marshal(endpoint.NewNode("worker-1", "vxlan", 1430, []netip.Prefix{own}))
		if err != nil {
			t.Fatal(err)
		}
		n.write(t, endpoint.NodeFile, string(told))
		n.golden(t, "nodes", "nodes")
		n.golden(t, "nodes-json", "nodes", "-o", "json")
	})
}
