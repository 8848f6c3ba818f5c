// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"
)

// Issue: an endpoint's change is in the kernel within 10 ms, a node is right 2 s after everything was read, 64 MiB are enough for an agent
// with 5 000 pods and 1 000 services, and 60 MiB for empty maps.
const (
	changeTarget = 10   // ms
	startTarget  = 2000 // ms
	memoryTarget = 64   // MiB
	mapsTarget   = 60   // MiB
)

const agentSection = "The agent, from what the API server says to the maps"

// benchAgentStart measures how long a node with empty maps takes to be right.
func benchAgentStart(ctx context.Context, b *bench) error {
	const services, endpoints = 10000, 2
	l, err := b.newAgentLab("start")
	if err != nil {
		return err
	}
	defer l.close()
	l.putCluster(1)
	l.putServices(services, endpoints)
	start := b.alone("agent.start.process", "10 000 services × 2 endpoints, from the process's start", "ms", 0)
	read := b.alone("agent.start.read", "10 000 services × 2 endpoints, after everything was read", "ms", startTarget)
	write := b.alone("agent.start.write", "10 000 services × 2 endpoints, after the first entry", "ms", 0)
	for i := range b.rounds(10, 1) {
		if err := l.startWith(ctx, fmt.Sprint(i), l.fromServer()...); err != nil {
			return err
		}
		first, last, err := l.untilWritten(services, services*endpoints)
		if err != nil {
			return err
		}
		start.addAlone(milliseconds(last.Sub(l.started)))
		read.addAlone(milliseconds(last.Sub(l.read)))
		write.addAlone(milliseconds(last.Sub(first)))
		l.stop()
	}
	return nil
}

// alone begins a measurement that is compared with nothing.
func (b *bench) alone(id, name, unit string, target float64) *measurement {
	m := &measurement{ID: id, Section: agentSection, Name: name, Unit: unit, Target: target, Absolute: target != 0}
	b.report.add(m)
	return m
}

// benchAgentChange measures from the API server's write to what the kernel's maps say, one change at a time, and the same for a manifest.
func benchAgentChange(ctx context.Context, b *bench) error {
	const services, endpoints = 10000, 10
	l, err := b.newAgentLab("change")
	if err != nil {
		return err
	}
	defer l.close()
	l.putCluster(1)
	l.putServices(services, endpoints)
	if err := l.startWith(ctx, "server", l.fromServer()...); err != nil {
		return err
	}
	put := func(service, endpoints int) error {
		l.api.Put(endpointSlice(service, endpoints))
		return nil
	}
	if err := l.changes("agent.change", "", services, endpoints, b.choose(200, 50, 2), changeTarget, put); err != nil {
		return err
	}
	l.stop()
	if !b.full {
		return nil
	}
	dir := filepath.Join(l.dir, "manifests")
	if err := writeManifests(dir, services, endpoints); err != nil {
		return err
	}
	if err := l.startWith(ctx, "manifests", "--manifests", dir); err != nil {
		return err
	}
	const usual = endpoints
	put = func(service, endpoints int) error {
		return writeManifest(dir, service, endpoints, usual)
	}
	return l.changes("agent.manifest", ", from manifests", services, endpoints, 20, 0, put)
}

// changes measures so many changes, each of one endpoint of one service.
func (l *agentLab) changes(id, source string, services, endpoints, times int, target float64, put func(service, endpoints int) error) error {
	_, last, err := l.untilWritten(services, services*endpoints)
	if err != nil {
		return err
	}
	l.bench.alone(id+".load", "10 000 services × 10 endpoints"+source+", from the process's start", "ms", 0).addAlone(milliseconds(last.Sub(l.started)))
	time.Sleep(2 * time.Second) // what comes with a start is over then
	// The API server is in this process: its garbage is not the agent's.
	runtime.GC()
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	var took []float64
	for i := range times {
		time.Sleep(time.Duration(50+i%10) * time.Millisecond)
		service, add := (i/2*2477+i/2)%services, i%2 == 0
		d, err := l.change(service, endpoints, add, put)
		if err != nil {
			return err
		}
		took = append(took, milliseconds(d))
	}
	p50 := l.bench.alone(id+".p50", "one endpoint of 10 000 services × 10"+source+", p50", "ms", target)
	p50.ours = took
	l.bench.alone(id+".p99", "one endpoint of 10 000 services × 10"+source+", p99", "ms", 0).addAlone(percentile(took, 99))
	return nil
}

