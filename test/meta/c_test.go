// SPDX-License-Identifier: Apache-2.0

package meta

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestNoPrintk: bpf_printk costs on every packet and floods the trace buffer of the whole machine; counters and events are the way.
func TestNoPrintk(t *testing.T) {
	for _, file := range files(t, isC) {
		if bytes.Contains(read(t, file), []byte("printk")) {
			t.Errorf("%s: bpf_printk must not stay", file)
		}
	}
}

var (
	cInclude     = regexp.MustCompile(`(?m)^\s*#\s*include\s+["<]([^">]+)[">]`)
	listedHeader = regexp.MustCompile("(?m)^\\s*\\d+\\.\\s+`((?:lib/)?[a-z0-9_]+\\.h)`")
)

// headerOrder returns the headers of bpf/README.md's numbered list, bottom up.
func headerOrder(readme []byte) []string {
	var order []string
	for _, m := range listedHeader.FindAllSubmatch(readme, -1) {
		order = append(order, string(m[1]))
	}
	return order
}

// TestHeaderOrder requires that a header includes only headers that stand above it in bpf/README.md, so that there is no cycle and each
// subject can be read knowing only what comes before it.
func TestHeaderOrder(t *testing.T) {
	order := headerOrder(read(t, "bpf/README.md"))
	if len(order) == 0 {
		t.Fatal("bpf/README.md has no numbered list of headers (`1. `lib/pkt.h` …`)")
	}
	graph := map[string][]string{}
	for _, file := range files(t, func(p string) bool { return strings.HasPrefix(p, "bpf/lib/") && isC(p) }) {
		graph[strings.TrimPrefix(file, "bpf/")] = includes(t, file)
	}
	for _, fault := range orderFaults(order, graph) {
		t.Error(fault)
	}
}

// base is what lies below every header of lib: the kernel's types and the contract with user space.
var base = []string{"config.h", "datagram.h", "maps.h", "service.h", "types.h", "headers/helpers.h", "headers/kernel.h"}

// orderFaults holds the headers of bpf/lib, with what each includes, against their listed order.
func orderFaults(order []string, graph map[string][]string) []string {
	var faults []string
	for _, header := range slices.Sorted(maps.Keys(graph)) {
		place := slices.Index(order, header)
		if place < 0 {
			faults = append(faults, fmt.Sprintf("bpf/README.md does not list %s", header))
			continue
		}
		for _, included := range graph[header] {
			at := slices.Index(order, included)
			if at >= place {
				faults = append(faults, fmt.Sprintf("%s includes %s, which bpf/README.md does not list above it", header, included))
			} else if at < 0 && !slices.Contains(base, included) {
				faults = append(faults, fmt.Sprintf("%s includes %s, which bpf/README.md does not list", header, included))
			}
		}
	}
	for _, header := range order {
		if _, there := graph[header]; !there && !slices.Contains(base, header) {
			faults = append(faults, fmt.Sprintf("bpf/README.md lists %s, which does not exist", header))
		}
	}
	return faults
}

// TestHeaderOrderBites proves on made-up headers that the rule finds what it is for.
func TestHeaderOrderBites(t *testing.T) {
	order := headerOrder([]byte("Bottom up:\n\n1. `lib/pkt.h` the packet\n2. `lib/nat.h` rewriting\n3. `lib/gone.h`\n"))
	got := orderFaults(order, map[string][]string{
		"lib/pkt.h": {"maps.h", "lib/nat.h"},
		"lib/nat.h": {"lib/pkt.h", "lib/new.h"},
		"lib/new.h": nil,
	})
	want := []string{
		"lib/nat.h includes lib/new.h, which bpf/README.md does not list",
		"bpf/README.md does not list lib/new.h",
		"lib/pkt.h includes lib/nat.h, which bpf/README.md does not list above it",
		"bpf/README.md lists lib/gone.h, which does not exist",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("faults (-want +got):\n%s", diff)
	}
}

// includes returns what a file under bpf/ includes, relative to bpf/: a name is looked up beside the file, then in bpf/.
func includes(t *testing.T, file string) []string {
	t.Helper()
	var found []string
	for _, m := range cInclude.FindAllSubmatch(read(t, file), -1) {
		name := string(m[1])
		beside := path.Join(path.Dir(file), name)
		if _, err := os.Stat(filepath.Join(root, beside)); err == nil {
			name = strings.TrimPrefix(beside, "bpf/")
		}
		found = append(found, name)
	}
	return found
}
