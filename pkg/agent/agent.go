// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sync/errgroup"

	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/flow"
	"github.com/margay-cni/margay/pkg/link"
	"github.com/margay-cni/margay/pkg/state"
)

// Files in the run directory.
const (
	numbersFile  = "numbers.json"
	raiseFile    = "raise.json"
	servicesFile = flow.ServicesFile
	rulesFile    = flow.RulesFile
)

// Source delivers snapshots of the cluster.
type Source interface {
	// Run publishes the first snapshot once everything has been read, then one for each change, until ctx ends.
	Run(ctx context.Context, publish func(*state.Snapshot)) error
	// Problems are what the source cannot use. Safe from any goroutine.
	Problems() []state.Problem
	// Incomplete names what the source has not been able to read since it started. Safe from any goroutine.
	Incomplete() []string
}

// Sweeper removes expired flows (pkg/datapath implements it, in the kernel).
type Sweeper interface {
	SweepFlows(ctx context.Context) (visited, deleted int, err error)
}

// Config is everything that an agent needs.
type Config struct {
	Version string
	// Node is this node's name.
	Node string
	// Run is the run directory.
	Run string
	// ProcSys is where kernel settings are written; empty: /proc/sys (datapath.Config).
	ProcSys string
	// Source of snapshots; SelectorSlices makes endpoint slices from services' selectors, where nobody else does.
	Source         Source
	SelectorSlices bool
	// ServiceReturn is the way back for services without an annotation of their own; default tunnel.
	ServiceReturn state.ServiceReturn
	// LoadBalancing is how backends are chosen for services without an annotation of their own; default at random.
	LoadBalancing state.LoadBalancing
	// ServiceCIDRs are the ranges that cluster addresses are taken from; empty: those that the source names. While none are known, nothing is
	// done about addresses of theirs that no service has.
	ServiceCIDRs []netip.Prefix
	// NodePortAddresses are the addresses that NodePorts are served on.
	NodePortAddresses NodePortAddresses
	// Tables, Epochs, HostPorts, Attach and Sweep are the kernel.
	Tables    Tables
	Epochs    Epochs
	HostPorts HostPorts
	Attach    Attacher
	Sweep     Sweeper
	// Links has the programs of the node's devices attached by links as well; nil: filters only.
	Links Linker
	// Collect removes what pods that are gone have left; nil: nobody does.
	Collect Collector
	// MaxEntries gives a map's size by name, for the status; may be nil.
	MaxEntries map[string]uint32
	// Devices are name patterns (path.Match) of the node's devices; empty: found by addresses and routes.
	Devices []string
	// Reach is how other nodes, and what is outside, are reached.
	Reach Reach
	// VerdictEvents has an event written for every new flow that policy lets pass.
	VerdictEvents bool
	// Events is told of problems that stay; may be nil.
	Events NodeEvents
	// PolicyStatus is told what became of ClusterNetworkPolicies; may be nil.
	PolicyStatus PolicyStatus
	// Serve is what is answered over TCP.
	Serve Serve
	// Resync is how often everything is compared with the kernel and the flow table is swept; default 10 s.
	Resync time.Duration
	Log    *slog.Logger
}

