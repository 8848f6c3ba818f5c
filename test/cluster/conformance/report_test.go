// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// madeUp is a report with one test of each outcome, in the form of ginkgo's.
const madeUp = `<?xml version="1.0" encoding="UTF-8"?>
<testsuites tests="9" disabled="3" errors="1" failures="1" time="100">
    <testsuite name="Kubernetes e2e suite" package="/e2e.test" tests="9">
        <properties><property name="SuiteSucceeded" value="false"></property></properties>
        <testcase name="[SynchronizedBeforeSuite]" classname="Kubernetes e2e suite" status="passed" time="1.5"></testcase>
        <testcase name="[It] [sig-apps] Job should run" classname="Kubernetes e2e suite" status="skipped" time="0">
            <skipped message="skipped"></skipped>
        </testcase>
        <testcase name="[It] [sig-network] DNS should answer [Conformance]" status="passed" time="61.234"></testcase>
        <testcase name="[It] [sig-network] Services should a|b` + "`" + `c" status="failed" time="2">
            <failure message="" type="failed">[FAILED] expected 1 &lt; 0&#xA;at service.go:1</failure>
        </testcase>
        <testcase name="[It] [sig-network] Services should not panic" status="panicked" time="2">
            <error message="nil map" type="panicked"></error>
        </testcase>
        <testcase name="[It] [sig-network] Conntrack needs two nodes" status="skipped" time="0.5">
            <skipped message="skipped - Requires at least 2 nodes"></skipped>
        </testcase>
        <testcase name="[It] [sig-network] LoadBalancers [Feature:LoadBalancer] should work" status="skipped" time="0">
            <skipped message="skipped"></skipped>
        </testcase>
        <testcase name="[It] [sig-network] [Feature:IPv6DualStack] should be dual" status="skipped" time="0">
            <skipped message="skipped"></skipped>
        </testcase>
        <testcase name="[SynchronizedAfterSuite]" status="failed" time="1">
            <failure message="" type="failed">namespace left</failure>
        </testcase>
    </testsuite>
</testsuites>`

func parsed(t *testing.T, content string) report {
	t.Helper()
	r, err := parseReport([]byte(content), sigNetwork)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestParseReport(t *testing.T) {
	want := report{
		tests: []result{
			{name: "[sig-network] DNS should answer [Conformance]", outcome: passed, took: 61234 * time.Millisecond},
			{name: "[sig-network] Services should a|b`c", outcome: failed, took: 2 * time.Second, note: "expected 1 < 0"},
			{name: "[sig-network] Services should not panic", outcome: failed, took: 2 * time.Second, note: "nil map"},
			{name: "[sig-network] Conntrack needs two nodes", outcome: skipped, took: 500 * time.Millisecond, note: "Requires at least 2 nodes"},
			{name: "[sig-network] LoadBalancers [Feature:LoadBalancer] should work", outcome: notRun},
			{name: "[sig-network] [Feature:IPv6DualStack] should be dual", outcome: notRun},
		},
		faults: []result{{name: "[SynchronizedAfterSuite]", outcome: failed, took: time.Second, note: "namespace left"}},
	}
	got := parsed(t, madeUp)
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(report{}, result{})); diff != "" {
		t.Errorf("parseReport (-want +got):\n%s", diff)
	}
	if got, want := got.count().String(), "1 passed, 3 failed, 1 skipped"; got != want {
		t.Errorf("count = %q, want %q", got, want)
	}
}

