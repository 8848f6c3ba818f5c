// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"log/slog"
	"maps"
	"time"
)

// Collector removes what pods that are gone have left on the node: records, leases, devices, and what belongs to them (pkg/cni implements it).
type Collector interface {
	// Collect looks once. removed counts by kind what was removed; suspects is how many things look dead, and are removed if they still do
	// in a later look.
	Collect(ctx context.Context) (removed map[string]int, suspects int, err error)
}

// How often is looked for what pods have left. Nothing is removed before it has looked dead for 10 seconds; what a pod leaves is gone after
// gcEvery plus one or two times gcSoon.
const (
	gcEvery = 20 * time.Second
	gcSoon  = 11 * time.Second
)

// kindMapEntries is the kind of what the pipeline removes itself: entries of the maps that no record tells of.
const kindMapEntries = "map entries"

// GarbageCollection is what was done about pods that are gone.
type GarbageCollection struct {
	// Last is when was last looked, Took how long that took, in nanoseconds.
	Last time.Time     `json:"last,omitzero"`
	Took time.Duration `json:"took"`
	// Suspects is how many things look dead, and will be removed if they still do in a later look.
	Suspects int `json:"suspects"`
	// Removed counts what was removed since the agent started, by kind.
	Removed map[string]int `json:"removed"`
	// Error is why something could not be removed, or the node not be read.
	Error string `json:"error,omitempty"`
}

// gc runs the collector. It waits for no source: pods end while the API server is away, too.
type gc struct {
	collector   Collector
	every, soon time.Duration
	log         *slog.Logger
	report      func(GarbageCollection)
	count       func(removed map[string]int, failed bool)

	removed map[string]int
	err     string
}

// collectGarbage works until ctx ends.
func collectGarbage(ctx context.Context, cfg *Config, b *board, o *observer) error {
	g := &gc{collector: cfg.Collect, every: gcEvery, soon: gcSoon, log: cfg.Log, report: b.gc, count: o.metrics.Collected}
	return g.run(ctx)
}

func (g *gc) run(ctx context.Context) error {
	if g.collector == nil {
		return nil
	}
	g.removed = map[string]int{}
	next := time.NewTimer(0)
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-next.C:
		}
		suspects := g.collect(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if suspects > 0 {
			next.Reset(min(g.soon, g.every))
		} else {
			next.Reset(g.every)
		}
	}
}

// collect looks once and returns how many suspects there are.
func (g *gc) collect(ctx context.Context) int {
	start := time.Now()
	removed, suspects, err := g.collector.Collect(ctx)
	if ctx.Err() != nil {
		return 0
	}
	for kind, n := range removed {
		g.removed[kind] += n
	}
	result := GarbageCollection{Last: start, Took: time.Since(start), Suspects: suspects, Removed: maps.Clone(g.removed)}
	if err != nil {
		result.Error = err.Error()
	}
	if result.Error != "" && result.Error != g.err {
		g.log.Error("garbage collection is not complete; trying again", "err", err)
	}
	g.err = result.Error
	g.report(result)
	g.count(removed, err != nil)
	return suspects
}
