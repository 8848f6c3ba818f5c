// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"iter"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/margay-cni/margay/pkg/state"
)

// class is a set of pods that no selector and no port name tells apart: same namespace, same labels, same named ports.
type class struct {
	key       string
	namespace string
	labels    labels.Set
	ports     []state.ContainerPort // named ones, sorted
	portsKey  string
}

// identity is what has an identity number: a class or nodes inside a region, or the rest of a region.
type identity struct {
	class  *class       // nil: no pod
	region netip.Prefix // longest prefix named by a policy that holds the addresses; zero value: none
	key    string
	number uint32
}

// population is every identity in use in one compilation, with the indexes that matching needs.
type population struct {
	identities  map[identityKey]*identity
	byRegion    map[netip.Prefix][]*identity
	byNodes     map[string][]*identity // by the key of the peer that selects them
	byNamespace map[string][]*identity
	pods        []*identity
	namespaces  map[string]*state.Namespace
}

type identityKey struct {
	class  *class
	nodes  string // the keys of the peers that select the nodes
	region netip.Prefix
}

// takesPart reports whether a pod can be policy subject or pod peer. hostNetwork pods have the node's addresses (contract row N11),
// finished ones have none.
func takesPart(p *state.Pod) bool {
	return !p.HostNetwork && !p.Finished
}

// classOf makes the class of a pod.
func classOf(p *state.Pod) *class {
	c := &class{namespace: p.Namespace, labels: labels.Set(p.Labels)}
	for _, port := range p.Ports {
		if port.Name != "" && port.Port != 0 {
			c.ports = append(c.ports, port)
		}
	}
	slices.SortFunc(c.ports, func(a, b state.ContainerPort) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Port, b.Port))
	})
	c.ports = slices.Compact(c.ports)
	var ports []byte
	for _, port := range c.ports {
		ports = append(strconv.AppendQuote(append(ports, ' '), port.Name), '=')
		ports = strconv.AppendUint(append(strconv.AppendUint(ports, uint64(port.Protocol), 10), '/'), uint64(port.Port), 10)
	}
	c.portsKey = string(ports)

	names := make([]string, 0, len(p.Labels))
	for name := range p.Labels {
		names = append(names, name)
	}
	slices.Sort(names)
	key := append(strconv.AppendQuote([]byte("pod "), p.Namespace), " {"...)
	for _, name := range names {
		key = strconv.AppendQuote(append(strconv.AppendQuote(append(key, ' '), name), '='), p.Labels[name])
	}
	c.key = string(append(append(key, " } ports {"...), ports...)) + " }"
	return c
}

func newPopulation(namespaces map[string]*state.Namespace) *population {
	return &population{
		identities:  map[identityKey]*identity{},
		byRegion:    map[netip.Prefix][]*identity{},
		byNodes:     map[string][]*identity{},
		byNamespace: map[string][]*identity{},
		namespaces:  namespaces,
	}
}

// add returns the identity of a class in a region, which it makes if it is new.
func (p *population) add(c *class, region netip.Prefix) *identity {
	id, fresh := p.identity(identityKey{class: c, region: region})
	if !fresh {
		return id
	}
	switch {
	case c == nil:
		id.key = "cidr " + region.String()
	case region.IsValid():
		id.key = c.key + " in " + region.String()
	default:
		id.key = c.key
	}
	if c != nil {
		p.byNamespace[c.namespace] = append(p.byNamespace[c.namespace], id)
		p.pods = append(p.pods, id)
	}
	return id
}

// addNodes returns the identity of the nodes that the same peers select, in a region. Nodes that no policy tells apart share one, so that
// entries do not grow with their number.
func (p *population) addNodes(selected []string, region netip.Prefix) *identity {
	nodes := strings.Join(selected, " | ")
	id, fresh := p.identity(identityKey{nodes: nodes, region: region})
	if !fresh {
		return id
	}
	id.key = nodes
	if region.IsValid() {
		id.key += " in " + region.String()
	}
	for _, key := range selected {
		p.byNodes[key] = append(p.byNodes[key], id)
	}
	return id
}