// TestParseReportFaults: what is not understood must end the run, not pass it.
func TestParseReportFaults(t *testing.T) {
	one := func(attributes, inner string) string {
		return fmt.Sprintf(`<testsuites><testsuite><testcase name="[It] [sig-network] x" %s>%s</testcase></testsuite></testsuites>`, attributes, inner)
	}
	tests := []struct{ name, content, want string }{
		{"no XML", "e2e.test: not found", "EOF"},
		{"cut off", madeUp[:len(madeUp)/2], "unexpected EOF"},
		{"other tests only", `<testsuites><testsuite><testcase name="[It] [sig-apps] x" status="passed"></testcase></testsuite></testsuites>`, "no test named"},
		{"new status", one(`status="exploded"`, ""), `unknown status "exploded"`},
		{"no status", one("", ""), `unknown status ""`},
		{"passed and failed", one(`status="passed"`, `<failure message="f"></failure>`), "failed or skipped as well"},
		{"skipped without a word", one(`status="skipped"`, ""), "without a word"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := parseReport([]byte(tt.content), sigNetwork); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("parseReport error = %v, want one with %q", err, tt.want)
			}
		})
	}
}

func TestVerdict(t *testing.T) {
	pass, fail, skip, out := result{outcome: passed}, result{outcome: failed}, result{outcome: skipped}, result{outcome: notRun}
	tests := []struct {
		name string
		r    report
		want bool
	}{
		{"passed and skipped", report{tests: []result{pass, skip, out}}, true},
		{"one failed", report{tests: []result{pass, fail}}, false},
		{"suite failed", report{tests: []result{pass}, faults: []result{fail}}, false},
		{"all skipped", report{tests: []result{skip, out}}, false},
		{"nothing", report{}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.r.verdict(); (err == nil) != tt.want {
				t.Errorf("verdict = %v, want passed: %v", err, tt.want)
			}
		})
	}
}

// TestUnaccounted: a test that silently is not run must not look like one that cannot run.
func TestUnaccounted(t *testing.T) {
	whyNot := func(name string) string { return map[string]string{"known": "a reason"}[name] }
	tests := []struct {
		name string
		r    result
		want bool // accounted for
	}{
		{"passed", result{name: "x", outcome: passed}, true},
		{"left out for a reason", result{name: "known", outcome: notRun}, true},
		{"left out without one", result{name: "x", outcome: notRun}, false},
		{"skipped itself for a known reason", result{name: "x", outcome: skipped, note: knownSkips[0]}, true},
		{"skipped itself", result{name: "known", outcome: skipped, note: "Requires at least 2 nodes"}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := suite{report: report{tests: []result{tt.r}}, whyNot: whyNot}
			if err := s.unaccounted(); (err == nil) != tt.want {
				t.Errorf("unaccounted = %v, want accounted for: %v", err, tt.want)
			}
		})
	}
}

// TestProgress feeds output in pieces that do not respect lines.
func TestProgress(t *testing.T) {
	const out = "  STEP: x\n• [12.3 seconds]\n[sig-network] DNS should answer [Conformance] [sig-network, Conformance]\nk8s.io/dns.go:1\n------\n• [FAILED] [2.0 seconds]\n" +
		"[sig-network] Services should x [It] should x\n[sig-network] no end before\n• [1 seconds]\n[sig-apps] other\n"
	for _, size := range []int{1, 7, len(out)} {
		var shown strings.Builder
		p := &progress{to: &shown}
		for rest := out; rest != ""; {
			n := min(size, len(rest))
			if written, err := p.Write([]byte(rest[:n])); written != n || err != nil {
				t.Fatalf("Write = %d, %v, want %d", written, err, n)
			}
			rest = rest[n:]
		}
		want := "• [12.3 seconds] DNS should answer [Conformance]\n• [FAILED] [2.0 seconds] Services should x [It] should x\n"
		if diff := cmp.Diff(want, shown.String()); diff != "" {
			t.Errorf("in pieces of %d (-want +got):\n%s", size, diff)
		}
	}
}

// TestReadReportMissing: a suite that wrote no report did not pass.
func TestReadReportMissing(t *testing.T) {
	if _, err := readReport(filepath.Join(t.TempDir(), "junit_01.xml"), sigNetwork); !os.IsNotExist(err) {
		t.Errorf("error = %v, want that the report is missing", err)
	}
}
