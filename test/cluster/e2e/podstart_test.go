// SPDX-License-Identifier: Apache-2.0

//go:build cluster

package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/margay-cni/margay/test/cluster/lab"
)

// TestPodStart measures how long the CNI ADD of a pod takes as containerd sees it, one by one and 100 at once, with policies in force, and
// how long it is until the pods are ready. docs/test-cluster.md has figures. On the reference network it measures ptp and host-local.
func TestPodStart(t *testing.T) {
	s := newSpace(t, nil)
	if onMargay() {
		s.apply(networkPolicy("deny", `{podSelector: {}, policyTypes: [Ingress, Egress]}`))
		for i := range 20 {
			s.apply(networkPolicy(fmt.Sprintf("allow%d", i), fmt.Sprintf(`{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {peer: p%d}}}, {namespaceSelector: {matchLabels: {team: t%d}}}], ports: [{port: %d}]}], egress: [{to: [{ipBlock: {cidr: 10.%d.0.0/16}}]}]}`, i, i, 1000+i, i)))
		}
	}
	timer := newPluginTimer(t)

	const single, many = 30, 100
	var readiness durations
	for i := range single {
		start := time.Now()
		name := fmt.Sprintf("single%d", i)
		s.start(idle(name, i%2+1))
		readiness = append(readiness, time.Since(start))
		s.must(api.remove(s.ctx, "Pod", s.name, name))
	}
	adds := timer.adds(t, single)
	t.Logf("%s, one by one, ADD: %v", cluster.CNI, adds)
	t.Logf("%s, one by one, from the pod's creation until it is ready: %v", cluster.CNI, readiness)
	if p50 := adds.quantile(0.5); onMargay() && p50 > time.Second {
		t.Errorf("half of all ADDs take more than %v", p50)
	}

	var objects []*corev1.Pod
	for i := range many {
		objects = append(objects, idle(fmt.Sprintf("many%d", i), i%2+1))
	}
	start := time.Now()
	s.start(objects...)
	all := time.Since(start).Round(10 * time.Millisecond)
	adds = timer.adds(t, many)
	t.Logf("%s, %d pods at once, ADD: %v", cluster.CNI, many, adds)
	t.Logf("%s, %d pods at once, until the last one is ready: %v", cluster.CNI, many, all)
	if p99 := adds.quantile(0.99); onMargay() && p99 > 30*time.Second {
		t.Errorf("an ADD takes up to %v", p99)
	}
}

// pluginTimer writes down how long every run of the network's plugin takes, on the first two nodes, until the test ends.
type pluginTimer struct {
	nodes []*lab.Node
	seen  map[string]int // runs that adds has returned already, for each node
}

func newPluginTimer(t *testing.T) *pluginTimer {
	t.Helper()
	program := buildProgram(t, "cnitimer")
	p := &pluginTimer{nodes: cluster.Nodes()[:2], seen: map[string]int{}}
	plugin := "margay"
	if !onMargay() {
		plugin = "ptp"
	}
	for _, n := range p.nodes {
		path := n.Disk(filepath.Join("/opt/cni/bin", plugin))
		t.Cleanup(func() {
			if exists(path + ".timed") {
				if err := os.Rename(path+".timed", path); err != nil {
					t.Error(err)
				}
			}
		})
		b, err := os.ReadFile(program)
		if err != nil {
			t.Fatal(err)
		}
		// At every moment a whole plugin has the name: pods may start.
		for _, step := range []func() error{
			func() error { return os.Link(path, path+".timed") },
			func() error { return os.WriteFile(path+".new", b, 0o755) },
			func() error { return os.Rename(path+".new", path) },
		} {
			if err := step(); err != nil {
				t.Fatal(err)
			}
		}
		p.seen[n.Name] = len(p.entries(t, n))
	}
	return p
}

// timerEntry is a line of the program cnitimer.
type timerEntry struct {
	Command  string
	Duration time.Duration
	Code     int
}

func (p *pluginTimer) entries(t *testing.T, n *lab.Node) []timerEntry {
	t.Helper()
	pid, err := n.PID()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/root/run/cnitimer.log", pid))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	var all []timerEntry
	for line := range bytes.Lines(b) {
		var e timerEntry
		if err := json.Unmarshal(line, &e); err != nil {
			t.Fatalf("decode %q: %v", line, err)
		}
		all = append(all, e)
	}
	return all
}

// adds returns the times of the ADDs since it was last called. There must be so many, none of which failed.
func (p *pluginTimer) adds(t *testing.T, want int) durations {
	t.Helper()
	var all durations
	for _, n := range p.nodes {
		entries := p.entries(t, n)
		for _, e := range entries[p.seen[n.Name]:] {
			if e.Command != "ADD" {
				continue
			}
			if e.Code != 0 {
				t.Logf("an ADD on %s ended with %d after %v", n.Name, e.Code, e.Duration)
				if onMargay() { // ptp gives up when a hundred start, and kubelet tries again
					t.Errorf("%s: no ADD may fail", n.Name)
				}
			}
			all = append(all, e.Duration)
		}
		p.seen[n.Name] = len(entries)
	}
	if len(all) < want { // kubelet may give up a start on a busy machine, and try again
		t.Errorf("%d ADDs, want %d", len(all), want)
	}
	return all
}
