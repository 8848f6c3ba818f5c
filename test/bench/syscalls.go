// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// listed is how many system calls have a line of their own in the table.
const listed = 24

// syscallsOfAdd makes the table of the system calls that one ADD makes, children's included, beside the reference's. Without strace there is
// none.
func (b *bench) syscallsOfAdd(ctx context.Context, subnets []string) error {
	strace, err := exec.LookPath("strace")
	if err != nil {
		b.report.note("No table of system calls: strace is missing (`make deps`).")
		return nil
	}
	plugins := []*plugin{b.node.margay("calls-margay", subnets...), b.node.ptp("calls-ptp", subnets...)}
	var counts []map[string]int
	for i, p := range plugins {
		ns, err := b.node.namespace(fmt.Sprintf("calls%d", i))
		if err != nil {
			return err
		}
		// Once without: what only the first ADD of a network does is left out.
		for _, command := range []string{"ADD", "DEL"} {
			if _, _, err := p.run(ctx, command, "calls", ns); err != nil {
				return err
			}
		}
		summary := filepath.Join(b.node.dir, "calls")
		traced := &plugin{path: p.path, conf: p.conf, under: []string{strace, "-f", "-qq", "-c", "-U", "calls,name", "-o", summary}}
		if _, _, err := traced.run(ctx, "ADD", "calls", ns); err != nil {
			return err
		}
		text, err := os.ReadFile(summary)
		if err != nil {
			return err
		}
		n, err := parseCalls(string(text))
		if err != nil {
			return err
		}
		counts = append(counts, n)
		if _, _, err := p.run(ctx, "DEL", "calls", ns); err != nil {
			return err
		}
	}
	b.report.tables = append(b.report.tables, callTable(counts[0], counts[1]))
	return nil
}

// parseCalls reads lines of a count and a name.
func parseCalls(summary string) (map[string]int, error) {
	counts := map[string]int{}
	for line := range strings.Lines(summary) {
		fields := strings.Fields(line)
		if len(fields) != 2 || fields[1] == "total" {
			continue
		}
		if n, err := strconv.Atoi(fields[0]); err == nil {
			counts[fields[1]] = n
		}
	}
	if len(counts) == 0 {
		return nil, fmt.Errorf("strace counted nothing:\n%s", summary)
	}
	return counts, nil
}

func callTable(ours, theirs map[string]int) table {
	t := table{title: "System calls of one ADD (dual stack, the process starts included)", head: []string{"system call", "margay", ptpName}}
	add := func(name string, a, b int) {
		t.rows = append(t.rows, []string{name, strconv.Itoa(a), strconv.Itoa(b)})
	}
	names := map[string]bool{}
	var all, rest [2]int
	for i, counts := range []map[string]int{ours, theirs} {
		for name, n := range counts {
			names[name] = true
			all[i] += n
		}
	}
	add("all", all[0], all[1])
	sorted := slices.SortedFunc(maps.Keys(names), func(a, b string) int {
		return cmp.Or(cmp.Compare(ours[b]+theirs[b], ours[a]+theirs[a]), cmp.Compare(a, b))
	})
	for i, name := range sorted {
		if i < listed {
			add(name, ours[name], theirs[name])
			continue
		}
		rest[0] += ours[name]
		rest[1] += theirs[name]
	}
	if rest != [2]int{} {
		add("others", rest[0], rest[1])
	}
	return t
}
