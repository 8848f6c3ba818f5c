// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"errors"
	"fmt"
	"net/netip"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/margay-cni/margay/pkg/state"
)

// increment is what a Compiler keeps from one call to the next: the inputs, what was made of them, and who uses it. A call takes in the
// objects that are others than before, and follows their uses:
//
//	pods, nodes         → addresses      → identities ─┐
//	policies, namespaces → subjects → intents → peers ─┴→ entries
//
// Everything but result is changed while it works. Result is written at the end, when nothing can fail any more; after a failure the
// increment is worth nothing.
type increment struct {
	compiler *Compiler
	began    uint64 // compilations before its first one
	result   *Result

	// Inputs as they were at the last call, and the journals that came with them.
	seen       state.Journals
	pods       map[state.Key]member
	namespaces map[string]*state.Namespace
	nodes      map[string]*state.Node
	objects    map[state.Key]*object // NetworkPolicies, and ClusterNetworkPolicies under keys without a namespace
	network    map[string][]*object  // NetworkPolicies by namespace, sorted by name
	cluster    []*object             // ClusterNetworkPolicies as they are asked
	inUse      map[string]int        // namespace → pods, of whatever kind

	classes  map[string]*class // by key
	subjects map[*class]*subject
	local    map[state.Key]*state.Pod // that take part
	variants map[string]*variant      // by group key
	intents  map[string]*shared       // by hash
	peers    map[string]*peerUse      // by peer key

	placement
	population *population
	// nodePeers are the selectors of nodes that active rules have, by peer key; rules the rules that entries may name, by name.
	nodePeers counted[string, labels.Selector]
	rules     counted[string, Rule]

	// Of one call.
	dirty   dirt
	numbers numbering
}

// dirt is what one call has found changed.
type dirt struct {
	namespaces map[string]struct{} // labels, or whether it is known
	restricted map[string]struct{} // may be restricted, or not, now
	classes    []*class            // have lost their last pod
	subjects   map[*class]struct{} // which policies select them
	cluster    bool                // some ClusterNetworkPolicy
	nodes      bool                // some node, or which of them rules select
	addresses  map[netip.Addr]struct{}
	regions    map[netip.Prefix]struct{} // are named now, or not any more
	fresh      map[*identity]struct{}
	unused     map[*identity]struct{}
	intents    map[*shared]struct{}
	policies   map[state.Key]struct{}
}

// numbering are the plans of one call.
type numbering struct{ identities, policies, rules *allocation }

// counted is a set with values whose members are there for as long as they have users. It remembers which came or went.
type counted[K comparable, V any] struct {
	users   map[K]int
	values  map[K]V
	changed map[K]struct{}
}

func newCounted[K comparable, V any]() counted[K, V] {
	return counted[K, V]{users: map[K]int{}, values: map[K]V{}, changed: map[K]struct{}{}}
}

func (c *counted[K, V]) add(k K, v V) {
	if c.users[k]++; c.users[k] == 1 {
		c.values[k] = v
		c.changed[k] = struct{}{}
	}
}

func (c *counted[K, V]) remove(k K) {
	if c.users[k]--; c.users[k] == 0 {
		delete(c.users, k)
		delete(c.values, k)
		c.changed[k] = struct{}{}
	}
}

func (c *counted[K, V]) has(k K) bool { return c.users[k] > 0 }

func newIncrement(c *Compiler) *increment {
	return &increment{
		compiler: c, began: c.compilations, result: newResult(),
		pods: map[state.Key]member{}, namespaces: map[string]*state.Namespace{}, nodes: map[string]*state.Node{},
		objects: map[state.Key]*object{}, network: map[string][]*object{}, inUse: map[string]int{},
		classes: map[string]*class{}, subjects: map[*class]*subject{}, local: map[state.Key]*state.Pod{},
		variants: map[string]*variant{}, intents: map[string]*shared{}, peers: map[string]*peerUse{},
		placement: newPlacement(), population: newPopulation(),
		nodePeers: newCounted[string, labels.Selector](), rules: newCounted[string, Rule](),
	}
}

