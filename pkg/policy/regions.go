// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"net/netip"
	"slices"
)

// mappedIPv4 is where IPv4 addresses lie in the ipcache.
var mappedIPv4 = netip.MustParsePrefix("::ffff:0:0/96")

// prefixes is a set of prefixes with longest-match lookup. The lengths in use are few, so trying each of them is quicker than a tree.
type prefixes struct {
	set     map[netip.Prefix]struct{}
	lengths [2][]int // IPv4, IPv6; longest first
	count   [2][129]int
}

func newPrefixes(list map[netip.Prefix]struct{}) *prefixes {
	p := &prefixes{set: make(map[netip.Prefix]struct{}, len(list))}
	for prefix := range list {
		p.add(prefix)
	}
	return p
}

// add adds a prefix that is not in the set.
func (p *prefixes) add(prefix netip.Prefix) {
	p.set[prefix] = struct{}{}
	f, bits := family(prefix.Addr()), prefix.Bits()
	if p.count[f][bits]++; p.count[f][bits] == 1 {
		at, _ := slices.BinarySearchFunc(p.lengths[f], bits, func(have, want int) int { return want - have })
		p.lengths[f] = slices.Insert(p.lengths[f], at, bits)
	}
}

// remove removes a prefix that is in the set.
func (p *prefixes) remove(prefix netip.Prefix) {
	delete(p.set, prefix)
	f, bits := family(prefix.Addr()), prefix.Bits()
	if p.count[f][bits]--; p.count[f][bits] == 0 {
		p.lengths[f] = slices.DeleteFunc(p.lengths[f], func(have int) bool { return have == bits })
	}
}

// longest returns the longest prefix of the set that holds all of within, or the zero value.
func (p *prefixes) longest(within netip.Prefix) netip.Prefix {
	for _, bits := range p.lengths[family(within.Addr())] {
		if bits > within.Bits() {
			continue
		}
		candidate, err := within.Addr().Prefix(bits)
		if err != nil {
			continue
		}
		if _, ok := p.set[candidate]; ok {
			return candidate
		}
	}
	return netip.Prefix{}
}

// family indexes prefixes.lengths.
func family(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}
