// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// fakeCollector answers what it is told to, look by look, and then that there is nothing.
type fakeCollector struct {
	answers []answer
	looks   []time.Time
	done    func()
}

type answer struct {
	removed  map[string]int
	suspects int
	err      error
}

func (c *fakeCollector) Collect(context.Context) (map[string]int, int, error) {
	n := len(c.looks)
	c.looks = append(c.looks, time.Now())
	if n == len(c.answers)-1 {
		c.done()
	}
	return c.answers[n].removed, c.answers[n].suspects, c.answers[n].err
}

func TestGarbageCollectionReports(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	c := &fakeCollector{answers: []answer{
		{nil, 2, nil}, {map[string]int{"record": 1, "lease": 1}, 1, errors.New("no")}, {map[string]int{"lease": 1}, 0, nil}, {nil, 0, nil},
	}, done: cancel}
	var reports []GarbageCollection
	counted, failures := map[string]int{}, 0
	g := &gc{collector: c, every: 50 * time.Millisecond, soon: time.Millisecond, log: slog.New(slog.DiscardHandler),
		report: func(r GarbageCollection) {
			r.Last, r.Took = time.Time{}, 0
			reports = append(reports, r)
		},
		count: func(removed map[string]int, failed bool) {
			for kind, n := range removed {
				counted[kind] += n
			}
			if failed {
				failures++
			}
		}}
	if err := g.run(ctx); err != nil {
		t.Errorf("run = %v, want nil", err)
	}
	want := []GarbageCollection{
		{Suspects: 2, Removed: map[string]int{}},
		{Suspects: 1, Removed: map[string]int{"record": 1, "lease": 1}, Error: "no"},
		{Removed: map[string]int{"record": 1, "lease": 2}},
	}
	if diff := cmp.Diff(want, reports); diff != "" {
		t.Errorf("reports (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(map[string]int{"record": 1, "lease": 2}, counted); diff != "" || failures != 1 {
		t.Errorf("counted with %d failures, want 1; (-want +got):\n%s", failures, diff)
	}
	if d := c.looks[3].Sub(c.looks[2]); d < g.every {
		t.Errorf("look without suspects before after %v, want %v", d, g.every)
	}
}

// What a pod leaves right after a look is found by the next, and removed by the one after the grace: all of that is less than a minute.
func TestGarbageIsGoneWithinAMinute(t *testing.T) {
	if worst := gcEvery + 2*gcSoon; worst > 45*time.Second {
		t.Errorf("what a pod leaves may stay %v, want a quarter of a minute to spare", worst)
	}
}
