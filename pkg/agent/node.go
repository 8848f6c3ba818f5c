// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"maps"
	"math"
	"net/netip"
	"os"
	"reflect"
	"slices"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/node"
)

// nodeFacts is what the node watcher knows: facts of this machine that no source has a say in.
type nodeFacts struct {
	// addrs are this node's addresses with NODE_ADDR_LOCAL and, where NodePorts are served, NODE_ADDR_NODEPORT.
	addrs map[netip.Addr]uint32
	// ordered are those on which NodePorts could be served, the ones of the device with the default route first.
	ordered []netip.Addr
	// routes is a fingerprint of everything that decides where a packet goes, and how large it may be, except routes to our own pods.
	routes string
	// devices shows what carries our programs.
	devices []DeviceStatus
	// machine is what the compiler is told.
	machine node.Machine
	// overlay is the ifindex of the overlay device with our programs on it, 0 if there is none.
	overlay int
	// overlayDevice shows the overlay device, whatever its state; nil if there is none.
	overlayDevice *DeviceStatus
	// host is the ifindex of the device by which the host's stack sends to services, 0 while nothing answers there.
	host int
	// underlay is how the programs send to other nodes what they encapsulate. A node that is not in it has not been looked up yet.
	underlay map[tunnelEnds]underlayRoute
	// problems are what keeps devices and kernel routes from being as wanted.
	problems []string
}

// nodeMaps is what the maps about nodes should hold.
type nodeMaps struct {
	nodes  map[uint32]bpf.Node
	routes map[bpf.RouteKey]bpf.Route
	addrs  map[bpf.Addr]uint32
	egress map[uint32]bpf.EgressAddrs
}

// newNodeMaps turns a compilation, nil if there is none yet, into map content. What this machine knows of its own addresses goes
// first. serves says on which addresses of other nodes NodePorts are served.
func newNodeMaps(r *node.Result, local map[netip.Addr]uint32, serves func(netip.Addr) bool, host int) nodeMaps {
	w := nodeMaps{
		nodes: map[uint32]bpf.Node{}, routes: map[bpf.RouteKey]bpf.Route{}, addrs: map[bpf.Addr]uint32{}, egress: map[uint32]bpf.EgressAddrs{},
	}
	if r != nil {
		for i, t := range r.Tunnels {
			w.nodes[uint32(i)] = bpf.Node{Addr: bpf.NewAddr(t.Remote), Local: bpf.NewAddr(t.Local), Mtu: uint16(min(t.MTU, math.MaxUint16))}
		}
		for p, route := range r.Routes {
			w.routes[bpf.NewRouteKey(p)] = bpf.Route{Node: route.Node, Flags: routeFlags(route)}
		}
		for a, v := range r.Addresses {
			flags := bpf.NodeAddrRemote | uint32(v.Node)<<bpf.NodeAddrIndexShift
			if serves(a) {
				flags |= bpf.NodeAddrNodePort
			}
			if v.Overlay {
				flags |= bpf.NodeAddrOverlay
			}
			w.addrs[bpf.NewAddr(a)] = flags
		}
		for ifindex, e := range r.Egress {
			w.egress[uint32(ifindex)] = newEgressAddrs(e)
		}
		if host != 0 {
			w.egress[uint32(host)] = newEgressAddrs(node.Egress{V4: ownAddr(r, false), V6: ownAddr(r, true)})
		}
	}
	for a, flags := range local {
		w.addrs[bpf.NewAddr(a)] = flags
	}
	return w
}

func routeFlags(r node.Route) (flags uint16) {
	if r.Overlay {
		flags |= bpf.RouteOverlay
	}
	if r.Local {
		flags |= bpf.RouteLocal
	}
	if r.NoMasquerade {
		flags |= bpf.RouteNoMasquerade
	}
	return flags
}

func newEgressAddrs(e node.Egress) (out bpf.EgressAddrs) {
	if e.V4.IsValid() {
		out.V4 = bpf.NewAddr(e.V4)
	}
	if e.V6.IsValid() {
		out.V6 = bpf.NewAddr(e.V6)
	}
	return out
}

// compileNodes runs the compiler of pkg/node when something that it reads has changed, and says what follows for devices and kernel routes.
func (p *pipeline) compileNodes() (hold bool) {
	if p.snapshot.Snapshot == nil {
		return true
	}
	hold = len(p.incomplete()) > 0
	if !p.nodesChanged && p.wantedNetwork != nil && p.wantedNetwork.hold == hold {
		return hold
	}
	p.nodesChanged = false
	r := p.nodes.Update(node.Input{Snapshot: p.snapshot.Snapshot, Machine: p.facts.machine, Hold: hold, InUse: p.nodesInUse()})
	p.nodeResult = r
	p.wantNetwork(hold)
	return hold
}

// networkInputs are what a wantedNetwork follows from: the same inputs make the same one.
type networkInputs struct {
	result    *node.Result
	facts     *nodeFacts
	frontends uint64
	served    bool
	hold      bool
}

