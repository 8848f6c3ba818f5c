// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"log/slog"
	"math/rand/v2"
	"strings"
	"testing"
)

// noisyRounds returns so many rounds of both sides: Margay's figure is ratio times the reference's, each of them off by up to noise, and both
// of them by what else the machine does at the time.
func noisyRounds(rng *rand.Rand, n int, ratio, noise float64) (margay, reference []float64) {
	for range n {
		machine := 100 * (1 + rng.Float64())
		reference = append(reference, machine*(1+noise*(2*rng.Float64()-1)))
		margay = append(margay, ratio*machine*(1+noise*(2*rng.Float64()-1)))
	}
	return margay, reference
}

func noisyResult(t *testing.T, rng *rand.Rand, m measurement, ratio, noise float64) result {
	t.Helper()
	margay, reference := noisyRounds(rng, 12, ratio, noise)
	return mustResult(t, measured(m, margay, reference))
}

func TestRegressions(t *testing.T) {
	steady := func(m measurement, margay float64) result {
		values, others := make([]float64, 10), make([]float64, 10)
		for i := range values {
			values[i], others[i] = margay, 10
		}
		if m.Portable {
			others = nil
		}
		return mustResult(t, measured(m, values, others))
	}
	tests := []struct {
		name    string
		was, is result
		warned  bool
	}{
		{"unchanged", steady(measurement{}, 10), steady(measurement{}, 10), false},
		{"a little slower", steady(measurement{}, 10), steady(measurement{}, 10.4), false},
		{"slower", steady(measurement{}, 10), steady(measurement{}, 11), true},
		{"faster", steady(measurement{}, 10), steady(measurement{}, 5), false},
		{"lower where higher is better", steady(measurement{Higher: true}, 10), steady(measurement{Higher: true}, 9), true},
		{"higher where higher is better", steady(measurement{Higher: true}, 10), steady(measurement{Higher: true}, 15), false},
		{"portable, larger", steady(measurement{Portable: true, Unit: "MiB"}, 60), steady(measurement{Portable: true, Unit: "MiB"}, 66), true},
		{"portable, as it was", steady(measurement{Portable: true, Unit: "MiB"}, 60), steady(measurement{Portable: true, Unit: "MiB"}, 61), false},
		{"another figure", steady(measurement{ID: "a"}, 10), steady(measurement{ID: "b"}, 20), false},
		{"another reference", steady(measurement{Reference: "ptp"}, 10), steady(measurement{Reference: "bridge"}, 20), false},
		{
			"seconds of another machine",
			mustResult(t, measured(measurement{}, []float64{1, 1, 1, 1, 1}, nil)),
			mustResult(t, measured(measurement{}, []float64{2, 2, 2, 2, 2}, nil)), false,
		},
		{
			"one round each, within what is not known",
			mustResult(t, measured(measurement{}, []float64{10}, []float64{10})),
			mustResult(t, measured(measurement{}, []float64{12}, []float64{10})), false,
		},
		{
			"one round each, beyond it",
			mustResult(t, measured(measurement{}, []float64{10}, []float64{10})),
			mustResult(t, measured(measurement{}, []float64{13}, []float64{10})), true,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			worse, _ := baseline{name: "before", results: []result{tt.was}}.regressions([]result{tt.is})
			if (len(worse) > 0) != tt.warned {
				t.Errorf("was %v, is %v: warned %v, want %v", tt.was.Ratio, tt.is.Ratio, len(worse) > 0, tt.warned)
			}
		})
	}
}

// Two runs of the same thing on a machine with other work on it, where the seconds double from round to round.
func TestRegressionsOfNoise(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 1))
	const figures = 2000
	for _, noise := range []float64{0.02, 0.1, 0.3} {
		false0, missed := 0, 0
		for range figures {
			was := noisyResult(t, rng, measurement{}, 1, noise)
			b := baseline{name: "before", results: []result{was}}
			if worse, _ := b.regressions([]result{noisyResult(t, rng, measurement{}, 1, noise)}); len(worse) > 0 {
				false0++
			}
			// Worse by more than noise can make it.
			if worse, _ := b.regressions([]result{noisyResult(t, rng, measurement{}, 1.1+2.5*noise, noise)}); len(worse) == 0 {
				missed++
			}
		}
		if false0 > figures/50 {
			t.Errorf("noise of %v: %d of %d unchanged figures warned of, seed %d", noise, false0, figures, seed)
		}
		if missed > figures/20 {
			t.Errorf("noise of %v: %d of %d worse figures not warned of, seed %d", noise, missed, figures, seed)
		}
	}
}

func TestWarning(t *testing.T) {
	r := newTestReport()
	r.add(measured(measurement{ID: "rr.ipv4", Section: "Traffic", Name: "TCP_RR, IPv4"}, []float64{20, 20, 20, 20, 20}, []float64{10, 10, 10, 10, 10}))
	was := mustResult(t, measured(measurement{ID: "rr.ipv4"}, []float64{11, 11, 11, 11, 11}, []float64{10, 10, 10, 10, 10}))
	if err := r.finish(baseline{name: "the committed results", results: []result{was}}); err != nil {
		t.Fatal(err)
	}
	var log, out bytes.Buffer
	warn(slog.New(slog.NewTextHandler(&log, nil)), r.regressions)
	for _, want := range []string{"level=WARN", "id=rr.ipv4", "was=1.1", "is=2", `change="+82 %"`, `allowed="5 %"`} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("no %s in the log: %s", want, log.String())
		}
	}
	if err := r.print(&out); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"printed": out.String(), "Markdown": r.markdown("benchmarks")} {
		for _, want := range []string{"Worse than the committed results", "Traffic: TCP_RR, IPv4", "+82 %", "1 figures, 1 of them worse"} {
			if !strings.Contains(text, want) {
				t.Errorf("%s: no %q in\n%s", name, want, text)
			}
		}
	}
}
