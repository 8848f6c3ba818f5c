// SPDX-License-Identifier: Apache-2.0

package node

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/margay-cni/margay/pkg/addr"
	"github.com/margay-cni/margay/pkg/state"
)

// claimAddresses makes the peers, with the addresses that are theirs alone. An address that this machine has is this node's, whatever
// anybody says; of two other nodes the one that comes first by name has it, so that every node decides alike.
func (b *compilation) claimAddresses(others []string, nodes map[string]*state.Node) {
	owner := map[netip.Addr]string{}
	for _, a := range b.machine.Addresses {
		owner[a] = b.name
	}
	for _, name := range others {
		number, ok := b.numbers[name]
		if !ok {
			continue
		}
		p := &peer{name: name, number: number}
		b.peers[name] = p
		for _, a := range nodes[name].Addresses {
			if other, taken := owner[a]; taken {
				b.problem(name, "its address %s belongs to node %s already", a, other)
				continue
			}
			owner[a] = name
			p.addresses = append(p.addresses, a)
		}
	}
}

// claimCIDRs gives every node the pod ranges that overlap with no other node's; of two that do, the node that comes first by name has its
// own, and the other's is not reached at all: half of a range would be worse to find than none.
func (b *compilation) claimCIDRs(names []string, nodes map[string]*state.Node) {
	claimed := claims{owner: map[netip.Prefix]string{}}
	for _, name := range names {
		p := b.peers[name]
		for _, cidr := range nodes[name].PodCIDRs {
			cidr = cidr.Masked()
			other, at, taken := claimed.overlap(cidr)
			if taken && other != name {
				b.problem(name, "its pod range %s overlaps with %s of node %s", cidr, at, other)
				continue
			}
			if !taken {
				claimed.add(cidr, name)
			}
			switch {
			case name == b.name:
				b.result.PodCIDRs = append(b.result.PodCIDRs, cidr)
			case p != nil:
				p.cidrs = append(p.cidrs, cidr)
			}
		}
	}
}

// claims are prefixes that do not overlap. Usually all have one of two lengths, and a lookup then costs one or two probes.
type claims struct {
	owner map[netip.Prefix]string
	bits  []int // the lengths, of both families
}

func (c *claims) add(p netip.Prefix, name string) {
	c.owner[p] = name
	if !slices.Contains(c.bits, p.Bits()) {
		c.bits = append(c.bits, p.Bits())
	}
}

// overlap returns who has the prefix that p overlaps with.
func (c *claims) overlap(p netip.Prefix) (owner string, at netip.Prefix, taken bool) {
	longer := false
	for _, bits := range c.bits {
		if bits > p.Bits() {
			longer = true
			continue
		}
		outer, err := p.Addr().Prefix(bits)
		if name, ok := c.owner[outer]; err == nil && ok {
			return name, outer, true
		}
	}
	if !longer {
		return "", netip.Prefix{}, false
	}
	for inner, name := range c.owner {
		// The smallest one, so that the answer does not depend on the order of a map.
		if p.Overlaps(inner) && (!taken || inner.Compare(at) < 0) {
			owner, at, taken = name, inner, true
		}
	}
	return owner, at, taken
}

// addPods adds a host prefix for every pod of another node whose address is outside that node's ranges, and returns which pods have such
// addresses. Pods that end yield to others.
func (b *compilation) addPods(s *state.Snapshot) map[state.Key]struct{} {
	type claim struct {
		pod *state.Pod
		ip  netip.Addr
	}
	var outside []claim
	keys := map[state.Key]struct{}{}
	for key, pod := range s.Pods {
		for _, ip := range b.outsideOf(pod) {
			outside = append(outside, claim{pod, ip})
			keys[key] = struct{}{}
		}
	}
	slices.SortFunc(outside, func(x, y claim) int {
		return cmp.Or(compareBool(x.pod.Terminating, y.pod.Terminating), cmp.Compare(x.pod.Namespace, y.pod.Namespace),
			cmp.Compare(x.pod.Name, y.pod.Name))
	})
	owner := map[netip.Addr]*state.Pod{}
	for _, o := range outside {
		if other := owner[o.ip]; other != nil {
			if other.Node != o.pod.Node && !o.pod.Terminating {
				b.problem(o.pod.Node, "address %s of its pod %s is that of pod %s on node %s", o.ip, o.pod.Key, other.Key, other.Node)
			}
			continue
		}
		owner[o.ip] = o.pod
		b.addRemote(b.peers[o.pod.Node], addr.HostPrefix(o.ip))
	}
	return keys
}

// compareBool orders false before true.
func compareBool(x, y bool) int {
	switch {
	case x == y:
		return 0
	case y:
		return -1
	}
	return 1
}