func (p *population) identity(k identityKey) (id *identity, fresh bool) {
	if id, ok := p.identities[k]; ok {
		return id, false
	}
	id = &identity{class: k.class, region: k.region}
	p.identities[k] = id
	if k.region.IsValid() {
		p.byRegion[k.region] = append(p.byRegion[k.region], id)
	}
	return id, true
}

// match returns the identities that the peer matches.
func (p *population) match(of *peer) []*identity {
	if of.block.IsValid() {
		return p.matchBlock(of)
	}
	if of.nodes != nil {
		return p.byNodes[of.key]
	}
	if of.namespaces == nil {
		return selectPods(p.byNamespace[of.namespace], of.pods)
	}
	if of.namespaces.Empty() {
		return selectPods(p.pods, of.pods)
	}
	var out []*identity
	for name, ids := range p.byNamespace {
		// The labels of a namespace that the source has not seen are unknown: only the selector that asks nothing matches.
		if ns, ok := p.namespaces[name]; ok && of.namespaces.Matches(labels.Set(ns.Labels)) {
			out = append(out, selectPods(ids, of.pods)...)
		}
	}
	return out
}

// matchBlock matches whole regions. That is exact, because the block's own prefix and its exceptions are regions: the longest named
// prefix that holds an address is inside the block if and only if the address is.
func (p *population) matchBlock(of *peer) []*identity {
	var out []*identity
	for region, ids := range p.byRegion {
		if contains(of.block, region) && !slices.ContainsFunc(of.except, func(e netip.Prefix) bool { return contains(e, region) }) {
			out = append(out, ids...)
		}
	}
	return out
}

func selectPods(ids []*identity, s labels.Selector) []*identity {
	if s.Empty() {
		return ids
	}
	var out []*identity
	for _, id := range ids {
		if s.Matches(id.class.labels) {
			out = append(out, id)
		}
	}
	return out
}

// contains reports whether every address of inner is in outer.
func contains(outer, inner netip.Prefix) bool {
	return outer.Bits() <= inner.Bits() && outer.Contains(inner.Addr())
}

// owners returns the pod that each address belongs to. Addresses of nodes belong to no pod. Where two pods claim one address, as when a
// pod is replaced, it is that of the pod that is not terminating, then of the first by name.
func owners(s *state.Snapshot) map[netip.Addr]*state.Pod {
	nodes := map[netip.Addr]struct{}{}
	for _, n := range s.Nodes {
		for a := range nodeAddresses(n) {
			nodes[a] = struct{}{}
		}
	}
	for _, p := range s.Pods {
		if p.HostNetwork && !p.Finished {
			for _, a := range p.IPs {
				nodes[canonical(a)] = struct{}{}
			}
		}
	}
	out := make(map[netip.Addr]*state.Pod, len(s.Pods))
	for _, p := range s.Pods {
		if !takesPart(p) {
			continue
		}
		for _, a := range p.IPs {
			a = canonical(a)
			if _, ok := nodes[a]; ok || !a.IsValid() {
				continue
			}
			if other, ok := out[a]; !ok || before(p, other) {
				out[a] = p
			}
		}
	}
	return out
}

// nodeAddresses are all addresses of a node.
func nodeAddresses(n *state.Node) iter.Seq[netip.Addr] {
	return func(yield func(netip.Addr) bool) {
		for _, list := range [][]netip.Addr{n.Addresses, n.AllAddresses} {
			for _, a := range list {
				if a.IsValid() && !yield(canonical(a)) {
					return
				}
			}
		}
	}
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

func before(a, b *state.Pod) bool {
	if a.Terminating != b.Terminating {
		return b.Terminating
	}
	return compareKeys(a.Key, b.Key) < 0
}

// canonical is the form of an address that prefixes and maps use.
func canonical(a netip.Addr) netip.Addr {
	return a.Unmap().WithZone("")
}
