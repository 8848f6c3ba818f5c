// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"context"
	"math/rand/v2"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/tools/cache"

	"github.com/margay-cni/margay/pkg/state"
)

const (
	// confirmAbsence is how long an API must have been missing before its objects count as gone: a server that starts may not serve
	// everything yet.
	confirmAbsence = 2 * time.Second
	// lookForFirst and lookForMax bound how often an API that is not served is looked for.
	lookForFirst = 2 * time.Second
	lookForMax   = 30 * time.Second
)

// kind is one resource that is followed.
type kind struct {
	// name is for people.
	name string
	// labels and fields are selectors.
	labels, fields string
	// optional kinds need not be served by every API server.
	optional bool
	api      api
	// convert trims an object; a nil pointer means that it takes no part.
	convert func(runtime.Object) any
	sink    sink

	// These are guarded by the source's mutex.

	// synced says that the kind has been read whole once, or is known not to be served; absent that it is not served now.
	synced, absent bool
	// err is what the server answered last instead of objects, since when it does.
	err      error
	errSince time.Time
	// missing is since when an optional kind that had objects is not served.
	missing time.Time
	// leave ends what follows the kind, which is started anew after a while.
	leave context.CancelFunc
}

// sink is a table as the reflector's store sees it.
type sink interface {
	put(*item) (changed bool)
	remove(*item) (changed bool)
	replace([]any) (changed bool)
	empty() bool
}

// sinkOf puts items into a table.
type sinkOf[K comparable, T any] struct {
	table *table[K, T]
	key   func(*item) K
}

func (s sinkOf[K, T]) put(i *item) bool {
	v, _ := i.value.(*T)
	return s.table.put(s.key(i), v)
}

func (s sinkOf[K, T]) remove(i *item) bool {
	return s.table.put(s.key(i), nil)
}

func (s sinkOf[K, T]) replace(items []any) bool {
	objects := make(map[K]*T, len(items))
	for _, o := range items {
		i := o.(*item)
		if v, _ := i.value.(*T); v != nil {
			objects[s.key(i)] = v
		}
	}
	return s.table.replace(objects)
}

func (s sinkOf[K, T]) empty() bool {
	return len(s.table.live) == 0
}

func named(i *item) string {
	return i.Name
}

func namespaced(i *item) state.Key {
	return state.Key{Namespace: i.Namespace, Name: i.Name}
}

// kinds makes all kinds. Selectors are those of rows I1 and I3: what they leave out never reaches the agent.
func (s *Source) kinds() ([]*kind, error) {
	var all []*kind
	add := func(k *kind, gv schema.GroupVersion, resource string, newList func() runtime.Object) error {
		c, err := s.client.rest(gv, runtime.ContentTypeProtobuf)
		k.api = &typedAPI{client: c, resource: resource, newList: newList}
		all = append(all, k)
		return err
	}
	for _, err := range []error{
		add(&kind{
			name: "pods", sink: sinkOf[state.Key, state.Pod]{&s.pods, namespaced},
			convert: func(o runtime.Object) any { return s.shared.Pod(state.FromPod(o.(*corev1.Pod), s.cfg.Node)) },
		}, corev1.SchemeGroupVersion, "pods", func() runtime.Object { return &corev1.PodList{} }),
		add(&kind{
			name: "services", labels: "!service.kubernetes.io/service-proxy-name", fields: "spec.clusterIP!=" + corev1.ClusterIPNone,
			sink:    sinkOf[state.Key, state.Service]{&s.services, namespaced},
			convert: func(o runtime.Object) any { return state.FromService(o.(*corev1.Service)) },
		}, corev1.SchemeGroupVersion, "services", func() runtime.Object { return &corev1.ServiceList{} }),
		add(&kind{
			name: "endpointslices", labels: "!" + corev1.IsHeadlessService, sink: sinkOf[state.Key, state.EndpointSlice]{&s.slices, namespaced},
			convert: func(o runtime.Object) any {
				return s.shared.EndpointSlice(state.FromEndpointSlice(o.(*discoveryv1.EndpointSlice)))
			},
		}, discoveryv1.SchemeGroupVersion, "endpointslices", func() runtime.Object { return &discoveryv1.EndpointSliceList{} }),
		add(&kind{
			name: "nodes", sink: sinkOf[string, state.Node]{&s.nodes, named},
			convert: func(o runtime.Object) any { return state.FromNode(o.(*corev1.Node)) },
		}, corev1.SchemeGroupVersion, "nodes", func() runtime.Object { return &corev1.NodeList{} }),
		add(&kind{
			name: "namespaces", sink: sinkOf[string, state.Namespace]{&s.namespaces, named},
			convert: func(o runtime.Object) any { return state.FromNamespace(o.(*corev1.Namespace)) },
		}, corev1.SchemeGroupVersion, "namespaces", func() runtime.Object { return &corev1.NamespaceList{} }),
		add(&kind{
			name: "networkpolicies", sink: sinkOf[state.Key, state.NetworkPolicy]{&s.policies, namespaced},
			convert: func(o runtime.Object) any { return state.FromNetworkPolicy(o.(*networkingv1.NetworkPolicy)) },
		}, networkingv1.SchemeGroupVersion, "networkpolicies", func() runtime.Object { return &networkingv1.NetworkPolicyList{} }),
		add(&kind{
			name: "servicecidrs", optional: true, sink: sinkOf[string, state.ServiceCIDR]{&s.cidrs, named},
			convert: func(o runtime.Object) any { return state.FromServiceCIDR(o.(*networkingv1.ServiceCIDR)) },
		}, networkingv1.SchemeGroupVersion, "servicecidrs", func() runtime.Object { return &networkingv1.ServiceCIDRList{} }),
	} {
		if err != nil {
			return nil, err
		}
	}
	c, err := s.client.rest(policyGroup, runtime.ContentTypeJSON)
	return append(all, &kind{
		name: clusterPolicies, optional: true, sink: sinkOf[string, state.ClusterNetworkPolicy]{&s.clusterPolicies, named},
		api: &rawAPI{client: c, resource: clusterPolicies}, convert: s.clusterPolicy,
	}), err
}