// wantNetwork says what devices and kernel routes follow from the nodes and the services, as far as they are compiled.
func (p *pipeline) wantNetwork(hold bool) {
	r := p.nodeResult
	if r == nil {
		return
	}
	of := networkInputs{result: r, facts: p.facts, frontends: p.frontendsSeen, served: p.serviceResult != nil, hold: hold}
	if p.wantedNetwork != nil && p.networkOf == of {
		return
	}
	p.networkOf = of
	want := &wantedNetwork{
		overlay: r.Overlay, routes: r.KernelRoutes, tunnels: sortedTunnels(r), podMTU: r.PodMTU, services: p.serviceRoutes(), hold: hold,
	}
	if !reflect.DeepEqual(want, p.wantedNetwork) {
		p.wantedNetwork = want
		p.network(want)
	}
}

// sortedTunnels are the tunnels in the order of their nodes' numbers.
func sortedTunnels(r *node.Result) (out []node.Tunnel) {
	for _, i := range slices.Sorted(maps.Keys(r.Tunnels)) {
		out = append(out, r.Tunnels[i])
	}
	return out
}

// nodesInUse are the numbers that the kernel's maps name.
func (p *pipeline) nodesInUse() map[uint16]bool {
	used := p.namedNodes()
	for i := range p.m.nodes.have {
		used[uint16(i)] = true
	}
	return used
}

// namedNodes are the numbers that routes and addresses in the kernel lead to.
func (p *pipeline) namedNodes() map[uint16]bool {
	used := map[uint16]bool{}
	for _, r := range p.m.routes.have {
		used[r.Node] = true
	}
	for _, flags := range p.m.nodeAddrs.have {
		used[uint16(flags>>bpf.NodeAddrIndexShift)] = true
	}
	return used
}

// nodePlan is what a round has to write of the maps about nodes.
type nodePlan struct {
	want                          nodeMaps
	state                         bpf.NodeState
	nodesPut, nodesGone           []uint32
	routesPut, routesGone         []bpf.RouteKey
	addrsPut, addrsGone           []bpf.Addr
	egressPut, egressGone         []uint32
	stateDiffers, fingerprintMove bool
}

func (l *nodePlan) empty() bool {
	return len(l.nodesPut)+len(l.nodesGone)+len(l.routesPut)+len(l.routesGone)+len(l.addrsPut)+len(l.addrsGone)+len(l.egressPut)+
		len(l.egressGone) == 0 && !l.stateDiffers && !l.fingerprintMove
}

// planNodes compares. With hold an entry is neither deleted nor given to another node: the owner may be in what the source cannot read. The
// machine's own addresses are nobody else's to say.
func (p *pipeline) planNodes(hold bool) *nodePlan {
	l := &nodePlan{
		want: newNodeMaps(p.nodeResult, p.ownAddrs(), p.serves, p.facts.host), fingerprintMove: p.facts.routes != p.routes,
	}
	p.encapsulate(l.want.nodes)
	l.nodesPut, l.nodesGone = p.m.nodes.plan(l.want.nodes, always, func(bpf.Node) bool { return !hold })
	l.routesPut, l.routesGone = p.m.routes.plan(l.want.routes,
		func(have, want bpf.Route) bool { return !hold || have.Node == want.Node }, func(bpf.Route) bool { return !hold })
	l.addrsPut, l.addrsGone = p.m.nodeAddrs.plan(l.want.addrs,
		func(have, want uint32) bool {
			return !hold || want&bpf.NodeAddrLocal != 0 || have>>bpf.NodeAddrIndexShift == want>>bpf.NodeAddrIndexShift
		},
		func(have uint32) bool { return !hold || have&bpf.NodeAddrRemote == 0 })
	l.egressPut, l.egressGone = p.m.egress.plan(l.want.egress, always, func(bpf.EgressAddrs) bool { return p.nodeResult != nil })
	l.state = p.wantState()
	l.stateDiffers = !p.m.nodeState.holds(0, l.state)
	return l
}

func always[V any](V, V) bool { return true }

// wantState is the whole of node_state. Masquerade is not switched on before the routes are known: what is in the cluster would get it too.
func (p *pipeline) wantState() bpf.NodeState {
	s := bpf.NodeState{
		OverlayIfindex: uint32(p.facts.overlay), Vni: p.reach.VXLANVNI, OverlayPort: bpf.Port16(p.reach.VXLANPort),
		HostIfindex: uint32(p.facts.host),
	}
	if p.verdicts {
		s.Flags |= bpf.NodeVerdictEvents
	}
	s.Flags |= p.nodePorts.localhost()
	if p.reach.Masquerade {
		s.Flags |= bpf.NodeMasquerade
		if p.nodeResult == nil {
			s.Flags &^= bpf.NodeMasquerade &^ p.m.nodeState.have[0].Flags
		}
	}
	return s
}

