// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strconv"
	"strings"
)

// intent is what all policies that select a pod say together for one direction, before it is known which identities exist. Equal intents
// are one policy id, whoever wrote them. An id thus keeps its number while pods come and go, and a changed policy text is a
// new id: its entries are complete before the first pod is switched to it.
type intent struct {
	hash      string // of everything but the names
	direction Direction
	// admin and baseline are what the rules of ClusterNetworkPolicies say, in the order in which they are asked.
	admin, baseline []statement
	// isolated says that a NetworkPolicy isolates the pod; then rules are what is allowed nevertheless, in no order.
	isolated  bool
	rules     []statement
	first     Rule   // isolation rule of the first policy that says this
	isolation string // its name
}

// nodeOnly stands for PolicyNodeOnly: whether a ClusterNetworkPolicy selects the pod is not known yet.
var nodeOnly = &intent{}

// statement is a rule whose ports have been resolved as far as the subject can resolve them.
type statement struct {
	key     string
	ref     Rule // first in order of the rules that say this
	name    string
	action  action
	anyPeer bool
	peers   []*peer
	ports   []portPrefix
	named   []namedPort // egress only: the peer resolves them
}

// intentOf returns the intent of a pod of class of, selected by objects, which are in their order; nil where nothing can be denied. Groups
// remembers what was worked out for the same policies and named ports.
func (w *compilation) intentOf(groups map[string]*intent, d Direction, objects []*object, of *class) *intent {
	key := groupKey(d, objects, of)
	if in, ok := groups[key]; ok {
		return in
	}
	in := newIntent(d, objects, of)
	if !in.denies() {
		groups[key] = nil
		return nil
	}
	if same, ok := w.intents[in.hash]; ok {
		same.merge(in)
		in = same
	}
	w.intents[in.hash] = in
	groups[key] = in
	return in
}

// groupKey is equal for pods whose intents are equal because the same policies select them.
func groupKey(d Direction, objects []*object, of *class) string {
	var b strings.Builder
	b.WriteString(d.String())
	byName := false
	for _, o := range objects {
		b.WriteByte('0' + byte(o.tier))
		if o.tier == networkTier {
			b.WriteString(strconv.Quote(o.key.Namespace))
		}
		b.WriteString(strconv.Quote(o.key.Name))
		byName = byName || d == Ingress && slices.ContainsFunc(o.rules[d], func(r *rule) bool { return len(r.named) > 0 })
	}
	if byName {
		b.WriteString(of.portsKey)
	}
	return b.String()
}

func newIntent(d Direction, objects []*object, of *class) *intent {
	in := &intent{direction: d}
	for _, o := range objects {
		into := &in.rules
		switch o.tier {
		case adminTier:
			into = &in.admin
		case baselineTier:
			into = &in.baseline
		case networkTier:
			if !in.isolated {
				in.isolated, in.first, in.isolation = true, o.isolation[d], o.isolationName[d]
			}
		}
		for _, r := range o.rules[d] {
			if s := r.statementFor(d, of); !s.empty() {
				*into = append(*into, s)
			}
		}
	}
	if in.isolated { // NetworkPolicy is final (contract row C2)
		in.baseline = nil
	}
	in.normalize()
	in.hash = in.sum()
	return in
}

// sum is the hash. That of an intent without ClusterNetworkPolicies has nothing to say that they exist.
func (in *intent) sum() string {
	sum := sha256.New()
	sum.Write([]byte(in.direction.String()))
	for _, s := range in.rules {
		sum.Write([]byte("\n" + s.key))
	}
	for _, list := range [][]statement{in.admin, in.baseline} {
		for _, s := range list {
			sum.Write([]byte("\n" + strconv.Itoa(int(s.action)) + " " + s.key))
		}
		if in.tiered() {
			sum.Write([]byte("\n" + strconv.FormatBool(in.isolated)))
		}
	}
	return hex.EncodeToString(sum.Sum(nil))
}

// tiered reports whether ClusterNetworkPolicies have a say.
func (in *intent) tiered() bool {
	return len(in.admin) > 0 || len(in.baseline) > 0
}

// denies reports whether anything could be denied.
func (in *intent) denies() bool {
	denial := func(s statement) bool { return s.action == deny }
	return in.isolated || slices.ContainsFunc(in.admin, denial) || slices.ContainsFunc(in.baseline, denial)
}

// statementFor is the statement of the rule for a subject of class of.
func (r *rule) statementFor(d Direction, of *class) statement {
	if d == Egress || len(r.named) == 0 {
		return r.said
	}
	return r.statement(append(slices.Clone(r.ports), resolve(r.named, of.ports)...), nil)
}

func (r *rule) statement(ports []portPrefix, named []namedPort) statement {
	s := statement{ref: r.ref, name: r.name, action: r.action, anyPeer: r.anyPeer, peers: r.peers, ports: prune(ports), named: named}
	names := strings.Split(joinStrings(s.named), ",")
	slices.Sort(names)
	s.key = r.peersKey + " ports " + joinStrings(s.ports) + " names " + strings.Join(slices.Compact(names), ",")
	return s
}

// empty reports that nothing can match, as with names that the subject does not declare.
func (s *statement) empty() bool {
	return len(s.ports) == 0 && len(s.named) == 0 || !s.anyPeer && len(s.peers) == 0
}

// everything reports that the statement matches all traffic.
func (s *statement) everything() bool {
	return s.anyPeer && len(s.ports) > 0 && s.ports[0].bits == 0
}

// normalize brings the rules into an order, once each; next to a rule that allows everything the others say nothing. Statements of a tier
// with an order say nothing behind one that matches everything.
func (in *intent) normalize() {
	for _, list := range []*[]statement{&in.admin, &in.baseline} {
		if i := slices.IndexFunc(*list, func(s statement) bool { return s.everything() }); i >= 0 {
			*list = (*list)[:i+1]
		}
	}
	for _, s := range in.rules {
		if s.everything() {
			in.rules = slices.DeleteFunc(in.rules, func(o statement) bool { return o.key != s.key })
			break
		}
	}
	slices.SortFunc(in.rules, func(a, b statement) int {
		if c := strings.Compare(a.key, b.key); c != 0 {
			return c
		}
		return compareRules(a.ref, b.ref)
	})
	in.rules = slices.CompactFunc(in.rules, func(a, b statement) bool { return a.key == b.key })
}

// merge takes over the names of an equal intent where they come first.
func (in *intent) merge(other *intent) {
	if in.isolated && compareRules(other.first, in.first) < 0 {
		in.first, in.isolation = other.first, other.isolation
	}
	mergeNames(in.rules, other.rules)
	mergeNames(in.admin, other.admin)
	mergeNames(in.baseline, other.baseline)
}

func mergeNames(list, others []statement) {
	for i := range list {
		if compareRules(others[i].ref, list[i].ref) < 0 {
			list[i].ref, list[i].name = others[i].ref, others[i].name
		}
	}
}
