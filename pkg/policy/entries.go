// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"
)

// permission is one port prefix that a rule allows.
type permission struct {
	portPrefix
	rule uint32
}

// expansion turns one intent without ClusterNetworkPolicies into entries. Such an intent only allows, so what an identity is allowed is a
// set of prefixes, and what everybody is allowed goes without saying. The others are the subject of tiers.go.
type expansion struct {
	w      *compilation
	intent *intent
	policy uint32
	wide   map[portPrefix]uint32   // allowed for AnyIdentity: prefix → rule
	memo   map[string][]permission // by statements that match, and the peer's named ports
}

// writeEntries fills Result.Entries.
func (w *compilation) writeEntries() error {
	for _, in := range w.sortedIntents() {
		if in.tiered() {
			w.writeTiers(in)
		} else {
			e := &expansion{w: w, intent: in, policy: w.numbers.policies[in.hash], memo: map[string][]permission{}}
			e.write()
		}
		if len(w.result.Entries) > w.limits.Entries {
			return fmt.Errorf("more than %d policy entries: %w", w.limits.Entries, ErrLimit)
		}
	}
	return nil
}

func (e *expansion) write() {
	// The statements in order of the rules: of several that allow the same, the first one is named.
	statements := slices.Clone(e.intent.rules)
	slices.SortFunc(statements, func(a, b statement) int { return compareRules(a.ref, b.ref) })

	e.writeWide(statements)
	matching := map[*identity][]int{}
	for i, s := range statements {
		switch {
		case !s.anyPeer:
			for _, id := range e.w.identitiesOf(s.peers) {
				matching[id] = append(matching[id], i)
			}
		case len(s.named) > 0: // its numeric ports are in wide
			for _, id := range e.w.population.pods {
				matching[id] = append(matching[id], i)
			}
		}
	}
	for id, list := range matching {
		for _, p := range e.permissions(statements, list, id) {
			e.w.result.Entries[e.key(id.number, p.portPrefix)] = Entry{Verdict: Allow, Rank: RankNetworkPolicy, Rule: p.rule}
		}
		if len(e.w.result.Entries) > e.w.limits.Entries {
			return // writeEntries reports it
		}
	}
}

// writeWide writes the entries for AnyIdentity: what rules without peers allow, and the isolation.
func (e *expansion) writeWide(statements []statement) {
	var list []permission
	for _, s := range statements {
		if s.anyPeer {
			list = e.w.permit(list, s, s.ports)
		}
	}
	e.wide = map[portPrefix]uint32{}
	e.w.result.Entries[e.key(AnyIdentity, portPrefix{})] = Entry{
		Verdict: Deny, Rank: RankIsolation, Rule: e.w.numbers.rules[e.intent.isolation],
	}
	for _, p := range pruneAgainst(nil, list) {
		e.wide[p.portPrefix] = p.rule
		e.w.result.Entries[e.key(AnyIdentity, p.portPrefix)] = Entry{Verdict: Allow, Rank: RankNetworkPolicy, Rule: p.rule}
	}
}

// permissions returns what the statements in list allow together with the identity as peer, without what AnyIdentity is allowed anyway.
func (e *expansion) permissions(statements []statement, list []int, id *identity) []permission {
	var key []byte
	named := false
	for _, i := range list {
		key = binary.AppendUvarint(key, uint64(i))
		named = named || len(statements[i].named) > 0
	}
	if named && id.class != nil {
		key = append(key, id.class.portsKey...)
	}
	if out, ok := e.memo[string(key)]; ok {
		return out
	}
	var all []permission
	for _, i := range list {
		s := statements[i]
		if !s.anyPeer {
			all = e.w.permit(all, s, s.ports)
		}
		if id.class != nil {
			all = e.w.permit(all, s, resolve(s.named, id.class.ports))
		}
	}
	out := pruneAgainst(e.wide, all)
	e.memo[string(key)] = out
	return out
}

func (e *expansion) key(identity uint32, p portPrefix) Key {
	return Key{
		Policy: e.policy, Identity: identity, Direction: e.intent.direction,
		Protocol: uint8(p.protocol), Port: p.port, Bits: p.bits,
	}
}

// permit appends the ports, allowed by s.
func (w *compilation) permit(list []permission, s statement, ports []portPrefix) []permission {
	n := w.numbers.rules[s.name]
	for _, p := range ports {
		list = append(list, permission{portPrefix: p, rule: n})
	}
	return list
}

// identitiesOf returns the identities that any of the peers matches, once each.
func (w *compilation) identitiesOf(peers []*peer) []*identity {
	var out []*identity
	for _, p := range peers {
		ids, ok := w.matches[p.key]
		if !ok {
			ids = w.population.match(p)
			w.matches[p.key] = ids
		}
		if len(peers) == 1 {
			return ids
		}
		out = append(out, ids...)
	}
	slices.SortFunc(out, func(a, b *identity) int { return cmp.Compare(a.number, b.number) })
	return slices.Compact(out)
}

// pruneAgainst returns the permissions, widest first, without those that a wider or earlier one of the list, or one in wide, holds.
func pruneAgainst(wide map[portPrefix]uint32, list []permission) []permission {
	slices.SortStableFunc(list, func(a, b permission) int { return comparePrefixes(a.portPrefix, b.portPrefix) })
	kept := make(map[portPrefix]uint32, len(list))
	var out []permission
	for _, p := range list {
		_, twice := kept[p.portPrefix]
		_, anyway := wide[p.portPrefix]
		if twice || anyway || p.coveredBy(kept) || p.coveredBy(wide) {
			continue
		}
		kept[p.portPrefix] = p.rule
		out = append(out, p)
	}
	return out
}

// prune returns the prefixes in order, without those that another one holds.
func prune(list []portPrefix) []portPrefix {
	if len(list) < 2 {
		return list
	}
	permissions := make([]permission, len(list))
	for i, p := range list {
		permissions[i].portPrefix = p
	}
	var out []portPrefix
	for _, p := range pruneAgainst(nil, permissions) {
		out = append(out, p.portPrefix)
	}
	return out
}

// comparePrefixes orders wider prefixes first.
func comparePrefixes(a, b portPrefix) int {
	return cmp.Or(cmp.Compare(a.bits, b.bits), cmp.Compare(a.protocol, b.protocol), cmp.Compare(a.port, b.port))
}