func newResult() *Result {
	return &Result{
		Identities: map[netip.Prefix]uint32{}, Pods: map[state.Key]Assignment{}, Restricted: map[string]bool{}, Entries: map[Key]Entry{},
		Rules: map[uint32]Rule{}, Invalid: map[state.Key]error{}, Conditions: map[string]metav1.Condition{},
	}
}

func (in *increment) begin() {
	in.dirty = dirt{
		namespaces: map[string]struct{}{}, restricted: map[string]struct{}{}, subjects: map[*class]struct{}{},
		addresses: map[netip.Addr]struct{}{}, regions: map[netip.Prefix]struct{}{},
		fresh: map[*identity]struct{}{}, unused: map[*identity]struct{}{}, intents: map[*shared]struct{}{},
		policies: map[state.Key]struct{}{},
	}
	clear(in.named.changed)
	clear(in.nodePeers.changed)
	clear(in.rules.changed)
}

// update brings everything to the snapshot.
func (in *increment) update(s *state.Snapshot) (*Changes, error) {
	in.begin()
	in.take(s)
	in.assign()
	in.place()
	in.matchPeers()
	if n := in.prefixCount(); n >= in.compiler.Limits.Prefixes {
		return nil, fmt.Errorf("compile policies: %d prefixes in the ipcache, room for %d: %w", n, in.compiler.Limits.Prefixes, ErrLimit)
	}
	if err := in.plan(); err != nil {
		return nil, fmt.Errorf("compile policies: %w", err)
	}
	staged, err := in.expand()
	if err != nil {
		return nil, fmt.Errorf("compile policies: %w", err)
	}
	return in.commit(staged), nil
}

// plan numbers what came into use.
func (in *increment) plan() error {
	c, now := in.compiler, in.compiler.compilations
	var err1, err2, err3 error
	names := map[string]struct{}{}
	for id := range in.dirty.fresh {
		names[id.key] = struct{}{}
	}
	in.numbers.identities, err1 = c.identities.plan(names, now)
	names = map[string]struct{}{}
	for s := range in.dirty.intents {
		if in.intents[s.hash] == s {
			names[s.hash] = struct{}{}
		}
	}
	in.numbers.policies, err2 = c.policies.plan(names, now)
	names = map[string]struct{}{}
	for name := range in.rules.changed {
		if in.rules.has(name) {
			names[name] = struct{}{}
		}
	}
	in.numbers.rules, err3 = c.rules.plan(names, now)
	if err := errors.Join(err1, err2, err3); err != nil {
		return err
	}
	for id := range in.dirty.fresh {
		n, ok := in.numbers.identities.assigned[id.key]
		if !ok {
			n = c.identities.Assigned[id.key]
		}
		id.number = n
	}
	for s := range in.dirty.intents {
		if n, ok := in.numbers.policies.assigned[s.hash]; ok {
			s.number = n
		} else {
			s.number = c.policies.Assigned[s.hash]
		}
	}
	return nil
}

// commitNumbers puts the plans in force.
func (in *increment) commitNumbers() {
	c := in.compiler
	c.compilations++
	var identities, policies, rules []string
	if in.first() { // there may be numbers of names that nobody knows any more
		identities = c.identities.without(func(name string) bool { return in.population.byKey[name] != nil })
		policies = c.policies.without(func(name string) bool { return in.intents[name] != nil })
		rules = c.rules.without(in.rules.has)
	}
	for id := range in.dirty.unused {
		identities = append(identities, id.key)
	}
	for s := range in.dirty.intents {
		if in.intents[s.hash] == nil {
			policies = append(policies, s.hash)
		}
	}
	for name := range in.rules.changed {
		if !in.rules.has(name) {
			delete(in.result.Rules, c.rules.Assigned[name])
			rules = append(rules, name)
		}
	}
	c.identities.commit(in.numbers.identities, identities, c.compilations)
	c.policies.commit(in.numbers.policies, policies, c.compilations)
	c.rules.commit(in.numbers.rules, rules, c.compilations)
}

// first reports whether it is the first call that is being committed: the result is new, and no changes of it are of use.
func (in *increment) first() bool { return in.compiler.compilations == in.began+1 }

// ruleNumber is the number of a rule in use.
func (in *increment) ruleNumber(name string) uint32 {
	if n, ok := in.numbers.rules.assigned[name]; ok {
		return n
	}
	return in.compiler.rules.Assigned[name]
}
