// SPDX-License-Identifier: Apache-2.0

package program

import (
	"bytes"
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/margay-cni/margay/internal/testutil/privileged"
	"github.com/margay-cni/margay/pkg/bpf/object"
)

const budgetFile = "../../bpf/budget.txt"

const budgetHeader = `# What each program may cost: its instructions, and those that the verifier walks through before it believes them (it gives up at one
# million). Measured on Linux %s; ten per cent more fails the build. To update: go test ./test/program -run TestVerifier -update
# program             instructions  verified
`

var update = flag.Bool("update", false, "rewrite "+budgetFile)

// switches are the boolean constants of bpf/config.h.
var switches = []string{"cfg_drop_events"}

// cost is what one program takes, the most over all combinations of switches.
type cost struct{ instructions, verified int }

// TestVerifier loads every program with every combination of its switches and compares what it costs with bpf/budget.txt.
func TestVerifier(t *testing.T) {
	privileged.Require(t)
	got := map[string]cost{}
	for combination := range 1 << len(switches) {
		specs, err := object.ProgramSpecs()
		must(t, err)
		for _, spec := range specs {
			for i, name := range switches {
				if v, ok := spec.Variables[name]; ok {
					must(t, v.Set(uint8(combination>>i&1)))
				}
			}
			for name, c := range load(t, spec) {
				got[name] = cost{max(c.instructions, got[name].instructions), max(c.verified, got[name].verified)}
			}
		}
	}
	if *update {
		must(t, os.WriteFile(budgetFile, formatBudget(t, got), 0o644))
	}
	if _, err := os.Stat("../../go.mod"); err != nil {
		t.Skip("all loaded; outside the repository there is no budget to compare with")
	}
	want, kernel := readBudget(t)
	if !strings.HasPrefix(release(t), kernel+".") {
		// Each verifier walks its own ways.
		t.Logf("verified instructions are not compared: bpf/budget.txt is of Linux %s, this is %s", kernel, release(t))
		for name, c := range got {
			got[name] = cost{instructions: c.instructions}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(got)) {
		b, ok := want[name]
		if !ok {
			t.Errorf("%s: no line in bpf/budget.txt; add\n%s", name, line(name, got[name]))
			continue
		}
		if over(got[name].instructions, b.instructions) || over(got[name].verified, b.verified) {
			t.Errorf("%s: %d instructions, %d verified, want at most 10 %% more than %d and %d; if it is worth it:\n%s",
				name, got[name].instructions, got[name].verified, b.instructions, b.verified, line(name, got[name]))
		}
		delete(want, name)
	}
	for name := range want {
		t.Errorf("%s: in bpf/budget.txt, but no object has it", name)
	}
}

func over(got, budget int) bool { return got*10 > budget*11 }

// load verifies an object's programs over maps of its own and returns what they cost.
func load(t *testing.T, spec *ebpf.CollectionSpec) map[string]cost {
	t.Helper()
	coll, err := ebpf.NewCollection(spec)
	if err != nil {
		t.Fatalf("load: %+v", err)
	}
	defer coll.Close()
	costs := map[string]cost{}
	for name, prog := range coll.Programs {
		info, err := prog.Info()
		must(t, err)
		verified, ok := info.VerifiedInstructions()
		if !ok {
			t.Skip("this kernel does not tell the verified instructions (5.16)")
		}
		costs[name] = cost{instructions: len(spec.Programs[name].Instructions), verified: int(verified)}
	}
	return costs
}

func line(name string, c cost) string {
	return fmt.Sprintf("%-20s  %12d  %8d", name, c.instructions, c.verified)
}

func formatBudget(t *testing.T, costs map[string]cost) []byte {
	t.Helper()
	version := strings.SplitN(release(t), ".", 3)
	var out bytes.Buffer
	fmt.Fprintf(&out, budgetHeader, strings.Join(version[:2], "."))
	for _, name := range slices.Sorted(maps.Keys(costs)) {
		fmt.Fprintln(&out, line(name, costs[name]))
	}
	return out.Bytes()
}

func release(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("/proc/sys/kernel/osrelease")
	must(t, err)
	return string(bytes.TrimSpace(b))
}

// readBudget returns what each program may cost, and the kernel (major.minor) that says so.
func readBudget(t *testing.T) (budget map[string]cost, kernel string) {
	t.Helper()
	content, err := os.ReadFile(budgetFile)
	must(t, err)
	budget = map[string]cost{}
	for l := range strings.Lines(string(content)) {
		if strings.HasPrefix(l, "#") {
			if _, after, ok := strings.Cut(l, "Linux "); ok {
				kernel, _, _ = strings.Cut(after, ";")
			}
			continue
		}
		var name string
		var c cost
		if _, err := fmt.Sscan(l, &name, &c.instructions, &c.verified); err != nil {
			t.Fatalf("bpf/budget.txt: %q: %v", l, err)
		}
		budget[name] = c
	}
	return budget, kernel
}
