// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"errors"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// full is an agent with something in every metric.
func full() *Metrics {
	m := New(Config{
		Version: "v0.1.0", Programs: "1a2b",
		Drops: func() ([]Drops, error) {
			return []Drops{{"policy", "ingress", 7}, {"policy", "egress", 0}, {"service_no_backend", "egress", 3}}, nil
		},
		Maps: func() []Map {
			return []Map{{Map: "services", Entries: 950, Capacity: 1000, NearlyFull: true}, {Map: "flows", Entries: 12, Capacity: 100}, {Map: "odd", Entries: 1}}
		},
	})
	at := time.Unix(1_700_000_000, 500_000_000)
	m.Queued(at, 3, 5)
	m.Round(Round{
		Ended: at.Add(time.Second), Duration: 30 * time.Millisecond, Compile: 10 * time.Millisecond, Write: 15 * time.Millisecond,
		Whole: true, Compiled: true, Services: true, AppliedServices: 2, AppliedSlices: 5,
		NoLocalEndpoints: []NoLocalEndpoints{{Internal, IPv4, 2}, {External, IPv6, 1}},
		Programmed:       []Programmed{{IPv6, 700 * time.Millisecond}},
	})
	m.Round(Round{
		Ended: at.Add(2 * time.Second), Duration: time.Millisecond, Services: true, ServicesFailed: true,
		Failures: []Failure{{"services", true, 4}, {"ipcache", false, 1}},
	})
	m.Round(Round{Ended: at.Add(3 * time.Second), Duration: time.Millisecond}) // the source has not spoken yet
	m.Sweep(2*time.Millisecond, 9, false)
	m.Sweep(0, 0, true)
	m.Collected(map[string]int{"lease": 2, "record": 1}, false)
	m.Collected(nil, true)
	m.Probed("healthz", 200)
	m.Probed("healthz", 503)
	m.Probed("livez", 200)
	return m
}

func compare(t *testing.T, m *Metrics, want string, names ...string) {
	t.Helper()
	if err := testutil.GatherAndCompare(m.Registry(), strings.NewReader(want), names...); err != nil {
		t.Error(err)
	}
}

func TestM1_KubeProxysNames(t *testing.T) {
	m := full()
	for name, labels := range map[string]string{
		"kubeproxy_sync_proxy_rules_duration_seconds":              "ip_family",
		"kubeproxy_sync_full_proxy_rules_duration_seconds":         "ip_family",
		"kubeproxy_sync_partial_proxy_rules_duration_seconds":      "ip_family",
		"kubeproxy_sync_proxy_rules_last_timestamp_seconds":        "ip_family",
		"kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds": "ip_family",
		"kubeproxy_network_programming_duration_seconds":           "ip_family",
		"kubeproxy_sync_proxy_rules_endpoint_changes_pending":      "",
		"kubeproxy_sync_proxy_rules_endpoint_changes_total":        "",
		"kubeproxy_sync_proxy_rules_service_changes_pending":       "",
		"kubeproxy_sync_proxy_rules_service_changes_total":         "",
		"kubeproxy_sync_proxy_rules_no_local_endpoints_total":      "ip_family,traffic_policy",
		"kubeproxy_proxy_healthz_total":                            "code",
		"kubeproxy_proxy_livez_total":                              "code",
		"kubeproxy_conntrack_reconciler_sync_duration_seconds":     "ip_family",
		"kubeproxy_conntrack_reconciler_deleted_entries_total":     "ip_family",
		"kubeproxy_sync_proxy_rules_nftables_sync_failures_total":  "ip_family",
	} {
		if got, ok := labelNames(t, m)[name]; !ok || got != labels {
			t.Errorf("%s has labels %q (there: %v), want %q", name, got, ok, labels)
		}
	}
}

// labelNames gives the label names of every metric.
func labelNames(t *testing.T, m *Metrics) map[string]string {
	t.Helper()
	families, err := m.Registry().Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, f := range families {
		var labels []string
		for _, l := range f.GetMetric()[0].GetLabel() {
			labels = append(labels, l.GetName())
		}
		slices.Sort(labels)
		out[f.GetName()] = strings.Join(labels, ",")
	}
	return out
}

