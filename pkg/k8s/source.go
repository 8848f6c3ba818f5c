// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"k8s.io/klog/v2"

	"github.com/margay-cni/margay/pkg/state"
)

// When snapshots are published.
const (
	// settle is how long a change waits for others that came with it. Those that come later are joined by the interval, if they are many.
	settle = 200 * time.Microsecond
	// interval is the least time between snapshots; share is how many times what one cost is waited before the next.
	interval = 10 * time.Millisecond
	share    = 10
)

// Config says whom to ask, and with what credentials.
type Config struct {
	// Node is this node's name.
	Node string
	// Kubeconfig is a file with server and credentials; empty: the service account in ServiceAccountDir, default that of the pod.
	Kubeconfig        string
	ServiceAccountDir string
	// Servers are URLs of API servers that the operator named; they alone are used.
	Servers []string
	// StateDir keeps the addresses of the API servers over reboots; empty: they are not kept.
	StateDir string
	// KubeletKubeconfigs are files of which the first ones that exist name a server.
	KubeletKubeconfigs []string
	// UserAgent names the agent to the server.
	UserAgent string
	Log       *slog.Logger
}

// Source follows the Kubernetes API.
type Source struct {
	cfg    Config
	client *client
	gate   gate
	all    []*kind
	// ctx is Run's.
	ctx context.Context
	// dirty has an element when there may be something to publish.
	dirty chan struct{}
	// shared is what objects have in common.
	shared state.Interner

	mu              sync.Mutex
	pods            table[state.Key, state.Pod]
	services        table[state.Key, state.Service]
	slices          table[state.Key, state.EndpointSlice]
	nodes           table[string, state.Node]
	namespaces      table[string, state.Namespace]
	policies        table[state.Key, state.NetworkPolicy]
	cidrs           table[string, state.ServiceCIDR]
	clusterPolicies table[string, state.ClusterNetworkPolicy]
	// changed says that something has changed since the last snapshot, synced that every kind has been read whole once.
	changed, synced bool
	// serversErr is why the API servers' addresses are not remembered.
	serversErr error

	// servers are what is remembered, learned is the journal of the slices that they were last looked for in. They belong to Run.
	servers []netip.AddrPort
	learned state.Journal[state.Key]
}

// New finds credentials and addresses; nobody is asked yet.
func New(cfg Config) (*Source, error) {
	if cfg.ServiceAccountDir == "" {
		cfg.ServiceAccountDir = serviceAccountDir
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	c, err := newClient(&cfg)
	if err != nil {
		return nil, err
	}
	s := &Source{cfg: cfg, client: c, gate: gate{log: cfg.Log}, ctx: context.Background(), dirty: make(chan struct{}, 1)}
	s.all, err = s.kinds()
	return s, err
}

// Run publishes a snapshot once every kind has been read whole, and a new one after changes, until ctx ends; then it returns nil. Calls of
// publish do not overlap; while one lasts, changes add up. Snapshots are never written to after they were published.
func (s *Source) Run(ctx context.Context, publish func(*state.Snapshot)) error {
	s.ctx = ctx
	s.cfg.Log.Info("following the Kubernetes API", "servers", s.client.dialer.order())
	var following sync.WaitGroup
	// What reflectors find worth a line is said by this package, once.
	reflectors := klog.NewContext(ctx, logr.FromSlogHandler(quiet{s.cfg.Log.Handler()}))
	for _, k := range s.all {
		following.Go(func() { s.follow(reflectors, k) })
	}
	defer following.Wait()
	next := time.Now()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.dirty:
		}
		if !sleep(ctx, max(settle, time.Until(next))) {
			return nil
		}
		began := time.Now()
		snapshot := s.snapshot()
		if snapshot == nil {
			continue
		}
		publish(snapshot)
		s.learn(snapshot)
		next = time.Now().Add(max(interval, share*time.Since(began)))
	}
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// touch notes a change. The mutex is held.
func (s *Source) touch() {
	s.changed = true
	select {
	case s.dirty <- struct{}{}:
	default:
	}
}

// snapshot returns what there is to publish; nil when there is nothing, or not everything has been read yet (row I10).
func (s *Source) snapshot() *state.Snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.unread()) > 0 || !s.changed {
		return nil
	}
	s.changed = false
	if !s.synced {
		s.synced = true
		s.cfg.Log.Info("everything has been read", "pods", len(s.pods.live), "services", len(s.services.live), "slices", len(s.slices.live))
	}
	return &state.Snapshot{
		KnowsAllPods:           true,
		Namespaces:             s.namespaces.share(),
		Pods:                   s.pods.share(),
		Services:               s.services.share(),
		EndpointSlices:         s.slices.share(),
		NetworkPolicies:        s.policies.share(),
		Nodes:                  s.nodes.share(),
		ServiceCIDRs:           s.cidrs.share(),
		ClusterNetworkPolicies: s.clusterPolicies.share(),
		Journals: state.Journals{
			Namespaces:             s.namespaces.log.Journal(),
			Pods:                   s.pods.log.Journal(),
			Services:               s.services.log.Journal(),
			EndpointSlices:         s.slices.log.Journal(),
			NetworkPolicies:        s.policies.log.Journal(),
			Nodes:                  s.nodes.log.Journal(),
			ServiceCIDRs:           s.cidrs.log.Journal(),
			ClusterNetworkPolicies: s.clusterPolicies.log.Journal(),
		},
	}
}

// unread are the kinds that have not been read whole since the start. The mutex is held.
func (s *Source) unread() []string {
	var out []string
	for _, k := range s.all {
		if !k.synced {
			out = append(out, k.name)
		}
	}
	return out
}

// learn takes over where the API servers are, and remembers it.
func (s *Source) learn(snapshot *state.Snapshot) {
	s.mu.Lock()
	failed := s.serversErr != nil
	s.mu.Unlock()
	changed, known := snapshot.Journals.EndpointSlices.Since(s.learned)
	s.learned = snapshot.Journals.EndpointSlices
	beside := func(k state.Key) bool { return k.Namespace == serviceKey.Namespace }
	if !s.client.learns || (known && !failed && !slices.ContainsFunc(changed, beside)) {
		return
	}
	servers := apiServers(snapshot.EndpointSlices)
	if len(servers) == 0 || (slices.Equal(servers, s.servers) && !failed) {
		return
	}
	s.servers = servers
	s.client.dialer.set(distinct(append(namedByCluster(servers), s.client.found...)))
	if s.cfg.StateDir == "" {
		return
	}
	err := writeRemembered(s.cfg.StateDir, servers)
	if err == nil {
		s.cfg.Log.Info("API servers are remembered", "servers", servers)
	} else {
		s.cfg.Log.Error("API servers are not remembered", "err", err)
	}
	s.mu.Lock()
	s.serversErr = err
	s.mu.Unlock()
}
