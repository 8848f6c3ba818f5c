// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"io"
	"log/slog"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/state"
)

// observed is a rig whose rounds an observer sees.
type observed struct {
	*rig
	o *observer
}

func newObserved(t *testing.T, k *fakeKernel, sizes map[string]uint32) *observed {
	t.Helper()
	r := newRig(t, k, runDir(t))
	cfg := &Config{Node: "n1", MaxEntries: sizes, Log: slog.New(slog.NewTextHandler(io.Discard, nil))}
	o := newObserver(cfg)
	t.Cleanup(o.services.Close)
	r.publish = func(round Round) {
		o.describe(&round)
		o.round(round, r.pipeline)
		r.last = round
	}
	return &observed{r, o}
}

// source does what Run does with a snapshot.
func (r *observed) source(s *state.Snapshot) {
	r.o.snapshot(s, r.clock)
	r.takeSnapshot(snapshotFrom{s, r.clock})
	if !r.haveRecords {
		r.takeRecords(nil)
	}
}

func (r *observed) metrics(t *testing.T, want string, names ...string) {
	t.Helper()
	if err := testutil.GatherAndCompare(r.o.metrics.Registry(), strings.NewReader(want), names...); err != nil {
		t.Error(err)
	}
}

// localService is a service of both families with Local policies and one endpoint on node, in each family.
func localService(name, node string, n byte) (*state.Service, []*state.EndpointSlice) {
	key := state.Key{Namespace: "default", Name: name}
	svc := &state.Service{
		Key: key, Type: state.NodePort, InternalLocal: true, ExternalLocal: true,
		ClusterIPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 96, 0, n}), netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x96, 15: n})},
		Ports:      []state.ServicePort{{Name: "web", Protocol: state.TCP, Port: 80, NodePort: 30000 + uint16(n)}},
	}
	var out []*state.EndpointSlice
	for suffix, a := range map[string]netip.Addr{"-4": netip.AddrFrom4([4]byte{10, 0, 0, n}), "-6": netip.AddrFrom16([16]byte{0: 0xfd, 15: n})} {
		out = append(out, &state.EndpointSlice{
			Key: state.Key{Namespace: "default", Name: name + suffix}, Service: key, IPv6: a.Is6(),
			Ports:     []state.SlicePort{{Name: "web", Protocol: state.TCP, Port: 8080}},
			Endpoints: []state.Endpoint{{Addr: a, Node: node, Ready: true, Serving: true}},
		})
	}
	return svc, out
}

func cluster(objects ...any) *state.Snapshot {
	s := state.NewSnapshot()
	for _, object := range objects {
		switch v := object.(type) {
		case *state.Service:
			s.Services[v.Key] = v
		case []*state.EndpointSlice:
			for _, slice := range v {
				s.EndpointSlices[slice.Key] = slice
			}
		case *state.Node:
			s.Nodes[v.Name] = v
		}
	}
	return s
}