// validate fills in the defaults and names everything that is wrong.
func (c *Config) validate() error {
	var errs []error
	if c.Node == "" {
		errs = append(errs, errors.New("node name is empty"))
	}
	if c.Run == "" {
		errs = append(errs, errors.New("run directory is not given"))
	}
	if c.Source == nil {
		errs = append(errs, errors.New("there is no source"))
	}
	for _, p := range c.Devices {
		if _, err := path.Match(p, ""); err != nil {
			errs = append(errs, fmt.Errorf("device pattern %q: %w", p, err))
		}
	}
	if err := c.Reach.validate(); err != nil {
		errs = append(errs, err)
	}
	if err := c.Serve.Validate(); err != nil {
		errs = append(errs, err)
	}
	if c.ServiceReturn == "" {
		c.ServiceReturn = state.ReturnTunnel
	}
	if !c.ServiceReturn.Known() {
		errs = append(errs, fmt.Errorf("service return is %q, want %q or %q",
			string(c.ServiceReturn), string(state.ReturnTunnel), string(state.ReturnDSR)))
	}
	if c.LoadBalancing == "" {
		c.LoadBalancing = state.BalanceRandom
	}
	if !c.LoadBalancing.Known() {
		errs = append(errs, fmt.Errorf("load balancing is %q, want %q or %q",
			string(c.LoadBalancing), string(state.BalanceRandom), string(state.BalanceMaglev)))
	}
	if c.Resync < 0 {
		errs = append(errs, fmt.Errorf("resync is %v, want a positive duration", c.Resync))
	}
	if c.Resync == 0 {
		c.Resync = 10 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return errors.Join(errs...)
}

// Run works until ctx ends, which is no error, or until something fails that makes going on pointless. It owns the run directory: a second
// agent on it gets ErrRunning. Map faults do not end it.
func Run(ctx context.Context, cfg Config) (err error) {
	if err := cfg.validate(); err != nil {
		return err
	}
	if err := os.MkdirAll(cfg.Run, 0o755); err != nil {
		return fmt.Errorf("make run directory: %w", err)
	}
	lock, err := lockRun(cfg.Run)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	socket, err := listen(cfg.Run)
	if err != nil {
		return err
	}
	b := &board{status: Status{Version: cfg.Version, Node: cfg.Node, PID: os.Getpid(), Started: time.Now()}}
	p := newPipeline(&cfg, cfg.Source.Incomplete)
	o := newObserver(&cfg)
	p.publish = func(r Round) {
		o.describe(&r)
		b.round(r)
		o.round(r, p)
	}
	conn, err := link.Dial(-1)
	if err != nil {
		return errors.Join(err, socket.Close())
	}
	defer conn.Close()
	w := &nodeWatcher{
		attach: cfg.Attach, links: cfg.Links, log: cfg.Log, devices: cfg.Devices, resync: cfg.Resync, records: newMailbox[[]*endpoint.Record](),
		network: systemNetwork{conn}, rules: systemNetfilter{}, vxlan: cfg.Reach.device(cfg.Node), encapsulation: cfg.Reach.Encapsulation, routeTo: kernelRoute,
		wants:   newMailbox[*wantedNetwork](),
		publish: p.nodeIn.put, report: b.pods, read: readSurvey, now: time.Now, raise: cfg.Epochs.RaiseEndpointEpochs,
	}
	p.network = w.wants.put
	records := &recordWatcher{store: p.store, log: cfg.Log, resync: cfg.Resync, newWatcher: fsnotify.NewWatcher, publish: func(r []*endpoint.Record) {
		o.records(time.Now())
		w.records.put(r)
		p.recordsIn.put(r)
	}}
	if cfg.PolicyStatus != nil {
		p.policyStatus = cfg.PolicyStatus.ClusterPolicies
	}
	changes, removals := newMailbox[struct{}](), make(chan int, 256)

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return serve(ctx, socket, func() Status { return b.now(cfg.Source, o) }) })
	g.Go(func() error { return o.run(ctx) })
	g.Go(func() error { return newTeller(cfg.Events).run(ctx, func() Status { return b.now(cfg.Source, o) }) })
	g.Go(func() error { return p.run(ctx) })
	g.Go(func() error { return records.run(ctx) })
	g.Go(func() error { return subscribe(ctx, changes, removals) })
	g.Go(func() error { return subscribeTransforms(ctx, changes) })
	g.Go(func() error { return w.run(ctx, changes, removals) })
	g.Go(func() error { return sweep(ctx, o, cfg.Resync, b, cfg.Log) })
	g.Go(func() error { return collectGarbage(ctx, &cfg, b, o) })
	g.Go(func() error {
		err := cfg.Source.Run(ctx, func(s *state.Snapshot) {
			at := time.Now()
			o.snapshot(s, at)
			p.snapshots.put(snapshotFrom{s, at})
		})
		if err != nil {
			return fmt.Errorf("source: %w", err)
		}
		return nil
	})
	return g.Wait()
}

// sweep removes expired flows from time to time.
func sweep(ctx context.Context, s Sweeper, every time.Duration, b *board, log *slog.Logger) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	failing := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		visited, deleted, err := s.SweepFlows(ctx)
		if ctx.Err() != nil {
			return nil
		}
		result := Sweeps{Last: time.Now(), Visited: visited, Deleted: deleted}
		if err != nil {
			result.Error = err.Error()
			if !failing {
				log.Error("flow table cannot be swept", "err", err)
			}
		}
		failing = err != nil
		b.flows(result)
	}
}

// board is the status that the goroutines write on and the local API reads from.
type board struct {
	mu     sync.Mutex
	status Status
}

func (b *board) round(r Round) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.status.Rounds++
	b.status.Last = r
	if r.Compiled {
		b.status.LastChange = r
	}
	b.status.Ready = b.status.Ready || (!r.Written.IsZero() && len(r.Faults) == 0)
}

func (b *board) pods(wrong []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.status.Pods = wrong
}

func (b *board) flows(s Sweeps) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.status.Flows = s
}

func (b *board) gc(r GarbageCollection) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.status.GC = r
}

func (b *board) now(source Source, o *observer) Status {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.status
	s.Source = source.Problems()
	s.Conditions = o.conditions()
	return s
}