func TestM1_Values(t *testing.T) {
	compare(t, full(), `
# HELP kubeproxy_conntrack_reconciler_deleted_entries_total Entries that sweeps deleted from the flow table
# TYPE kubeproxy_conntrack_reconciler_deleted_entries_total counter
kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family="all"} 9
# HELP kubeproxy_proxy_healthz_total Answers of /healthz
# TYPE kubeproxy_proxy_healthz_total counter
kubeproxy_proxy_healthz_total{code="200"} 1
kubeproxy_proxy_healthz_total{code="503"} 1
# HELP kubeproxy_proxy_livez_total Answers of /livez
# TYPE kubeproxy_proxy_livez_total counter
kubeproxy_proxy_livez_total{code="200"} 1
kubeproxy_proxy_livez_total{code="503"} 0
# HELP kubeproxy_sync_proxy_rules_endpoint_changes_pending Changed EndpointSlices that are not in the maps yet
# TYPE kubeproxy_sync_proxy_rules_endpoint_changes_pending gauge
kubeproxy_sync_proxy_rules_endpoint_changes_pending 0
# HELP kubeproxy_sync_proxy_rules_endpoint_changes_total Changed EndpointSlices
# TYPE kubeproxy_sync_proxy_rules_endpoint_changes_total counter
kubeproxy_sync_proxy_rules_endpoint_changes_total 5
# HELP kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds When something last changed that has to go into the maps
# TYPE kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds gauge
kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{ip_family="IPv4"} 1.7000000005e+09
kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{ip_family="IPv6"} 1.7000000005e+09
# HELP kubeproxy_sync_proxy_rules_last_timestamp_seconds When services were last in the maps without a failure
# TYPE kubeproxy_sync_proxy_rules_last_timestamp_seconds gauge
kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family="IPv4"} 1.7000000015e+09
kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family="IPv6"} 1.7000000015e+09
# HELP kubeproxy_sync_proxy_rules_nftables_sync_failures_total Rounds that could not write all services; Margay has no nftables, the name is what dashboards ask for
# TYPE kubeproxy_sync_proxy_rules_nftables_sync_failures_total counter
kubeproxy_sync_proxy_rules_nftables_sync_failures_total{ip_family="IPv4"} 1
kubeproxy_sync_proxy_rules_nftables_sync_failures_total{ip_family="IPv6"} 1
# HELP kubeproxy_sync_proxy_rules_no_local_endpoints_total Service ports whose traffic policy is Local and that have endpoints, but none on this node
# TYPE kubeproxy_sync_proxy_rules_no_local_endpoints_total gauge
kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family="IPv4",traffic_policy="internal"} 2
kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family="IPv6",traffic_policy="external"} 1
# HELP kubeproxy_sync_proxy_rules_service_changes_pending Changed services that are not in the maps yet
# TYPE kubeproxy_sync_proxy_rules_service_changes_pending gauge
kubeproxy_sync_proxy_rules_service_changes_pending 1
# HELP kubeproxy_sync_proxy_rules_service_changes_total Changed services
# TYPE kubeproxy_sync_proxy_rules_service_changes_total counter
kubeproxy_sync_proxy_rules_service_changes_total 3
# HELP margay_build_info 1, with the version of the agent and the build of its programs as labels
# TYPE margay_build_info gauge
margay_build_info{programs="1a2b",version="v0.1.0"} 1
# HELP margay_drops_total Packets that Margay dropped, by reason and the pod's policy direction
# TYPE margay_drops_total counter
margay_drops_total{direction="egress",reason="policy"} 0
margay_drops_total{direction="egress",reason="service_no_backend"} 3
margay_drops_total{direction="ingress",reason="policy"} 7
# HELP margay_flow_sweep_failures_total Sweeps of the flow table that failed
# TYPE margay_flow_sweep_failures_total counter
margay_flow_sweep_failures_total 1
# HELP margay_gc_failures_total Looks for what pods have left that could not read or remove everything
# TYPE margay_gc_failures_total counter
margay_gc_failures_total 1
# HELP margay_gc_removed_total What pods that are gone had left on the node and was removed, by kind
# TYPE margay_gc_removed_total counter
margay_gc_removed_total{kind="lease"} 2
margay_gc_removed_total{kind="record"} 1
# HELP margay_map_capacity Entries that a map has room for
# TYPE margay_map_capacity gauge
margay_map_capacity{map="flows"} 100
margay_map_capacity{map="services"} 1000
# HELP margay_map_entries Entries of a map
# TYPE margay_map_entries gauge
margay_map_entries{map="flows"} 12
margay_map_entries{map="odd"} 1
margay_map_entries{map="services"} 950
# HELP margay_map_failures_total Failed operations on a map; full says that it had no room
# TYPE margay_map_failures_total counter
margay_map_failures_total{full="false",map="ipcache"} 1
margay_map_failures_total{full="true",map="services"} 4
# HELP margay_map_nearly_full 1 if a map is so full that it should be made larger
# TYPE margay_map_nearly_full gauge
margay_map_nearly_full{map="flows"} 0
margay_map_nearly_full{map="services"} 1
`,
		"kubeproxy_conntrack_reconciler_deleted_entries_total", "kubeproxy_proxy_healthz_total", "kubeproxy_proxy_livez_total",
		"kubeproxy_sync_proxy_rules_endpoint_changes_pending", "kubeproxy_sync_proxy_rules_endpoint_changes_total",
		"kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds", "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
		"kubeproxy_sync_proxy_rules_nftables_sync_failures_total", "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
		"kubeproxy_sync_proxy_rules_service_changes_pending", "kubeproxy_sync_proxy_rules_service_changes_total",
		"margay_build_info", "margay_drops_total", "margay_flow_sweep_failures_total", "margay_gc_failures_total", "margay_gc_removed_total", "margay_map_capacity", "margay_map_entries",
		"margay_map_failures_total", "margay_map_nearly_full")
}

