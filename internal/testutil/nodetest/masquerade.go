// SPDX-License-Identifier: Apache-2.0

package nodetest

import (
	"net/netip"

	"github.com/margay-cni/margay/pkg/bpf"
)

// Masquerade lets pods' traffic to outside the cluster leave by ClientDevice with these addresses; NodeAddrs is what a node would have.
// Without it the node does not masquerade. Flows under way keep their addresses.
func (n *Node) Masquerade(addrs ...netip.Addr) {
	n.t.Helper()
	var egress bpf.EgressAddrs
	for _, a := range addrs {
		if a.Is4() {
			egress.V4 = bpf.NewAddr(a)
		} else {
			egress.V6 = bpf.NewAddr(a)
		}
	}
	n.Put(n.DP.Maps.EgressAddrs, uint32(n.ClientDevice), egress)
	var state bpf.NodeState
	n.must(n.DP.Maps.NodeState.Lookup(uint32(0), &state))
	state.Flags |= bpf.NodeMasquerade
	n.Put(n.DP.Maps.NodeState, uint32(0), state)
	n.must(n.DP.RaiseRouteEpoch())
}

// ReservePorts says which ports masquerade must not take: those from first to last, in place of all earlier ones. first > last: none.
func (n *Node) ReservePorts(first, last int) {
	n.t.Helper()
	for word := range uint32(1024) {
		var bits uint64
		for bit := range 64 {
			if port := int(word)*64 + bit; first <= port && port <= last {
				bits |= 1 << bit
			}
		}
		n.Put(n.DP.Maps.ReservedPorts, word, bits)
	}
}
