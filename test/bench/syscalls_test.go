// SPDX-License-Identifier: Apache-2.0

package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestCalls(t *testing.T) {
	ours, err := parseCalls("    calls syscall\n--------- ----------------\n       12 read\n        3 bpf\n--------- ----------------\n       15 total\n")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]int{"read": 12, "bpf": 3}, ours); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
	if _, err := parseCalls("nothing\n"); err == nil {
		t.Error("parseCalls() of no counts = nil, want an error")
	}
	want := [][]string{{"all", "15", "21"}, {"read", "12", "20"}, {"bpf", "3", "0"}, {"mount", "0", "1"}}
	if diff := cmp.Diff(want, callTable(ours, map[string]int{"read": 20, "mount": 1}).rows); diff != "" {
		t.Errorf("rows (-want +got):\n%s", diff)
	}
}
