// SPDX-License-Identifier: Apache-2.0

//go:build cluster

package lab_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/margay-cni/margay/test/cluster/lab"
)

// TestDownLeavesNothing compares the machine before a cluster and after it, and requires that the comparison sees a cluster at all.
func TestDownLeavesNothing(t *testing.T) {
	const name = "leaves-nothing"
	dir := built(t)
	before := traces(t, dir, name)
	c := up(t, lab.Options{Dir: dir, Name: name, Nodes: 1, Family: lab.Dual, CNI: "reference"})
	during := traces(t, dir, name)
	for _, want := range []string{"/bin/kubelet", "/bin/etcd", "path /sys/fs/cgroup/memory/margay-cluster-" + c.ID, "path " + c.State()} {
		if !slices.ContainsFunc(during, func(s string) bool { return strings.Contains(s, want) }) {
			t.Errorf("the comparison does not see %s", want)
		}
	}
	for _, line := range during {
		if !slices.Contains(before, line) && !strings.HasPrefix(line, "process ") && !strings.HasPrefix(line, "path ") {
			t.Errorf("a running cluster shows outside of its namespaces: %s", line)
		}
	}
	must(t, lab.Down(dir, c.Name))
	unchanged(t, dir, name, before)
	must(t, lab.Down(dir, c.Name)) // nothing to do is no error
}

// TestDownAfterEverythingWasKilled ends a cluster of which no process is left, or only some.
func TestDownAfterEverythingWasKilled(t *testing.T) {
	const name = "killed"
	dir := built(t)
	for which, victims := range map[string][]string{"all": {"control", "node1", "client"}, "control": {"control"}, "node": {"node1"}} {
		t.Run(which, func(t *testing.T) {
			before := traces(t, dir, name)
			c := up(t, lab.Options{Dir: dir, Name: name, Nodes: 1, Family: lab.IPv4, CNI: "none"})
			for _, v := range victims {
				m, err := c.Machine(v)
				must(t, err)
				pid, err := m.PID()
				must(t, err)
				must(t, syscall.Kill(pid, syscall.SIGKILL))
			}
			must(t, lab.Down(dir, c.Name))
			unchanged(t, dir, name, before)
		})
	}
}

// TestDownWithoutState ends a cluster whose directory somebody moved away.
func TestDownWithoutState(t *testing.T) {
	const name = "stateless"
	dir := built(t)
	before := traces(t, dir, name)
	c := up(t, lab.Options{Dir: dir, Name: name, Nodes: 1, Family: lab.Dual, CNI: "none"})
	lost := filepath.Join(dir, "lost")
	must(t, os.Rename(c.State(), lost))
	must(t, lab.Down(dir, name))
	must(t, os.RemoveAll(lost))
	unchanged(t, dir, name, before)
}

// TestDownSparesOthers: the number of a process that ended may belong to another one by now.
func TestDownSparesOthers(t *testing.T) {
	dir := built(t)
	c := up(t, lab.Options{Dir: dir, Name: "spares", Nodes: 1, Family: lab.IPv6, CNI: "none"})
	must(t, c.Client().PowerOff())
	other := exec.Command("sleep", "60")
	must(t, other.Start())
	defer func() { _ = other.Process.Kill(); _ = other.Wait() }()
	record := filepath.Join(c.Client().Dir(), "process.json")
	must(t, os.WriteFile(record, fmt.Appendf(nil, `{"PID": %d, "Start": 1}`, other.Process.Pid), 0o600))
	must(t, lab.Down(dir, c.Name))
	if err := other.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("a process that has the number of a dead machine was ended: %v", err)
	}
}

// TestDownAfterUpWasKilled kills the process that makes a cluster at many moments.
func TestDownAfterUpWasKilled(t *testing.T) {
	const name = "halfway"
	dir := built(t)
	program := filepath.Join(t.TempDir(), "cluster")
	out, err := exec.Command("go", "build", "-o", program, "..").CombinedOutput()
	if err != nil {
		t.Fatalf("build the program: %v: %s", err, out)
	}
	before := traces(t, dir, name)
	for _, after := range []time.Duration{10, 20, 30, 50, 80, 120, 200, 300, 500, 800, 1500, 4000, 8000} {
		after *= time.Millisecond
		t.Run(after.String(), func(t *testing.T) {
			t.Cleanup(func() { must(t, lab.Down(dir, name)) })
			cmd := exec.Command(program, "up", "--dir", dir, "--name", name, "--nodes", "2", "--cni", "reference")
			must(t, cmd.Start())
			time.Sleep(after)
			must(t, cmd.Process.Kill())
			_ = cmd.Wait()
			must(t, lab.Down(dir, name))
			unchanged(t, dir, name, before)
		})
	}
}

// TestUpTwice: a cluster of the same name is neither replaced nor ended.
func TestUpTwice(t *testing.T) {
	dir := built(t)
	o := lab.Options{Dir: dir, Name: "twice", Nodes: 1, Family: lab.Dual, CNI: "none"}
	c := up(t, o)
	if _, err := lab.Up(t.Context(), o, logger(t)); err == nil || !strings.Contains(err.Error(), "exists already") {
		t.Errorf("a second Up = %v, want that the cluster exists already", err)
	}
	if !c.Control().Running() {
		t.Error("the second Up ended the cluster")
	}
}

// up makes a cluster that ends with the test.
func up(t *testing.T, o lab.Options) *lab.Cluster {
	t.Helper()
	t.Cleanup(func() {
		if err := lab.Down(o.Dir, o.Name); err != nil {
			t.Error(err)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	c, err := lab.Up(ctx, o, logger(t))
	must(t, err)
	return c
}
