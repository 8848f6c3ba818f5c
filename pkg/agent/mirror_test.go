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

func (l *listed) Each(see func(k, v int) bool) (once bool, err error) {
	for k, v := range l.entries {
		if !see(k, v) || (l.again && !see(k, v)) {
			return false, nil
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
		if err := m.load(nil); err != nil {
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

// A load of what is known gives way, soon; the next one reads it all.
func TestMirrorGivesWay(t *testing.T) {
	table := &listed{entries: map[int]int{}}
	for i := range 10 * urgentEvery {
		table.entries[i] = i
	}
	m := newMirror[int, int]("numbers", table, slog.New(slog.DiscardHandler))
	asked := 0
	urgent := func() bool { asked++; return true }
	if err := m.load(urgent); err != nil || asked > 0 {
		t.Fatalf("the first load = %v, want all of it at once", err)
	}
	table.entries[3] = 4
	delete(table.entries, 5)
	// It may meet the other entry before it asks.
	if err := m.load(urgent); err != errUrgent && !maps.Equal(m.have, table.entries) {
		t.Errorf("load() = %v, with other entries than the table's", err)
	}
	if err := m.load(nil); err != nil || !maps.Equal(m.have, table.entries) {
		t.Errorf("load() = %v, with the table's entries %v", err, maps.Equal(m.have, table.entries))
	}
	asked = 0
	if err := m.load(urgent); err != errUrgent || asked != 1 {
		t.Errorf("load() of what is known = %v after asking %d times, want %v after one", err, asked, errUrgent)
	}
	if m.failed > 0 {
		t.Error("giving way counts as a failure")
	}
}
