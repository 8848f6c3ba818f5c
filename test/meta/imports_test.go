// SPDX-License-Identifier: Apache-2.0

package meta

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const module = "github.com/margay-cni/margay/"

// floors says how high each package is built: it may import only what lies on lower floors (docs/design/0002-import-floors.md).
var floors = map[string]int{
	"plugin": 6, "plugin/loader": 6, "ipam": 6, "agent": 6, "ctl": 6, "install": 6,
	"pkg/agent": 5, "pkg/cni": 5,
	"pkg/k8s": 4, "pkg/manifest": 4, "pkg/policy": 4, "pkg/service": 4, "pkg/node": 4, "pkg/datapath": 4, "pkg/flow": 4,
	"pkg/health": 4,
	"pkg/state":  3, "pkg/endpoint": 3, "pkg/pins": 3, "pkg/link": 3, "pkg/netfilter": 3, "pkg/netns": 3, "pkg/ipam": 3, "pkg/metrics": 3,
	"pkg/bpf": 2, "pkg/bpf/object": 2,
	"pkg/addr": 1, "pkg/dump": 1, "pkg/rtnetlink": 1, "pkg/jsonwrite": 1, "conf": 1,
}

// A ban forbids packages to import others, directly or through whatever they import.
type ban struct {
	from    []string // relative to the module
	imports []string // a package and everything below it
	why     string
}

var bans = []ban{
	{
		from:    []string{"pkg/policy", "pkg/service", "pkg/node", "pkg/state"},
		imports: []string{"github.com/vishvananda/netlink", "github.com/cilium/ebpf", "k8s.io/client-go", module + "pkg/bpf"},
		why:     "compilers are functions from a snapshot to desired state: they run, and are tested, without a kernel and without a cluster",
	},
	{
		from:    []string{"pkg/ipam", "pkg/endpoint", "ipam"},
		imports: []string{"github.com/vishvananda/netlink", "github.com/cilium/ebpf"},
		why:     "addresses and records are files: they must be readable and releasable where no network or BPF call works",
	},
	{
		from:    []string{"plugin", "ipam", "pkg/cni"},
		imports: []string{"k8s.io", "sigs.k8s.io"},
		why:     "pods start without a daemon and without the API server, and every process start pays for what a binary links",
	},
	{
		from:    []string{"plugin", "ipam", "pkg/cni"},
		imports: []string{module + "pkg/netfilter", "github.com/google/nftables"},
		why:     "the nftables table is the agent's, and every process start pays for what a binary links",
	},
	{
		from:    []string{"plugin", "pkg/cni", "pkg/pins", "pkg/bpf"},
		imports: []string{"github.com/cilium/ebpf", module + "pkg/datapath", module + "pkg/bpf/object"},
		why:     "what loads programs is margay-loader's: it costs every process that links it a third of a millisecond before main, and ADD only opens what is pinned",
	},
	{
		from:    []string{"plugin", "pkg/cni"},
		imports: []string{"github.com/containernetworking/cni/pkg/skel", "github.com/containernetworking/cni/pkg/utils"},
		why:     "they compile regular expressions before main; pkg/cni reads a command itself",
	},
	{
		from:    []string{"plugin", "plugin/loader", "ipam", "pkg/cni", "ctl", "install"},
		imports: []string{"github.com/prometheus"},
		why:     "metrics are the agent's: what runs for a moment has nobody to scrape it",
	},
	{
		from:    []string{"pkg/health", "pkg/metrics"},
		imports: []string{"github.com/vishvananda/netlink", "github.com/cilium/ebpf", "k8s.io/client-go", module + "pkg/bpf"},
		why:     "they answer what they are told: numbers come from who has them, so both are tested without a kernel",
	},
	{
		from:    []string{"pkg/addr"},
		imports: []string{module},
		why:     "everything may use addresses, so addresses use nothing of ours",
	},
	{
		from:    []string{"pkg/bpf"},
		imports: []string{"github.com/vishvananda/netlink", "k8s.io"},
		why:     "the map types are the contract between programs and user space; devices and API objects are none of its business",
	},
	{
		from:    []string{"pkg/datapath", "pkg/pins", "pkg/flow", "pkg/link", "pkg/netfilter", "pkg/netns"},
		imports: []string{"k8s.io"},
		why:     "what reaches the kernel does not know where it came from: both sources fill the same state",
	},
}

type listed struct {
	ImportPath string
	Imports    []string
	Standard   bool
}

