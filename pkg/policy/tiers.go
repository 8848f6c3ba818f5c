// SPDX-License-Identifier: Apache-2.0

package policy

import "slices"

// decision is what happens to traffic, and the rule that decides it.
type decision struct {
	verdict Verdict
	rule    uint32
	cluster bool // Entry.Cluster
}

// tiers turns one intent in which ClusterNetworkPolicies have a say into entries. The order of tiers and rules is settled here: for each
// identity that some rule names, what happens to every protocol and port is worked out from the rules in their order, and
// written as the fewest prefixes that say it. The kernel then finds the verdict in the two lookups that it does anyway.
// docs/design/0013-policy-tiers.md has the reasons.
type tiers struct {
	in     *increment
	intent *intent
	// statements of all tiers in the order in which they are asked; ends says where each tier ends.
	statements []statement
	ends       [3]int
	everybody  []int     // places of the statements without peers
	others     []segment // what happens to peers that no statement names
}

// defaultAllow names the end of the last tier.
func defaultAllow(d Direction) Rule {
	return Rule{Direction: d, Index: DefaultAllow}
}

func newTiers(in *increment, of *intent) *tiers {
	t := &tiers{in: in, intent: of}
	t.order()
	t.others = t.decide(t.everybody, nil)
	return t
}

func (t *tiers) everybodysEntries() []portEntry {
	return portEntries(RankOthers, completePrefixes(t.others))
}

// entries returns those of a peer of a class that the statements in list match: none where they lead to what happens to all others.
func (t *tiers) entries(list []int, peer *class) []portEntry {
	return portEntries(RankPeer, differingPrefixes(t.decide(list, peer), t.others))
}

func portEntries(rank uint32, list []prefixDecision) []portEntry {
	out := make([]portEntry, 0, len(list))
	for _, p := range list {
		out = append(out, portEntry{p.portPrefix, Entry{Verdict: p.verdict, Rank: rank, Rule: p.rule, Cluster: p.cluster}})
	}
	return out
}

// order fills statements. Those of NetworkPolicies have no order among themselves: first those for everybody, so that a
// peer's entries differ from everybody's in as little as possible.
func (t *tiers) order() {
	network := slices.Clone(t.intent.rules)
	slices.SortFunc(network, func(a, b statement) int {
		if a.anyPeer != b.anyPeer {
			if a.anyPeer {
				return -1
			}
			return 1
		}
		return compareRules(a.ref, b.ref)
	})
	for i, list := range [3][]statement{t.intent.admin, network, t.intent.baseline} {
		t.statements = append(t.statements, list...)
		t.ends[i] = len(t.statements)
	}
	for i, s := range t.statements {
		if s.anyPeer {
			t.everybody = append(t.everybody, i)
		}
	}
}

// decide asks the statements in list, which are places in their order, about a peer of a class; nil: no pod.
func (t *tiers) decide(list []int, peer *class) []segment {
	p := newPainting()
	for i, end := range t.ends {
		for len(list) > 0 && list[0] < end {
			t.ask(p, &t.statements[list[0]], peer)
			list = list[1:]
		}
		if i == int(networkTier) && t.intent.isolated {
			p.nextTier()
			p.rest(decision{verdict: Deny, rule: t.in.ruleNumber(t.intent.isolation)})
		}
		p.nextTier()
	}
	p.rest(decision{verdict: Allow, rule: t.in.ruleNumber(defaultAllow(t.intent.direction).String())})
	return p.segments()
}

// ask lets one statement decide about what it matches of the traffic that reaches it.
func (t *tiers) ask(p *painting, s *statement, peer *class) {
	ports := s.ports
	if len(s.named) > 0 && peer != nil {
		ports = append(slices.Clone(ports), resolve(s.named, peer.ports)...)
	}
	d := decision{verdict: Allow, rule: t.in.ruleNumber(s.name)}
	if s.action == deny {
		d.verdict, d.cluster = Deny, true
	}
	for _, prefix := range ports {
		if s.action == pass {
			p.pass(spanOf(prefix))
		} else {
			p.paint(spanOf(prefix), d)
		}
	}
}

// union joins two sorted lists without repetition.
func union(a, b []int) []int {
	if len(b) == 0 {
		return a
	}
	out := append(slices.Clone(a), b...)
	slices.Sort(out)
	return slices.Compact(out)
}
