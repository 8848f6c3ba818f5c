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

func TestMedianInterval(t *testing.T) {
	upTo := func(n int) (values []float64) {
		for i := range n {
			values = append(values, float64(n-i))
		}
		return values
	}
	// From tables of the sign test.
	for n, want := range map[int][2]float64{0: {}, 5: {}, 6: {1, 6}, 8: {1, 8}, 9: {2, 8}, 10: {2, 9}, 12: {3, 10}, 25: {8, 18}, 40: {14, 27}, 200: {86, 115}} {
		if got, ok := medianInterval(upTo(n)); got != want || ok != (n > 5) {
			t.Errorf("medianInterval of %d values = %v, %v, want %v", n, got, ok, want)
		}
	}
}
