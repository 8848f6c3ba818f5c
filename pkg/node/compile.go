// SPDX-License-Identifier: Apache-2.0

package node

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/margay-cni/margay/pkg/state"
)

// minMTU6 is the least that every IPv6 link carries, in bytes (RFC 8200 §5).
const minMTU6 = 1280

// Compiler turns snapshots into what this node needs to reach the others, and remembers the nodes' numbers.
type Compiler struct {
	// MaxIndex is the largest number that is handed out: the size of the map nodes less one.
	MaxIndex uint16

	name            string
	mode            Mode
	nonMasquerade   []netip.Prefix
	egressOverrides []EgressOverride

	next     uint32
	released []uint16
	numbers  map[string]uint16
	// uses grows with every number that is given or taken back.
	uses uint64
	// last is what Update goes on from; nil: it compiles.
	last *before
}

// NewCompiler returns a compiler for the node of that name. nonMasquerade are prefixes outside the cluster to which pods keep their
// address, egress the addresses that they leave with instead of the default.
func NewCompiler(name string, mode Mode, nonMasquerade []netip.Prefix, egress []EgressOverride) *Compiler {
	return &Compiler{
		MaxIndex: MaxIndex, name: name, mode: mode, nonMasquerade: nonMasquerade, egressOverrides: egress, next: 1, numbers: map[string]uint16{},
	}
}

// compilation is the work of one Compile.
type compilation struct {
	*Compiler
	machine Machine
	result  *Result
	// underlay is the smallest MTU of the devices, 0 if none is known.
	underlay int
	peers    map[string]*peer
	kernel   map[netip.Prefix]KernelRoute
	// overhead is the most that encapsulation adds, on the way to any node; encapsulated that pods' packets need it.
	overhead     int
	encapsulated bool
}

// peer is another node.
type peer struct {
	name      string
	number    uint16
	addresses []netip.Addr // those that it does not share with another node
	cidrs     []netip.Prefix
	tunnel    bool
}

// Compile computes what the snapshot means for this node.
func (c *Compiler) Compile(in Input) *Result {
	b := &compilation{
		Compiler: c, machine: in.Machine, peers: map[string]*peer{}, kernel: map[netip.Prefix]KernelRoute{},
		result: &Result{
			Tunnels: map[uint16]Tunnel{}, Names: map[uint16]string{}, Routes: map[netip.Prefix]Route{}, Addresses: map[netip.Addr]Address{},
			Egress: map[int]Egress{},
		},
	}
	for _, d := range in.Machine.Devices {
		if d.MTU > 0 && (b.underlay == 0 || d.MTU < b.underlay) {
			b.underlay = d.MTU
		}
	}
	names := slices.Sorted(maps.Keys(in.Snapshot.Nodes))
	others := slices.DeleteFunc(slices.Clone(names), func(n string) bool { return n == c.name })
	left := c.number(others, in)
	for _, name := range left {
		b.problem(name, "there is no number left for it; raise the size of the map nodes")
	}
	self := in.Snapshot.Nodes[c.name]
	b.own(self)
	if self == nil && len(others) > 0 {
		b.problem(c.name, "this node has no Node object: other nodes do not know its pods")
	}
	b.claimAddresses(others, in.Snapshot.Nodes)
	b.claimCIDRs(names, in.Snapshot.Nodes)
	for _, name := range others {
		if p := b.peers[name]; p != nil {
			b.addPeer(p)
		}
	}
	b.addOwn()
	outside := b.addPods(in.Snapshot)
	b.addNonMasquerade()
	b.egress()
	b.finish(len(others) > 0)
	c.last = nil
	if len(left) == 0 { // else a number may come free by what the maps name
		c.last = &before{compilation: b, journals: in.Snapshot.Journals, hold: in.Hold, outside: outside}
	}
	return b.result
}

func (b *compilation) problem(node, format string, args ...any) {
	b.result.Problems = append(b.result.Problems, Problem{Node: node, Message: fmt.Sprintf(format, args...)})
}

