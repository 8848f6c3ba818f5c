// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"encoding/binary"
	"slices"
)

// permission is one port prefix that a rule allows.
type permission struct {
	portPrefix
	rule uint32
}

// portEntry is an entry, but for whose it is.
type portEntry struct {
	portPrefix
	Entry
}

// expansion is what one intent becomes in the policy map.
type expansion struct {
	in     *increment
	intent *intent
	// statements in the order in which they are named or asked; uses are the peers of each, none where the statement is about everybody.
	statements []statement
	uses       [][]*peerUse
	// everybody are the entries for AnyIdentity, peers those of identities that are treated differently.
	everybody []portEntry
	peers     map[*identity][]portEntry
	// dirty are the identities that statements have come to match, or do not match any more.
	dirty identities

	tiers *tiers                // with ClusterNetworkPolicies; nil: without
	wide  map[portPrefix]uint32 // without: what everybody is allowed, prefix → rule
	memo  map[string][]portEntry
}

// begin prepares the expansion of an intent, for the first time or because its rules have other names.
func (e *expansion) begin(in *increment, of *intent) {
	dirty := e.dirty
	*e = expansion{in: in, intent: of, memo: map[string][]portEntry{}, dirty: dirty}
	if of.tiered() {
		e.tiers = newTiers(in, of)
		e.statements = e.tiers.statements
		e.everybody = e.tiers.everybodysEntries()
	} else {
		// In order of the rules: of several that allow the same, the first one is named.
		e.statements = slices.Clone(of.rules)
		slices.SortFunc(e.statements, func(a, b statement) int { return compareRules(a.ref, b.ref) })
		e.everybody = e.wideEntries()
	}
	e.uses = make([][]*peerUse, len(e.statements))
	for i := range e.statements {
		for _, p := range e.statements[i].matched() {
			e.uses[i] = append(e.uses[i], in.peers[p.key])
		}
	}
}

// all works out the entries of every identity.
func (e *expansion) all() {
	matching := map[*identity][]int{}
	for i, uses := range e.uses {
		for _, use := range uses {
			for id := range use.matches {
				if list := matching[id]; len(list) == 0 || list[len(list)-1] != i {
					matching[id] = append(list, i)
				}
			}
		}
	}
	e.peers = make(map[*identity][]portEntry, len(matching))
	for id, list := range matching {
		if entries := e.entries(list, id); len(entries) > 0 {
			e.peers[id] = entries
		}
	}
}

// one works out the entries of one identity.
func (e *expansion) one(id *identity) []portEntry {
	var list []int
	for i, uses := range e.uses {
		if slices.ContainsFunc(uses, func(use *peerUse) bool { _, ok := use.matches[id]; return ok }) {
			list = append(list, i)
		}
	}
	if len(list) == 0 {
		return nil
	}
	return e.entries(list, id)
}

// entries returns those of an identity that the statements in list match.
func (e *expansion) entries(list []int, id *identity) []portEntry {
	if e.tiers != nil {
		list = union(list, e.tiers.everybody)
	}
	var key []byte
	named := false
	for _, i := range list {
		key = binary.AppendUvarint(key, uint64(i))
		named = named || len(e.statements[i].named) > 0
	}
	if named && id.class != nil {
		key = append(key, id.class.portsKey...)
	}
	if out, ok := e.memo[string(key)]; ok {
		return out
	}
	var out []portEntry
	if e.tiers != nil {
		out = e.tiers.entries(list, id.class)
	} else {
		out = e.permissions(list, id)
	}
	if len(e.memo) > 2*len(e.peers)+64 { // most of it is of identities that are gone
		clear(e.memo)
	}
	e.memo[string(key)] = out
	return out
}

// wideEntries fills wide and returns the entries for AnyIdentity: what rules without peers allow, and the isolation. An intent without
// ClusterNetworkPolicies only allows, so what an identity is allowed is a set of prefixes, and what everybody is allowed goes without
// saying. The others are the subject of tiers.go.
func (e *expansion) wideEntries() []portEntry {
	var list []permission
	for _, s := range e.statements {
		if s.anyPeer {
			list = e.in.permit(list, s, s.ports)
		}
	}
	out := []portEntry{{Entry: Entry{Verdict: Deny, Rank: RankIsolation, Rule: e.in.ruleNumber(e.intent.isolation)}}}
	e.wide = map[portPrefix]uint32{}
	for _, p := range pruneAgainst(nil, list) {
		if e.wide[p.portPrefix] = p.rule; p.bits == 0 {
			out = nil // everything is allowed: this entry has the isolation's key
		}
		out = append(out, p.entry())
	}
	return out
}

// permissions returns what the statements in list allow together with the identity as peer, without what AnyIdentity is allowed anyway.
func (e *expansion) permissions(list []int, id *identity) (out []portEntry) {
	var all []permission
	for _, i := range list {
		s := e.statements[i]
		if !s.anyPeer { // the numeric ports of the others are in wide
			all = e.in.permit(all, s, s.ports)
		}
		if id.class != nil {
			all = e.in.permit(all, s, resolve(s.named, id.class.ports))
		}
	}
	for _, p := range pruneAgainst(e.wide, all) {
		out = append(out, p.entry())
	}
	return out
}

func (p permission) entry() portEntry {
	return portEntry{p.portPrefix, Entry{Verdict: Allow, Rank: RankNetworkPolicy, Rule: p.rule}}
}

// permit appends the ports, allowed by s.
func (in *increment) permit(list []permission, s statement, ports []portPrefix) []permission {
	n := in.ruleNumber(s.name)
	for _, p := range ports {
		list = append(list, permission{portPrefix: p, rule: n})
	}
	return list
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
