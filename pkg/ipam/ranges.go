// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"math/big"
	"net/netip"
	"slices"
	"strings"
)

// addrRange is a run of addresses within one subnet, canonical: every field is set and checked.
type addrRange struct {
	subnet     netip.Prefix
	start, end netip.Addr // inclusive
	gateway    netip.Addr
	// reserved are the addresses within start and end that are never leased: sorted, disjoint, not adjacent.
	reserved []span
}

// span is a run of addresses, both ends inclusive.
type span struct {
	first, last netip.Addr
}

// rangeConf is one range as the configuration has it; the format is the one of the host-local plugin plus exclude.
type rangeConf struct {
	Subnet  string   `json:"subnet"`
	Start   string   `json:"rangeStart"`
	End     string   `json:"rangeEnd"`
	Gateway string   `json:"gateway"`
	Exclude []string `json:"exclude"`
}

// parse checks the configuration and fills in its defaults: the whole subnet, and its first address as gateway.
func (c rangeConf) parse() (addrRange, error) {
	var r addrRange
	var err error
	if r.subnet, err = parsePrefix(c.Subnet); err != nil {
		return r, fmt.Errorf("subnet %q: %w", c.Subnet, err)
	}
	if r.subnet != r.subnet.Masked() {
		return r, fmt.Errorf("subnet %s has host bits set, its network address is %s", r.subnet, r.subnet.Masked())
	}
	if r.subnet.Bits() > r.subnet.Addr().BitLen()-2 {
		return r, fmt.Errorf("subnet %s is too small: at least 4 addresses are needed", r.subnet)
	}
	r.start, r.end = r.subnet.Addr().Next(), lastAddr(r.subnet)
	if r.end.Is4() {
		r.end = r.end.Prev() // the last one is the broadcast address
	}
	r.gateway = r.subnet.Addr().Next()
	for _, f := range []struct {
		key, value string
		addr       *netip.Addr
	}{{"rangeStart", c.Start, &r.start}, {"rangeEnd", c.End, &r.end}, {"gateway", c.Gateway, &r.gateway}} {
		if f.value == "" {
			continue
		}
		if *f.addr, err = parseAddr(f.value); err != nil {
			return r, fmt.Errorf("%s %q: %w", f.key, f.value, err)
		}
		// The gateway may be outside the subnet, a link-local address for example; it must be of the same family.
		if f.key != "gateway" && !r.subnet.Contains(*f.addr) || f.addr.Is4() != r.subnet.Addr().Is4() {
			return r, fmt.Errorf("%s %s is not in subnet %s", f.key, f.value, r.subnet)
		}
	}
	if r.end.Less(r.start) {
		return r, fmt.Errorf("rangeStart %s is behind rangeEnd %s", r.start, r.end)
	}
	if r.reserved, err = r.parseReserved(c.Exclude); err != nil {
		return r, err
	}
	if _, ok := r.next(r.start); !ok {
		return r, fmt.Errorf("range %s has no usable address", r)
	}
	return r, nil
}

// parseReserved collects what is never leased: the network's own address (in IPv6 the subnet-router anycast address, RFC 4291 §2.6.1),
// the IPv4 broadcast address, the gateway, and exclude.
func (r addrRange) parseReserved(exclude []string) ([]span, error) {
	all := []span{{r.subnet.Addr(), r.subnet.Addr()}, {r.gateway, r.gateway}}
	if r.subnet.Addr().Is4() {
		all = append(all, span{lastAddr(r.subnet), lastAddr(r.subnet)})
	}
	for _, e := range exclude {
		if !strings.Contains(e, "/") {
			a, err := parseAddr(e)
			if err != nil {
				return nil, fmt.Errorf("exclude %q: %w", e, err)
			}
			all = append(all, span{a, a})
			continue
		}
		p, err := parsePrefix(e)
		if err != nil {
			return nil, fmt.Errorf("exclude %q: %w", e, err)
		}
		all = append(all, span{p.Masked().Addr(), lastAddr(p)})
	}
	return r.clip(all), nil
}

// clip sorts and joins spans and cuts them to the range.
func (r addrRange) clip(all []span) []span {
	slices.SortFunc(all, func(a, b span) int { return a.first.Compare(b.first) })
	var out []span
	for _, s := range all {
		if s.first.Is4() != r.start.Is4() || s.last.Less(r.start) || r.end.Less(s.first) {
			continue
		}
		s.first = slices.MaxFunc([]netip.Addr{s.first, r.start}, netip.Addr.Compare)
		s.last = slices.MinFunc([]netip.Addr{s.last, r.end}, netip.Addr.Compare)
		if n := len(out); n > 0 && (s.first.Compare(out[n-1].last) <= 0 || s.first == out[n-1].last.Next()) {
			out[n-1].last = slices.MaxFunc([]netip.Addr{s.last, out[n-1].last}, netip.Addr.Compare)
			continue
		}
		out = append(out, s)
	}
	return out
}

