// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func newTestReport() *report {
	return &report{started: time.Now(), command: "make bench", load: "0.10", versions: []string{"ptp v0"}}
}

func TestReplaceBlock(t *testing.T) {
	doc := "# Title\n\n" + blockBegin + "\nold\n" + blockEnd + "\n\nprose\n"
	got, err := replaceBlock(doc, "new\n")
	if want := "# Title\n\n" + blockBegin + "\n\nnew\n\n" + blockEnd + "\n\nprose\n"; err != nil || got != want {
		t.Errorf("replaceBlock() = %q, %v, want %q", got, err, want)
	}
	if _, err := replaceBlock("no block", "new"); err == nil {
		t.Error("replaceBlock of a document without the block: no error")
	}
}

func TestWrite(t *testing.T) {
	top := t.TempDir()
	if err := os.MkdirAll(filepath.Join(top, dataDir), 0o755); err != nil {
		t.Fatal(err)
	}
	for path, text := range map[string]string{
		docFile: "before\n" + blockBegin + "\n" + blockEnd + "\nafter\n", filepath.Join(dataDir, "of-an-old-section.svg"): "<svg/>",
	} {
		if err := os.WriteFile(filepath.Join(top, path), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	r := newTestReport()
	rate := measured(measurement{ID: "rr", Section: "Pod to pod", Name: "TCP_RR", Unit: "1000/s", Higher: true, Target: 0.95, Reference: "bare pair"}, []float64{9}, []float64{10})
	second := rate.beside("ptp")
	second.add(9, 8)
	r.add(rate, second, measured(measurement{ID: "rss", Section: "Memory", Name: "agent", Unit: "MiB", Target: 64, Absolute: true}, []float64{50}, nil))
	if err := r.finish(baseline{}); err != nil {
		t.Fatal(err)
	}
	if err := r.write(top); err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile(filepath.Join(top, docFile))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"Run with `make bench` on ", "load average 0.10 before", "; ptp v0.", "1 of 2 figures with a target are within it, 0 of them within noise; 1 miss it, 0 of them within noise.",
		"### Missed targets\n", "| Pod to pod: TCP_RR | 9.00 1000/s | 10.0 | bare pair | 0.90 |  | ≥ 0.95 | 1 round |\n",
		"![Pod to pod](benchmarks/pod-to-pod.svg)",
		"| TCP_RR | 1000/s | 9.00 |  | 10.0 |  | bare pair | 0.90 |  | ≥ 0.95 | no, 1 round |\n",
		"| TCP_RR | 1000/s | 9.00 |  | 8.00 |  | ptp | 1.12 |  |  |  |\n",
		"| agent | MiB | 50.0 |  |  |  |  |  |  | ≤ 64 MiB | yes, 1 round |\n",
	} {
		if !strings.Contains(string(doc), want) {
			t.Errorf("no %q in\n%s", want, doc)
		}
	}
	var back []result
	text, err := os.ReadFile(filepath.Join(top, latestRun))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &back); err != nil || len(back) != 3 || back[1].ID != "rr~ptp" || *back[1].Ratio != 1.125 || back[1].Target != nil {
		t.Errorf("read back: %+v, %v", back, err)
	}
	plots, err := filepath.Glob(filepath.Join(top, dataDir, "*.svg"))
	for i := range plots {
		plots[i] = filepath.Base(plots[i])
	}
	if left, _ := filepath.Glob(filepath.Join(top, "docs", "*.new")); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
	if want := []string{"memory.svg", "pod-to-pod.svg"}; err != nil || !slices.Equal(plots, want) {
		t.Errorf("plots %v, %v, want %v", plots, err, want)
	}
}

// A file that cannot be replaced stays as it was.
func TestReplaceFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	if err := replaceFile(path, []byte("one")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path+".new", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := replaceFile(path, []byte("two")); err == nil {
		t.Error("replaceFile beside a directory: no error")
	}
	if text, err := os.ReadFile(path); err != nil || string(text) != "one" {
		t.Errorf("the file has %q, %v, want what it had", text, err)
	}
	if err := replaceFile(path, []byte("three")); err != nil {
		t.Error(err)
	}
}

func TestMeasuredTwice(t *testing.T) {
	r := newTestReport()
	r.add(measured(measurement{ID: "same"}, []float64{1}, nil), measured(measurement{ID: "same"}, []float64{1}, nil))
	if err := r.finish(baseline{}); err == nil || !strings.Contains(err.Error(), "same: measured twice") {
		t.Errorf("finish() = %v, want an error about the id", err)
	}
}

func TestBySection(t *testing.T) {
	groups := bySection([]result{
		{ID: "1", Section: "a", Name: "rr"}, {ID: "2", Section: "b"}, {ID: "3", Section: "a", Name: "crr"}, {ID: "1~ptp", Section: "a", Name: "rr"},
	})
	var got []string
	for _, group := range groups {
		got = append(got, "|")
		for _, r := range group {
			got = append(got, r.ID)
		}
	}
	if want := []string{"|", "1", "1~ptp", "3", "|", "2"}; !slices.Equal(got, want) {
		t.Errorf("bySection() = %v, want %v", got, want)
	}
}