// benchAgentMemory measures what the agent holds in memory, with clusters of two sizes, at rest and while pods change, and what the maps take.
func benchAgentMemory(ctx context.Context, b *bench) error {
	if err := b.memoryWith(ctx, 5000, 1000, memoryTarget); err != nil || !b.full {
		return err
	}
	return b.memoryWith(ctx, 50000, 10000, 0)
}

// changesASecond is how many pods change while memory under change is measured.
const changesASecond = 200

func (b *bench) memoryWith(ctx context.Context, pods, services int, target float64) error {
	const endpoints = 10
	size := fmt.Sprintf("%d pods, %d services × %d", pods, services, endpoints)
	id := fmt.Sprintf("agent.memory.%d", pods)
	l, err := b.newAgentLab(fmt.Sprint("memory", pods))
	if err != nil {
		return err
	}
	defer l.close()
	l.putCluster(pods / podsANode)
	for i := range pods {
		l.api.Put(apiPod(i, 0))
	}
	l.putServices(services, endpoints)
	if err := l.startWith(ctx, "server", l.fromServer()...); err != nil {
		return err
	}
	if target != 0 {
		if err := l.mapMemory(id, "empty", mapsTarget); err != nil {
			return err
		}
	}
	if _, _, err = l.untilWritten(services, services*endpoints); err != nil {
		return err
	}
	time.Sleep(3 * time.Second)
	idle, err := l.resident()
	if err != nil {
		return err
	}
	b.alone(id+".idle", "resident, "+size, "MiB", target).addAlone(idle["Rss"])
	b.alone(id+".idle.anonymous", "resident without the program's file, "+size, "MiB", 0).addAlone(idle["Anonymous"])
	most, err := l.whilePodsChange(pods, b.choose(10, 5, 1))
	if err != nil {
		return err
	}
	b.alone(id+".changing", "the most while 200 pods a second change, "+size, "MiB", target).addAlone(most["Rss"])
	b.alone(id+".changing.anonymous", "the most without the program's file, "+size, "MiB", 0).addAlone(most["Anonymous"])
	return l.mapMemory(id+".filled", size, 0)
}

// whilePodsChange changes pods for so many seconds, a deployment of 50 after the other, and returns the most that the agent held meanwhile.
func (l *agentLab) whilePodsChange(pods, seconds int) (map[string]float64, error) {
	most := map[string]float64{}
	tick := time.NewTicker(time.Second / changesASecond)
	defer tick.Stop()
	for i := range seconds * changesASecond {
		<-tick.C
		l.api.Put(apiPod(i%pods, 1+i/pods))
		if i%10 > 0 {
			continue
		}
		now, err := l.resident()
		if err != nil {
			return nil, err
		}
		for what, v := range now {
			most[what] = max(most[what], v)
		}
	}
	return most, nil
}

// mapMemory reports what the kernel accounts for all maps together, and makes a table of each of them.
func (l *agentLab) mapMemory(id, filled string, target float64) error {
	each, err := mapSizes(filepath.Join(l.bpffs, "maps"))
	if err != nil {
		return err
	}
	all := l.bench.alone(id+".maps", "kernel memory of all maps, "+filled, "MiB", target)
	all.Portable = true
	sum := 0.0
	t := table{title: "Kernel memory of the maps, " + filled, head: []string{"map", "MiB"}}
	names := make([]string, 0, len(each))
	for name, mib := range each {
		sum += mib
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b string) int { return cmp.Or(cmp.Compare(each[b], each[a]), strings.Compare(a, b)) })
	for _, name := range names {
		t.rows = append(t.rows, []string{name, number(each[name])})
	}
	all.addAlone(sum)
	l.bench.report.tables = append(l.bench.report.tables, t)
	return nil
}

// writeManifests writes services as files of a hundred each.
func writeManifests(dir string, services, endpoints int) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for first := 0; first < services; first += servicesAFile {
		if err := writeManifest(dir, first, endpoints, endpoints); err != nil {
			return err
		}
	}
	return nil
}