func TestM1_RoundsReachTheMetrics(t *testing.T) {
	k := newKernel(1)
	r := newObserved(t, k, map[string]uint32{"services": 40, "flows": 100})
	here, hereSlices := localService("here", "n1", 1)
	away, awaySlices := localService("away", "n2", 2)
	const counts = `
# HELP kubeproxy_sync_proxy_rules_service_changes_pending Changed services that are not in the maps yet
# TYPE kubeproxy_sync_proxy_rules_service_changes_pending gauge
kubeproxy_sync_proxy_rules_service_changes_pending %P
# HELP kubeproxy_sync_proxy_rules_service_changes_total Changed services
# TYPE kubeproxy_sync_proxy_rules_service_changes_total counter
kubeproxy_sync_proxy_rules_service_changes_total %T
`
	changes := func(pending, total string) {
		t.Helper()
		r.metrics(t, strings.NewReplacer("%P", pending, "%T", total).Replace(counts),
			"kubeproxy_sync_proxy_rules_service_changes_pending", "kubeproxy_sync_proxy_rules_service_changes_total")
	}
	r.source(cluster(here, hereSlices, away, awaySlices))
	changes("2", "2")
	r.work(false)
	changes("0", "2")
	r.metrics(t, `
# HELP kubeproxy_sync_proxy_rules_no_local_endpoints_total Service ports whose traffic policy is Local and that have endpoints, but none on this node
# TYPE kubeproxy_sync_proxy_rules_no_local_endpoints_total gauge
kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family="IPv4",traffic_policy="external"} 1
kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family="IPv4",traffic_policy="internal"} 1
kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family="IPv6",traffic_policy="external"} 1
kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family="IPv6",traffic_policy="internal"} 1
`, "kubeproxy_sync_proxy_rules_no_local_endpoints_total")

	// A change that cannot be written waits; the failure is counted by map, and that it had no room.
	k.services.max = len(k.services.entries)
	third, thirdSlices := localService("third", "n1", 3)
	for _, s := range thirdSlices {
		s.Triggered = r.o.started.Add(time.Hour)
	}
	r.source(cluster(here, hereSlices, third, thirdSlices, away, awaySlices))
	r.work(false)
	changes("1", "3")
	r.metrics(t, `
# HELP margay_map_failures_total Failed operations on a map; full says that it had no room
# TYPE margay_map_failures_total counter
margay_map_failures_total{full="true",map="services"} 4
`, "margay_map_failures_total")
	r.metrics(t, "", "kubeproxy_network_programming_duration_seconds")
	k.services.max = 1 << 20
	r.work(false)
	changes("0", "3")
	if n, err := testutil.GatherAndCount(r.o.metrics.Registry(), "kubeproxy_network_programming_duration_seconds"); err != nil || n != 2 {
		t.Errorf("families with a time to the maps = %d, %v, want 2: both slices name when they were triggered", n, err)
	}
	r.o.cfg.Sweep = sweptTable{visited: 40, deleted: 10}
	if _, _, err := r.o.SweepFlows(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, want := r.o.readMaps()[len(r.o.readMaps())-1].Entries, 30; got != want {
		t.Errorf("entries of flows = %d, want %d: what a sweep leaves", got, want)
	}
}

// sweptTable is a flow table of a known size.
type sweptTable struct{ visited, deleted int }

func (s sweptTable) SweepFlows(ctx context.Context) (int, int, error) {
	return s.visited, s.deleted, ctx.Err()
}

// probe asks /healthz and returns its status and body.
func (r *observed) probe() (int, string) {
	w := httptest.NewRecorder()
	r.o.health.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/healthz", nil))
	return w.Code, w.Body.String()
}

// A fault of a service map keeps an update waiting, one of a policy map does not.
func TestH2_FaultsThatCount(t *testing.T) {
	for name, tc := range map[string]struct {
		fill    func(k *fakeKernel)
		applied bool
	}{
		"none":     {func(*fakeKernel) {}, true},
		"services": {func(k *fakeKernel) { k.services.max = 0 }, false},
		"backends": {func(k *fakeKernel) { k.backends.max = 0 }, false},
		"ipcache":  {func(k *fakeKernel) { k.ipcache.max = 0 }, true},
	} {
		t.Run(name, func(t *testing.T) {
			k := newKernel(1)
			r := newObserved(t, k, nil)
			s, records := shop(r.rig)
			tc.fill(k)
			r.takeRecords(records)
			r.source(s)
			r.work(false)
			// The answer names the families once an update has been applied.
			if _, body := r.probe(); strings.Contains(body, `"IPv4"`) != tc.applied {
				t.Errorf("answer = %s, want an applied update: %v (faults %+v)", body, tc.applied, r.last.Faults)
			}
		})
	}
}

func TestH2_NodeObject(t *testing.T) {
	r := newObserved(t, newKernel(1), nil)
	for _, step := range []struct {
		name string
		s    *state.Snapshot
		want int
	}{
		{"nobody describes the node", cluster(), 200},
		{"another node leaves", cluster(&state.Node{Name: "n2", Leaving: true}), 200},
		{"it is there", cluster(&state.Node{Name: "n1"}), 200},
		{"it leaves", cluster(&state.Node{Name: "n1", Leaving: true}), 503},
		{"it stays after all", cluster(&state.Node{Name: "n1"}), 200},
		{"it is gone", cluster(), 503},
	} {
		r.source(step.s)
		r.work(false)
		if code, body := r.probe(); code != step.want {
			t.Errorf("%s: /healthz = %d %s, want %d", step.name, code, body, step.want)
		}
	}
}

func TestFillLevelsAreConditions(t *testing.T) {
	var log strings.Builder
	l := newLevels(slog.New(slog.NewTextHandler(&log, nil)))
	for _, step := range []struct {
		entries int
		max     uint32
		near    bool
		logged  string // "" for nothing
	}{
		{89, 100, false, ""},
		{90, 100, true, "map is nearly full"},
		{100, 100, true, ""},
		{86, 100, true, ""},
		{84, 100, false, "map has room again"},
		{89, 100, false, ""},
		{1000, 0, false, ""},
	} {
		log.Reset()
		got := l.check([]MapStatus{{Map: "pending", Entries: 1, Max: 100}, {Map: "services", Entries: step.entries, Max: step.max}}, testEpoch)
		var want []Level
		if step.near {
			want = []Level{{
				Map: "services", Entries: step.entries, Max: step.max, Since: testEpoch,
				Cure: "the map's size is --map-size services=N; it takes effect when the maps are made anew",
			}}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%d of %d (-want +got):\n%s", step.entries, step.max, diff)
		}
		if (step.logged == "") != (log.Len() == 0) || !strings.Contains(log.String(), step.logged) {
			t.Errorf("%d of %d: log = %q, want %q", step.entries, step.max, log.String(), step.logged)
		}
	}
}

// The level of a round is in its status, with the size from the configuration.
func TestFillLevelsAreShown(t *testing.T) {
	k := newKernel(1)
	r := newObserved(t, k, map[string]uint32{"node_addrs": 10})
	addrs := map[netip.Addr]uint32{}
	for n := range byte(9) {
		addrs[netip.AddrFrom4([4]byte{192, 0, 2, n})] = bpf.NodeAddrLocal
	}
	r.facts = &nodeFacts{addrs: addrs}
	r.work(false)
	if len(r.last.NearlyFull) != 1 || r.last.NearlyFull[0].Map != "node_addrs" || r.last.NearlyFull[0].Entries != 9 {
		t.Errorf("nearly full = %+v, want node_addrs with 9 of 10", r.last.NearlyFull)
	}
	r.metrics(t, `
# HELP margay_map_nearly_full 1 if a map is so full that it should be made larger
# TYPE margay_map_nearly_full gauge
margay_map_nearly_full{map="node_addrs"} 1
`, "margay_map_nearly_full")
}

func TestChangesBetweenSnapshots(t *testing.T) {
	svc, slices := localService("a", "n1", 1)
	equal, equalSlices := localService("a", "n1", 1)
	other, otherSlices := localService("a", "n2", 1)
	other.InternalLocal = false
	late := testEpoch.Add(time.Second)
	triggered := *slices[0]
	triggered.Triggered = late
	early := *slices[0]
	early.Triggered = testEpoch.Add(-time.Second)
	for _, tc := range []struct {
		name        string
		before, now *state.Snapshot
		want        change
	}{
		{"first", nil, cluster(svc, slices), change{services: 1, slices: 2}},
		{"the same objects", cluster(svc, slices), cluster(svc, slices), change{}},
		{"equal objects", cluster(svc, slices), cluster(equal, equalSlices), change{}},
		{"other objects", cluster(svc, slices), cluster(other, otherSlices), change{services: 1, slices: 2}},
		{"gone", cluster(svc, slices), cluster(svc), change{slices: 2}},
		{"triggered", cluster(svc, slices), cluster(svc, slices, []*state.EndpointSlice{&triggered}),
			change{slices: 1, triggers: []trigger{{late, slices[0].IPv6}}}},
		{"triggered before the start", cluster(svc, slices), cluster(svc, slices, []*state.EndpointSlice{&early}), change{slices: 1}},
	} {
		tc.want.at = late
		got := compareSnapshots(tc.before, tc.now, late, testEpoch)
		if diff := cmp.Diff(tc.want, got, cmp.AllowUnexported(change{}, trigger{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tc.name, diff)
		}
	}
}

func TestServeAddresses(t *testing.T) {
	for address, ok := range map[string]bool{
		"": true, "0.0.0.0:10256": true, "[::]:10256": true, ":10256": true, "127.0.0.1:0": true,
		"10256": false, "localhost:10256": false, "0.0.0.0": false, "0.0.0.0:http": false, "0.0.0.0:70000": false, "::1:10256": false,
	} {
		for _, s := range []Serve{{Healthz: address}, {Metrics: address}} {
			if err := s.Validate(); (err == nil) != ok {
				t.Errorf("Validate() of %+v = %v, accepted: want %v", s, err, ok)
			}
		}
	}
}
