// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"

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

// identity is what has an identity number: a class inside a region, or a region outside every pod.
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
	byNamespace map[string][]*identity
	pods        []*identity
	namespaces  map[string]*state.Namespace
}

type identityKey struct {
	class  *class
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
		byNamespace: map[string][]*identity{},
		namespaces:  namespaces,
	}
}

// add returns the identity of a class in a region, which it makes if it is new.
func (p *population) add(c *class, region netip.Prefix) *identity {
	k := identityKey{c, region}
	id, ok := p.identities[k]
	if ok {
		return id
	}
	id = &identity{class: c, region: region}
	switch {
	case c == nil:
		id.key = "cidr " + region.String()
	case region.IsValid():
		id.key = c.key + " in " + region.String()
	default:
		id.key = c.key
	}
	p.identities[k] = id
	if region.IsValid() {
		p.byRegion[region] = append(p.byRegion[region], id)
	}
	if c != nil {
		p.byNamespace[c.namespace] = append(p.byNamespace[c.namespace], id)
		p.pods = append(p.pods, id)
	}
	return id
}

// match returns the identities that the peer matches.
func (p *population) match(of *peer) []*identity {
	if of.block.IsValid() {
		return p.matchBlock(of)
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
		for _, a := range n.Addresses {
			nodes[canonical(a)] = struct{}{}
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
