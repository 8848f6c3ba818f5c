// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/margay-cni/margay/pkg/addr"
	"github.com/margay-cni/margay/pkg/state"
)

// placement says which identity every prefix of the ipcache has.
type placement struct {
	claims     claims
	nodeClaims map[netip.Addr]int // addresses that nodes have, and hostNetwork pods
	// selected are the addresses of nodes that active rules select, with the sorted keys of the peers that do.
	selected map[netip.Addr][]string
	// named are the prefixes that active rules name, regions the same for lookups.
	named   counted[netip.Prefix, struct{}]
	regions *prefixes

	hosts map[netip.Addr]*identity
	rest  map[netip.Prefix]*identity // of what of a region is nobody's
	bare  map[state.Key]*identity    // of local pods that own no address
	// moved are the prefixes whose identity this call has changed, with what it was; nil: there was none.
	moved map[netip.Prefix]*identity
	// mapped counts the regions that hold all of IPv4 in its mapped form.
	mapped int
}

func newPlacement() placement {
	return placement{
		claims: claims{owner: map[netip.Addr]*state.Pod{}}, nodeClaims: map[netip.Addr]int{}, selected: map[netip.Addr][]string{},
		named: newCounted[netip.Prefix, struct{}](), regions: newPrefixes(nil),
		hosts: map[netip.Addr]*identity{}, rest: map[netip.Prefix]*identity{}, bare: map[state.Key]*identity{},
	}
}

// claims are the pods that claim each address. Where two claim one, as when a pod is replaced, it is that of the pod that is not
// terminating, then of the first by name.
type claims struct {
	owner  map[netip.Addr]*state.Pod
	rivals map[netip.Addr][]*state.Pod // all others
}

func (c *claims) add(a netip.Addr, p *state.Pod) {
	owner, ok := c.owner[a]
	switch {
	case !ok:
		c.owner[a] = p
		return
	case before(p, owner):
		c.owner[a], p = p, owner
	}
	if c.rivals == nil {
		c.rivals = map[netip.Addr][]*state.Pod{}
	}
	c.rivals[a] = append(c.rivals[a], p)
}

func (c *claims) remove(a netip.Addr, p *state.Pod) {
	rivals := c.rivals[a]
	if c.owner[a] == p {
		delete(c.owner, a)
		delete(c.rivals, a)
		for _, r := range rivals {
			c.add(a, r)
		}
		return
	}
	if i := slices.Index(rivals, p); i >= 0 {
		if c.rivals[a] = slices.Delete(rivals, i, i+1); len(c.rivals[a]) == 0 {
			delete(c.rivals, a)
		}
	}
}

func (c *claims) exchange(a netip.Addr, old, now *state.Pod) {
	if c.owner[a] == old {
		c.owner[a] = now
	}
	for i, r := range c.rivals[a] {
		if r == old {
			c.rivals[a][i] = now
		}
	}
}

// place gives every address, region and local pod whose circumstances have changed its identity.
//
// Only policies that select a local pod name regions and nodes: the others are enforced elsewhere, and each further region would split
// identities here.
func (in *increment) place() {
	in.moved = map[netip.Prefix]*identity{}
	in.selectNodes()
	for p := range in.named.changed {
		if _, ok := in.rest[p]; ok == in.named.has(p) {
			continue
		}
		in.dirty.regions[p] = struct{}{}
		if in.named.has(p) {
			in.regions.add(p)
		} else {
			in.regions.remove(p)
		}
	}
	if len(in.dirty.regions) > 0 {
		for a := range in.hosts {
			if in.inDirtyRegion(a) {
				in.dirty.addresses[a] = struct{}{}
			}
		}
	}
	for p := range in.dirty.regions {
		in.placeRegion(p)
	}
	for a := range in.dirty.addresses {
		in.placeHost(a)
	}
	in.placeBare()
	for id := range in.dirty.unused {
		in.population.drop(id)
		if _, ok := in.dirty.fresh[id]; ok { // came and went
			delete(in.dirty.fresh, id)
			delete(in.dirty.unused, id)
		}
	}
}

