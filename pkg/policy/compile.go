// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/margay-cni/margay/pkg/addr"
	"github.com/margay-cni/margay/pkg/state"
)

// ErrLimit is wrapped by Compile's error when the result is larger than a map.
var ErrLimit = errors.New("more than the map holds")

// Limits are the sizes of the maps that a Result must fit into.
type Limits struct {
	Prefixes int // ipcache
	Entries  int // policy
}

// DefaultLimits are the maps' default sizes.
func DefaultLimits() Limits {
	return Limits{Prefixes: 131072, Entries: 262144}
}

// Compiler turns snapshots into Results. It remembers the numbers that it gave, and what it made of objects that the next snapshot
// may still hold.
type Compiler struct {
	Limits Limits

	identities   *space
	policies     *space
	rules        *space
	compilations uint64

	objects map[any]*object // by *state.NetworkPolicy or *state.ClusterNetworkPolicy
	classes map[*state.Pod]*class
	byKey   map[string]*class
}

// NewCompiler returns a compiler that has given no numbers yet.
func NewCompiler() *Compiler {
	return &Compiler{
		Limits:     DefaultLimits(),
		identities: newSpace("identities", FirstIdentity, AnyIdentity-2, false),
		policies:   newSpace("policy ids", FirstPolicy, MaxPolicy, true),
		rules:      newSpace("rules", 1, AnyIdentity-2, false),
	}
}

// compilation is the work on one snapshot.
type compilation struct {
	snapshot *state.Snapshot
	limits   Limits
	result   *Result

	objects map[string][]*object // NetworkPolicies by namespace, sorted by name
	cluster []*object            // ClusterNetworkPolicies as they are asked
	classes map[*state.Pod]*class
	owners  map[netip.Addr]*state.Pod

	population *population
	primary    map[state.Key]*identity // of local pods
	prefixes   map[netip.Prefix]*identity

	intents  map[string]*intent       // by hash
	assigned map[state.Key][2]*intent // of local pods; nil: nothing is denied
	active   map[*object]*[2]bool     // policies that select a local pod, by direction
	matches  map[string][]*identity   // by peer key
	numbers  struct{ policies, rules numbered }
}

type numbered = map[string]uint32

// Compile compiles a snapshot. On an error the compiler's numbers stay as they were: go on with the previous Result.
func (c *Compiler) Compile(s *state.Snapshot) (*Result, error) {
	w := &compilation{
		snapshot: s,
		limits:   c.Limits,
		result: &Result{
			Identities: map[netip.Prefix]uint32{},
			Pods:       map[state.Key]Assignment{},
			Restricted: map[string]bool{},
			Entries:    map[Key]Entry{},
			Rules:      map[uint32]Rule{},
			Invalid:    map[state.Key]error{},
			Conditions: map[string]metav1.Condition{},
		},
		intents:  map[string]*intent{},
		assigned: map[state.Key][2]*intent{},
		active:   map[*object]*[2]bool{},
		matches:  map[string][]*identity{},
	}
	c.parse(w)
	w.classes = c.classify(s)
	w.owners = owners(s)
	w.restrict()
	w.assign()
	w.populate()
	if len(w.prefixes) >= w.limits.Prefixes {
		return nil, fmt.Errorf("compile policies: %d prefixes in the ipcache, room for %d: %w", len(w.prefixes), w.limits.Prefixes, ErrLimit)
	}
	return w.number(c)
}

// number gives every name its number, writes the result with them, and only then puts them in force.
func (w *compilation) number(c *Compiler) (*Result, error) {
	identities, err1 := c.identities.plan(w.identityNames(), c.compilations)
	policies, err2 := c.policies.plan(w.intentNames(), c.compilations)
	rules, err3 := c.rules.plan(w.ruleNames(), c.compilations)
	if err := errors.Join(err1, err2, err3); err != nil {
		return nil, fmt.Errorf("compile policies: %w", err)
	}
	for _, id := range w.population.identities {
		id.number = identities.assigned[id.key]
	}
	w.numbers.policies, w.numbers.rules = policies.assigned, rules.assigned
	w.writeIdentities()
	w.writePods()
	w.writeRules()
	if err := w.writeEntries(); err != nil {
		return nil, fmt.Errorf("compile policies: %w", err)
	}
	c.compilations++
	c.identities.commit(identities, c.compilations)
	c.policies.commit(policies, c.compilations)
	c.rules.commit(rules, c.compilations)
	return w.result, nil
}

// parse fills objects and cluster. Policies that an earlier snapshot held are not parsed again.
func (c *Compiler) parse(w *compilation) {
	kept := make(map[any]*object, len(w.snapshot.NetworkPolicies)+len(w.snapshot.ClusterNetworkPolicies))
	w.objects = map[string][]*object{}
	for _, p := range w.snapshot.NetworkPolicies {
		o, ok := c.objects[p]
		if !ok {
			o = parseObject(p)
		}
		kept[p] = o
		w.objects[p.Namespace] = append(w.objects[p.Namespace], o)
	}
	for _, p := range w.snapshot.ClusterNetworkPolicies {
		o, ok := c.objects[p]
		if !ok {
			o = parseCluster(p)
		}
		kept[p] = o
		w.cluster = append(w.cluster, o)
		w.result.Conditions[p.Name] = o.condition
	}
	c.objects = kept
	for _, o := range kept {
		if o.err != nil {
			w.result.Invalid[o.key] = o.err
		}
	}
	for _, list := range w.objects {
		slices.SortFunc(list, compareObjects)
	}
	slices.SortFunc(w.cluster, compareObjects)
}

