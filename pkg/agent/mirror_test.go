// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"log/slog"
	"maps"
	"math/rand/v2"
	"testing"
)

// listed is a table that somebody else changes. It may show entries more than once, and says so.
type listed struct {
	entries map[int]int
	again   bool
}

func (l *listed) Each(see func(k, v int)) (once bool, err error) {
	for k, v := range l.entries {
		see(k, v)
		if l.again {
			see(k, v)
		}
	}
	return !l.again, nil
}

func (l *listed) Put(k, v int) error        { l.entries[k] = v; return nil }
func (l *listed) Replace(k, _, v int) error { return l.Put(k, v) }
func (l *listed) Delete(k, _ int) error     { delete(l.entries, k); return nil }

// Whatever others did to a map: after a load the mirror knows its content, theirs and ours apart, and compares all of it.
func TestMirrorLoads(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 7))
	table := &listed{entries: map[int]int{}}
	m := newMirror[int, int]("numbers", table, slog.New(slog.DiscardHandler))
	odd := func(_, v int) bool { return v%2 == 1 }
	m.pods = odd
	kept, compared := 0, 0
	for step := range 500 {
		for range r.IntN(3) {
			k := r.IntN(5)
			if r.IntN(3) == 0 {
				delete(table.entries, k)
			} else {
				table.entries[k] = r.IntN(4)
			}
		}
		table.again = r.IntN(4) == 0
		ours, theirs := map[int]int{}, map[int]int{}
		for k, v := range table.entries {
			if odd(k, v) {
				theirs[k] = v
			} else {
				ours[k] = v
			}
		}
		known := m.have != nil && maps.Equal(ours, m.have) && maps.Equal(theirs, m.others)
		if known {
			kept++
		}
		if err := m.load(); err != nil {
			t.Fatal(err)
		}
		if !maps.Equal(ours, m.have) || !maps.Equal(theirs, m.others) {
			t.Fatalf("step %d: %v and %v, want %v and %v", step, m.have, m.others, ours, theirs)
		}
		if m.differ != nil && !known {
			t.Fatalf("step %d: the content is another one, and not compared", step)
		}
		if known && m.differ == nil {
			compared++
		}
		m.differ = map[int]struct{}{}
	}
	if kept == 0 || compared == 0 {
		t.Errorf("%d loads found what was known, after %d of them it was compared all the same; want some of both", kept, compared)
	}
}
