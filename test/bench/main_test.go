// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestCommand(t *testing.T) {
	for line, want := range map[string]string{
		"-write":                              "make bench",
		"-inside /tmp/somewhere -full -write": "make bench-full",
		"-inside /tmp/somewhere -only packet -strict": "go run ./test/bench -only packet -strict",
		"": "go run ./test/bench",
	} {
		o, err := parse(strings.Fields(line), io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		if got := o.command(); got != want {
			t.Errorf("command of %q = %q, want %q", line, got, want)
		}
	}
}

func TestFlagErrors(t *testing.T) {
	for _, line := range []string{"-smoke -write", "-smoke -full", "-smoke -strict", "-write -only packet", "-nothing", "word"} {
		if _, err := parse(strings.Fields(line), io.Discard); err == nil {
			t.Errorf("%q: no error", line)
		}
	}
}

func TestChoose(t *testing.T) {
	for want, o := range map[int]options{60: {full: true}, 12: {}, 1: {smoke: true}} {
		b := &bench{options: o}
		if got := b.choose(60, 12, 1); got != want {
			t.Errorf("choose with %+v = %d, want %d", o, got, want)
		}
	}
}

// A section that fails, or panics, leaves nothing in the report, and the others are run.
func TestFailedSections(t *testing.T) {
	add := func(id string, err error) section {
		return section{name: id, run: func(_ context.Context, b *bench) error {
			b.report.add(measured(measurement{ID: id}, []float64{1}, nil))
			b.report.note("of %s", id)
			if id == "measures nothing" {
				b.report.add(&measurement{ID: "none"})
			}
			if id == "panics" {
				(&fixture{}).Fatal("no certificate")
			}
			return err
		}}
	}
	b := &bench{report: newTestReport()}
	var stderr strings.Builder
	failed, err := b.runSections(context.Background(), []section{add("one", nil), add("fails", errors.New("no pod")), add("panics", nil), add("measures nothing", nil), add("last", nil)}, &stderr)
	if want := []string{"fails", "panics", "measures nothing"}; err != nil || !slices.Equal(failed, want) {
		t.Errorf("runSections() = %v, %v, want %v", failed, err, want)
	}
	var got []string
	for _, m := range b.report.measurements {
		got = append(got, m.ID)
	}
	if want := []string{"one", "last"}; !slices.Equal(got, want) || len(b.report.notes) != 2 {
		t.Errorf("the report has %v and notes %q, want %v", got, b.report.notes, want)
	}
	for _, want := range []string{"bench: one, 1 of 5, takes about ", "bench: one took 0s\n", "bench: fails failed after 0s: no pod\n", "no certificate", "last, 5 of 5"} {
		if !strings.Contains(stderr.String(), want) {
			t.Errorf("no %q in the progress:\n%s", want, stderr.String())
		}
	}
}

func TestInterruptedSection(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	ran := 0
	s := section{name: "one", run: func(context.Context, *bench) error { ran++; cancel(); return nil }}
	if failed, err := (&bench{report: newTestReport()}).runSections(ctx, []section{s, s}, io.Discard); err == nil || ran != 1 {
		t.Errorf("runSections() = %v, %v after %d sections, want an error after the first", failed, err, ran)
	}
}

func TestProgressSteps(t *testing.T) {
	p := newProgress(io.Discard, time.Minute)
	p.at("round %d of %d", 3, 12)
	if got := p.where(); got != ": round 3 of 12" {
		t.Errorf("where() = %q", got)
	}
	var silent *progress
	silent.at("nobody listens")
}

// Processes whose parent has ended are ended as well, at whatever depth.
func TestEndChildren(t *testing.T) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) }()
	out, err := exec.Command("sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!; (setsid sh -c 'sleep 1001; true' >/dev/null 2>&1 & echo $!)").Output()
	if err != nil {
		t.Fatal(err)
	}
	left := strings.Fields(string(out))
	if len(left) != 2 {
		t.Fatalf("started %q, want two processes", left)
	}
	start := time.Now()
	endChildren()
	if took := time.Since(start); took > grace/2 {
		t.Errorf("endChildren took %v", took)
	}
	for _, process := range left {
		if _, err := os.Stat("/proc/" + process); err == nil {
			t.Errorf("process %s is left", process)
		}
	}
}
