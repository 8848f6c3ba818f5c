// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	// clusterPolicy is the group of network-policy-api's tests. They are a program of their own.
	clusterPolicy = "clusterpolicy"
	policyTest    = "network-policy-api.test"
	policyRoot    = "TestConformance"
)

// policy builds and runs the conformance tests of network-policy-api for ClusterNetworkPolicy.
func (r runner) policy(ctx context.Context) (report, error) {
	out := filepath.Join(r.options.reports, "policy")
	if err := errors.Join(os.RemoveAll(out), os.MkdirAll(out, 0o755)); err != nil {
		return report{}, err
	}
	crd, err := r.policyTests(ctx)
	if err != nil {
		return report{}, err
	}
	if _, err := r.cluster.Kubectl(ctx, "apply", "--server-side", "-f", crd); err != nil {
		return report{}, fmt.Errorf("define ClusterNetworkPolicy: %w", err)
	}
	run := "^" + policyRoot + "$"
	if r.options.focus != "" {
		run += "/" + r.options.focus
	}
	events := filepath.Join(out, "events.json")
	runErr := r.logged(ctx, events, &policyProgress{to: os.Stdout}, []string{
		r.bin("test2json"), "-t", r.bin(policyTest), "-test.v=test2json", "-test.run=" + run, "-test.timeout=" + r.options.timeout.String(), "-all-features",
	})
	content, err := os.ReadFile(events)
	if err != nil {
		return report{}, errors.Join(runErr, err)
	}
	got, err := parsePolicy(content)
	return got, errors.Join(runErr, err)
}

// event is one line of test2json's output (go doc test2json).
type event struct {
	Action  string
	Test    string
	Elapsed float64 // seconds
	Output  string
}

// policyCase is what the events said of one test, its subtests included.
type policyCase struct {
	result
	made, leftOut int
	failure       string
}

// parsePolicy reads test2json's output. A test is one subtest of the program's only one; what fails beneath it has failed it.
func parsePolicy(events []byte) (report, error) {
	cases := map[string]*policyCase{}
	var order []string
	var r report
	for dec := json.NewDecoder(bytes.NewReader(events)); ; {
		var e event
		if err := dec.Decode(&e); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return report{}, fmt.Errorf("events of the tests: %w", err)
		}
		path := strings.Split(e.Test, "/")
		if len(path) < 2 {
			if e.Action == "fail" && e.Test == policyRoot {
				r.faults = append(r.faults, result{name: policyRoot, outcome: failed, note: "the tests as a whole failed"})
			}
			continue
		}
		c := cases[path[1]]
		if c == nil {
			c = &policyCase{result: result{name: path[1]}}
			cases[path[1]] = c
			order = append(order, path[1])
		}
		c.take(e, len(path) == 2)
	}
	oneFailed := false
	for _, name := range order {
		r.tests = append(r.tests, cases[name].judge())
		oneFailed = oneFailed || cases[name].outcome == failed
	}
	if oneFailed {
		r.faults = nil // the whole failed because a test did: that is no further fault
	}
	if len(r.tests) == 0 {
		return r, errors.New("no test in the events")
	}
	return r, nil
}

// take adds an event; own says that it is the test's own and not a subtest's.
func (c *policyCase) take(e event, own bool) {
	switch e.Action {
	case "output":
		switch {
		case strings.Contains(e.Output, probeMade):
			c.made++
		case strings.Contains(e.Output, probeLeftOut):
			c.leftOut++
		}
	case "fail":
		if c.failure == "" {
			c.failure = e.Test
		}
	}
	if !own {
		return
	}
	outcomes := map[string]outcome{"pass": passed, "fail": failed, "skip": skipped}
	if o, ended := outcomes[e.Action]; ended {
		c.outcome, c.took = o, time.Duration(e.Elapsed*float64(time.Second))
	}
}

// judge says what became of the test. One that never ended failed; one whose every probe was left out was not run.
func (c *policyCase) judge() result {
	switch {
	case c.outcome == "":
		c.outcome, c.note = failed, "did not end"
	case c.outcome == failed:
		c.note = "failed first: " + strings.TrimPrefix(c.failure, policyRoot+"/")
	case c.outcome == skipped:
		c.note = "a feature was not asked for"
	case c.leftOut > 0 && c.made == 0:
		c.outcome = notRun
	case c.leftOut > 0:
		c.note = fmt.Sprintf("without %d of %d probes: those by SCTP", c.leftOut, c.leftOut+c.made)
	}
	return c.result
}

// policyWhyNot is the reason of the tests that had no probe.
func policyWhyNot(string) string { return noSCTP }

// policyProgress takes test2json's output and writes a line for each test that ended.
type policyProgress struct {
	to   io.Writer
	rest []byte
}

func (p *policyProgress) Write(b []byte) (int, error) {
	p.rest = append(p.rest, b...)
	for {
		line, rest, whole := bytes.Cut(p.rest, []byte("\n"))
		if !whole {
			return len(b), nil
		}
		p.rest = rest
		var e event
		// A line that is no event is for the log only; whoever reads the log afterwards reports it.
		if json.Unmarshal(line, &e) != nil || strings.Count(e.Test, "/") != 1 {
			continue
		}
		if e.Action == "pass" || e.Action == "fail" || e.Action == "skip" {
			if _, err := fmt.Fprintf(p.to, "• [%s] [%.1f seconds] %s\n", e.Action, e.Elapsed, e.Test); err != nil {
				return 0, err
			}
		}
	}
}
