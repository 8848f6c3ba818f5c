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
		func() error { return b.oneByOne(ctx, "IPv4", four, b.rounds(120, 3)) },
		func() error { return b.oneByOne(ctx, "dual stack", both, b.rounds(60, 3)) },
		func() error { return b.inParallel(ctx, four, b.rounds(100, 10)) },
		func() error { return b.whereAddGoes(ctx, both, b.rounds(40, 3)) },
		func() error { return b.syscallsOfAdd(ctx, both) },
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
	add, del [2][]float64 // milliseconds: wall, CPU
}

// cycle adds a pod and removes it again.
func (c *contestant) cycle(ctx context.Context, id string) error {
	add, _, err := c.run(ctx, "ADD", id, c.ns)
	if err != nil {
		return err
	}
	del, _, err := c.run(ctx, "DEL", id, c.ns)
	note(&c.add, add)
	note(&c.del, del)
	return err
}

func note(to *[2][]float64, c cost) {
	to[0], to[1] = append(to[0], milliseconds(c.wall)), append(to[1], milliseconds(c.cpu))
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
			ours.add, ours.del = [2][]float64{}, [2][]float64{}
			theirs.add, theirs.del = [2][]float64{}, [2][]float64{}
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
	b.commandResults("ADD", name, ours.add, theirs.add, addTarget, addP99Target)
	b.commandResults("DEL", name, ours.del, theirs.del, delTarget, delTarget)
	return nil
}

// commandResults reports one command's figures.
func (b *bench) commandResults(command, name string, ours, theirs [2][]float64, target, p99Target float64) {
	begin := func(what string, target float64) *measurement {
		m := &measurement{ID: strings.ToLower(command) + "." + idOf(name) + "." + what, Section: addSection,
			Name: fmt.Sprintf("%s, %s, %s", command, name, what), Unit: "ms", Reference: ptpName, Target: target}
		b.report.add(m)
		return m
	}
	p50 := begin("p50", target)
	p50.ours, p50.theirs = ours[0], theirs[0]
	begin("p99", p99Target).add(percentile(ours[0], 99), percentile(theirs[0], 99))
	cpu := begin("CPU", 0)
	cpu.ours, cpu.theirs = ours[1], theirs[1]
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
	for round := range b.rounds(10, 1) {
		var all, worst, del [2]float64
		for k := range plugins { // who goes first changes from round to round
			i := (round + k) % len(plugins)
			p := plugins[i]
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
		wg.Go(func() {
			var c cost
			c, _, errs[i] = p.run(ctx, command, fmt.Sprintf("parallel-%d", i), ns[i])
			took[i] = c.wall
		})
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
		spans.add("process: start, runtime, configuration, exit", whole.wall-inside)
		spans.add("whole", whole.wall)
		spans.add("for comparison: a process that answers VERSION", start.wall)
		if _, _, err := quiet.run(ctx, "DEL", id, ns); err != nil {
			return err
		}
	}
	b.report.tables = append(b.report.tables, spans.table(fmt.Sprintf("Where ADD's time goes (dual stack, medians of %d)", rounds)))
	return nil
}