func (in *increment) inDirtyRegion(a netip.Addr) bool {
	for p := range in.dirty.regions {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

func (in *increment) placeRegion(p netip.Prefix) {
	in.note(p)
	if !in.named.has(p) {
		in.release(in.rest[p])
		delete(in.rest, p)
		in.countMapped(p, -1)
		return
	}
	in.rest[p] = in.hold(identityKey{region: p})
	in.countMapped(p, 1)
}

func (in *increment) countMapped(p netip.Prefix, by int) {
	if p.Addr().Is6() && contains(p, mappedIPv4) {
		in.mapped += by
	}
}

func (in *increment) placeHost(a netip.Addr) {
	host := addr.HostPrefix(a)
	in.note(host)
	old := in.hosts[a]
	key, ok := in.holder(a)
	if !ok {
		delete(in.hosts, a)
	} else {
		key.region = in.regions.longest(host)
		in.hosts[a] = in.hold(key)
	}
	in.release(old)
}

// holder is whose the address is.
func (in *increment) holder(a netip.Addr) (k identityKey, ok bool) {
	if selected := in.selected[a]; len(selected) > 0 {
		return identityKey{nodes: joinKeys(selected)}, true
	}
	owner := in.claims.owner[a]
	if owner == nil || in.nodeClaims[a] > 0 {
		return k, false
	}
	return identityKey{class: in.pods[owner.Key].class}, true
}

// placeBare gives local pods that own no address the identity of their class outside every region.
func (in *increment) placeBare() {
	for key, p := range in.local {
		old := in.bare[key]
		if in.primaryAddress(p).IsValid() {
			if old != nil {
				delete(in.bare, key)
				in.release(old)
			}
			continue
		}
		if of := in.pods[key].class; old == nil || old.class != of {
			in.bare[key] = in.hold(identityKey{class: of})
			in.release(old)
		}
	}
	for key, old := range in.bare {
		if in.local[key] == nil {
			delete(in.bare, key)
			in.release(old)
		}
	}
}

// primaryAddress is the first address that the pod owns, or the zero value.
func (in *increment) primaryAddress(p *state.Pod) netip.Addr {
	for _, a := range p.IPs {
		if a = canonical(a); in.claims.owner[a] == p && in.nodeClaims[a] == 0 {
			return a
		}
	}
	return netip.Addr{}
}

// hold returns the identity, which has one user more.
func (in *increment) hold(k identityKey) *identity {
	id, fresh := in.population.identity(k)
	if fresh {
		in.dirty.fresh[id] = struct{}{}
	}
	id.users++
	delete(in.dirty.unused, id)
	return id
}

func (in *increment) release(id *identity) {
	if id == nil {
		return
	}
	if id.users--; id.users == 0 {
		in.dirty.unused[id] = struct{}{}
	}
}

// note remembers what a prefix was before this call.
func (in *increment) note(p netip.Prefix) {
	if _, ok := in.moved[p]; !ok {
		in.moved[p] = in.at(p)
	}
}

// at is the identity of a prefix; nil: it is not in the ipcache.
func (in *increment) at(p netip.Prefix) *identity {
	if p.IsSingleIP() {
		if id := in.hosts[p.Addr()]; id != nil {
			return id
		}
	}
	return in.rest[p]
}

// prefixCount is how many prefixes have an identity.
func (in *increment) prefixCount() int {
	n := len(in.hosts) + len(in.rest)
	for p := range in.rest {
		if p.IsSingleIP() && in.hosts[p.Addr()] != nil {
			n--
		}
	}
	return n
}

// selectNodes finds out which nodes the rules select, if that may have changed.
func (in *increment) selectNodes() {
	if !in.dirty.nodes && len(in.nodePeers.changed) == 0 {
		return
	}
	now := selectNodes(in.nodes, in.nodePeers.values)
	for a, keys := range now {
		if !slices.Equal(keys, in.selected[a]) {
			in.dirty.addresses[a] = struct{}{}
		}
	}
	for a := range in.selected {
		if _, ok := now[a]; !ok {
			in.dirty.addresses[a] = struct{}{}
		}
	}
	in.selected = now
}

// selectNodes returns the addresses of the nodes that any of the selectors selects, each with the sorted keys of those that do.
func selectNodes(nodes map[string]*state.Node, selectors map[string]labels.Selector) map[netip.Addr][]string {
	out := map[netip.Addr][]string{}
	if len(selectors) == 0 {
		return out
	}
	for _, n := range nodes {
		for key, s := range selectors {
			if !s.Matches(labels.Set(n.Labels)) {
				continue
			}
			for a := range nodeAddresses(n) {
				out[a] = append(out[a], key)
			}
		}
	}
	for a, keys := range out {
		slices.Sort(keys)
		out[a] = slices.Compact(keys)
	}
	return out
}