// Histograms by how often they were told something, for each value of their label.
func TestM1_Durations(t *testing.T) {
	families, err := full().Registry().Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]uint64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if h := m.GetHistogram(); h != nil {
				got[f.GetName()+" "+m.GetLabel()[0].GetValue()] = h.GetSampleCount()
			}
		}
	}
	want := map[string]uint64{
		"kubeproxy_sync_proxy_rules_duration_seconds IPv4": 2, "kubeproxy_sync_proxy_rules_duration_seconds IPv6": 2,
		"kubeproxy_sync_full_proxy_rules_duration_seconds IPv4": 1, "kubeproxy_sync_full_proxy_rules_duration_seconds IPv6": 1,
		"kubeproxy_sync_partial_proxy_rules_duration_seconds IPv4": 1, "kubeproxy_sync_partial_proxy_rules_duration_seconds IPv6": 1,
		"kubeproxy_network_programming_duration_seconds IPv6":      1,
		"kubeproxy_conntrack_reconciler_sync_duration_seconds all": 1,
		"margay_round_duration_seconds whole":                      3, "margay_round_duration_seconds compile": 1, "margay_round_duration_seconds write": 2,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("samples (-want +got):\n%s", diff)
	}
}

// kubeProxysGauge has a suffix that is wrong for a gauge, and is kube-proxy's all the same.
const kubeProxysGauge = "kubeproxy_sync_proxy_rules_no_local_endpoints_total"

// TestM1_Lint is what promtool says of a scrape.
func TestM1_Lint(t *testing.T) {
	problems, err := testutil.GatherAndLint(full().Registry())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		if p.Metric != kubeProxysGauge {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
}

// TestM1_Documented compares docs/health.md with what there is.
func TestM1_Documented(t *testing.T) {
	text, err := os.ReadFile("../../docs/health.md")
	if err != nil {
		t.Fatal(err)
	}
	named := map[string]bool{}
	for _, m := range regexp.MustCompile("`((?:margay|kubeproxy)_[a-z_]+)`").FindAllStringSubmatch(string(text), -1) {
		named[m[1]] = true
	}
	there := map[string]bool{}
	for name := range labelNames(t, full()) {
		if strings.HasPrefix(name, "margay_") || strings.HasPrefix(name, "kubeproxy_") {
			there[name] = true
		}
	}
	if diff := cmp.Diff(there, named); diff != "" {
		t.Errorf("metrics in docs/health.md (-there +named):\n%s", diff)
	}
}

// What cannot be read is missing, and the rest is there.
func TestM1_ScrapeWithoutCounters(t *testing.T) {
	m := New(Config{Drops: func() ([]Drops, error) { return nil, errors.New("map counters: no such file") }})
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	if body := w.Body.String(); w.Code != 200 || strings.Contains(body, "margay_drops_total") || !strings.Contains(body, "go_goroutines") {
		t.Errorf("scrape = %d\n%s\nwant 200 with everything but drops", w.Code, body)
	}
}
