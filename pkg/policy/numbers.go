// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
)

// ErrExhausted is wrapped by Compile's error when a number space has no number left.
var ErrExhausted = errors.New("number space exhausted")

// quarantine is how many successful compilations in a row must have lacked a policy id before the id is used again. By then nobody still
// holds the number from an earlier Result.
const quarantine = 16

// numbersVersion is the layout of Numbers, and the form of the names in it.
const numbersVersion = 1

// Numbers are the compiler's number spaces in a form that survives a restart as JSON.
type Numbers struct {
	Version int `json:"version"`
	// Compilations that have succeeded so far: the clock of the quarantine.
	Compilations uint64 `json:"compilations"`
	Identities   Space  `json:"identities"`
	Policies     Space  `json:"policies"`
	Rules        Space  `json:"rules"`
}

// Space is one number space.
type Space struct {
	// Assigned maps the canonical name of what has a number to the number.
	Assigned map[string]uint32 `json:"assigned,omitempty"`
	// Next is the lowest number that was never used; 0 means the first of the space.
	Next uint32 `json:"next"`
	// Freed numbers wait here for their reuse, oldest first. Only policy ids are used again.
	Freed []Freed `json:"freed,omitempty"`
}

// Freed is a number that went out of use.
type Freed struct {
	Number uint32 `json:"number"`
	// Since counts the compilations up to the first one that lacked it.
	Since uint64 `json:"since"`
}

// space hands out numbers. Identities and rules are never used again: 2^32 of them outlast a node, and a number that means two things at
// different times would be misread in the moment between two writes to the kernel. Policy ids are few (MaxPolicy), so
// they are used again, oldest first, but only when no fresh one is left and after the quarantine.
type space struct {
	name        string
	first, last uint32
	reuse       bool
	Space
}

// allocation is what one compilation numbers, not yet in force.
type allocation struct {
	assigned map[string]uint32 // new ones
	next     uint32
	taken    int // of Freed
}

func newSpace(name string, first, last uint32, reuse bool) *space {
	return &space{name: name, first: first, last: last, reuse: reuse, Space: Space{Assigned: map[string]uint32{}, Next: first}}
}

// plan numbers those of the names that have no number yet, in the order of the names. It changes nothing.
func (s *space) plan(names map[string]struct{}, now uint64) (*allocation, error) {
	var missing []string
	for name := range names {
		if _, ok := s.Assigned[name]; !ok {
			missing = append(missing, name)
		}
	}
	a := &allocation{assigned: make(map[string]uint32, len(missing)), next: s.Next}
	slices.Sort(missing)
	for i, name := range missing {
		switch {
		case a.next <= s.last:
			a.assigned[name] = a.next
			a.next++
		case a.taken < len(s.Freed) && now+1 >= s.Freed[a.taken].Since+quarantine:
			a.assigned[name] = s.Freed[a.taken].Number
			a.taken++
		default:
			return nil, fmt.Errorf("%d more %s than there are from %d to %d: %w", len(missing)-i, s.name, s.first, s.last, ErrExhausted)
		}
	}
	return a, nil
}

// commit puts a plan in force, and frees the numbers of the names that are gone.
func (s *space) commit(a *allocation, gone []string, now uint64) {
	var freed []uint32
	for _, name := range gone {
		if n, ok := s.Assigned[name]; ok {
			freed = append(freed, n)
			delete(s.Assigned, name)
		}
	}
	if s.reuse {
		slices.Sort(freed)
		s.Freed = slices.Clone(s.Freed[a.taken:])
		for _, n := range freed {
			s.Freed = append(s.Freed, Freed{Number: n, Since: now})
		}
	}
	maps.Copy(s.Assigned, a.assigned)
	s.Next = a.next
}

// without returns the names that have a number and are not in use.
func (s *space) without(inUse func(string) bool) (gone []string) {
	for name := range s.Assigned {
		if !inUse(name) {
			gone = append(gone, name)
		}
	}
	return gone
}

func (s *space) export() Space {
	return Space{Assigned: maps.Clone(s.Assigned), Next: s.Next, Freed: slices.Clone(s.Freed)}
}

// restore checks in and returns the space that continues it.
func (s *space) restore(in Space) (*space, error) {
	out := newSpace(s.name, s.first, s.last, s.reuse)
	if in.Next != 0 {
		out.Next = in.Next
	}
	if out.Next < s.first || out.Next > s.last+1 {
		return nil, fmt.Errorf("%s: next number %d is outside %d to %d", s.name, in.Next, s.first, s.last+1)
	}
	seen := map[uint32]string{}
	check := func(n uint32, name string) error {
		if n < s.first || n >= out.Next {
			return fmt.Errorf("%s: number %d of %q is outside %d to %d", s.name, n, name, s.first, out.Next-1)
		}
		if other, ok := seen[n]; ok {
			return fmt.Errorf("%s: number %d belongs to both %q and %q", s.name, n, min(name, other), max(name, other))
		}
		seen[n] = name
		return nil
	}
	for name, n := range in.Assigned {
		if err := check(n, name); err != nil {
			return nil, err
		}
		out.Assigned[name] = n
	}
	for _, f := range in.Freed {
		if err := check(f.Number, "freed"); err != nil {
			return nil, err
		}
	}
	if s.reuse {
		out.Freed = slices.Clone(in.Freed)
		slices.SortStableFunc(out.Freed, func(a, b Freed) int { return cmp.Compare(a.Since, b.Since) })
	}
	return out, nil
}

// Export returns the numbers in force, for Import into a later Compiler.
func (c *Compiler) Export() Numbers {
	return Numbers{
		Version:      numbersVersion,
		Compilations: c.compilations,
		Identities:   c.identities.export(),
		Policies:     c.policies.export(),
		Rules:        c.rules.export(),
	}
}

// Import continues the numbers of an earlier Compiler, so that the same snapshot compiles to the same Result. Call it before the first
// Compile. Spaces without Assigned are valid: Next alone keeps clear of numbers that the kernel may still hold. On an error
// nothing is imported.
func (c *Compiler) Import(n Numbers) error {
	if n.Version != numbersVersion {
		return fmt.Errorf("import numbers: version %d, want %d", n.Version, numbersVersion)
	}
	identities, err1 := c.identities.restore(n.Identities)
	policies, err2 := c.policies.restore(n.Policies)
	rules, err3 := c.rules.restore(n.Rules)
	if err := errors.Join(err1, err2, err3); err != nil {
		return fmt.Errorf("import numbers: %w", err)
	}
	c.identities, c.policies, c.rules, c.compilations = identities, policies, rules, n.Compilations
	c.last = nil
	return nil
}