// classify returns the class of every pod that takes part; equal classes are one pointer, in this and in later snapshots.
func (c *Compiler) classify(s *state.Snapshot) map[*state.Pod]*class {
	classes := make(map[*state.Pod]*class, len(s.Pods))
	byKey := make(map[string]*class, len(c.byKey))
	for _, p := range s.Pods {
		if !takesPart(p) {
			continue
		}
		of, ok := c.classes[p]
		if !ok {
			of = classOf(p)
			if same, ok := c.byKey[of.key]; ok {
				of = same
			}
		}
		if same, ok := byKey[of.key]; ok {
			of = same
		}
		byKey[of.key], classes[p] = of, of
	}
	c.classes, c.byKey = classes, byKey
	return classes
}

// populate splits the addresses by the prefixes that active policies name, and finds the identity of each part.
//
// Only policies that select a local pod count: the others are enforced elsewhere, and each further region would split identities here.
func (w *compilation) populate() {
	named := map[netip.Prefix]struct{}{}
	nodes := map[string]labels.Selector{}
	for r := range w.activeRules() {
		for _, p := range r.peers {
			if p.nodes != nil {
				nodes[p.key] = p.nodes
			}
			if p.block.IsValid() {
				named[p.block] = struct{}{}
				for _, e := range p.except {
					named[e] = struct{}{}
				}
			}
		}
	}
	w.population = newPopulation(w.snapshot.Namespaces)
	w.prefixes = make(map[netip.Prefix]*identity, len(named)+len(w.owners))
	for prefix := range named {
		w.prefixes[prefix] = w.population.add(nil, prefix)
	}
	regions := newPrefixes(named)
	for a, p := range w.owners {
		host := addr.HostPrefix(a)
		w.prefixes[host] = w.population.add(w.classes[p], regions.longest(host))
	}
	for a, selected := range selectNodes(w.snapshot.Nodes, nodes) {
		host := addr.HostPrefix(a)
		w.prefixes[host] = w.population.addNodes(selected, regions.longest(host))
	}
	w.primary = make(map[state.Key]*identity, len(w.assigned))
	for p, of := range w.classes {
		if p.Local {
			w.primary[p.Key] = w.primaryOf(p, of)
		}
	}
}

// activeRules are the rules that may decide about a local pod.
func (w *compilation) activeRules() iter.Seq[*rule] {
	return func(yield func(*rule) bool) {
		for o, directions := range w.active {
			for d, on := range directions {
				if on && !yieldAll(o.rules[d], yield) {
					return
				}
			}
		}
	}
}

func yieldAll(rules []*rule, yield func(*rule) bool) bool {
	for _, r := range rules {
		if !yield(r) {
			return false
		}
	}
	return true
}

// primaryOf is the identity of the pod's first address, or of its class outside every region if it owns no address yet.
func (w *compilation) primaryOf(p *state.Pod, of *class) *identity {
	for _, a := range p.IPs {
		a = canonical(a)
		if w.owners[a] == p {
			return w.prefixes[addr.HostPrefix(a)]
		}
	}
	return w.population.add(of, netip.Prefix{})
}

func (w *compilation) identityNames() map[string]struct{} {
	names := make(map[string]struct{}, len(w.population.identities))
	for _, id := range w.population.identities {
		names[id.key] = struct{}{}
	}
	return names
}

func (w *compilation) intentNames() map[string]struct{} {
	names := make(map[string]struct{}, len(w.intents))
	for hash := range w.intents {
		names[hash] = struct{}{}
	}
	return names
}

// ruleNames names every rule of the active policies, whether or not an entry will come from it, so that numbers do not depend on what
// other policies say.
func (w *compilation) ruleNames() map[string]struct{} {
	names := map[string]struct{}{}
	for name := range w.namedRules() {
		names[name] = struct{}{}
	}
	return names
}

// namedRules are the rules that entries may name, by name.
func (w *compilation) namedRules() iter.Seq2[string, Rule] {
	return func(yield func(string, Rule) bool) {
		for r := range w.activeRules() {
			if !yield(r.name, r.ref) {
				return
			}
		}
		for o, directions := range w.active {
			for d, on := range directions {
				if on && o.tier == networkTier && !yield(o.isolationName[d], o.isolation[d]) {
					return
				}
			}
		}
		for _, in := range w.intents {
			if r := defaultAllow(in.direction); in.tiered() && !yield(r.String(), r) {
				return
			}
		}
	}
}

func (w *compilation) writeIdentities() {
	for prefix, id := range w.prefixes {
		w.result.Identities[prefix] = id.number
	}
	all4 := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	if _, ok := w.prefixes[all4]; ok {
		return
	}
	for prefix := range w.prefixes {
		if prefix.Addr().Is6() && contains(prefix, mappedIPv4) {
			w.result.Identities[all4] = World
			return
		}
	}
}

func (w *compilation) writePods() {
	for key, intents := range w.assigned {
		a := Assignment{Identity: w.primary[key].number}
		for d, in := range intents {
			switch in {
			case nil:
			case nodeOnly:
				a.Policy[d] = PolicyNodeOnly
			default:
				a.Policy[d] = w.numbers.policies[in.hash]
			}
		}
		w.result.Pods[key] = a
	}
}

func (w *compilation) writeRules() {
	for name, r := range w.namedRules() {
		w.result.Rules[w.numbers.rules[name]] = r
	}
}

// sortedIntents returns the intents in an order that depends on nothing but their content.
func (w *compilation) sortedIntents() []*intent {
	return slices.SortedFunc(maps.Values(w.intents), func(a, b *intent) int { return cmp.Compare(a.hash, b.hash) })
}
