// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// facts say where a report comes from. All are asked of the cluster when it is made.
type facts struct {
	date       string // of the run, YYYY-MM-DD
	version    string // of Margay
	kubernetes string
	nodes      int
	families   string // of the nodes' pod ranges, for example "IPv4, IPv6"
	kernel     string
	runtime    string // container runtime
	network    string // what connects the pods
	command    string
	took       time.Duration
}

// render returns docs/conformance.md: the summary, what could not run and why, and every test of the report with what became of it.
func render(f facts, suites []suite) string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Conformance\n\n<!-- Written by make conformance. Do not edit. -->\n\n")
	fmt.Fprintf(&b, "The upstream tests of Kubernetes' SIG Network, run on the test cluster: fake nodes on one machine, whose only network is %s.\n\n", f.network)
	fmt.Fprintf(&b, "| | |\n| --- | --- |\n")
	for _, row := range [][2]string{
		{"run", f.date + ", in " + f.took.Round(time.Second).String()},
		{"by", "`" + f.command + "`"},
		{"Margay", "`" + f.version + "`"},
		{"tests of", "Kubernetes " + f.kubernetes},
		{"cluster", fmt.Sprintf("%d nodes, %s, Linux %s, %s", f.nodes, f.families, f.kernel, f.runtime)},
	} {
		fmt.Fprintf(&b, "| %s | %s |\n", row[0], row[1])
	}
	fmt.Fprintf(&b, "\n## Result\n\n| tests | passed | failed | skipped | not run |\n| --- | --- | --- | --- | --- |\n")
	for _, row := range summary(suites) {
		fmt.Fprintf(&b, "| %s | %d | %d | %d | %d |\n", row.name, row.passed, row.failed, row.skipped, row.notRun)
	}
	b.WriteString("\n*Skipped* tests were started and found themselves that they do not apply; *not run* are those that were left out, with the reason below.\n")
	renderFaults(&b, suites)
	renderNotRun(&b, suites)
	renderTests(&b, suites)
	return b.String()
}

// suite is the report of one test program, and its title in the document.
type suite struct {
	title string
	report
	// group sorts the tests; whyNot tells why one was left out.
	group  func(name string) string
	whyNot func(name string) string
}

// summaryRow counts one kind of tests.
type summaryRow struct {
	name string
	count
	notRun int
}

// summary counts the tests by group, those marked as conformance tests, and all.
func summary(suites []suite) []summaryRow {
	conformance, all := summaryRow{name: "**[Conformance]**"}, summaryRow{name: "**all**"}
	groups := map[string]*summaryRow{}
	for _, s := range suites {
		for _, t := range s.tests {
			name := s.group(t.name)
			if name == "" {
				name = "cannot run here"
			}
			if groups[name] == nil {
				groups[name] = &summaryRow{name: name}
			}
			rows := []*summaryRow{groups[name], &all}
			if strings.Contains(t.name, "[Conformance]") {
				rows = append(rows, &conformance)
			}
			for _, row := range rows {
				row.add(t.outcome)
			}
		}
	}
	var sorted []summaryRow
	for _, row := range groups {
		sorted = append(sorted, *row)
	}
	slices.SortFunc(sorted, func(a, b summaryRow) int { return cmp.Compare(a.name, b.name) })
	return append([]summaryRow{conformance}, append(sorted, all)...)
}

func (r *summaryRow) add(o outcome) {
	switch o {
	case passed:
		r.passed++
	case failed:
		r.failed++
	case skipped:
		r.skipped++
	case notRun:
		r.notRun++
	}
}

// renderFaults lists failures outside of the tests, if there are any.
func renderFaults(b *strings.Builder, suites []suite) {
	for _, s := range suites {
		for _, f := range s.faults {
			fmt.Fprintf(b, "\n**Failed outside of the tests:** %s: %s\n", code(f.name), cell(f.note))
		}
	}
}

// renderNotRun lists the tests that were left out, by reason.
func renderNotRun(b *strings.Builder, suites []suite) {
	byReason := map[string][]string{}
	var reasons []string
	for _, s := range suites {
		for _, t := range s.tests {
			if t.outcome != notRun {
				continue
			}
			why := s.whyNot(t.name)
			if byReason[why] == nil {
				reasons = append(reasons, why)
			}
			byReason[why] = append(byReason[why], t.name)
		}
	}
	if len(reasons) == 0 {
		return
	}
	slices.Sort(reasons)
	b.WriteString("\n## Not run, and why\n\n| why | tests |\n| --- | --- |\n")
	for _, why := range reasons {
		names := byReason[why]
		slices.Sort(names)
		for i := range names {
			names[i] = code(short(names[i]))
		}
		fmt.Fprintf(b, "| %s | %s |\n", cell(why), strings.Join(names, "<br>"))
	}
}

// renderTests lists every test that was run.
func renderTests(b *strings.Builder, suites []suite) {
	for _, s := range suites {
		tests := slices.DeleteFunc(slices.Clone(s.tests), func(t result) bool { return t.outcome == notRun })
		if len(tests) == 0 {
			continue
		}
		slices.SortFunc(tests, func(x, y result) int {
			return cmp.Or(cmp.Compare(s.group(x.name), s.group(y.name)), cmp.Compare(x.name, y.name))
		})
		fmt.Fprintf(b, "\n## %s\n\n| group | test | result | seconds | |\n| --- | --- | --- | ---: | --- |\n", s.title)
		for _, t := range tests {
			fmt.Fprintf(b, "| %s | %s | %s | %.0f | %s |\n", s.group(t.name), code(short(t.name)), mark(t.outcome), t.took.Seconds(), cell(t.note))
		}
	}
}

// short drops what every name has.
func short(name string) string { return strings.TrimSpace(strings.TrimPrefix(name, sigNetwork)) }

// mark makes the unusual visible in a long table.
func mark(o outcome) string {
	if o == passed {
		return string(o)
	}
	return "**" + string(o) + "**"
}

// code quotes a name as code in a table cell.
func code(name string) string {
	return "`" + strings.ReplaceAll(strings.ReplaceAll(name, "`", "'"), "|", "¦") + "`"
}

// cell makes foreign words harmless in a table cell.
func cell(text string) string {
	return strings.NewReplacer("|", `\|`, "\n", " ", "<", "&lt;", "*", `\*`, "_", `\_`, "[", `\[`, "`", "'").Replace(text)
}
