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
}

func newPrefixes(list map[netip.Prefix]struct{}) *prefixes {
	p := &prefixes{set: list}
	var seen [2][129]bool
	for prefix := range list {
		seen[family(prefix.Addr())][prefix.Bits()] = true
	}
	for f := range seen {
		for bits, ok := range seen[f] {
			if ok {
				p.lengths[f] = append(p.lengths[f], bits)
			}
		}
		slices.Reverse(p.lengths[f])
	}
	return p
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
