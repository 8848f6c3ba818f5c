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
	pods      int // in the snapshot
}

// identity is what has an identity number: a class or nodes inside a region, or the rest of a region.
type identity struct {
	identityKey
	key    string
	number uint32
	users  int // prefixes, and local pods without address
}

// identityKey tells identities apart.
type identityKey struct {
	class  *class       // nil: no pod
	nodes  string       // the keys of the peers that select the nodes
	region netip.Prefix // longest prefix named by a policy that holds the addresses; zero value: none
}

// population is every identity in use, with the indexes that matching needs.
type population struct {
	identities  map[identityKey]*identity
	byKey       map[string]*identity
	byRegion    map[netip.Prefix]identities
	byNodes     map[string]identities // by the key of the peer that selects them
	byNamespace map[string]identities
	pods        identities
}

// identities is a set of them.
type identities map[*identity]struct{}

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

func newPopulation() *population {
	return &population{
		identities:  map[identityKey]*identity{},
		byKey:       map[string]*identity{},
		byRegion:    map[netip.Prefix]identities{},
		byNodes:     map[string]identities{},
		byNamespace: map[string]identities{},
		pods:        identities{},
	}
}

// identity returns the identity of a key, which it makes if it is new. Nodes that no policy tells apart share one, so that entries do not
// grow with their number.
func (p *population) identity(k identityKey) (id *identity, fresh bool) {
	if id, ok := p.identities[k]; ok {
		return id, false
	}
	id = &identity{identityKey: k}
	switch {
	case k.class != nil:
		id.key = k.class.key
	case k.nodes != "":
		id.key = k.nodes
	default:
		id.key = "cidr " + k.region.String()
	}
	if k.region.IsValid() && (k.class != nil || k.nodes != "") {
		id.key += " in " + k.region.String()
	}
	p.identities[k], p.byKey[id.key] = id, id
	p.index(id, insert)
	return id, true
}

// drop forgets an identity.
func (p *population) drop(id *identity) {
	delete(p.identities, id.identityKey)
	delete(p.byKey, id.key)
	p.index(id, remove)
}

// index brings an identity into the indexes, or takes it out.
func (p *population) index(id *identity, change func(identities, *identity) identities) {
	if id.region.IsValid() {
		keep(p.byRegion, id.region, change(p.byRegion[id.region], id))
	}
	if id.nodes != "" {
		for _, key := range splitKeys(id.nodes) {
			keep(p.byNodes, key, change(p.byNodes[key], id))
		}
	}
	if id.class != nil {
		keep(p.byNamespace, id.class.namespace, change(p.byNamespace[id.class.namespace], id))
		p.pods = change(p.pods, id)
	}
}

func insert(set identities, id *identity) identities {
	if set == nil {
		set = identities{}
	}
	set[id] = struct{}{}
	return set
}

func remove(set identities, id *identity) identities {
	delete(set, id)
	return set
}

func keep[K comparable](index map[K]identities, k K, set identities) {
	if len(set) == 0 {
		delete(index, k)
	} else {
		index[k] = set
	}
}

// joinKeys makes one string of the keys of peers, splitKeys takes it apart.
func joinKeys(keys []string) string    { return strings.Join(keys, keySeparator) }
func splitKeys(joined string) []string { return strings.Split(joined, keySeparator) }

const keySeparator = " | "

// contains reports whether every address of inner is in outer.
func contains(outer, inner netip.Prefix) bool {
	return outer.Bits() <= inner.Bits() && outer.Contains(inner.Addr())
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
