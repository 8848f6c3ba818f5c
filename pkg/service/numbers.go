// SPDX-License-Identifier: Apache-2.0

package service

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/margay-cni/margay/pkg/state"
)

// quarantine is how many numbers are released before the oldest of them is used again. A packet that read a service entry just before
// it changed must not find another service's backends behind the number it holds.
const quarantine = 1024

// allocator hands out numbers from 1 to max: new ones first, then released ones, the one released first, first.
type allocator struct {
	next, max uint32
	released  []uint32
	// uses counts what it gave and took back.
	uses uint64
}

// take returns a number, or false when all are in use.
func (a *allocator) take() (uint32, bool) {
	fresh := a.next <= a.max && a.next != 0
	a.uses++
	if len(a.released) > quarantine || (!fresh && len(a.released) > 0) {
		n := a.released[0]
		a.released = a.released[1:]
		return n, true
	}
	if !fresh {
		return 0, false
	}
	n := a.next
	a.next++ // Wraps to 0 after the last uint32, which reads as used up.
	return n, true
}

func (a *allocator) release(n uint32) {
	a.uses++
	a.released = append(a.released, n)
}

// Uses grows with every number that is given or taken back: while it stays, Export differs in nothing but the order of slots.
func (c *Compiler) Uses() uint64 {
	return c.ids.uses + c.lists.uses
}

// Moves grows when the order of slots changes: while it and Uses stay, so does Export.
func (c *Compiler) Moves() uint64 {
	return c.moves
}

// portKey identifies one port of a service in one family (rows I4, I5).
type portKey struct {
	service  state.Key
	port     string
	protocol state.Protocol
	ipv6     bool
}

func (k portKey) compare(o portKey) int {
	family := func(ipv6 bool) int {
		if ipv6 {
			return 1
		}
		return 0
	}
	return cmp.Or(
		cmp.Compare(k.service.Namespace, o.service.Namespace),
		cmp.Compare(k.service.Name, o.service.Name),
		cmp.Compare(k.port, o.port),
		cmp.Compare(k.protocol, o.protocol),
		cmp.Compare(family(k.ipv6), family(o.ipv6)),
	)
}

// list is a numbered list of backends in slot order.
type list struct {
	number uint32
	slots  []netip.AddrPort
	// table is computed from slots where the service asks for one; not remembered across a restart, because it follows from them.
	table Table
}

// port is what the compiler remembers of a service port. A list whose number is 0 is not in use.
type port struct {
	id             uint32
	cluster, local list
}

// numbersVersion is the layout of Numbers.
const numbersVersion = 1

// Numbers is what a compiler remembers between compilations, in a form to be written to a file. With it, a restarted agent
// compiles the same snapshot into the same numbers and slots.
type Numbers struct {
	Version  int           `json:"version"`
	Services NumberRange   `json:"services"`
	Lists    NumberRange   `json:"lists"`
	Ports    []PortNumbers `json:"ports"`
}

// NumberRange is the state of an allocator: the next number never used, and those released, oldest first.
type NumberRange struct {
	Next     uint32   `json:"next"`
	Released []uint32 `json:"released,omitempty"`
}

// PortNumbers are the numbers of one service port in one address family.
type PortNumbers struct {
	Namespace    string           `json:"namespace"`
	Name         string           `json:"name"`
	Port         string           `json:"port,omitempty"`
	Protocol     state.Protocol   `json:"protocol"`
	IPv6         bool             `json:"ipv6,omitempty"`
	ID           uint32           `json:"id"`
	Cluster      uint32           `json:"cluster,omitempty"`
	Local        uint32           `json:"local,omitempty"`
	ClusterSlots []netip.AddrPort `json:"clusterSlots,omitempty"`
	LocalSlots   []netip.AddrPort `json:"localSlots,omitempty"`
}

// Export returns what the compiler remembers. It belongs to the last Result: write it once that is in the maps.
func (c *Compiler) Export() Numbers {
	out := Numbers{
		Version:  numbersVersion,
		Services: NumberRange{Next: c.ids.next, Released: slices.Clone(c.ids.released)},
		Lists:    NumberRange{Next: c.lists.next, Released: slices.Clone(c.lists.released)},
		Ports:    make([]PortNumbers, 0, len(c.ports)),
	}
	for _, key := range slices.SortedFunc(maps.Keys(c.ports), portKey.compare) {
		p := c.ports[key]
		out.Ports = append(out.Ports, PortNumbers{
			Namespace: key.service.Namespace, Name: key.service.Name, Port: key.port, Protocol: key.protocol, IPv6: key.ipv6,
			ID: p.id, Cluster: p.cluster.number, Local: p.local.number, ClusterSlots: p.cluster.slots, LocalSlots: p.local.slots,
		})
	}
	return out
}

// Import replaces what the compiler remembers by n, before its first compilation. It changes nothing when n contradicts itself.
func (c *Compiler) Import(n Numbers) error {
	if n.Version != numbersVersion {
		return fmt.Errorf("import service numbers: version is %d, want %d", n.Version, numbersVersion)
	}
	ids, err := newChecker("service id", n.Services, MaxServiceID)
	if err != nil {
		return fmt.Errorf("import service numbers: %w", err)
	}
	lists, err := newChecker("list", n.Lists, MaxList)
	if err != nil {
		return fmt.Errorf("import service numbers: %w", err)
	}
	ports := make(map[portKey]*port, len(n.Ports))
	for _, p := range n.Ports {
		key := portKey{service: state.Key{Namespace: p.Namespace, Name: p.Name}, port: p.Port, protocol: p.Protocol, ipv6: p.IPv6}
		if ports[key] != nil {
			return fmt.Errorf("import service numbers: port %q of %s is there twice", p.Port, key.service)
		}
		if err := cmp.Or(ids.use(p.ID), lists.useOptional(p.Cluster), lists.useOptional(p.Local)); err != nil {
			return fmt.Errorf("import service numbers: port %q of %s: %w", p.Port, key.service, err)
		}
		ports[key] = &port{
			id:      p.ID,
			cluster: list{number: p.Cluster, slots: slices.Clone(p.ClusterSlots)},
			local:   list{number: p.Local, slots: slices.Clone(p.LocalSlots)},
		}
	}
	c.ports, c.ids, c.lists, c.last = ports, ids.allocator, lists.allocator, nil
	return nil
}

// checker proves that no number is used twice.
type checker struct {
	what      string
	allocator allocator
	used      map[uint32]bool
}

func newChecker(what string, r NumberRange, limit uint32) (*checker, error) {
	c := &checker{what: what, used: map[uint32]bool{}, allocator: allocator{next: r.Next, max: limit, released: slices.Clone(r.Released)}}
	if r.Next > 0 && r.Next-1 > limit {
		return nil, fmt.Errorf("next %s is %d, above %d", what, r.Next, limit)
	}
	for _, n := range r.Released {
		if err := c.use(n); err != nil {
			return nil, err
		}
	}
	return c, nil
}

func (c *checker) use(n uint32) error {
	if n == 0 || (c.allocator.next != 0 && n >= c.allocator.next) {
		return fmt.Errorf("%s %d was never handed out", c.what, n)
	}
	if c.used[n] {
		return fmt.Errorf("%s %d is there twice", c.what, n)
	}
	c.used[n] = true
	return nil
}

// useOptional is use for a number that may be missing.
func (c *checker) useOptional(n uint32) error {
	if n == 0 {
		return nil
	}
	return c.use(n)
}
