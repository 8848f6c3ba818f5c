// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"math"
	"strings"
	"testing"
)

// measured returns a measurement with these rounds; without reference rounds it has no reference.
func measured(m measurement, margay, reference []float64) *measurement {
	if m.ID == "" {
		m.ID = "id"
	}
	if len(reference) > 0 && m.Reference == "" {
		m.Reference = "other"
	}
	m.ours, m.theirs = margay, reference
	return &m
}

func mustResult(t *testing.T, m *measurement) result {
	t.Helper()
	r, err := m.result()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestTargets(t *testing.T) {
	tests := []struct {
		name              string
		m                 measurement
		margay, reference []float64
		ratio             float64 // 0: none
		ok                bool
		target            string
	}{
		{"lower is better, reached", measurement{Target: 0.5}, []float64{4, 5, 6}, []float64{10, 10, 10}, 0.5, true, "≤ 0.50"},
		{"lower is better, missed", measurement{Target: 0.5}, []float64{6}, []float64{10}, 0.6, false, "≤ 0.50"},
		{"higher is better, reached", measurement{Target: 0.95, Higher: true}, []float64{96}, []float64{100}, 0.96, true, "≥ 0.95"},
		{"higher is better, missed", measurement{Target: 0.95, Higher: true}, []float64{94}, []float64{100}, 0.94, false, "≥ 0.95"},
		{"no target", measurement{}, []float64{94}, []float64{100}, 0.94, true, ""},
		{"own figure, reached", measurement{Target: 64, Absolute: true, Unit: "MiB"}, []float64{60, 63, 70}, nil, 0, true, "≤ 64 MiB"},
		{"own figure, missed", measurement{Target: 64, Absolute: true, Unit: "MiB"}, []float64{65}, nil, 0, false, "≤ 64 MiB"},
		{"own figure beside a reference", measurement{Target: 20, Absolute: true, Unit: "ms"}, []float64{30}, []float64{60}, 0.5, false, "≤ 20 ms"},
		{"no reference, no target", measurement{}, []float64{1}, nil, 0, true, ""},
		{"ratio of the rounds, not of the medians", measurement{}, []float64{10, 40, 30}, []float64{10, 20, 10}, 2, true, ""},
		{"reference of nothing", measurement{}, []float64{1}, []float64{0}, 0, true, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := mustResult(t, measured(tt.m, tt.margay, tt.reference))
			ratio := 0.0
			if r.Ratio != nil {
				ratio = *r.Ratio
			}
			if ratio != tt.ratio || r.OK != tt.ok || r.target() != tt.target {
				t.Errorf("ratio, ok, target = %v, %v, %q, want %v, %v, %q", ratio, r.OK, r.target(), tt.ratio, tt.ok, tt.target)
			}
		})
	}
}

// A verdict that more rounds could turn says so, whichever it is.
func TestNoise(t *testing.T) {
	around := func(center float64) (rounds []float64) { // its interval is 0.02 to both sides, and not what the extremes are
		for i := range 12 {
			rounds = append(rounds, center+float64(i-6)/150)
		}
		rounds[0], rounds[11] = center/2, center*2
		return rounds
	}
	ones := []float64{1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}
	tests := []struct {
		name              string
		m                 measurement
		margay, reference []float64
		verdict           string
	}{
		{"far above", measurement{Higher: true, Target: 0.95}, around(1), ones, "yes"},
		{"just above", measurement{Higher: true, Target: 0.95}, around(0.96), ones, "yes, within noise"},
		{"just below", measurement{Higher: true, Target: 0.95}, around(0.94), ones, "no, within noise"},
		{"far below", measurement{Higher: true, Target: 0.95}, around(0.9), ones, "no"},
		{"lower is better, far below", measurement{Target: 1.05}, around(1), ones, "yes"},
		{"lower is better, just above", measurement{Target: 1.05}, around(1.06), ones, "no, within noise"},
		{"own figure", measurement{Target: 1.05, Absolute: true}, around(1.06), nil, "no, within noise"},
		{"own figure beside a reference that varies", measurement{Target: 1.05, Absolute: true}, ones, around(1), "yes"},
		{"five rounds", measurement{Target: 1.05}, ones[:5], ones[:5], "yes, 5 rounds"},
		{"one round", measurement{Target: 1.05}, ones[:1], ones[:1], "yes, 1 round"},
		{"six rounds", measurement{Target: 1.05}, ones[:6], ones[:6], "yes"},
		{"no target", measurement{}, around(1), ones, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if r := mustResult(t, measured(tt.m, tt.margay, tt.reference)); r.verdict() != tt.verdict {
				t.Errorf("verdict %q, want %q; ratio %s, interval %s, target %s", r.verdict(), tt.verdict, r.interval(), r.interval(), r.target())
			}
		})
	}
}

func TestResultsWithoutMeaning(t *testing.T) {
	tests := map[string]*measurement{
		"no rounds":                      measured(measurement{}, nil, nil),
		"reference without rounds":       measured(measurement{Reference: "other"}, []float64{1}, nil),
		"rounds of nobody":               {ID: "id", ours: []float64{1}, theirs: []float64{1}},
		"no number":                      measured(measurement{}, []float64{math.NaN()}, nil),
		"target for a ratio that is not": measured(measurement{Target: 1}, []float64{1}, nil),
	}
	for name, m := range tests {
		if r, err := m.result(); err == nil {
			t.Errorf("%s: result %+v, want an error", name, r)
		}
	}
}

func TestResultEncoding(t *testing.T) {
	alone, err := json.Marshal(mustResult(t, measured(measurement{ID: "a", Name: "n", Unit: "MiB"}, []float64{1, 3, 2}, nil)))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"margay":2,`, `"reference":null`, `"reference_name":""`, `"ratio":null`, `"target":null`, `"ok":true`, `"margay_range":[1,3]`} {
		if !strings.Contains(string(alone), want) {
			t.Errorf("without reference: no %s in %s", want, alone)
		}
	}
	beside, err := json.Marshal(mustResult(t, measured(measurement{Target: 0.5}, []float64{4}, []float64{10})))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"reference":10,"reference_name":"other","ratio":0.4,"target":0.5,"target_of":"ratio","ok":true`} {
		if !strings.Contains(string(beside), want) {
			t.Errorf("with reference: no %s in %s", want, beside)
		}
	}
}

func TestBeside(t *testing.T) {
	m := &measurement{ID: "rr", Section: "s", Name: "n", Unit: "µs", Reference: "first", Target: 1, Higher: true}
	got := m.beside("second one")
	if got.ID != "rr~second-one" || got.Reference != "second one" || got.Target != 0 || got.Name != "n" || !got.Higher || got.Section != "s" || got.Unit != "µs" {
		t.Errorf("beside() = %+v", got)
	}
}

func TestRatioDigits(t *testing.T) {
	for margay, want := range map[float64]string{0.9789: "0.979", 0.98: "0.98", 0.961: "0.96", 1.5: "1.50"} {
		r := mustResult(t, measured(measurement{Target: 0.98, Higher: true}, []float64{margay}, []float64{1}))
		if got := r.ratio(); got != want {
			t.Errorf("ratio of %v = %q, want %q", margay, got, want)
		}
	}
}

func TestNumbers(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 0.0123: "0.0123", 0.5: "0.50", 14.63: "14.6", 1234.5: "1234"} {
		if got := number(v); got != want {
			t.Errorf("number(%v) = %q, want %q", v, got, want)
		}
	}
	if got := rounded(0.0123456); got != 0.01235 {
		t.Errorf("rounded(0.0123456) = %v, want 0.01235", got)
	}
}
