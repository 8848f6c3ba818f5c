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
	hash      string // of direction and rules
	direction Direction
	rules     []statement
	first     Rule   // isolation rule of the first policy that says this
	isolation string // its name
}

// statement is a rule whose ports have been resolved as far as the subject can resolve them.
type statement struct {
	key     string
	ref     Rule // first in order of the rules that say this
	name    string
	anyPeer bool
	peers   []*peer
	ports   []portPrefix
	named   []namedPort // egress only: the peer resolves them
}

// intentOf returns the intent of a pod of class of, selected by objects. Groups remembers what was worked out for the same policies and
// named ports.
func (w *compilation) intentOf(groups map[string]*intent, d Direction, objects []*object, of *class) *intent {
	key := groupKey(d, objects, of)
	if in, ok := groups[key]; ok {
		return in
	}
	in := newIntent(d, objects, of)
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
	b.WriteString(strconv.Quote(of.namespace))
	byName := false
	for _, o := range objects {
		b.WriteString(strconv.Quote(o.key.Name))
		byName = byName || d == Ingress && slices.ContainsFunc(o.rules[d], func(r *rule) bool { return len(r.named) > 0 })
	}
	if byName {
		b.WriteString(of.portsKey)
	}
	return b.String()
}

func newIntent(d Direction, objects []*object, of *class) *intent {
	in := &intent{direction: d, first: objects[0].isolation[d], isolation: objects[0].isolationName[d]}
	for _, o := range objects {
		for _, r := range o.rules[d] {
			if s := r.statementFor(d, of); !s.empty() {
				in.rules = append(in.rules, s)
			}
		}
	}
	in.normalize()
	sum := sha256.New()
	sum.Write([]byte(d.String()))
	for _, s := range in.rules {
		sum.Write([]byte("\n" + s.key))
	}
	in.hash = hex.EncodeToString(sum.Sum(nil))
	return in
}

// statementFor is the statement of the rule for a subject of class of.
func (r *rule) statementFor(d Direction, of *class) statement {
	if d == Egress || len(r.named) == 0 {
		return r.said
	}
	return r.statement(append(slices.Clone(r.ports), resolve(r.named, of.ports)...), nil)
}

func (r *rule) statement(ports []portPrefix, named []namedPort) statement {
	s := statement{ref: r.ref, name: r.name, anyPeer: r.anyPeer, peers: r.peers, ports: prune(ports), named: named}
	names := strings.Split(joinStrings(s.named), ",")
	slices.Sort(names)
	s.key = r.peersKey + " ports " + joinStrings(s.ports) + " names " + strings.Join(slices.Compact(names), ",")
	return s
}

// empty reports that nothing can match, as with names that the subject does not declare.
func (s *statement) empty() bool {
	return len(s.ports) == 0 && len(s.named) == 0 || !s.anyPeer && len(s.peers) == 0
}

// normalize brings the rules into an order, once each; next to a rule that allows everything the others say nothing.
func (in *intent) normalize() {
	for _, s := range in.rules {
		if s.anyPeer && s.ports != nil && s.ports[0].bits == 0 {
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
	if compareRules(other.first, in.first) < 0 {
		in.first, in.isolation = other.first, other.isolation
	}
	for i := range in.rules {
		if compareRules(other.rules[i].ref, in.rules[i].ref) < 0 {
			in.rules[i].ref, in.rules[i].name = other.rules[i].ref, other.rules[i].name
		}
	}
}
