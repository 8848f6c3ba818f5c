// SPDX-License-Identifier: Apache-2.0

// Package metrics is what the agent tells Prometheus: the names that dashboards of kube-proxy use (row M1 of the kube-proxy contract in
// the design documents), and Margay's own, which begin with margay_. It owns names, labels and help texts; every label has a bounded set of
// values, and what the kernel or the agent counts anyhow is read when somebody scrapes, not copied.
//
// One round of the agent writes both address families, so where kube-proxy has a value for each family, both have that of the round.
// All methods may be called concurrently.
package metrics

import (
	"log/slog"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// families are the values of the label ip_family.
var families = []string{IPv4, IPv6}

// The address families as the label ip_family names them.
const (
	IPv4 = "IPv4"
	IPv6 = "IPv6"
)

// bothFamilies is the value of ip_family where one number stands for both families and adding up twice would be wrong.
const bothFamilies = "all"

// Config is what New needs.
type Config struct {
	// Version is the agent's, Programs the build of the BPF programs.
	Version, Programs string
	// Drops and Maps are read at each scrape; nil: there are none.
	Drops func() ([]Drops, error)
	Maps  func() []Map
	Log   *slog.Logger
}

// Metrics holds every metric of one agent.
type Metrics struct {
	registry *prometheus.Registry
	log      *slog.Logger
	kubeproxy
	margay
}

// New returns the metrics of one agent, in a registry of their own.
func New(cfg Config) *Metrics {
	m := &Metrics{registry: prometheus.NewRegistry(), log: cfg.Log, kubeproxy: newKubeproxy(), margay: newMargay()}
	if m.log == nil {
		m.log = slog.New(slog.DiscardHandler)
	}
	m.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	m.registry.MustRegister(m.kubeproxy.all()...)
	m.registry.MustRegister(m.margay.all()...)
	m.registry.MustRegister(&scraped{drops: cfg.Drops, maps: cfg.Maps})
	m.build.WithLabelValues(cfg.Version, cfg.Programs).Set(1)
	return m
}

// Handler answers a scrape. What cannot be read is logged, and missing in the answer.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{
		ErrorLog:      slog.NewLogLogger(m.log.Handler(), slog.LevelWarn),
		ErrorHandling: promhttp.ContinueOnError,
	})
}

// Registry is for who wants to gather without HTTP.
func (m *Metrics) Registry() *prometheus.Registry {
	return m.registry
}

// Queued notes an input that is not in the maps yet, with how many services and slices changed since the one before.
func (m *Metrics) Queued(at time.Time, services, slices int) {
	for _, f := range families {
		m.lastQueued.WithLabelValues(f).Set(seconds(at))
	}
	m.serviceChanges.Add(float64(services))
	m.endpointChanges.Add(float64(slices))
	m.servicesPending.Add(float64(services))
	m.endpointsPending.Add(float64(slices))
}

// Round is one pass of the agent's pipeline.
type Round struct {
	// Ended is when it ended; the durations are those of the whole round, and of compiling and of writing in it.
	Ended                    time.Time
	Duration, Compile, Write time.Duration
	// Whole says that everything was compared with the kernel, Compiled that something new was compiled.
	Whole, Compiled bool
	// Services says that the services were written, ServicesFailed that not all of them could be.
	Services, ServicesFailed bool
	// Applied are the changes of services and slices that the round brought into the maps; see Queued.
	AppliedServices, AppliedSlices int
	// NoLocalEndpoints counts the service ports whose traffic policy is Local and that have endpoints, but none here.
	NoLocalEndpoints []NoLocalEndpoints
	// Failures are the map operations that failed, Programmed the times from a change in the cluster until it was in the maps.
	Failures   []Failure
	Programmed []Programmed
}

// NoLocalEndpoints is one number of service ports.
type NoLocalEndpoints struct {
	// Policy is Internal or External, Family IPv4 or IPv6.
	Policy, Family string
	Count          int
}

// The traffic policies as the label traffic_policy names them.
const (
	Internal = "internal"
	External = "external"
)

// Failure is a number of failed operations on one map.
type Failure struct {
	Map    string
	Full   bool // there was no room
	Failed int
}

// Programmed is how long one change of endpoints took.
type Programmed struct {
	Family string
	After  time.Duration
}

// Round notes one pass of the pipeline.
func (m *Metrics) Round(r Round) {
	m.margay.round(r)
	if r.Services {
		m.kubeproxy.round(r)
	}
}

// Sweep notes one sweep of the flow table.
func (m *Metrics) Sweep(took time.Duration, deleted int, failed bool) {
	if failed {
		m.sweepFailures.Inc()
		return
	}
	m.reconciled.WithLabelValues(bothFamilies).Observe(took.Seconds())
	m.reconcilerDeleted.WithLabelValues(bothFamilies).Add(float64(deleted))
}

// Collected notes what a look for what pods have left has removed, by kind.
func (m *Metrics) Collected(removed map[string]int, failed bool) {
	for kind, n := range removed {
		m.gcRemoved.WithLabelValues(kind).Add(float64(n))
	}
	if failed {
		m.gcFailures.Inc()
	}
}

// Probed counts an answer of /healthz or /livez; probe is that name without the slash.
func (m *Metrics) Probed(probe string, code int) {
	switch probe {
	case "healthz":
		m.healthz.WithLabelValues(strconv.Itoa(code)).Inc()
	case "livez":
		m.livez.WithLabelValues(strconv.Itoa(code)).Inc()
	}
}

// seconds is a time as Prometheus writes it.
func seconds(t time.Time) float64 {
	return float64(t.UnixNano()) / 1e9
}