// policyGroup is that of ClusterNetworkPolicy, which is a custom resource.
var policyGroup = schema.GroupVersion{Group: "policy.networking.k8s.io", Version: "v1alpha2"}

// clusterPolicies is the resource of ClusterNetworkPolicies.
const clusterPolicies = "clusternetworkpolicies"

// clusterPolicy trims a policy. What it has that nobody knows is kept as being there (row C5).
func (s *Source) clusterPolicy(o runtime.Object) any {
	p, err := state.FromClusterNetworkPolicy(o.(*rawObject).raw)
	if err != nil {
		// The API server has stored it under a name, so it can be read that far.
		s.cfg.Log.Error("a ClusterNetworkPolicy is of no use", "name", o.(*rawObject).Name, "err", err)
	}
	return p
}

// follow keeps a kind's table up to date until ctx ends.
func (s *Source) follow(ctx context.Context, k *kind) {
	for delay := lookForFirst; ctx.Err() == nil; delay = min(2*delay, lookForMax) {
		run, leave := context.WithCancel(ctx)
		s.mu.Lock()
		k.leave = leave
		s.mu.Unlock()
		began := time.Now()
		cache.NewReflectorWithOptions(&listWatch{kind: k, source: s}, &item{}, &store{kind: k, source: s}, cache.ReflectorOptions{
			Name: k.name, TypeDescription: k.name, Backoff: &wait.Backoff{Duration: 500 * time.Millisecond, Factor: 2, Jitter: 1, Steps: 5, Cap: 10 * time.Second},
		}).RunWithContext(run)
		leave()
		if time.Since(began) > lookForMax {
			delay = lookForFirst // it was there for a while
		}
		select {
		case <-ctx.Done():
		case <-time.After(delay/2 + rand.N(delay)):
		}
	}
}

// note keeps what a server answered to a request for the kind.
func (l *listWatch) note(err error) {
	s, k := l.source, l.kind
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	switch {
	case err == nil:
		if k.err != nil {
			s.cfg.Log.Info("the API server answers again", "kind", k.name)
		}
		k.err, k.missing, k.absent = nil, time.Time{}, false
	case k.optional && apierrors.IsNotFound(err):
		k.err = nil
		if k.missing.IsZero() {
			k.missing = now
		}
		if k.sink.empty() || now.Sub(k.missing) >= confirmAbsence {
			s.gone(k)
		}
	case apierrors.IsResourceExpired(err) || apierrors.IsGone(err):
		// The reflector lists anew.
	default:
		if k.err == nil {
			k.errSince = now
			s.cfg.Log.Error("the API server refuses; what is known stays in force", "kind", k.name, "err", err)
		}
		k.err = err
	}
}

// gone notes that a kind is not served. The source's mutex is held.
func (s *Source) gone(k *kind) {
	if !k.absent {
		s.cfg.Log.Info("the API server does not serve these objects; going on without", "kind", k.name)
	}
	changed := k.sink.replace(nil) || !k.synced
	k.absent, k.synced = true, true
	k.leave()
	if changed {
		s.touch()
	}
}

// store is a kind's table as the reflector's store.
type store struct {
	*kind
	source *Source
}

func (t *store) change(apply func() bool) error {
	t.source.mu.Lock()
	defer t.source.mu.Unlock()
	if apply() {
		t.source.touch()
	}
	return nil
}

// Add implements cache.ReflectorStore.
func (t *store) Add(o any) error {
	return t.change(func() bool { return t.sink.put(o.(*item)) })
}

// Update implements cache.ReflectorStore.
func (t *store) Update(o any) error {
	return t.Add(o)
}

// Delete implements cache.ReflectorStore.
func (t *store) Delete(o any) error {
	return t.change(func() bool { return t.sink.remove(o.(*item)) })
}

// Replace implements cache.ReflectorStore: the kind has been read whole.
func (t *store) Replace(items []any, _ string) error {
	return t.change(func() bool {
		changed := t.sink.replace(items) || !t.synced
		t.synced = true
		return changed
	})
}

// Resync implements cache.ReflectorStore.
func (t *store) Resync() error {
	return nil
}