// own finds this node's addresses: those of its Node object that the machine really has, because a tunnel must not start at another; and
// where that leaves none, the machine's.
func (b *compilation) own(self *state.Node) {
	if self != nil {
		for _, a := range self.Addresses {
			if slices.Contains(b.machine.Addresses, a) {
				b.result.Own = append(b.result.Own, a)
			} else {
				b.problem(b.name, "its address %s is on no device of this machine", a)
			}
		}
	}
	if len(b.result.Own) > 0 {
		return
	}
	devices := slices.Clone(b.machine.Devices)
	slices.SortStableFunc(devices, func(x, y Device) int {
		if x.DefaultRoute == y.DefaultRoute {
			return cmp.Compare(x.Index, y.Index)
		}
		if x.DefaultRoute {
			return -1
		}
		return 1
	})
	for _, v6 := range []bool{false, true} {
		for _, d := range devices {
			for _, p := range d.Addresses {
				if p.Addr().Is6() == v6 {
					b.result.Own = append(b.result.Own, p.Addr())
				}
			}
		}
	}
}

// first returns the first of the addresses that is of the family; the zero Addr if none is.
func first(addrs []netip.Addr, v6 bool) netip.Addr {
	for _, a := range addrs {
		if a.Is6() == v6 {
			return a
		}
	}
	return netip.Addr{}
}

// tunnelTo chooses the outer addresses. The family is that of the first address of whichever of the two nodes comes first by name, so
// that both choose the same: a node believes only the one outer source that it would answer to itself. Without a common address of that
// family it is the other one.
func (b *compilation) tunnelTo(p *peer) (Tunnel, bool) {
	own := b.result.Own
	if len(own) == 0 || len(p.addresses) == 0 {
		return Tunnel{}, false
	}
	prefer := own[0].Is6()
	if p.name < b.name {
		prefer = p.addresses[0].Is6()
	}
	for _, v6 := range []bool{prefer, !prefer} {
		local, remote := first(own, v6), first(p.addresses, v6)
		if !local.IsValid() || !remote.IsValid() {
			continue
		}
		return Tunnel{Local: local, Remote: remote, MTU: less(b.wayMTU(remote), overheadOf(remote))}, true
	}
	return Tunnel{}, false
}

func overheadOf(outer netip.Addr) int {
	if outer.Is6() {
		return Overhead6
	}
	return Overhead4
}

// less takes overhead from an MTU that is known.
func less(mtu, overhead int) int {
	if mtu == 0 {
		return 0
	}
	return max(mtu-overhead, 0)
}

// neighbour returns the device by whose network the address is reached without a router.
func (b *compilation) neighbour(a netip.Addr) (Device, bool) {
	for _, d := range b.machine.Devices {
		for _, network := range d.Addresses {
			if network.Bits() < network.Addr().BitLen() && network.Contains(a) {
				return d, true
			}
		}
	}
	return Device{}, false
}

// wayMTU is the MTU of the device towards another node's address: the network's that the address is on, else the smallest.
func (b *compilation) wayMTU(a netip.Addr) int {
	if d, ok := b.neighbour(a); ok && d.MTU > 0 {
		return d.MTU
	}
	return b.underlay
}

// connected returns the peer's address of the family on a network that this node is on, and the device there.
func (b *compilation) connected(p *peer, v6 bool) (netip.Addr, Device, bool) {
	for _, a := range p.addresses {
		if a.Is6() != v6 {
			continue
		}
		if d, ok := b.neighbour(a); ok {
			return a, d, true
		}
	}
	return netip.Addr{}, Device{}, false
}

// overlaid reports whether the peer's prefixes of the family are reached by the overlay.
func (b *compilation) overlaid(p *peer, v6 bool) bool {
	switch b.mode {
	case Direct:
		return false
	case Auto:
		_, _, connected := b.connected(p, v6)
		return !connected
	}
	return true
}

