// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"net/netip"

	"github.com/margay-cni/margay/pkg/bpf"
)

// nodeFacts is what the node watcher knows: facts of this machine that no source has a say in.
type nodeFacts struct {
	// addrs are this node's addresses with NODE_ADDR_LOCAL and, where NodePorts are served, NODE_ADDR_NODEPORT.
	addrs map[netip.Addr]uint32
	// routes is a fingerprint of everything that decides where a packet goes, except routes to our own pods.
	routes string
	// devices shows what from_netdev is attached to.
	devices []DeviceStatus
}

// applyNode writes what follows from the node alone. It does not wait for the source: an address that the machine got or lost is true
// whatever the cluster says, and a raised route epoch costs each flow one slow packet, while one not raised can lose it.
func (p *pipeline) applyNode() {
	if p.facts == nil {
		return
	}
	p.round.Devices = p.facts.devices
	want := make(map[bpf.Addr]uint32, len(p.facts.addrs))
	if p.snapshot.Snapshot != nil {
		for name, n := range p.snapshot.Nodes {
			if name == p.node {
				continue
			}
			for _, a := range n.Addresses {
				want[bpf.NewAddr(a)] = bpf.NodeAddrRemote
			}
		}
	}
	for a, flags := range p.facts.addrs {
		want[bpf.NewAddr(a)] = flags
	}
	changed := p.facts.routes != p.routes
	for k, v := range want {
		if !p.m.nodeAddrs.holds(k, v) {
			p.m.nodeAddrs.put(k, v)
			changed = true
		}
	}
	for _, k := range p.m.nodeAddrs.surplus(want) {
		// Other nodes are the source's to name.
		if p.snapshot.Snapshot == nil && p.m.nodeAddrs.have[k] == bpf.NodeAddrRemote {
			continue
		}
		p.m.nodeAddrs.remove(k)
		changed = true
	}
	if changed {
		p.raiseRoutes()
	}
}

// raiseRoutes comes after what it is about was written: a flow that is judged again in between would be judged by the old.
func (p *pipeline) raiseRoutes() {
	if err := p.epochs.RaiseRouteEpoch(); err != nil {
		p.fault("endpoint_epochs", err)
		return
	}
	p.log.Info("routes or addresses changed; flows will be routed anew")
	p.routes = p.facts.routes
	p.round.Raised.Routes = true
	p.saveNumbers()
}