// applyNode writes what follows from the node and its place among others. What follows from the node alone does not wait for the source: an
// address that the machine got or lost is true whatever the cluster says, and a raised route epoch costs each flow one slow packet, while
// one not raised can lose it.
//
// A node is there before anything names it; what is gone goes after what took its place, and the node itself last. Then the flows are
// routed anew, once. Routes do not wait for the overlay device: what leads into it is dropped until it is there, and must not go elsewhere.
func (p *pipeline) applyNode() {
	if p.facts == nil {
		return
	}
	p.round.Devices, p.round.Overlay = p.facts.devices, p.facts.overlayDevice
	hold := p.compileNodes()
	now := nodesApplied{p.nodeResult, p.facts, hold}
	if !p.round.Whole && !p.raise.Routes && p.nodesSettled == now {
		return
	}
	p.nodesSettled = nodesApplied{}
	l := p.planNodes(hold)
	if !l.empty() {
		p.raise.Routes = true
	}
	if p.raise.Routes {
		p.saveNumbers()
	}
	named := p.saveNodeNames(hold)
	if named && l.empty() && !p.raise.Routes {
		p.nodesSettled = now
		return
	}
	for _, i := range l.nodesPut {
		p.m.nodes.put(i, l.want.nodes[i])
	}
	if l.stateDiffers {
		early := l.state
		early.Flags &= p.m.nodeState.have[0].Flags | bpf.NodeVerdictEvents
		p.m.nodeState.put(0, early)
	}
	for _, i := range l.egressPut {
		p.m.egress.put(i, l.want.egress[i])
	}
	for _, k := range l.routesPut {
		if v := l.want.routes[k]; p.nodeThere(l, v.Node) {
			p.m.routes.put(k, v)
		}
	}
	for _, k := range l.addrsPut {
		if v := l.want.addrs[k]; p.nodeThere(l, uint16(v>>bpf.NodeAddrIndexShift)) {
			p.m.nodeAddrs.put(k, v)
		}
	}
	for _, k := range l.addrsGone {
		p.m.nodeAddrs.remove(k)
	}
	for _, k := range l.routesGone {
		p.m.routes.remove(k)
	}
	for _, i := range l.egressGone {
		p.m.egress.remove(i)
	}
	inUse := map[uint16]bool{}
	if len(l.nodesGone) > 0 {
		inUse = p.namedNodes()
	}
	for _, i := range l.nodesGone {
		if !inUse[uint16(i)] {
			p.m.nodes.remove(i)
		}
	}
	if l.stateDiffers {
		p.m.nodeState.put(0, l.state)
	}
	if p.raise.Routes {
		p.raiseRoutes()
	}
}

// nodesApplied are the inputs with which a round found nothing to write about nodes: with the same ones there is nothing to look for.
type nodesApplied struct {
	result *node.Result
	facts  *nodeFacts
	hold   bool
}

// nodeThere reports whether what names the node may be written: the kernel has the node, or there is none to have.
func (p *pipeline) nodeThere(l *nodePlan, number uint16) bool {
	want, ok := l.want.nodes[uint32(number)]
	return !ok || p.m.nodes.holds(uint32(number), want)
}

// raiseRoutes comes after what it is about was written: a flow that is judged again in between would be judged by the old.
func (p *pipeline) raiseRoutes() {
	if err := p.epochs.RaiseRouteEpoch(); err != nil {
		p.fault("endpoint_epochs", err)
		return
	}
	p.log.Info("routes or addresses changed; flows will be routed anew")
	p.routes, p.raise.Routes = p.facts.routes, false
	p.round.Raised.Routes = true
	p.saveNumbers()
}

// saveNode writes what the plugin is told. It comes after what new pods start with: on a machine that has just started nothing else keeps the
// runtime from starting pods, and where nothing is published they start open. With hold a file that is there stays: it was written by an
// agent that knew everything.
func (p *pipeline) saveNode(hold bool) {
	r := p.nodeResult
	if r == nil {
		return
	}
	_, err := os.Stat(p.nodeFile.path)
	if first := err != nil; first && p.m.pending.fault(p.now()) != nil || !first && hold {
		return
	}
	n := endpoint.NewNode(p.node, string(p.reach.Mode), r.PodMTU, r.PodCIDRs)
	if _, p.nodeFileErr = p.nodeFile.save(n); p.nodeFileErr != nil {
		p.log.Error("what the plugin is told of the node could not be saved", "err", p.nodeFileErr)
	}
}

// saveNodeNames writes the names of the other nodes, before anything has their numbers, and reports whether they are there.
func (p *pipeline) saveNodeNames(hold bool) bool {
	if p.nodeResult == nil {
		return true
	}
	names := maps.Clone(p.nodeResult.Names)
	if hold {
		for name, number := range p.nodes.Export().Nodes {
			names[number] = name
		}
	}
	if _, err := p.nodeNames.save(names); err != nil {
		p.log.Warn("names of nodes could not be saved", "err", err)
		return false
	}
	return true
}
