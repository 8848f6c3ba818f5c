// SPDX-License-Identifier: Apache-2.0

package apitest

import (
	"encoding/json"
	"slices"
	"strconv"
	"sync"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
)

// store has the objects of one resource and what happened to them.
type store struct {
	mu      sync.Mutex
	objects map[string]runtime.Object
	events  []event
	// oldest is the version up to which events have been forgotten.
	oldest  uint64
	changed chan struct{} // closed with the next event, or when watches are to end
	// generation is raised to end all watches.
	generation int
}

// event is one change; before or after is nil.
type event struct {
	version       uint64
	before, after runtime.Object
}

// ClusterNetworkPolicies is the resource of ClusterNetworkPolicy.
const ClusterNetworkPolicies = "clusternetworkpolicies"

// resources that the server serves from the start. ClusterNetworkPolicies come with Serve.
var resources = []string{"pods", "services", "endpointslices", "nodes", "namespaces", "networkpolicies", "servicecidrs", "events"}

func (s *Server) storeOf(resource string) *store {
	s.lock.Lock()
	defer s.lock.Unlock()
	st, known := s.stores[resource]
	if !known && slices.Contains(resources, resource) {
		st = newStore()
		s.stores[resource] = st
	}
	return st
}

func newStore() *store {
	return &store{objects: map[string]runtime.Object{}, changed: make(chan struct{})}
}

// Serve adds a resource, as installing a custom resource definition does; it keeps what it had.
func (s *Server) Serve(resource string) {
	s.lock.Lock()
	defer s.lock.Unlock()
	if s.stores[resource] == nil {
		s.stores[resource] = newStore()
	}
}

// Unserve takes a resource away with all its objects.
func (s *Server) Unserve(resource string) {
	s.lock.Lock()
	st := s.stores[resource]
	s.stores[resource] = nil
	s.lock.Unlock()
	if st != nil {
		st.end()
	}
}

func (st *store) end() {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.generation++
	st.wake()
}

func (st *store) wake() {
	close(st.changed)
	st.changed = make(chan struct{})
}

// resourceOf is where an object belongs.
func (s *Server) resourceOf(o runtime.Object) string {
	switch v := o.(type) {
	case *corev1.Pod:
		return "pods"
	case *corev1.Service:
		return "services"
	case *corev1.Node:
		return "nodes"
	case *corev1.Namespace:
		return "namespaces"
	case *corev1.Event:
		return "events"
	case *discoveryv1.EndpointSlice:
		return "endpointslices"
	case *networkingv1.NetworkPolicy:
		return "networkpolicies"
	case *networkingv1.ServiceCIDR:
		return "servicecidrs"
	case *unstructured.Unstructured:
		if v.GetKind() == "ClusterNetworkPolicy" {
			return ClusterNetworkPolicies
		}
	}
	s.t.Fatalf("no resource for %T", o)
	return ""
}

// PutJSON creates or changes an object that has no Go type.
func (s *Server) PutJSON(text string) {
	s.t.Helper()
	u := &unstructured.Unstructured{}
	if err := json.Unmarshal([]byte(text), &u.Object); err != nil {
		s.t.Fatal(err)
	}
	s.Put(u)
}

// Put creates or changes objects, each with a version of its own. The server owns them.
func (s *Server) Put(objects ...runtime.Object) {
	s.t.Helper()
	for _, o := range objects {
		s.change(o, o)
	}
}

// Delete removes an object.
func (s *Server) Delete(o runtime.Object) {
	s.t.Helper()
	s.change(o, nil)
}

func (s *Server) change(named, after runtime.Object) {
	s.t.Helper()
	st := s.storeOf(s.resourceOf(named))
	m, err := meta.Accessor(named)
	if err != nil {
		s.t.Fatal(err)
	}
	key := m.GetNamespace() + "/" + m.GetName()
	s.lock.Lock()
	s.version++
	version := s.version
	s.lock.Unlock()
	st.mu.Lock()
	defer st.mu.Unlock()
	before := st.objects[key]
	if after == nil {
		if before == nil {
			s.t.Fatalf("no object %s to delete", key)
		}
		delete(st.objects, key)
		gone := before.DeepCopyObject()
		setVersion(gone, version)
		st.events = append(st.events, event{version, gone, nil})
	} else {
		after = after.DeepCopyObject()
		setVersion(after, version)
		st.objects[key] = after
		st.events = append(st.events, event{version, before, after})
	}
	st.wake()
}

func setVersion(o runtime.Object, version uint64) {
	m, _ := meta.Accessor(o) // it was one before
	m.SetResourceVersion(strconv.FormatUint(version, 10))
}

// Expire forgets what happened to a resource and ends its watches: whoever goes on from an old version gets 410.
func (s *Server) Expire(resource string) {
	st := s.storeOf(resource)
	s.lock.Lock()
	s.version++
	version := s.version
	s.lock.Unlock()
	st.mu.Lock()
	defer st.mu.Unlock()
	st.events, st.oldest = nil, version
	st.generation++
	st.wake()
}

// EndWatches ends the watches of a resource, as the real server does from time to time.
func (s *Server) EndWatches(resource string) {
	s.storeOf(resource).end()
}

// Names are those of a resource's objects.
func (s *Server) Names(resource string) (out []string) {
	st := s.storeOf(resource)
	st.mu.Lock()
	defer st.mu.Unlock()
	for key := range st.objects {
		out = append(out, key)
	}
	slices.Sort(out)
	return out
}

// Events are the corev1.Events that clients wrote.
func (s *Server) Events() (out []*corev1.Event) {
	st := s.storeOf("events")
	st.mu.Lock()
	defer st.mu.Unlock()
	for _, e := range st.events {
		if o, ok := e.after.(*corev1.Event); ok {
			out = append(out, o)
		}
	}
	return out
}

// filter is a pair of selectors.
type filter struct {
	labels labels.Selector
	fields fields.Selector
}

func (f filter) matches(o runtime.Object) bool {
	if o == nil {
		return false
	}
	m, err := meta.Accessor(o)
	if err != nil {
		return false
	}
	set := fields.Set{"metadata.name": m.GetName(), "metadata.namespace": m.GetNamespace()}
	if s, ok := o.(*corev1.Service); ok {
		set["spec.clusterIP"], set["spec.type"] = s.Spec.ClusterIP, string(s.Spec.Type)
	}
	return f.labels.Matches(labels.Set(m.GetLabels())) && f.fields.Matches(set)
}

// seen is an event as a watch with selectors has it: an object that begins to match is new, one that ceases to is gone.
func (f filter) seen(e event) (watch.EventType, runtime.Object) {
	was, is := f.matches(e.before), f.matches(e.after)
	switch {
	case is && was:
		return watch.Modified, e.after
	case is:
		return watch.Added, e.after
	case was:
		gone := e.before.DeepCopyObject()
		setVersion(gone, e.version)
		return watch.Deleted, gone
	}
	return "", nil
}
