// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"github.com/prometheus/client_golang/prometheus"
)

// Drops is how many packets were dropped for one reason in one direction since the maps were made.
type Drops struct {
	Reason, Direction string
	Packets           uint64
}

// Map is how full one map is.
type Map struct {
	Map      string
	Entries  int
	Capacity uint32 // 0 if unknown
	// NearlyFull says that the agent reports it for its fill level.
	NearlyFull bool
}

// scraped reads numbers that others count when somebody asks.
type scraped struct {
	drops func() ([]Drops, error)
	maps  func() []Map
}

var (
	dropsDesc = prometheus.NewDesc("margay_drops_total", "Packets that Margay dropped, by reason and the pod's policy direction",
		[]string{"reason", "direction"}, nil)
	entriesDesc  = prometheus.NewDesc("margay_map_entries", "Entries of a map", []string{"map"}, nil)
	capacityDesc = prometheus.NewDesc("margay_map_capacity", "Entries that a map has room for", []string{"map"}, nil)
	nearDesc     = prometheus.NewDesc("margay_map_nearly_full", "1 if a map is so full that it should be made larger", []string{"map"}, nil)
)

// Describe implements prometheus.Collector.
func (s *scraped) Describe(descs chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{dropsDesc, entriesDesc, capacityDesc, nearDesc} {
		descs <- d
	}
}

// Collect implements prometheus.Collector.
func (s *scraped) Collect(out chan<- prometheus.Metric) {
	if s.drops != nil {
		drops, err := s.drops()
		if err != nil {
			out <- prometheus.NewInvalidMetric(dropsDesc, err)
		}
		for _, d := range drops {
			out <- prometheus.MustNewConstMetric(dropsDesc, prometheus.CounterValue, float64(d.Packets), d.Reason, d.Direction)
		}
	}
	if s.maps == nil {
		return
	}
	for _, m := range s.maps() {
		out <- prometheus.MustNewConstMetric(entriesDesc, prometheus.GaugeValue, float64(m.Entries), m.Map)
		if m.Capacity == 0 {
			continue
		}
		near := 0.0
		if m.NearlyFull {
			near = 1
		}
		out <- prometheus.MustNewConstMetric(capacityDesc, prometheus.GaugeValue, float64(m.Capacity), m.Map)
		out <- prometheus.MustNewConstMetric(nearDesc, prometheus.GaugeValue, near, m.Map)
	}
}
