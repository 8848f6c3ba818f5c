// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"math"
	"time"
)

// runner is a course with its two processes, which stay for the whole run, and what was measured of it, by mode and round.
type runner struct {
	course
	client, server *peer
	streams        bool // takes part in streams only
	laps           map[string][]lap
}

// lap is one burst.
type lap struct {
	rate, p50, p99 float64 // as the kind's unit says; µs
	cpu            float64 // of both ends and the kernel, as the kind says
}

// kind is what is measured of a mode of traffic.
type kind struct {
	mode, id, name string
	length         time.Duration // of a burst; short ones, so that a round is over before the machine has changed
	unit           string
	scale          float64 // of the unit, in what a client counts
	times          bool    // p50 and p99 are of interest
	cpuName        string
	cpuScale       float64 // nanoseconds for one of what a client counts → milliseconds for what cpuName says
	target         float64 // for the rate
}

func (k kind) stream() bool { return k.mode == modeThroughput || k.mode == modeStreams }

// Issue: what Margay must keep of a bare veth pair.
var kinds = []kind{
	{modeRequests, "rr", "TCP_RR", 40 * time.Millisecond, "1000/s", 1e3, true, "CPU per 1000 transactions", 1e-3, 0.97},
	{modeConnects, "crr", "TCP_CRR", 60 * time.Millisecond, "1000/s", 1e3, true, "CPU per 1000 transactions", 1e-3, 0.95},
	{modeThroughput, "stream", "one TCP stream", 60 * time.Millisecond, "Gbit/s", 1e9, false, "CPU per Gbit", 1e3, 0.98},
	{modeStreams, "streams", "eight TCP streams", 80 * time.Millisecond, "Gbit/s", 1e9, false, "CPU per Gbit", 1e3, 0.98},
	{modeDatagrams, "udp", "UDP, 64 bytes", 30 * time.Millisecond, "1000/s", 1e3, false, "CPU per 1000 packets", 1e-3, 0},
}

// race lets the runners take turns in all kinds of traffic, so many rounds. Who goes first changes from round to round, and in which
// direction it goes on: nobody always follows the same one.
func (b *bench) race(ctx context.Context, rounds int, kinds []kind, runners []*runner) error {
	cpu, err := newCPUMeter()
	if err != nil {
		return err
	}
	for i := range rounds {
		b.progress.at("%s, round %d of %d", runners[0].name, i+1, rounds)
		for _, k := range kinds {
			for turn := range runners {
				at := (i + turn) % len(runners)
				if i%2 == 1 {
					at = len(runners) - 1 - at
				}
				if runners[at].streams && !k.stream() {
					continue
				}
				if err := runners[at].lap(ctx, k, b.length(k), cpu); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func (b *bench) length(k kind) time.Duration {
	if b.smoke {
		return 10 * time.Millisecond
	}
	return k.length
}

func (r *runner) lap(ctx context.Context, k kind, length time.Duration, cpu *cpuMeter) error {
	before, err := cpu.read(r.server)
	if err != nil {
		return err
	}
	got, err := r.client.burst(ctx, r.course, k.mode, length)
	if err != nil {
		return err
	}
	after, err := cpu.read(r.server)
	if err != nil {
		return err
	}
	if r.laps == nil {
		r.laps = map[string][]lap{}
	}
	r.laps[k.id] = append(r.laps[k.id], lap{
		rate: got.PerSecond / k.scale, p50: got.P50, p99: got.P99, cpu: (got.CPU + after - before) / got.Count * k.cpuScale,
	})
	return nil
}

// cpuMeter reads what the measured CPU has done that a client does not know of.
type cpuMeter struct {
	softirq int // process; 0: not seen
}

func newCPUMeter() (*cpuMeter, error) {
	_, last, err := lastCPU()
	if err != nil {
		return nil, err
	}
	m := &cpuMeter{}
	for cpu := range 64 * len(last) {
		if last.IsSet(cpu) {
			m.softirq, _ = softirqThread(cpu)
		}
	}
	return m, nil
}

// read returns nanoseconds of the server and of the kernel's thread for network work.
func (m *cpuMeter) read(server *peer) (float64, error) {
	used, err := cpuTime(server.cmd.Process.Pid)
	if err != nil || m.softirq == 0 {
		return used, err
	}
	kernel, err := cpuTime(m.softirq)
	return used + kernel, err
}

// pairing is two runners whose laps are reported beside each other.
type pairing struct {
	section      string
	suffix       string // of the ids: "ipv4"
	name         string // behind that of the kind: "IPv4"
	ours, theirs *runner
	targets      bool // whether the kinds' targets are for this pair
	further      bool // a further reference of figures that have one
}

// compare reports everything of the kinds that both have run.
func (p pairing) compare(r *report, kinds []kind) error {
	for _, k := range kinds {
		if p.theirs.streams && !k.stream() {
			continue
		}
		ours, theirs := p.ours.laps[k.id], p.theirs.laps[k.id]
		if len(ours) == 0 || len(ours) != len(theirs) {
			return fmt.Errorf("%s beside %s: %d and %d rounds of %s", p.ours.name, p.theirs.name, len(ours), len(theirs), k.name)
		}
		add := func(what, name, unit string, target float64, of func(lap) float64) {
			m := &measurement{
				ID: k.id + "." + p.suffix + what, Section: p.section, Name: k.name + ", " + p.name + name, Unit: unit,
				Reference: p.theirs.name, Higher: what == "",
			}
			if p.further {
				m = m.beside(p.theirs.name)
			}
			if p.targets {
				m.Target = target
			}
			for i := range ours {
				m.add(of(ours[i]), of(theirs[i]))
			}
			r.add(m)
		}
		add("", "", k.unit, k.target, func(l lap) float64 { return l.rate })
		if k.times {
			// Other work on the CPU lowers both rates at random. Of the transactions' own time the p50 shows it least.
			add(".p50", ", p50", "µs", math.Round(100/k.target)/100, func(l lap) float64 { return l.p50 })
			add(".p99", ", p99", "µs", 0, func(l lap) float64 { return l.p99 })
		}
		add(".CPU", ", "+k.cpuName, "ms", 0, func(l lap) float64 { return l.cpu })
	}
	return nil
}
