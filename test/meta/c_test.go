// SPDX-License-Identifier: Apache-2.0

package meta

import (
	"bytes"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
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
	if _, err := os.Stat(filepath.Join(root, "bpf/README.md")); err != nil {
		t.Skip("no bpf/README.md yet")
	}
	order := headerOrder(read(t, "bpf/README.md"))
	if len(order) == 0 {
		t.Fatal("bpf/README.md has no numbered list of headers (`1. `lib/pkt.h` …`)")
	}
	for i, header := range order {
		if _, err := os.Stat(filepath.Join(root, "bpf", header)); err != nil {
			t.Errorf("bpf/README.md lists %s, which does not exist", header)
			continue
		}
		for _, included := range includes(t, "bpf/"+header) {
			if at := slices.Index(order, included); at >= i {
				t.Errorf("bpf/%s includes %s, which bpf/README.md lists below it", header, included)
			} else if at < 0 && !strings.HasPrefix(included, "headers/") {
				t.Errorf("bpf/%s includes %s, which bpf/README.md does not list", header, included)
			}
		}
	}
	for _, file := range files(t, func(p string) bool { return strings.HasPrefix(p, "bpf/lib/") && isC(p) }) {
		if header := strings.TrimPrefix(file, "bpf/"); !slices.Contains(order, header) {
			t.Errorf("bpf/README.md does not list %s", header)
		}
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
