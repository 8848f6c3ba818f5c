// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/margay-cni/margay/pkg/health"
	"github.com/margay-cni/margay/pkg/metrics"
	"github.com/margay-cni/margay/pkg/service"
	"github.com/margay-cni/margay/pkg/state"
)

// policyOnly are the maps whose faults do not make the node a bad one for load balancers: with all nodes out of service nobody would be
// served, and that does not make room for policies.
var policyOnly = map[string]bool{"policy": true, "ipcache": true, "pending": true, "endpoints": true, "endpoint_epochs": true}

// observer tells the health servers and the metrics what the pipeline does. It has no say in that.
type observer struct {
	cfg      *Config
	health   *health.Proxy
	services *health.Services
	metrics  *metrics.Metrics
	// servers answer on the configured addresses.
	servers []*health.Server
	levels  *levels

	// These belong to the source's goroutine.
	before  *state.Snapshot
	started time.Time

	// This belongs to the pipeline's goroutine: the source has known a Node object of this node.
	known bool

	mu      sync.Mutex
	changes []change
	maps    []metrics.Map
	flows   int
}

// newObserver makes the servers that the configuration asks for; they run with run.
func newObserver(cfg *Config) *observer {
	o := &observer{cfg: cfg, levels: newLevels(cfg.Log), started: time.Now()}
	o.metrics = metrics.New(metrics.Config{
		Version: cfg.Version, Programs: cfg.Serve.Programs, Drops: cfg.readDrops(), Maps: o.readMaps, Log: cfg.Log,
	})
	o.health = health.NewProxy(o.metrics.Probed)
	o.services = health.NewServices(cfg.Node, o.health.Healthy, cfg.Serve.Events, cfg.Log)
	if a := cfg.Serve.Healthz; a != "" {
		o.servers = append(o.servers, health.NewServer("health server", a, o.health.Handler(), cfg.Log))
	}
	if a := cfg.Serve.Metrics; a != "" {
		o.servers = append(o.servers, health.NewServer("metrics server", a, health.NewIntrospection(health.Introspection{
			Metrics: o.metrics.Handler(), Config: cfg.Serve.Flags, Profiling: cfg.Serve.Profiling,
		}), cfg.Log))
	}
	return o
}

// run serves until ctx ends.
func (o *observer) run(ctx context.Context) error {
	defer o.services.Close()
	var all sync.WaitGroup
	for _, s := range o.servers {
		all.Go(func() { _ = s.Run(ctx) }) // it returns nil
	}
	all.Wait()
	<-ctx.Done()
	return nil
}

// conditions are what the servers cannot do.
func (o *observer) conditions() []health.Condition {
	out := []health.Condition{}
	for _, s := range o.servers {
		out = append(out, s.Conditions()...)
	}
	return append(out, o.services.Conditions()...)
}

// snapshot notes a snapshot that is about to go to the pipeline.
func (o *observer) snapshot(s *state.Snapshot, at time.Time) {
	c := compareSnapshots(o.before, s, at, o.started)
	o.before = s
	o.mu.Lock()
	o.changes = append(o.changes, c)
	o.mu.Unlock()
	o.health.Queued(at)
	o.metrics.Queued(at, c.services, c.slices)
}

// records notes records that are about to go to the pipeline.
func (o *observer) records(at time.Time) {
	o.health.Queued(at)
	o.metrics.Queued(at, 0, 0)
}

// describe adds to a round how full the maps are. The pipeline's goroutine calls it.
func (o *observer) describe(r *Round) {
	for i := range r.Maps {
		r.Maps[i].Max = o.cfg.MaxEntries[r.Maps[i].Map]
	}
	r.NearlyFull = o.levels.check(r.Maps, time.Now())
}

// round notes a described round of the pipeline, whose goroutine calls it.
func (o *observer) round(r Round, p *pipeline) {
	now := time.Now()
	o.keepMaps(r)
	if !r.Written.IsZero() && len(r.Faults) == 0 {
		o.health.SetReady()
	}
	if r.Leaks > 0 {
		o.metrics.Collected(map[string]int{kindMapEntries: r.Leaks}, false)
	}
	m := metrics.Round{
		Ended: now, Duration: r.Duration, Compile: r.Compile, Write: r.Write,
		Whole: r.Whole, Compiled: r.Compiled, Services: !r.Written.IsZero(),
	}
	for _, f := range r.Faults {
		m.Failures = append(m.Failures, metrics.Failure{Map: f.Map, Full: f.Cure != "", Failed: f.Failed})
		m.ServicesFailed = m.ServicesFailed || !policyOnly[f.Map]
	}
	if m.Services && !m.ServicesFailed {
		o.health.Applied(r.Started)
		o.take(&m, p.snapshot.at, now)
	}
	if r.Compiled {
		m.NoLocalEndpoints = noLocalEndpoints(p.serviceResult)
	}
	o.metrics.Round(m)
	if p.serviceResult != nil {
		o.services.Sync(p.serviceResult.HealthChecks, o.healthCheckAddrs(p.facts))
	}
	o.eligible(p.snapshot.Snapshot)
}