// importGraph returns the imports, without those of tests, of every package of the module and of all that they depend on.
func importGraph(t *testing.T) map[string][]string {
	t.Helper()
	cmd := exec.Command("go", "list", "-e", "-deps", "-json=ImportPath,Imports,Standard", "./...")
	cmd.Dir = root
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v", cmd, err)
	}
	graph := map[string][]string{}
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p listed
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return graph
		} else if err != nil {
			t.Fatalf("decode the output of %v: %v", cmd, err)
		}
		if !p.Standard {
			graph[p.ImportPath] = p.Imports
		}
	}
}

// TestImportDirection holds every package to its floor.
func TestImportDirection(t *testing.T) {
	for _, fault := range floorFaults(importGraph(t)) {
		t.Error(fault)
	}
}

func floorFaults(graph map[string][]string) []string {
	var faults []string
	for _, path := range slices.Sorted(maps.Keys(graph)) {
		from, ours := strings.CutPrefix(path, module)
		if !ours || strings.HasPrefix(from, "internal/testutil/") || strings.HasPrefix(from, "test/") || strings.HasPrefix(from, "hack/") {
			continue
		}
		floor, known := floors[from]
		if !known {
			faults = append(faults, fmt.Sprintf("%s stands on no floor: give it one here and in docs/design/0002-import-floors.md", from))
			continue
		}
		for _, imported := range graph[path] {
			to, ours := strings.CutPrefix(imported, module)
			switch {
			case !ours:
			case floors[to] == 0:
				faults = append(faults, fmt.Sprintf("%s imports %s, which only tests and scripts may use", from, to))
			case floors[to] >= floor:
				faults = append(faults, fmt.Sprintf("%s (floor %d) imports %s (floor %d): imports go downwards only, and rooms on one floor do not know each other; what both need belongs on a lower floor, what joins them on a higher one", from, floor, to, floors[to]))
			}
		}
	}
	return faults
}

// TestImportBans holds every ban, also against what is imported through other packages.
func TestImportBans(t *testing.T) {
	for _, fault := range banFaults(importGraph(t)) {
		t.Error(fault)
	}
}

func banFaults(graph map[string][]string) []string {
	var faults []string
	for _, b := range bans {
		for _, from := range b.from {
			for _, banned := range b.imports {
				if chain := importChain(graph, module+from, banned); chain != nil {
					faults = append(faults, fmt.Sprintf("%s must not import %s, because %s; it does: %s", from, banned, b.why, strings.Join(chain, " → ")))
				}
			}
		}
	}
	return faults
}

// importChain returns the shortest way from one package to another at or below banned, nil when there is none.
func importChain(graph map[string][]string, from, banned string) []string {
	banned = strings.TrimSuffix(banned, "/")
	before := map[string]string{from: ""}
	for queue := []string{from}; len(queue) > 0; queue = queue[1:] {
		for _, next := range graph[queue[0]] {
			if _, seen := before[next]; seen {
				continue
			}
			before[next] = queue[0]
			if next != banned && !strings.HasPrefix(next, banned+"/") {
				queue = append(queue, next)
				continue
			}
			var chain []string
			for at := next; at != ""; at = before[at] {
				chain = append(chain, at)
			}
			slices.Reverse(chain)
			return chain
		}
	}
	return nil
}

// TestImportRulesBite proves on made-up imports that the rules find what they are for.
func TestImportRulesBite(t *testing.T) {
	graph := map[string][]string{
		module + "pkg/policy":   {module + "pkg/state", module + "pkg/service"},
		module + "pkg/service":  {module + "pkg/state", "example.org/metrics"},
		module + "pkg/state":    {module + "internal/testutil/privileged"},
		module + "pkg/surprise": nil,
		"example.org/metrics":   {"k8s.io/client-go/rest"},
		module + "plugin":       {module + "pkg/cni"},
		module + "pkg/cni":      {"k8s.io/api/core/v1"},
	}
	tests := []struct {
		name string
		got  []string
		want []string // beginnings of the faults
	}{
		{"floors", floorFaults(graph), []string{
			"pkg/policy (floor 4) imports pkg/service (floor 4)",
			"pkg/state imports internal/testutil/privileged",
			"pkg/surprise stands on no floor",
		}},
		{"bans", banFaults(graph), []string{
			"pkg/policy must not import k8s.io/client-go",
			"pkg/service must not import k8s.io/client-go",
			"plugin must not import k8s.io",
			"pkg/cni must not import k8s.io",
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := slices.Clone(tt.got)
			for i := range min(len(got), len(tt.want)) {
				if strings.HasPrefix(got[i], tt.want[i]) {
					got[i] = tt.want[i]
				}
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("faults (-want +got):\n%s", diff)
			}
		})
	}
}
