// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// measurement is one comparison. Ratio is always Margay's value by the reference's.
type measurement struct {
	ID        string  `json:"id"`
	Section   string  `json:"section"`
	Name      string  `json:"name"`
	Unit      string  `json:"unit"`
	Margay    float64 `json:"margay"` // median of the rounds
	Value     float64 `json:"reference"`
	Reference string  `json:"reference_name"`
	Ratio     float64 `json:"ratio"`
	Target    float64 `json:"target,omitempty"` // for the ratio; 0 = none
	Higher    bool    `json:"higher_is_better,omitempty"`
	OK        bool    `json:"ok"` // true also without a target
	Rounds    int     `json:"rounds"`
	// Smallest and largest round.
	MargayRange    [2]float64 `json:"margay_range"`
	ReferenceRange [2]float64 `json:"reference_range"`

	ours, theirs []float64
}

// add notes one round.
func (m *measurement) add(margay, reference float64) {
	m.ours = append(m.ours, margay)
	m.theirs = append(m.theirs, reference)
}

// finish computes what is reported from the rounds.
func (m *measurement) finish() {
	m.Rounds = len(m.ours)
	m.Margay, m.Value = rounded(median(m.ours)), rounded(median(m.theirs))
	m.MargayRange = [2]float64{rounded(slices.Min(m.ours)), rounded(slices.Max(m.ours))}
	m.ReferenceRange = [2]float64{rounded(slices.Min(m.theirs)), rounded(slices.Max(m.theirs))}
	m.Ratio = math.Round(1000*median(m.ours)/median(m.theirs)) / 1000
	m.OK = m.Target == 0 || (m.Higher && m.Ratio >= m.Target) || (!m.Higher && m.Ratio <= m.Target)
}

// rounded keeps four significant digits: more would be noise.
func rounded(v float64) float64 {
	if v == 0 || math.IsNaN(v) {
		return v
	}
	scale := math.Pow(10, 3-math.Floor(math.Log10(math.Abs(v))))
	return math.Round(v*scale) / scale
}

func number(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	default:
		return fmt.Sprintf("%.2f", v)
	}
}

func span(r [2]float64) string {
	return number(r[0]) + "–" + number(r[1])
}

func (m *measurement) target() string {
	switch {
	case m.Target == 0:
		return ""
	case m.Higher:
		return fmt.Sprintf("≥ %.2f", m.Target)
	default:
		return fmt.Sprintf("≤ %.2f", m.Target)
	}
}

func (m *measurement) verdict() string {
	switch {
	case m.Target == 0:
		return ""
	case m.OK:
		return "yes"
	default:
		return "no"
	}
}

// table is something to show that is no comparison: where time goes.
type table struct {
	title string
	head  []string
	rows  [][]string
}

type report struct {
	started      time.Time
	load         string // average at the start
	reference    string // version of the reference plugins
	measurements []*measurement
	tables       []table
	notes        []string
}

func newReport(bin string) *report {
	version, err := os.ReadFile(filepath.Join(bin, versionFile))
	if err != nil {
		version = []byte("of unknown version")
	}
	return &report{started: time.Now(), load: loadAverage(), reference: string(version)}
}

func (r *report) add(m *measurement) { r.measurements = append(r.measurements, m) }

func (r *report) note(format string, args ...any) {
	r.notes = append(r.notes, fmt.Sprintf(format, args...))
}

func (r *report) finish() {
	for _, m := range r.measurements {
		m.finish()
	}
}

var columns = []string{"", "unit", "margay", "range", "reference", "range", "", "ratio", "target", "ok"}

func (m *measurement) row() []string {
	return []string{
		m.Name, m.Unit, number(m.Margay), span(m.MargayRange), number(m.Value), span(m.ReferenceRange), m.Reference,
		fmt.Sprintf("%.2f", m.Ratio), m.target(), m.verdict(),
	}
}

// bySection returns the measurements' rows as one table per section.
func (r *report) bySection() []table {
	var out []table
	for _, m := range r.measurements {
		if len(out) == 0 || out[len(out)-1].title != m.Section {
			out = append(out, table{title: m.Section, head: columns})
		}
		last := &out[len(out)-1]
		last.rows = append(last.rows, m.row())
	}
	return out
}

// print writes everything as aligned text.
func (r *report) print(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	for _, t := range append(r.bySection(), r.tables...) {
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

// markdown is the part of docs/benchmarks.md that a run writes.
func (r *report) markdown() string {
	var b strings.Builder
	for _, n := range append(r.environment(), r.notes...) {
		fmt.Fprintf(&b, "- %s\n", n)
	}
	for _, t := range append(r.bySection(), r.tables...) {
		fmt.Fprintf(&b, "\n### %s\n\n", t.title)
		fmt.Fprintf(&b, "| %s |\n|%s\n", strings.Join(t.head, " | "), strings.Repeat(" --- |", len(t.head)))
		for _, row := range t.rows {
			fmt.Fprintf(&b, "| %s |\n", strings.Join(row, " | "))
		}
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

// write puts the results where they are committed.
func (r *report) write(doc, data string) error {
	text, err := os.ReadFile(doc)
	if err != nil {
		return err
	}
	replaced, err := replaceBlock(string(text), r.markdown())
	if err != nil {
		return fmt.Errorf("%s: %w", doc, err)
	}
	out, err := json.MarshalIndent(r.measurements, "", "  ")
	if err != nil {
		return fmt.Errorf("encode the results: %w", err)
	}
	return errors.Join(
		os.MkdirAll(filepath.Dir(data), 0o755),
		os.WriteFile(doc, []byte(replaced), 0o644),
		os.WriteFile(data, append(out, '\n'), 0o644),
	)
}
