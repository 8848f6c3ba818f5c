// SPDX-License-Identifier: Apache-2.0

package state

import (
	"maps"
	"slices"
	"sync"
)

// Interner lets objects share what many of them have in common: the labels of a deployment's pods, the names of nodes, namespaces and ports.
// Objects come from a source one by one, each with copies of its own. Its zero value is ready, and safe for concurrent use.
type Interner struct {
	mu      sync.Mutex
	strings shelf[string]
	labels  shelf[map[string]string]
	ports   shelf[[]ContainerPort]
	slices  shelf[[]SlicePort]
	// key is the room in which keys are made.
	key []byte
}

// shelfRoom is how many values are remembered. Clusters have fewer label sets, nodes and ports than that; where there are more, the shelf is
// emptied and what comes then is shared anew. So what nobody has any more does not stay for good.
const shelfRoom = 16384

// shelf has one value of each kind, by a text that tells values apart.
type shelf[T any] struct {
	values map[string]T
}

// share returns the value that was first shared under the key.
func (s *shelf[T]) share(key []byte, v T) T {
	if known, ok := s.values[string(key)]; ok {
		return known
	}
	if s.values == nil || len(s.values) >= shelfRoom {
		s.values = map[string]T{}
	}
	s.values[string(key)] = v
	return v
}

// Pod makes p, which nobody else has yet, share what it can with the pods before it.
func (i *Interner) Pod(p *Pod) *Pod {
	if p == nil {
		return nil
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	p.Namespace, p.Node = i.text(p.Namespace), i.text(p.Node)
	p.Labels = i.labelSet(p.Labels)
	if len(p.Ports) > 0 {
		i.key = i.key[:0]
		for _, port := range p.Ports {
			i.portKey(port.Name, port.Protocol, port.Port)
		}
		p.Ports = i.ports.share(i.key, slices.Clip(p.Ports))
	}
	return p
}

// EndpointSlice is as Pod.
func (i *Interner) EndpointSlice(s *EndpointSlice) *EndpointSlice {
	if s == nil {
		return nil
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	s.Namespace = i.text(s.Namespace)
	s.Service.Namespace = s.Namespace
	for e := range s.Endpoints {
		s.Endpoints[e].Node, s.Endpoints[e].Zone = i.text(s.Endpoints[e].Node), i.text(s.Endpoints[e].Zone)
	}
	if len(s.Ports) > 0 {
		i.key = i.key[:0]
		for _, port := range s.Ports {
			i.portKey(port.Name, port.Protocol, port.Port)
		}
		s.Ports = i.slices.share(i.key, slices.Clip(s.Ports))
	}
	return s
}

// text shares a string.
func (i *Interner) text(s string) string {
	if s == "" {
		return ""
	}
	i.key = append(i.key[:0], s...)
	return i.strings.share(i.key, s)
}

// labelSet shares a set of labels. Neither keys nor values have zero bytes.
func (i *Interner) labelSet(labels map[string]string) map[string]string {
	if len(labels) == 0 {
		return labels
	}
	i.key = i.key[:0]
	for _, name := range slices.Sorted(maps.Keys(labels)) {
		i.key = append(append(append(append(i.key, name...), 0), labels[name]...), 0)
	}
	return i.labels.share(i.key, labels)
}

func (i *Interner) portKey(name string, protocol Protocol, port uint16) {
	i.key = append(append(i.key, name...), 0, byte(protocol), byte(port>>8), byte(port))
}
