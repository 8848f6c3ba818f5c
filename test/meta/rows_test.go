// SPDX-License-Identifier: Apache-2.0

package meta

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// cornerCases are the corner cases of many nodes: conditions under which dataplanes were seen to fail. Each has tests of its own, named
// TestRow<number>_<what they show>, so that none is lost when tests are moved.
var cornerCases = map[int]string{
	10: "two frontends, or a frontend and the backend itself, asked from one client port",
	11: "ICMP errors about translated flows: inner header and both checksums, back through tunnel and DSR",
	12: "packets that encapsulation makes too big: the entry node tells the client",
	13: "fragments without ports, in any order",
	14: "segmented UDP datagrams whose headers are pushed or rewritten",
	15: "a backend in the host's network, behind another node's NodePort",
	19: "hairpin: a pod reaches itself through its service",
	20: "forged encapsulated packets",
	21: "the outer header keeps the node's underlay address as its source",
	22: "devices without link layer",
	23: "a bridge inside the pod: MAC addresses that are not the interface's",
	24: "strict reverse path filters",
}

// TestCornerCasesHaveTests requires a test by name for each of them, and a title for each number that tests are named after.
func TestCornerCasesHaveTests(t *testing.T) {
	name := regexp.MustCompile(`(?m)^func TestRow(\d+)_[A-Z]\w*\(t \*testing\.T\)`)
	tested := map[string]bool{}
	for _, file := range files(t, func(path string) bool { return strings.HasSuffix(path, "_test.go") }) {
		for _, m := range name.FindAllSubmatch(read(t, file), -1) {
			tested[string(m[1])] = true
		}
	}
	var numbers []string
	for row, title := range cornerCases {
		number := fmt.Sprint(row)
		numbers = append(numbers, number)
		if !tested[number] {
			t.Errorf("no test is named TestRow%s_…: %s", number, title)
		}
	}
	for number := range tested {
		if !slices.Contains(numbers, number) {
			t.Errorf("tests are named TestRow%s_…, and no corner case has that number", number)
		}
	}
}
