// SPDX-License-Identifier: Apache-2.0

package node

import (
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/pkg/state"
)

// cluster has the nodes of these names, and no more about them.
func cluster(names ...string) Input {
	s := state.NewSnapshot()
	for _, n := range names {
		s.Nodes[n] = &state.Node{Name: n}
	}
	return Input{Snapshot: s}
}

func numbersOf(r *Result) map[string]uint16 {
	out := map[string]uint16{}
	for i, n := range r.Names {
		out[n] = i
	}
	return out
}

func TestNumbersStay(t *testing.T) {
	c := NewCompiler("self", VXLAN, nil, nil)
	c.Compile(cluster("self", "a", "b"))
	c.Compile(cluster("self", "b"))
	want := map[string]uint16{"b": 2, "c": 3, "a": 4}
	for name, numbers := range map[string]Numbers{"same compiler": c.Export(), "after a restart": c.Export()} {
		t.Run(name, func(t *testing.T) {
			again := NewCompiler("self", VXLAN, nil, nil)
			if err := again.Import(numbers); err != nil {
				t.Fatal(err)
			}
			again.Compile(cluster("self", "b", "c"))
			if diff := cmp.Diff(want, numbersOf(again.Compile(cluster("self", "a", "b", "c")))); diff != "" {
				t.Errorf("numbers (-want +got):\n%s", diff)
			}
		})
	}
}

func TestNumbersOfAnIncompleteSnapshotStay(t *testing.T) {
	c := NewCompiler("self", VXLAN, nil, nil)
	c.Compile(cluster("self", "a", "b"))
	held := cluster("self", "b")
	held.Hold = true
	c.Compile(held)
	if diff := cmp.Diff(map[string]uint16{"a": 1, "b": 2}, numbersOf(c.Compile(cluster("self", "a", "b")))); diff != "" {
		t.Errorf("numbers (-want +got):\n%s", diff)
	}
}

func TestNumbersAreReusedLate(t *testing.T) {
	c := NewCompiler("self", VXLAN, nil, nil)
	c.MaxIndex = 1000
	last := uint16(0)
	for i := range 2 * quarantine {
		last = numbersOf(c.Compile(cluster("self", fmt.Sprint("n", i))))[fmt.Sprint("n", i)]
		if i <= quarantine && int(last) != i+1 {
			t.Fatalf("node %d has number %d, want a new one", i, last)
		}
	}
	if last > quarantine+2 {
		t.Errorf("the last of %d nodes has number %d, want one used before", 2*quarantine, last)
	}
}

func TestNumbersRunOut(t *testing.T) {
	c := NewCompiler("self", VXLAN, nil, nil)
	c.MaxIndex = 2
	r := c.Compile(cluster("self", "a", "b", "c"))
	if diff := cmp.Diff(map[string]uint16{"a": 1, "b": 2}, numbersOf(r)); diff != "" {
		t.Errorf("numbers (-want +got):\n%s", diff)
	}
	found := false
	for _, p := range r.Problems {
		found = found || p.Node == "c" && p.Message == "there is no number left for it; raise the size of the map nodes"
	}
	if !found {
		t.Errorf("problems = %v, want one about c", r.Problems)
	}
	// What the maps still name is nobody's yet.
	next := cluster("self", "b", "c")
	next.InUse = map[uint16]bool{1: true, 2: true}
	if got := numbersOf(c.Compile(next)); got["c"] != 0 {
		t.Errorf("numbers = %v, want none for c: the maps name 1", got)
	}
	next.InUse = map[uint16]bool{2: true}
	if got := numbersOf(c.Compile(next)); got["c"] != 1 {
		t.Errorf("numbers = %v, want 1 for c", got)
	}
}

func TestImportRefusesContradictions(t *testing.T) {
	for name, n := range map[string]Numbers{
		"another version":  {Version: 2, Next: 1},
		"no next":          {Version: 1},
		"never handed out": {Version: 1, Next: 2, Nodes: map[string]uint16{"a": 2}},
		"zero":             {Version: 1, Next: 2, Nodes: map[string]uint16{"a": 0}},
		"twice":            {Version: 1, Next: 3, Nodes: map[string]uint16{"a": 1, "b": 1}},
		"used and free":    {Version: 1, Next: 3, Released: []uint16{1}, Nodes: map[string]uint16{"a": 1}},
		"too large":        {Version: 1, Next: MaxIndex + 2},
	} {
		t.Run(name, func(t *testing.T) {
			c := NewCompiler("self", VXLAN, nil, nil)
			if err := c.Import(n); err == nil {
				t.Errorf("Import(%+v) = nil, want an error", n)
			}
			if got := numbersOf(c.Compile(cluster("a"))); got["a"] != 1 {
				t.Errorf("numbers after a refused import = %v, want those of a fresh compiler", got)
			}
		})
	}
	if err := NewCompiler("self", VXLAN, nil, nil).Import(Numbers{}); err != nil {
		t.Errorf("Import of nothing = %v, want nil: an older file has no node numbers", err)
	}
}

func TestParseMode(t *testing.T) {
	for _, m := range []Mode{VXLAN, Direct, Auto} {
		if got, err := ParseMode(string(m)); got != m || err != nil {
			t.Errorf("ParseMode(%q) = %q, %v", m, got, err)
		}
	}
	if _, err := ParseMode("bgp"); err == nil {
		t.Errorf("ParseMode(bgp) = nil error, want one")
	}
}