// take moves the changes that came with snapshots up to at into m: they are in the maps now.
func (o *observer) take(m *metrics.Round, at, now time.Time) {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := 0
	for ; n < len(o.changes) && !o.changes[n].at.After(at); n++ {
		c := o.changes[n]
		m.AppliedServices += c.services
		m.AppliedSlices += c.slices
		for _, t := range c.triggers {
			m.Programmed = append(m.Programmed, metrics.Programmed{Family: familyName(t.ipv6), After: now.Sub(t.at)})
		}
	}
	o.changes = slices.Delete(o.changes, 0, n)
}

// eligible judges the node by its object. A source that never had one, such as a directory without it, has no say.
func (o *observer) eligible(s *state.Snapshot) {
	if s == nil {
		return
	}
	n := s.Nodes[o.cfg.Node]
	o.known = o.known || n != nil
	o.health.SetLeaving((n != nil && n.Leaving) || (n == nil && o.known))
}

// healthCheckAddrs are the addresses of healthCheckNodePort, nil for all.
func (o *observer) healthCheckAddrs(facts *nodeFacts) []netip.Addr {
	if len(o.cfg.NodePortAddresses.Prefixes) == 0 {
		return nil
	}
	out := []netip.Addr{}
	if facts == nil {
		return out
	}
	for a := range facts.addrs {
		if slices.ContainsFunc(o.cfg.NodePortAddresses.Prefixes, func(p netip.Prefix) bool { return p.Contains(a) }) {
			out = append(out, a)
		}
	}
	return out
}

// keepMaps copies the fill levels for the next scrape.
func (o *observer) keepMaps(r Round) {
	var out []metrics.Map
	for _, m := range r.Maps {
		near := slices.ContainsFunc(r.NearlyFull, func(l Level) bool { return l.Map == m.Map })
		out = append(out, metrics.Map{Map: m.Map, Entries: m.Entries, Capacity: m.Max, NearlyFull: near})
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.maps = out
}

// readMaps are the fill levels of the last round, and of the flow table after its last sweep. That one may be full: it evicts.
func (o *observer) readMaps() []metrics.Map {
	o.mu.Lock()
	defer o.mu.Unlock()
	return append(slices.Clone(o.maps), metrics.Map{Map: "flows", Entries: o.flows, Capacity: o.cfg.MaxEntries["flows"]})
}

// SweepFlows passes a sweep on to the kernel and notes what it took: the observer stands between the agent and its sweeper.
func (o *observer) SweepFlows(ctx context.Context) (visited, deleted int, err error) {
	begun := time.Now()
	visited, deleted, err = o.cfg.Sweep.SweepFlows(ctx)
	if ctx.Err() != nil {
		return visited, deleted, err
	}
	o.metrics.Sweep(time.Since(begun), deleted, err != nil)
	if err == nil {
		o.mu.Lock()
		o.flows = visited - deleted
		o.mu.Unlock()
	}
	return visited, deleted, err
}

// noLocalEndpoints counts the service ports that have endpoints, but none on this node for a traffic policy that wants it there.
func noLocalEndpoints(r *service.Result) []metrics.NoLocalEndpoints {
	ports := map[metrics.NoLocalEndpoints]map[uint32]bool{}
	for f, s := range r.Frontends {
		family := familyName(f.Addr.Is6())
		internal := metrics.NoLocalEndpoints{Policy: metrics.Internal, Family: family}
		external := metrics.NoLocalEndpoints{Policy: metrics.External, Family: family}
		for _, key := range []metrics.NoLocalEndpoints{internal, external} {
			if ports[key] == nil {
				ports[key] = map[uint32]bool{}
			}
		}
		// An outside frontend uses the list of the whole cluster for traffic from this node, so only a ClusterIP has none there.
		if s.DropEmpty[service.Internal] {
			ports[internal][s.ID] = true
		}
		if s.ExternalLocal && s.DropEmpty[service.External] {
			ports[external][s.ID] = true
		}
	}
	var out []metrics.NoLocalEndpoints
	for _, policy := range []string{metrics.Internal, metrics.External} {
		for _, family := range []string{metrics.IPv4, metrics.IPv6} {
			key := metrics.NoLocalEndpoints{Policy: policy, Family: family}
			out = append(out, metrics.NoLocalEndpoints{Policy: policy, Family: family, Count: len(ports[key])})
		}
	}
	return out
}

func familyName(ipv6 bool) string {
	if ipv6 {
		return metrics.IPv6
	}
	return metrics.IPv4
}
