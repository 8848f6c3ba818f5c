// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
)

// margay are Margay's own metrics, except those that are read at a scrape.
type margay struct {
	build         *prometheus.GaugeVec
	rounds        *prometheus.HistogramVec
	failures      *prometheus.CounterVec
	sweepFailures prometheus.Counter
	gcRemoved     *prometheus.CounterVec
	gcFailures    prometheus.Counter
}

// roundBuckets begin where a round that changes one service lies: 0.1 ms to 13 s.
var roundBuckets = prometheus.ExponentialBuckets(0.0001, 2, 18)

func newMargay() margay {
	return margay{
		build: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "margay_build_info", Help: "1, with the version of the agent and the build of its programs as labels",
		}, []string{"version", "programs"}),
		rounds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "margay_round_duration_seconds", Help: "Duration of the agent's rounds, whole, and of compiling and of writing in them", Buckets: roundBuckets,
		}, []string{"part"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "margay_map_failures_total", Help: "Failed operations on a map; full says that it had no room",
		}, []string{"map", "full"}),
		sweepFailures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "margay_flow_sweep_failures_total", Help: "Sweeps of the flow table that failed",
		}),
		gcRemoved: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "margay_gc_removed_total", Help: "What pods that are gone had left on the node and was removed, by kind",
		}, []string{"kind"}),
		gcFailures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "margay_gc_failures_total", Help: "Looks for what pods have left that could not read or remove everything",
		}),
	}
}

func (m *margay) all() []prometheus.Collector {
	return []prometheus.Collector{m.build, m.rounds, m.failures, m.sweepFailures, m.gcRemoved, m.gcFailures}
}

func (m *margay) round(r Round) {
	m.rounds.WithLabelValues("whole").Observe(r.Duration.Seconds())
	if r.Compiled {
		m.rounds.WithLabelValues("compile").Observe(r.Compile.Seconds())
	}
	if r.Services {
		m.rounds.WithLabelValues("write").Observe(r.Write.Seconds())
	}
	for _, f := range r.Failures {
		m.failures.WithLabelValues(f.Map, strconv.FormatBool(f.Full)).Add(float64(f.Failed))
	}
}
