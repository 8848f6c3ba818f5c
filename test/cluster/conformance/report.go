// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"
)

// outcome is what became of one test.
type outcome string

const (
	passed  outcome = "passed"
	failed  outcome = "failed"
	skipped outcome = "skipped" // by itself, while it ran; the note is why
	notRun  outcome = "not run" // left out by the run's expressions
)

// result is one test of a report.
type result struct {
	name    string // as ginkgo reports it, without the type of node
	outcome outcome
	took    time.Duration
	note    string // of a skipped test its own words, of a failed one the first line
}

// report is what one run of the suite said.
type report struct {
	tests []result
	// faults are failures outside of the tests: of what the suite does before and after them.
	faults []result
}

// junit is the part that we read of the report that ginkgo v2.32 writes (reporters/junit_report.go there).
type junit struct {
	Suites []struct {
		Cases []junitCase `xml:"testcase"`
	} `xml:"testsuite"`
}

type junitCase struct {
	Name    string        `xml:"name,attr"`
	Status  string        `xml:"status,attr"`
	Seconds float64       `xml:"time,attr"`
	Skipped *junitMessage `xml:"skipped"`
	Failure *junitMessage `xml:"failure"`
	Error   *junitMessage `xml:"error"`
}

type junitMessage struct {
	Message string `xml:"message,attr"`
	Text    string `xml:",chardata"`
}

// readReport reads a JUnit report and keeps the tests whose names have the prefix. A report without any is an error: something else was run.
func readReport(path, prefix string) (report, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return report{}, err
	}
	r, err := parseReport(content, prefix)
	if err != nil {
		return report{}, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

func parseReport(content []byte, prefix string) (report, error) {
	var decoded junit
	if err := xml.Unmarshal(content, &decoded); err != nil {
		return report{}, err
	}
	var r report
	for _, s := range decoded.Suites {
		for _, c := range s.Cases {
			got, err := c.result()
			if err != nil {
				return report{}, err
			}
			// Names of tests follow the type of their node, "[It] "; other nodes are the suite's own.
			name, isTest := strings.CutPrefix(c.Name, "[It] ")
			switch {
			case !isTest && got.outcome == failed:
				r.faults = append(r.faults, got)
			case isTest && strings.HasPrefix(name, prefix):
				got.name = name
				r.tests = append(r.tests, got)
			}
		}
	}
	if len(r.tests) == 0 {
		return report{}, fmt.Errorf("no test named %s… in the report", prefix)
	}
	return r, nil
}

// result tells what became of a test from its status. An unknown status is an error, not a guess: a kind of failure that ginkgo adds must
// not pass.
func (c junitCase) result() (result, error) {
	r := result{name: c.Name, took: time.Duration(c.Seconds * float64(time.Second))}
	switch c.Status {
	case "passed":
		if c.Failure != nil || c.Error != nil || c.Skipped != nil {
			return r, fmt.Errorf("%s: passed, and failed or skipped as well", c.Name)
		}
		r.outcome = passed
	case "skipped":
		if c.Skipped == nil {
			return r, fmt.Errorf("%s: skipped without a word", c.Name)
		}
		r.outcome = notRun
		// Ginkgo gives only those skips a reason that the test itself asked for.
		if _, why, itself := strings.Cut(c.Skipped.Message, "skipped - "); itself {
			r.outcome, r.note = skipped, firstLine(why)
		}
	case "pending":
		r.outcome, r.note = skipped, "pending upstream"
	case "failed", "timedout", "interrupted", "aborted", "panicked":
		r.outcome, r.note = failed, firstLine(c.failure())
		if r.note == "" {
			r.note = c.Status
		}
	default:
		return r, fmt.Errorf("%s: unknown status %q", c.Name, c.Status)
	}
	return r, nil
}

// failure returns the words of a failed test.
func (c junitCase) failure() string {
	for _, m := range []*junitMessage{c.Failure, c.Error} {
		if m != nil {
			if text := strings.TrimSpace(m.Text); text != "" {
				return text
			}
			return m.Message
		}
	}
	return ""
}

// firstLine shortens a message to what fits into a table.
func firstLine(message string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(strings.TrimPrefix(message, "[FAILED] ")), "\n")
	const most = 200
	if runes := []rune(line); len(runes) > most {
		line = string(runes[:most]) + "…"
	}
	return strings.TrimSpace(line)
}

// count is the summary of a run.
type count struct{ passed, failed, skipped int }

// String is the last line of `make conformance`.
func (c count) String() string {
	return fmt.Sprintf("%d passed, %d failed, %d skipped", c.passed, c.failed, c.skipped)
}

// add adds the tests of another run.
func (c *count) add(d count) {
	c.passed += d.passed
	c.failed += d.failed
	c.skipped += d.skipped
}

// count adds up the tests that were run; the suite's own failures count as failed.
func (r report) count() count {
	c := count{failed: len(r.faults)}
	for _, t := range r.tests {
		switch t.outcome {
		case passed:
			c.passed++
		case failed:
			c.failed++
		case skipped:
			c.skipped++
		}
	}
	return c
}

// verdict returns why a run does not count as passed, nil when it does.
func (r report) verdict() error {
	c := r.count()
	var faults []error
	if c.failed > 0 {
		faults = append(faults, fmt.Errorf("%d failed", c.failed))
	}
	if c.passed == 0 {
		faults = append(faults, errors.New("no test passed: nothing was shown"))
	}
	return errors.Join(faults...)
}
