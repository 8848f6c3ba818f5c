// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/margay-cni/margay/pkg/bpf"
)

// NodePortAddresses says on which of a node's addresses NodePorts are served (row V6). The zero value is the default: the primary ones.
type NodePortAddresses struct {
	// Primary stands for the node's first address of each family, All for every address of the devices that it is reached by.
	Primary, All bool
	// Localhost stands for the loopback addresses, which only the node's own processes can ask.
	Localhost bool
	// Prefixes select addresses. A family that nothing here speaks of is served on all its addresses, as kube-proxy does.
	Prefixes []netip.Prefix
}

// ParseNodePortAddresses reads a comma-separated list of prefixes and the keywords primary, localhost and all.
func ParseNodePortAddresses(s string) (n NodePortAddresses, err error) {
	for _, word := range strings.Split(s, ",") {
		switch word = strings.TrimSpace(word); word {
		case "primary":
			n.Primary = true
		case "localhost":
			n.Localhost = true
		case "all":
			n.All = true
		default:
			p, err := netip.ParsePrefix(word)
			if err != nil {
				return NodePortAddresses{}, fmt.Errorf("%q is neither a prefix nor primary, localhost or all", word)
			}
			n.Prefixes = append(n.Prefixes, p.Masked())
		}
	}
	return n, nil
}

// has reports whether NodePorts are served on the address; primary says that it is its node's first one of its family.
func (n NodePortAddresses) has(a netip.Addr, primary bool) bool {
	a = a.Unmap()
	if a.IsLoopback() && n.Localhost {
		return true
	}
	if n.All || slices.ContainsFunc(n.Prefixes, func(p netip.Prefix) bool { return p.Contains(a) }) {
		return true
	}
	spoken := slices.ContainsFunc(n.Prefixes, func(p netip.Prefix) bool { return p.Addr().Is6() == a.Is6() })
	if n.Primary || (len(n.Prefixes) == 0 && !n.Localhost) {
		return primary
	}
	return !spoken && !n.Localhost
}

// localhost are the flags of node_state for the loopback addresses, on which the node's own processes find NodePorts.
func (n NodePortAddresses) localhost() (flags uint32) {
	if n.has(netip.AddrFrom4([4]byte{127, 0, 0, 1}), false) {
		flags |= bpf.NodeLocalhostIPv4
	}
	if n.has(netip.IPv6Loopback(), false) {
		flags |= bpf.NodeLocalhostIPv6
	}
	return flags
}

// restrict takes the NodePort flag off this node's addresses that are not selected. named are the addresses of the Node object, ordered
// those of the machine, each in the order of preference.
func (n NodePortAddresses) restrict(flags map[netip.Addr]uint32, named, ordered []netip.Addr) map[netip.Addr]uint32 {
	primary := primaryAddrs(flags, named, ordered)
	out := make(map[netip.Addr]uint32, len(flags))
	for a, f := range flags {
		if f&bpf.NodeAddrNodePort != 0 && !n.has(a, slices.Contains(primary, a)) {
			f &^= bpf.NodeAddrNodePort
		}
		out[a] = f
	}
	return out
}

// primaryAddrs returns the node's first address of each family: of those that its Node object names, if the machine has it, else the
// machine's first one that could serve NodePorts, or any of them where no order is known.
func primaryAddrs(flags map[netip.Addr]uint32, named, ordered []netip.Addr) (primary []netip.Addr) {
	last := slices.SortedFunc(maps.Keys(flags), netip.Addr.Compare)
	for _, ipv6 := range []bool{false, true} {
		for _, a := range slices.Concat(named, ordered, last) {
			if a = a.Unmap(); a.Is6() == ipv6 && flags[a]&bpf.NodeAddrNodePort != 0 {
				primary = append(primary, a)
				break
			}
		}
	}
	return primary
}

// ordered returns the addresses of the chosen devices, those of a device with a default route first.
func (s *survey) ordered(chosen []DeviceStatus) (addrs []netip.Addr) {
	for _, first := range []bool{true, false} {
		for _, d := range s.devices {
			if d.defaultRoute == first && slices.ContainsFunc(chosen, func(c DeviceStatus) bool { return c.Ifindex == d.index }) {
				addrs = append(addrs, d.addrs...)
			}
		}
	}
	return addrs
}

// ownAddrs returns this node's addresses with their flags. Which ones are primary, the source has a say in: until it has spoken, an address
// keeps what a predecessor wrote.
func (p *pipeline) ownAddrs() map[netip.Addr]uint32 {
	var named []netip.Addr
	if s := p.snapshot.Snapshot; s != nil && s.Nodes[p.node] != nil {
		named = s.Nodes[p.node].Addresses
	}
	out := p.nodePorts.restrict(p.facts.addrs, named, p.facts.ordered)
	if p.snapshot.Snapshot != nil {
		return out
	}
	for a, flags := range out {
		if have := p.m.nodeAddrs.have[bpf.NewAddr(a)]; have&bpf.NodeAddrLocal != 0 && p.facts.addrs[a]&bpf.NodeAddrNodePort != 0 {
			out[a] = flags&^bpf.NodeAddrNodePort | have&bpf.NodeAddrNodePort
		}
	}
	return out
}

// serves reports whether other nodes serve NodePorts on an address of theirs, by what this node is told of its own: all agents need the same.
func (p *pipeline) serves(a netip.Addr) bool {
	s := p.snapshot.Snapshot
	if s == nil {
		return true
	}
	if p.primariesOf != s {
		p.primaries, p.primariesOf = make(map[netip.Addr]bool, 2*len(s.Nodes)), s
		for _, n := range s.Nodes {
			for _, first := range firstOfEach(n.Addresses) {
				p.primaries[first] = true
			}
		}
	}
	return p.nodePorts.has(a, p.primaries[a.Unmap()])
}

// firstOfEach returns the first address of each family.
func firstOfEach(addrs []netip.Addr) (first []netip.Addr) {
	for _, ipv6 := range []bool{false, true} {
		if i := slices.IndexFunc(addrs, func(a netip.Addr) bool { return a.Unmap().Is6() == ipv6 }); i >= 0 {
			first = append(first, addrs[i].Unmap())
		}
	}
	return first
}
