// SPDX-License-Identifier: Apache-2.0

package nodetest

import (
	"net/netip"

	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/pkg/bpf"
)

// Vanish takes the pod off the network without a goodbye: what its processes send from here on, a FIN or a reset too, reaches nobody. Its
// entries stay until Unregister.
func (n *Node) Vanish(p *Pod) {
	n.t.Helper()
	n.NS.Do(func() {
		l, err := netlink.LinkByIndex(p.Ifindex)
		n.must(err)
		n.must(netlink.LinkDel(l))
	})
}

// Unregister removes the pod's endpoint entries, as the plugin's DEL does.
func (n *Node) Unregister(p *Pod) {
	n.t.Helper()
	for _, a := range p.Addrs {
		n.must(n.DP.DeleteEndpoint(a, p.Ifindex))
	}
}

// Leave takes a backend out of the service's set of those that serve, and has its flows looked at again.
func (n *Node) Leave(id uint32, b netip.AddrPort) {
	n.t.Helper()
	member := bpf.NewServiceBackend(id, b)
	n.must(n.DP.Maps.ServiceBackends.Delete(&member))
	n.must(n.DP.RaiseServiceEpochs(id))
}

// Forget takes another node out of the node's view, as the agent does when its Node object has gone.
func (n *Node) Forget(other *Node) {
	n.t.Helper()
	for i, p := range other.PodRanges() {
		route, a := bpf.NewRouteKey(p), bpf.NewAddr(other.Addrs[i])
		n.must(n.DP.Maps.Routes.Delete(&route))
		n.must(n.DP.Maps.NodeAddrs.Delete(&a))
	}
	n.Put(n.DP.Maps.Nodes, NodeIndex(other), bpf.Node{})
	n.must(n.DP.RaiseRouteEpoch())
}
