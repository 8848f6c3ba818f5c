// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// Issue: ADD takes at most half of what ptp with host-local takes, and DEL is faster as well.
const (
	addTarget      = 0.5
	delTarget      = 1
	addP99Target   = 1
	parallelTarget = 1
)

const addSection = "CNI commands, as processes"

const ptpName = "ptp+host-local"

// benchAdd measures ADD and DEL beside the reference's, and where ADD's time goes.
func benchAdd(ctx context.Context, b *bench) error {
	four := []string{"10.245.0.0/16"}
	both := []string{"10.245.0.0/16", "fd00:245::/64"}
	steps := []func() error{
		func() error { return b.oneByOne(ctx, "IPv4", four, b.rounds(100, 3)) },
		func() error { return b.oneByOne(ctx, "dual stack", both, b.rounds(60, 3)) },
		func() error { return b.inParallel(ctx, four, b.rounds(100, 10)) },
		func() error { return b.whereAddGoes(ctx, both, b.rounds(40, 3)) },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// contestant is one side of a comparison of plugins.
type contestant struct {
	*plugin
	ns       string
	add, del []float64 // milliseconds
}

// cycle adds a pod and removes it again.
func (c *contestant) cycle(ctx context.Context, id string) error {
	add, _, err := c.run(ctx, "ADD", id, c.ns)
	if err != nil {
		return err
	}
	del, _, err := c.run(ctx, "DEL", id, c.ns)
	c.add, c.del = append(c.add, milliseconds(add)), append(c.del, milliseconds(del))
	return err
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// oneByOne measures ADD and DEL of both plugins in turns, on a node without other pods. The namespaces exist before: their making is the
// runtime's.
func (b *bench) oneByOne(ctx context.Context, name string, subnets []string, rounds int) error {
	network := "one-" + idOf(name)
	ns, err := b.node.namespaces(network, 2)
	if err != nil {
		return err
	}
	ours := &contestant{plugin: b.node.margay(network+"-margay", subnets...), ns: ns[0]}
	theirs := &contestant{plugin: b.node.ptp(network+"-ptp", subnets...), ns: ns[1]}
	for i := range rounds + 1 {
		if i == 1 { // the first round, with its cold caches, does not count
			ours.add, ours.del, theirs.add, theirs.del = nil, nil, nil, nil
		}
		order := []*contestant{ours, theirs}
		if i%2 == 1 {
			order = []*contestant{theirs, ours}
		}
		for _, c := range order {
			if err := c.cycle(ctx, fmt.Sprintf("%s-%d", network, i)); err != nil {
				return err
			}
		}
	}
	for _, command := range []struct {
		name         string
		ours, theirs []float64
		target, p99  float64
	}{
		{"ADD", ours.add, theirs.add, addTarget, addP99Target},
		{"DEL", ours.del, theirs.del, delTarget, delTarget},
	} {
		id := strings.ToLower(command.name) + "." + idOf(name)
		p50 := &measurement{ID: id + ".p50", Section: addSection, Name: fmt.Sprintf("%s, %s, p50", command.name, name), Unit: "ms",
			Reference: ptpName, Target: command.target, ours: command.ours, theirs: command.theirs}
		p99 := &measurement{ID: id + ".p99", Section: addSection, Name: fmt.Sprintf("%s, %s, p99", command.name, name), Unit: "ms",
			Reference: ptpName, Target: command.p99}
		p99.add(percentile(command.ours, 99), percentile(command.theirs, 99))
		b.report.add(p50)
		b.report.add(p99)
	}
	return nil
}

// inParallel adds so many pods at once, and removes them at once.
func (b *bench) inParallel(ctx context.Context, subnets []string, pods int) error {
	ns, err := b.node.namespaces("parallel", pods)
	if err != nil {
		return err
	}
	begin := func(id, name string) *measurement {
		return &measurement{ID: id, Section: addSection, Name: fmt.Sprintf(name, pods), Unit: "ms", Reference: ptpName, Target: parallelTarget}
	}
	total, slowest := begin("add.parallel.total", "%d ADDs at once, all"), begin("add.parallel.slowest", "%d ADDs at once, the slowest")
	removed := begin("del.parallel.total", "%d DELs at once, all")
	plugins := []*plugin{b.node.margay("parallel-margay", subnets...), b.node.ptp("parallel-ptp", subnets...)}
	for range b.rounds(3, 1) {
		var all, worst, del [2]float64
		for i, p := range plugins {
			if all[i], worst[i], err = p.atOnce(ctx, "ADD", ns); err != nil {
				return err
			}
			if del[i], _, err = p.atOnce(ctx, "DEL", ns); err != nil {
				return err
			}
		}
		total.add(all[0], all[1])
		slowest.add(worst[0], worst[1])
		removed.add(del[0], del[1])
	}
	for _, m := range []*measurement{total, slowest, removed} {
		b.report.add(m)
	}
	return nil
}

// atOnce runs a command for every namespace at the same time, and returns the milliseconds until all were done and those of the slowest.
func (p *plugin) atOnce(ctx context.Context, command string, ns []string) (all, slowest float64, err error) {
	var wg sync.WaitGroup
	took, errs := make([]time.Duration, len(ns)), make([]error, len(ns))
	start := time.Now()
	for i := range ns {
		wg.Go(func() { took[i], _, errs[i] = p.run(ctx, command, fmt.Sprintf("parallel-%d", i), ns[i]) })
	}
	wg.Wait()
	all = milliseconds(time.Since(start))
	for _, t := range took {
		slowest = max(slowest, milliseconds(t))
	}
	return all, slowest, errors.Join(errs...)
}

// whereAddGoes makes the table of ADD's steps, from the durations that the plugin logs.
func (b *bench) whereAddGoes(ctx context.Context, subnets []string, rounds int) error {
	ns, err := b.node.namespace("steps")
	if err != nil {
		return err
	}
	logFile := filepath.Join(b.node.dir, "steps.log")
	quiet := b.node.margay("steps", subnets...)
	p := b.node.margayWith(map[string]any{"logFile": logFile, "logLevel": "debug"}, "steps", subnets...)
	spans := newSpans()
	for i := range rounds {
		id := fmt.Sprintf("steps-%d", i)
		start, _, err := p.run(ctx, "VERSION", id, ns)
		if err != nil {
			return err
		}
		if err := os.RemoveAll(logFile); err != nil {
			return err
		}
		whole, _, err := p.run(ctx, "ADD", id, ns)
		if err != nil {
			return err
		}
		text, err := os.ReadFile(logFile)
		if err != nil {
			return err
		}
		inside, err := spans.read(string(text))
		if err != nil {
			return err
		}
		spans.add("process: start, runtime, configuration, exit", whole-inside)
		spans.add("whole", whole)
		spans.add("for comparison: a process that answers VERSION", start)
		if _, _, err := quiet.run(ctx, "DEL", id, ns); err != nil {
			return err
		}
	}
	b.report.tables = append(b.report.tables, spans.table(fmt.Sprintf("Where ADD's time goes (dual stack, medians of %d)", rounds)))
	return nil
}
