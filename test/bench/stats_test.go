// SPDX-License-Identifier: Apache-2.0

package main

import (
	"math"
	"testing"
)

func TestStatistics(t *testing.T) {
	tests := []struct {
		name                         string
		values                       []float64
		median, p99, p50, middleMean float64
	}{
		{"one", []float64{3}, 3, 3, 3, 3},
		{"two", []float64{4, 2}, 3, 4, 2, 3},
		{"odd", []float64{9, 1, 5}, 5, 9, 5, 5},
		{"outliers", []float64{1000, 10, 11, 12, 13, 14, 15, 0}, 12.5, 1000, 12, 12.5},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := median(tt.values); got != tt.median {
				t.Errorf("median(%v) = %v, want %v", tt.values, got, tt.median)
			}
			if got := percentile(tt.values, 99); got != tt.p99 {
				t.Errorf("percentile(%v, 99) = %v, want %v", tt.values, got, tt.p99)
			}
			if got := percentile(tt.values, 50); got != tt.p50 {
				t.Errorf("percentile(%v, 50) = %v, want %v", tt.values, got, tt.p50)
			}
			if got := middleMean(tt.values); got != tt.middleMean {
				t.Errorf("middleMean(%v) = %v, want %v", tt.values, got, tt.middleMean)
			}
		})
	}
	if got := median(nil); !math.IsNaN(got) {
		t.Errorf("median of nothing = %v, want NaN", got)
	}
}

func TestPercentileOfHundred(t *testing.T) {
	var values []float64
	for i := range 100 {
		values = append(values, float64(100-i))
	}
	if got := percentile(values, 99); got != 99 {
		t.Errorf("percentile(1…100, 99) = %v, want 99", got)
	}
}

func TestTargets(t *testing.T) {
	tests := []struct {
		name              string
		m                 measurement
		margay, reference []float64
		ratio             float64
		ok                bool
	}{
		{"lower is better, reached", measurement{Target: 0.5}, []float64{4, 5, 6}, []float64{10, 10, 10}, 0.5, true},
		{"lower is better, missed", measurement{Target: 0.5}, []float64{6}, []float64{10}, 0.6, false},
		{"higher is better, reached", measurement{Target: 0.95, Higher: true}, []float64{96}, []float64{100}, 0.96, true},
		{"higher is better, missed", measurement{Target: 0.95, Higher: true}, []float64{94}, []float64{100}, 0.94, false},
		{"no target", measurement{}, []float64{94}, []float64{100}, 0.94, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := tt.m
			for i := range tt.margay {
				m.add(tt.margay[i], tt.reference[i])
			}
			m.finish()
			if m.Ratio != tt.ratio || m.OK != tt.ok {
				t.Errorf("ratio, ok = %v, %v, want %v, %v", m.Ratio, m.OK, tt.ratio, tt.ok)
			}
		})
	}
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
