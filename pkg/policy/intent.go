// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"crypto/sha256"
	"encoding/binary"
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

// variant is the intent of pods that the same policies select, and whose own named ports the policies do not tell apart.
type variant struct {
	key   string // of the group
	users int    // classes of local pods
	// intent is nil where nothing can be denied. It is never written to: its names are those of these policies.
	intent *intent
	shared *shared
}

// shared is what equal variants have in common: a policy id with its entries. The intent's names are the first of all its variants'.
type shared struct {
	*intent
	number   uint32
	variants map[*variant]struct{}
	entries  expansion
}

// holdVariant returns the variant of pods of class of, selected by objects, which are in their order; it has one user more.
func (in *increment) holdVariant(d Direction, objects []*object, of *class) *variant {
	key := groupKey(d, objects, of)
	v := in.variants[key]
	if v == nil {
		v = &variant{key: key, intent: newIntent(d, objects, of)}
		in.variants[key] = v
		if v.intent.denies() {
			in.share(v)
		} else {
			v.intent = nil
		}
	}
	v.users++
	return v
}

func (in *increment) releaseVariant(v *variant) {
	if v == nil {
		return
	}
	if v.users--; v.users > 0 {
		return
	}
	delete(in.variants, v.key)
	if v.shared == nil {
		return
	}
	delete(v.shared.variants, v)
	in.dirty.intents[v.shared] = struct{}{}
	if len(v.shared.variants) == 0 {
		delete(in.intents, v.shared.hash)
		if v.shared.tiered() {
			in.rules.remove(defaultAllow(v.shared.direction).String())
		}
	}
}

// share joins the variant with those that say the same.
func (in *increment) share(v *variant) {
	s := in.intents[v.intent.hash]
	if s == nil {
		s = &shared{intent: v.intent, variants: map[*variant]struct{}{}}
		in.intents[s.hash] = s
		if s.tiered() {
			r := defaultAllow(s.direction)
			in.rules.add(r.String(), r)
		}
	}
	v.shared = s
	s.variants[v] = struct{}{}
	in.dirty.intents[s] = struct{}{}
}

// names works out the first names of all variants anew, and reports whether they are others than before.
func (s *shared) names() (changed bool) {
	var now *intent
	for v := range s.variants {
		if now == nil {
			now = v.intent.clone()
		} else {
			now.merge(v.intent)
		}
	}
	changed = s.isolation != now.isolation || !sameNames(s.rules, now.rules) || !sameNames(s.admin, now.admin) || !sameNames(s.baseline, now.baseline)
	s.intent = now
	return changed
}

func sameNames(a, b []statement) bool {
	return slices.EqualFunc(a, b, func(a, b statement) bool { return a.name == b.name })
}

// clone returns a copy whose names can be changed.
func (in *intent) clone() *intent {
	out := *in
	out.admin, out.rules, out.baseline = slices.Clone(in.admin), slices.Clone(in.rules), slices.Clone(in.baseline)
	return &out
}

// groupKey is equal for pods whose intents are equal because the same policies, with the same text, select them.
func groupKey(d Direction, objects []*object, of *class) string {
	b := []byte{byte(d)}
	byName := false
	for _, o := range objects {
		b = binary.AppendUvarint(b, o.serial)
		byName = byName || d == Ingress && slices.ContainsFunc(o.rules[d], func(r *rule) bool { return len(r.named) > 0 })
	}
	if byName {
		b = append(append(b, 0), of.portsKey...) // no serial is 0
	}
	return string(b)
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
