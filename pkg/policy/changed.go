// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"maps"
	"net/netip"
	"slices"
)

// Changed returns, sorted, the policy ids whose epochs must be raised when new replaces old, so that no flow stays with a verdict
// that new would not give. These are
//
//   - every id one of whose entries was added, removed or changed (also one that went out of use, or came into use again);
//   - every id that treats two identities differently between which some address moved: because its pod appeared, went or was relabelled,
//     because a CIDR region appeared, went or was split there. Ids for which both identities mean the same are left alone, so a
//     new pod in the cluster disturbs only flows under policies that name it;
//   - the former id, PolicyNone included, of every pod in both results whose id changed, for the direction that changed.
//
// Pods in only one of the results add nothing of their own: for a new one the caller raises the id that it overwrites in the endpoints
// map, which this package cannot know; a deleted one's flows end with its device.
//
// A nil old means that nothing is known of the past: PolicyNone, PolicyNodeOnly and every id in new.
func Changed(old, new *Result) []uint32 {
	raised := map[uint32]struct{}{}
	if old == nil {
		raised[PolicyNone], raised[PolicyNodeOnly] = struct{}{}, struct{}{}
		old = &Result{}
	}
	compareEntries(raised, old.Entries, new.Entries)
	compareEntries(raised, new.Entries, old.Entries)
	for key, before := range old.Pods {
		after, ok := new.Pods[key]
		for d, id := range before.Policy {
			if ok && after.Policy[d] != id {
				raised[id] = struct{}{}
			}
		}
	}
	raiseMoved(raised, new.Entries, moves(old.Identities, new.Identities))
	return slices.Sorted(maps.Keys(raised))
}

// compareEntries raises the ids of the entries of a that b has not.
func compareEntries(raised map[uint32]struct{}, a, b map[Key]Entry) {
	for key, entry := range a {
		if other, ok := b[key]; !ok || other != entry {
			raised[key.Policy] = struct{}{}
		}
	}
}

// move says that some address changed its identity.
type move struct {
	from, to uint32
}

// moves returns the changes of identity that at least one address may have made. Only prefixes that differ can be the cause: an address
// whose longest prefix, in both maps together, is in both with one identity has not moved.
func moves(old, new map[netip.Prefix]uint32) map[move]struct{} {
	out := map[move]struct{}{}
	oldSet, newSet := prefixesOf(old), prefixesOf(new)
	identity := func(in map[netip.Prefix]uint32, set *prefixes, p netip.Prefix) uint32 {
		return in[set.longest(p)] // none: World
	}
	for p, from := range old {
		if to := identity(new, newSet, p); to != from {
			out[move{from, to}] = struct{}{}
		}
	}
	for p, to := range new {
		if from := identity(old, oldSet, p); from != to {
			out[move{from, to}] = struct{}{}
		}
	}
	return out
}

func prefixesOf(m map[netip.Prefix]uint32) *prefixes {
	set := make(map[netip.Prefix]struct{}, len(m))
	for p := range m {
		set[p] = struct{}{}
	}
	return newPrefixes(set)
}

// raiseMoved raises the ids that treat the ends of a move differently. The entries of ids that are not raised yet are the same before and
// after, so looking at one side is enough.
func raiseMoved(raised map[uint32]struct{}, entries map[Key]Entry, moved map[move]struct{}) {
	if len(moved) == 0 {
		return
	}
	ends := map[uint32]map[uint32]map[Key]Entry{} // identity → policy → entries without the identity
	for m := range moved {
		ends[m.from], ends[m.to] = map[uint32]map[Key]Entry{}, map[uint32]map[Key]Entry{}
	}
	for key, entry := range entries {
		of, ok := ends[key.Identity]
		if _, done := raised[key.Policy]; done || !ok {
			continue
		}
		if of[key.Policy] == nil {
			of[key.Policy] = map[Key]Entry{}
		}
		policy := key.Policy
		key.Identity = 0
		of[policy][key] = entry
	}
	for m := range moved {
		for _, pair := range [][2]uint32{{m.from, m.to}, {m.to, m.from}} {
			for policy, list := range ends[pair[0]] {
				if !maps.Equal(list, ends[pair[1]][policy]) {
					raised[policy] = struct{}{}
				}
			}
		}
	}
}