// addPeer takes in another node.
func (b *compilation) addPeer(p *peer) {
	b.result.Names[p.number] = p.name
	if t, ok := b.tunnelTo(p); ok {
		p.tunnel = true
		b.result.Tunnels[p.number] = t
		b.overhead = max(b.overhead, overheadOf(t.Remote))
	} else {
		b.problem(p.name, "it has no address of a family in which this node has one: the overlay does not reach it")
	}
	for _, a := range p.addresses {
		b.result.Addresses[a] = Address{Node: p.number, Overlay: p.tunnel && b.overlaid(p, a.Is6())}
	}
	for _, cidr := range p.cidrs {
		b.addRemote(p, cidr)
	}
}

// addRemote adds a prefix of another node's pods. A node without a tunnel keeps it: its pods are in the cluster, and what cannot reach
// them must not leave it.
func (b *compilation) addRemote(p *peer, prefix netip.Prefix) {
	v6 := prefix.Addr().Is6()
	overlay := b.overlaid(p, v6)
	b.result.Routes[prefix] = Route{Node: p.number, Overlay: overlay}
	if overlay {
		b.encapsulated = true
		if p.tunnel {
			b.kernel[prefix] = KernelRoute{Prefix: prefix, Kind: ViaOverlay, Source: first(b.result.Own, v6)}
		}
		return
	}
	if gw, d, ok := b.connected(p, v6); ok {
		b.kernel[prefix] = KernelRoute{Prefix: prefix, Kind: ViaNode, Gateway: gw, Device: d.Index}
	}
}

// addOwn adds this node's own pod ranges. The kernel route answers for addresses that no pod has; without it they would follow the default
// route, and come back.
func (b *compilation) addOwn() {
	for _, cidr := range b.result.PodCIDRs {
		b.result.Routes[cidr] = Route{Local: true}
		b.kernel[cidr] = KernelRoute{Prefix: cidr, Kind: Unreachable}
	}
}

// addNonMasquerade adds the prefixes outside the cluster to which pods keep their address. What lies within a pod range is in the cluster
// anyway, and must not hide where it is.
func (b *compilation) addNonMasquerade() {
	for _, p := range b.nonMasquerade {
		if !b.withinRoute(p) {
			b.result.Routes[p.Masked()] = Route{NoMasquerade: true}
		}
	}
}

func (b *compilation) withinRoute(p netip.Prefix) bool {
	for bits := p.Bits(); bits >= 0; bits-- {
		outer, err := p.Addr().Prefix(bits)
		if r, ok := b.result.Routes[outer]; err == nil && ok && !r.NoMasquerade {
			return true
		}
	}
	return false
}

// finish computes the MTUs and sorts. In mode vxlan a node may come at any moment, so pods leave room for it from the start.
func (b *compilation) finish(others bool) {
	overhead := b.overhead
	if overhead == 0 {
		overhead = Overhead4
		if len(b.result.Own) > 0 {
			overhead = overheadOf(b.result.Own[0])
		}
	}
	b.result.PodMTU = b.underlay
	if b.encapsulated || b.mode == VXLAN {
		b.result.PodMTU = less(b.underlay, overhead)
	}
	if p := b.result.PodMTU; p > 0 && p < minMTU6 && slices.ContainsFunc(b.result.PodCIDRs, func(c netip.Prefix) bool { return c.Addr().Is6() }) {
		b.problem(b.name, "the MTU of pods would be %d, and IPv6 needs %d: raise the MTU of the node's devices", p, minMTU6)
	}
	if others {
		b.result.Overlay = &Overlay{MTU: less(b.underlay, overhead)}
	}
	for _, prefix := range slices.SortedFunc(maps.Keys(b.kernel), netip.Prefix.Compare) {
		b.result.KernelRoutes = append(b.result.KernelRoutes, b.kernel[prefix])
	}
	slices.SortStableFunc(b.result.Problems, func(x, y Problem) int { return cmp.Compare(x.Node, y.Node) })
}
