// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// table is something to show that is no comparison: where time goes.
type table struct {
	title string
	head  []string
	rows  [][]string
}

// report collects what the sections measure.
type report struct {
	started      time.Time
	command      string   // that makes this run
	load         string   // average at the start
	versions     []string // of what Margay is compared with
	measurements []*measurement
	tables       []table
	notes        []string

	// From finish on.
	results     []result
	regressions []regression
}

func newReport(o options) *report {
	version, err := os.ReadFile(filepath.Join(o.inside, versionFile))
	if err != nil {
		version = []byte("of unknown version")
	}
	return &report{
		started: time.Now(), command: o.command(), load: loadAverage(),
		versions: []string{"the reference plugins " + string(version)},
	}
}

// version notes what something was that Margay is compared with, such as "kube-proxy v1.37.0".
func (r *report) version(text string) { r.versions = append(r.versions, text) }

// add takes a measurement into the report. Its rounds may follow until the end of the run.
func (r *report) add(measurements ...*measurement) {
	r.measurements = append(r.measurements, measurements...)
}

func (r *report) note(format string, args ...any) {
	r.notes = append(r.notes, fmt.Sprintf(format, args...))
}

// finish computes the results, and what of them is worse than the baseline.
func (r *report) finish(b baseline) error {
	var errs []error
	seen := map[string]bool{}
	for _, m := range r.measurements {
		res, err := m.result()
		if seen[m.ID] {
			err = fmt.Errorf("%s: measured twice", m.ID)
		}
		seen[m.ID] = true
		errs = append(errs, err)
		r.results = append(r.results, res)
	}
	var compared int
	r.regressions, compared = b.regressions(r.results)
	r.note("%s", r.targets())
	if b.name != "" {
		r.note("Compared with %s, by ratios: %d figures, %d of them worse by more than the rounds' spread explains.",
			b.name, compared, len(r.regressions))
	}
	return errors.Join(errs...)
}

// missed returns the results that are not within their targets.
func (r *report) missed() []result {
	var missed []result
	for _, res := range r.results {
		if !res.OK {
			missed = append(missed, res)
		}
	}
	return missed
}

func (r *report) targets() string {
	with, near, nearMissed := 0, 0, 0
	for _, res := range r.results {
		switch {
		case res.Target == nil:
			continue
		case res.WithinNoise && res.OK:
			near++
		case res.WithinNoise:
			nearMissed++
		}
		with++
	}
	missed := len(r.missed())
	return fmt.Sprintf("%d of %d figures with a target are within it, %d of them within noise; %d miss it, %d of them within noise.",
		with-missed, with, near, missed, nearMissed)
}

// bySection returns the results grouped by section, in the order in which the sections came, and in them the same figure beside its
// references together.
func bySection(results []result) [][]result {
	var groups [][]result
	index := map[string]int{}
	for _, res := range results {
		i, known := index[res.Section]
		if !known {
			i = len(groups)
			index[res.Section] = i
			groups = append(groups, nil)
		}
		groups[i] = append(groups[i], res)
	}
	for _, group := range groups {
		first := map[string]int{}
		for i, res := range group {
			if _, known := first[res.Name]; !known {
				first[res.Name] = i
			}
		}
		slices.SortStableFunc(group, func(a, b result) int { return cmp.Compare(first[a.Name], first[b.Name]) })
	}
	return groups
}

func resultTable(group []result) table {
	t := table{title: group[0].Section, head: columns}
	for _, res := range group {
		t.rows = append(t.rows, res.row())
	}
	return t
}

// attention returns the tables that come first: what is worse than before, and what misses its target.
func (r *report) attention() (tables []table) {
	if len(r.regressions) > 0 {
		tables = append(tables, regressionTable(r.regressions))
	}
	if missed := r.missed(); len(missed) > 0 {
		t := table{title: "Missed targets", head: []string{"", "margay", "reference", "", "ratio", "interval", "target", ""}}
		for _, res := range missed {
			row := res.row()
			t.rows = append(t.rows, []string{
				res.Section + ": " + res.Name, row[2] + " " + res.Unit, row[4], row[6], row[7], row[8], row[9], strings.TrimPrefix(res.doubt(), ", "),
			})
		}
		tables = append(tables, t)
	}
	return tables
}

