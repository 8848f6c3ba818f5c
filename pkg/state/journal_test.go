// SPDX-License-Identifier: Apache-2.0

package state

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// On random histories a journal names exactly what was noted since an earlier one, or admits that it does not know: of what is too long ago,
// of another log, and of everything after Forget.
func TestJournalSince(t *testing.T) {
	for seed := range uint64(30) {
		r := rand.New(rand.NewPCG(seed, 2))
		type point struct {
			journal Journal[int]
			noted   int
		}
		var (
			log     Log[int]
			history []int
			points  = []point{{log.Journal(), 0}}
			known   int // index of the first point that log has anything to do with
		)
		for i := range 8 * remembered {
			history = append(history, r.IntN(50))
			log.Note(history[i])
			if r.IntN(50) == 0 {
				points = append(points, point{log.Journal(), len(history)})
			}
			if r.IntN(4*remembered) == 0 {
				log.Forget()
				known = len(points)
				points = append(points, point{log.Journal(), len(history)})
			}
		}
		now := log.Journal()
		for i, p := range points {
			got, ok := now.Since(p.journal)
			want := history[p.noted:]
			switch {
			case ok && (i < known || !slices.Equal(got, want)):
				t.Fatalf("seed %d: Since of point %d of %d = %v, want %v", seed, i, len(points), got, want)
			case !ok && i >= known && len(want) <= remembered:
				t.Fatalf("seed %d: Since of point %d of %d is not known, %d changes ago", seed, i, len(points), len(want))
			case now.Same(p.journal) != (ok && len(want) == 0):
				t.Fatalf("seed %d: Same of point %d = %v", seed, i, now.Same(p.journal))
			}
			if _, backwards := p.journal.Since(now); backwards && p.noted < len(history) {
				t.Fatalf("seed %d: an earlier journal knows what comes after it", seed)
			}
		}
	}
	var none Journal[int]
	var other Log[int]
	if _, ok := none.Since(none); ok {
		t.Error("the zero journal knows something")
	}
	if _, ok := other.Journal().Since((&Log[int]{}).Journal()); ok {
		t.Error("a journal knows of another log")
	}
}
