// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net/netip"
	"testing"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/flow"
)

func TestPlaces(t *testing.T) {
	for _, f := range families() {
		t.Run(f.name, func(t *testing.T) {
			n := newNode(t, f)
			n.addPods(t)
			n.addNodes(t)
			unnamed, own, sibling := n.otherPod.Next().Next(), n.cidr.Addr().Next(), n.client.Next()
			n.put(t, "endpoints", bpf.NewAddr(unnamed), bpf.Endpoint{Ifindex: loopback})
			n.put(t, "node_addrs", bpf.NewAddr(own), bpf.NodeAddrLocal|bpf.NodeAddrNodePort)
			n.put(t, "routes", bpf.NewRouteKey(netip.PrefixFrom(n.client, n.client.BitLen()-8)), bpf.Route{Flags: bpf.RouteLocal})
			names, err := flow.LoadNames(n.run)
			if err != nil {
				t.Fatal(err)
			}
			a := &app{}
			a.node.BPFFS, a.node.Run = n.bpffs, n.run
			s := a.source()
			defer s.close()
			p, err := openPlaces(s, names)
			if err != nil {
				t.Fatal(err)
			}
			for _, tt := range []struct {
				what string
				addr netip.Addr
				want place
			}{
				{"pod with a record only", n.web2, place{location: placeLocal}},
				{"pod in the map only, inside another node's range", unnamed, place{location: placeLocal}},
				{"address of this node", own, place{location: placeLocal}},
				{"in this node's pod range", sibling, place{location: placeLocal}},
				{"pod of another node, by the longest prefix", n.otherPod, place{placeRemote, n.otherNode}},
				{"another node", n.otherNode, place{placeRemote, n.otherNode}},
				{"pod of a node without an entry", n.otherRange.Addr().Next(), place{location: placeRemote}},
				{"outside, not masqueraded", n.external, place{}},
				{"outside", n.external.Next(), place{}},
			} {
				for range 2 { // the second time from what is known
					if got, err := p.of(tt.addr); err != nil || got != tt.want {
						t.Errorf("%s: of(%s) = %v, %v; want %v", tt.what, tt.addr, got, err, tt.want)
					}
				}
			}
		})
	}
}
