// SPDX-License-Identifier: Apache-2.0

package node

import (
	"fmt"
	"maps"
	"slices"
)

// quarantine is how many numbers are released before the oldest of them is used again. A flow that was routed to a node that is gone names
// it until its next packet, and a packet under way has read the number already: neither may find another node behind it.
const quarantine = 256

// numbersVersion is the layout of Numbers.
const numbersVersion = 1

// Numbers is what a compiler remembers between compilations, in a form to be written to a file. With it, a restarted agent gives the same
// nodes the same numbers.
type Numbers struct {
	Version int `json:"version"`
	// Next is the smallest number that was never used, Released those given back, oldest first.
	Next     uint32            `json:"next"`
	Released []uint16          `json:"released,omitempty"`
	Nodes    map[string]uint16 `json:"nodes,omitempty"`
}

// Export returns what the compiler remembers. It belongs to the last Result: write it before that is in the maps.
func (c *Compiler) Export() Numbers {
	return Numbers{Version: numbersVersion, Next: c.next, Released: slices.Clone(c.released), Nodes: maps.Clone(c.numbers)}
}

// Uses grows with every number that is given or taken back: while it stays, so does Export.
func (c *Compiler) Uses() uint64 {
	return c.uses
}

// Import replaces what the compiler remembers by n, before its first compilation; the zero Numbers, of a file from before there were any,
// remember nothing. It changes nothing when n contradicts itself.
func (c *Compiler) Import(n Numbers) error {
	if n.Version == 0 && n.Next == 0 && len(n.Nodes) == 0 {
		n = Numbers{Version: numbersVersion, Next: 1}
	}
	if n.Version != numbersVersion {
		return fmt.Errorf("import node numbers: version is %d, want %d", n.Version, numbersVersion)
	}
	if n.Next == 0 || n.Next > MaxIndex+1 {
		return fmt.Errorf("import node numbers: next is %d, want 1 to %d", n.Next, MaxIndex+1)
	}
	used := map[uint16]string{}
	use := func(number uint16, name string) error {
		if number == 0 || uint32(number) >= n.Next {
			return fmt.Errorf("import node numbers: %d of %s was never handed out", number, name)
		}
		if other, twice := used[number]; twice {
			return fmt.Errorf("import node numbers: %d is that of %s and of %s", number, other, name)
		}
		used[number] = name
		return nil
	}
	for _, number := range n.Released {
		if err := use(number, "no node"); err != nil {
			return err
		}
	}
	for name, number := range n.Nodes {
		if err := use(number, name); err != nil {
			return err
		}
	}
	c.next, c.released, c.numbers, c.last = n.Next, slices.Clone(n.Released), maps.Clone(n.Nodes), nil
	c.uses++
	if c.numbers == nil {
		c.numbers = map[string]uint16{}
	}
	return nil
}

// number gives the nodes of names, which are sorted, their numbers, new ones where they have none, and takes back those of nodes that are
// gone. It returns the names for which there was none left.
func (c *Compiler) number(names []string, in Input) (left []string) {
	if !in.Hold {
		var gone []uint16
		for name, number := range c.numbers {
			if _, there := slices.BinarySearch(names, name); !there {
				gone = append(gone, number)
				delete(c.numbers, name)
			}
		}
		slices.Sort(gone)
		c.uses += uint64(len(gone))
		c.released = append(c.released, gone...)
	}
	for _, name := range names {
		if _, known := c.numbers[name]; known {
			continue
		}
		c.uses++ // also where take finds none: it may have put some aside
		number, ok := c.take(in.InUse)
		if !ok {
			left = append(left, name)
			continue
		}
		c.numbers[name] = number
	}
	return left
}

// take returns a number that no map names: the one released first, once enough have been released after it, else a new one, and when
// there are no new ones any that was released.
func (c *Compiler) take(inUse map[uint16]bool) (uint16, bool) {
	fresh := c.next <= uint32(c.MaxIndex)
	if len(c.released) > quarantine || !fresh {
		for i, number := range c.released {
			if fresh && len(c.released)-i <= quarantine {
				break
			}
			if !inUse[number] && number <= c.MaxIndex {
				c.released = slices.Delete(c.released, i, i+1)
				return number, true
			}
		}
	}
	for c.next <= uint32(c.MaxIndex) {
		number := uint16(c.next)
		c.next++
		if !inUse[number] {
			return number, true
		}
		c.released = append(c.released, number) // somebody else's leftover; it comes free like any other
	}
	return 0, false
}
