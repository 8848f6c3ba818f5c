// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"slices"

	"github.com/prometheus/client_golang/prometheus"
)

// kubeproxy are the metrics that kube-proxy has too, under its names. Left out are those of its single modes (iptables_…, winkernel_…),
// except the one that counts failures: it is what alerts look at.
type kubeproxy struct {
	sync, syncFull, syncPartial       *prometheus.HistogramVec
	lastSync, lastQueued              *prometheus.GaugeVec
	syncFailures                      *prometheus.CounterVec
	programming                       *prometheus.HistogramVec
	endpointsPending, servicesPending prometheus.Gauge
	endpointChanges, serviceChanges   prometheus.Counter
	noLocalEndpoints                  *prometheus.GaugeVec
	healthz, livez                    *prometheus.CounterVec
	reconciled                        *prometheus.HistogramVec
	reconcilerDeleted                 *prometheus.CounterVec
}

// syncBuckets are kube-proxy's: 1 ms to 16 s.
var syncBuckets = prometheus.ExponentialBuckets(0.001, 2, 15)

// programmingBuckets are kube-proxy's: finer where the objective of Kubernetes lies, up to 5 minutes.
var programmingBuckets = slices.Concat(
	prometheus.LinearBuckets(0.25, 0.25, 2),
	prometheus.LinearBuckets(1, 1, 59),
	prometheus.LinearBuckets(60, 5, 12),
	prometheus.LinearBuckets(120, 30, 7),
)

func newKubeproxy() kubeproxy {
	const prefix = "kubeproxy_"
	histogram := func(name, help string, buckets []float64) *prometheus.HistogramVec {
		return prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: prefix + name, Help: help, Buckets: buckets}, []string{"ip_family"})
	}
	gauges := func(name, help string, labels ...string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: prefix + name, Help: help}, labels)
	}
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: prefix + name, Help: help})
	}
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: prefix + name, Help: help})
	}
	counters := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: prefix + name, Help: help}, labels)
	}
	k := kubeproxy{
		sync:              histogram("sync_proxy_rules_duration_seconds", "Duration of rounds that brought services into the maps", syncBuckets),
		syncFull:          histogram("sync_full_proxy_rules_duration_seconds", "Duration of rounds that compared everything with the kernel", syncBuckets),
		syncPartial:       histogram("sync_partial_proxy_rules_duration_seconds", "Duration of rounds that wrote what had changed", syncBuckets),
		lastSync:          gauges("sync_proxy_rules_last_timestamp_seconds", "When services were last in the maps without a failure", "ip_family"),
		lastQueued:        gauges("sync_proxy_rules_last_queued_timestamp_seconds", "When something last changed that has to go into the maps", "ip_family"),
		syncFailures:      counters("sync_proxy_rules_nftables_sync_failures_total", "Rounds that could not write all services; Margay has no nftables, the name is what dashboards ask for", "ip_family"),
		programming:       histogram("network_programming_duration_seconds", "Time from a change of endpoints in the cluster until it was in the maps", programmingBuckets),
		endpointsPending:  gauge("sync_proxy_rules_endpoint_changes_pending", "Changed EndpointSlices that are not in the maps yet"),
		endpointChanges:   counter("sync_proxy_rules_endpoint_changes_total", "Changed EndpointSlices"),
		servicesPending:   gauge("sync_proxy_rules_service_changes_pending", "Changed services that are not in the maps yet"),
		serviceChanges:    counter("sync_proxy_rules_service_changes_total", "Changed services"),
		noLocalEndpoints:  gauges("sync_proxy_rules_no_local_endpoints_total", "Service ports whose traffic policy is Local and that have endpoints, but none on this node", "traffic_policy", "ip_family"),
		healthz:           counters("proxy_healthz_total", "Answers of /healthz", "code"),
		livez:             counters("proxy_livez_total", "Answers of /livez", "code"),
		reconciled:        histogram("conntrack_reconciler_sync_duration_seconds", "Duration of sweeps of the flow table, which is Margay's connection tracking", syncBuckets),
		reconcilerDeleted: counters("conntrack_reconciler_deleted_entries_total", "Entries that sweeps deleted from the flow table", "ip_family"),
	}
	for _, f := range families {
		k.syncFailures.WithLabelValues(f)
	}
	for _, code := range []string{"200", "503"} {
		k.healthz.WithLabelValues(code)
		k.livez.WithLabelValues(code)
	}
	k.reconcilerDeleted.WithLabelValues(bothFamilies)
	return k
}

func (k *kubeproxy) all() []prometheus.Collector {
	return []prometheus.Collector{
		k.sync, k.syncFull, k.syncPartial, k.lastSync, k.lastQueued, k.syncFailures, k.programming,
		k.endpointsPending, k.endpointChanges, k.servicesPending, k.serviceChanges, k.noLocalEndpoints,
		k.healthz, k.livez, k.reconciled, k.reconcilerDeleted,
	}
}

// round notes a round that wrote services.
func (k *kubeproxy) round(r Round) {
	kind := k.syncPartial
	if r.Whole {
		kind = k.syncFull
	}
	for _, f := range families {
		k.sync.WithLabelValues(f).Observe(r.Duration.Seconds())
		kind.WithLabelValues(f).Observe(r.Duration.Seconds())
		if r.ServicesFailed {
			k.syncFailures.WithLabelValues(f).Inc()
		} else {
			k.lastSync.WithLabelValues(f).Set(seconds(r.Ended))
		}
	}
	k.servicesPending.Sub(float64(r.AppliedServices))
	k.endpointsPending.Sub(float64(r.AppliedSlices))
	for _, n := range r.NoLocalEndpoints {
		k.noLocalEndpoints.WithLabelValues(n.Policy, n.Family).Set(float64(n.Count))
	}
	for _, p := range r.Programmed {
		k.programming.WithLabelValues(p.Family).Observe(p.After.Seconds())
	}
}