// next returns the first usable address at or behind a, in a binary search however much is excluded.
func (r addrRange) next(a netip.Addr) (netip.Addr, bool) {
	if a.Less(r.start) {
		a = r.start
	}
	i, _ := slices.BinarySearchFunc(r.reserved, a, func(s span, a netip.Addr) int { return s.last.Compare(a) })
	if i < len(r.reserved) && r.reserved[i].first.Compare(a) <= 0 {
		a = r.reserved[i].last.Next() // spans are not adjacent, so this one is not reserved
	}
	return a, a.IsValid() && a.Compare(r.end) <= 0
}

// usable says whether a may be leased from this range.
func (r addrRange) usable(a netip.Addr) bool {
	n, ok := r.next(a)
	return ok && n == a
}

func (r addrRange) contains(a netip.Addr) bool {
	return a.Is4() == r.start.Is4() && r.start.Compare(a) <= 0 && a.Compare(r.end) <= 0
}

// size is how many addresses the range can lease.
func (r addrRange) size() *big.Int {
	n := (span{r.start, r.end}).size()
	for _, s := range r.reserved {
		n.Sub(n, s.size())
	}
	return n
}

func (s span) size() *big.Int {
	first, last := s.first.As16(), s.last.As16()
	n := new(big.Int).SetBytes(last[:])
	n.Sub(n, new(big.Int).SetBytes(first[:]))
	return n.Add(n, big.NewInt(1))
}

func (r addrRange) String() string {
	return fmt.Sprintf("%s (%s to %s)", r.subnet, r.start, r.end)
}

// plan is every range of a configuration. A range is known by its number, counted through all sets.
type plan struct {
	ranges []addrRange
	// sets holds, for each range set, the numbers of its ranges.
	sets [][]int
}

// newPlan numbers the ranges and checks them against each other.
func newPlan(sets [][]addrRange) (*plan, error) {
	if len(sets) > maxAddrs {
		return nil, fmt.Errorf("%d range sets, but an interface gets at most %d addresses", len(sets), maxAddrs)
	}
	p := &plan{}
	for i, set := range sets {
		if len(set) == 0 {
			return nil, fmt.Errorf("range set %d is empty", i)
		}
		var ids []int
		for _, r := range set {
			if r.start.Is4() != set[0].start.Is4() {
				return nil, fmt.Errorf("range set %d mixes IPv4 and IPv6", i)
			}
			for _, o := range p.ranges {
				if o.contains(r.start) || r.contains(o.start) {
					return nil, fmt.Errorf("ranges %s and %s overlap", o, r)
				}
			}
			ids = append(ids, len(p.ranges))
			p.ranges = append(p.ranges, r)
		}
		p.sets = append(p.sets, ids)
	}
	return p, nil
}

// find returns the number of the range from which a may be leased, or -1.
func (p *plan) find(a netip.Addr) int {
	return slices.IndexFunc(p.ranges, func(r addrRange) bool { return r.usable(a) })
}

// setOf returns the number of the set that range id belongs to.
func (p *plan) setOf(id int) int {
	return slices.IndexFunc(p.sets, func(ids []int) bool { return slices.Contains(ids, id) })
}

// fingerprint changes with everything that the stored queues and cursors depend on.
func (p *plan) fingerprint() uint64 {
	h := fnv.New64a()
	for _, r := range p.ranges {
		fmt.Fprintln(h, r.subnet, r.start, r.end)
		for _, s := range r.reserved { // one by one: of an unexported field fmt prints the memory, which differs from process to process
			fmt.Fprintln(h, s.first, s.last)
		}
	}
	return cmp.Or(h.Sum64(), 1) // 0 stands for "no ranges known"
}

func parseAddr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err == nil && (a.Zone() != "" || a.Is4In6()) {
		err = fmt.Errorf("a plain IPv4 or IPv6 address is needed")
	}
	return a, err
}

func parsePrefix(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err == nil && p.Addr().Is4In6() {
		err = fmt.Errorf("a plain IPv4 or IPv6 prefix is needed")
	}
	return p, err
}

// lastAddr returns the highest address of p.
func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