// print writes everything as aligned text.
func (r *report) print(w io.Writer) error {
	tables := r.attention()
	for _, group := range bySection(r.results) {
		tables = append(tables, resultTable(group))
	}
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	for _, t := range append(tables, r.tables...) {
		fmt.Fprintf(tw, "\n%s\n", t.title)
		for _, row := range append([][]string{t.head}, t.rows...) {
			fmt.Fprintf(tw, "  %s\n", strings.Join(row, "\t"))
		}
		if err := tw.Flush(); err != nil {
			return err
		}
	}
	fmt.Fprintln(tw)
	for _, n := range append(r.environment(), r.notes...) {
		fmt.Fprintln(tw, n)
	}
	return tw.Flush()
}

func (t table) markdown(b *strings.Builder) {
	fmt.Fprintf(b, "| %s |\n|%s\n", strings.Join(t.head, " | "), strings.Repeat(" --- |", len(t.head)))
	for _, row := range t.rows {
		fmt.Fprintf(b, "| %s |\n", strings.Join(row, " | "))
	}
}

// markdown is the part of docs/benchmarks.md that a run writes. plots is the plots' directory as seen from there.
func (r *report) markdown(plots string) string {
	var b strings.Builder
	for _, n := range append(r.environment(), r.notes...) {
		fmt.Fprintf(&b, "- %s\n", n)
	}
	for _, t := range r.attention() {
		fmt.Fprintf(&b, "\n### %s\n\n", t.title)
		t.markdown(&b)
	}
	for _, group := range bySection(r.results) {
		title := group[0].Section
		fmt.Fprintf(&b, "\n### %s\n\n![%s](%s/%s)\n\n", title, title, plots, plotName(title))
		resultTable(group).markdown(&b)
	}
	for _, t := range r.tables {
		fmt.Fprintf(&b, "\n### %s\n\n", t.title)
		t.markdown(&b)
	}
	return b.String()
}

// The tables of docs/benchmarks.md stand between these lines; the text around them is written by hand.
const (
	blockBegin = "<!-- make bench writes from here -->"
	blockEnd   = "<!-- to here -->"
)

// replaceBlock returns doc with other text between the two lines.
func replaceBlock(doc, text string) (string, error) {
	before, rest, begins := strings.Cut(doc, blockBegin+"\n")
	_, after, ends := strings.Cut(rest, blockEnd)
	if !begins || !ends {
		return "", fmt.Errorf("no lines %q and %q", blockBegin, blockEnd)
	}
	return before + blockBegin + "\n\n" + strings.TrimSpace(text) + "\n\n" + blockEnd + after, nil
}

// Where the results are committed.
var (
	docFile   = filepath.Join("docs", "benchmarks.md")
	dataDir   = filepath.Join("docs", "benchmarks")
	latestRun = filepath.Join(dataDir, "latest.json")
)

// write puts the results where they are committed, below top: the tables, the data, and a plot for every section.
func (r *report) write(top string) error {
	doc, data := filepath.Join(top, docFile), filepath.Join(top, latestRun)
	text, err := os.ReadFile(doc)
	if err != nil {
		return err
	}
	replaced, err := replaceBlock(string(text), r.markdown(filepath.Base(dataDir)))
	if err != nil {
		return fmt.Errorf("%s: %w", doc, err)
	}
	out, err := json.MarshalIndent(r.results, "", "  ")
	if err != nil {
		return fmt.Errorf("encode the results: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(data), 0o755); err != nil {
		return err
	}
	return errors.Join(
		writePlots(filepath.Join(top, dataDir), r.results),
		replaceFile(doc, []byte(replaced)),
		replaceFile(data, append(out, '\n')),
	)
}

// replaceFile writes a file at once: whoever reads it, and whatever happens, it is the old one or the new one.
func replaceFile(path string, text []byte) error {
	next := path + ".new"
	err := os.WriteFile(next, text, 0o644)
	if err == nil {
		err = os.Rename(next, path)
	}
	if err != nil {
		return errors.Join(err, os.RemoveAll(next))
	}
	return nil
}
