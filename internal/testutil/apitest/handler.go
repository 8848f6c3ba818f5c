// SPDX-License-Identifier: Apache-2.0

package apitest

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/scheme"
)

// handle answers /api/v1/RESOURCE, /apis/GROUP/VERSION/RESOURCE, and events in a namespace.
func (s *Server) handle(w http.ResponseWriter, r *http.Request) {
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	resource := parts[len(parts)-1]
	q := r.URL.Query()
	verb := "list"
	switch {
	case r.Method == http.MethodPatch && len(parts) > 2:
		verb, resource = "patch", parts[len(parts)-2]
	case r.Method == http.MethodPost:
		verb = "create"
	case q.Get("watch") == "true" || q.Get("watch") == "1":
		verb = "watch"
	}
	s.mu.Lock()
	s.requests = append(s.requests, Request{
		Verb: verb, Resource: resource, Labels: q.Get("labelSelector"), Fields: q.Get("fieldSelector"), Accept: r.Header.Get("Accept"),
		Protocol: r.Proto, ServerName: r.TLS.ServerName, ResourceVersion: q.Get("resourceVersion"),
	})
	fault := s.faults[resource]
	if all := s.faults[""]; all.Code != 0 || all.Stall != nil {
		fault = all
	}
	token := s.token
	s.mu.Unlock()
	e := negotiate(r.Header.Get("Accept"))
	if fault.Stall != nil {
		select {
		case <-fault.Stall:
		case <-r.Context().Done():
			return
		}
	}
	switch st := s.storeOf(resource); {
	case r.Header.Get("Authorization") != "Bearer "+token:
		e.refuse(w, http.StatusUnauthorized, resource, "Unauthorized")
	case fault.Code != 0:
		e.refuse(w, fault.Code, resource, "apitest was told to")
	case st == nil:
		e.refuse(w, http.StatusNotFound, resource, "the server could not find the requested resource")
	case verb == "create":
		s.create(w, r, e)
	case verb == "watch":
		s.watch(w, r, e, st, resource)
	case verb == "list":
		s.list(w, r, e, st, resource)
	default:
		e.refuse(w, http.StatusMethodNotAllowed, resource, verb)
	}
}

// encoding is a wire format.
type encoding struct {
	info runtime.SerializerInfo
}

// negotiate takes the first type that is accepted and known.
func negotiate(accept string) encoding {
	for want := range strings.SplitSeq(accept, ",") {
		want, _, _ = strings.Cut(strings.TrimSpace(want), ";")
		if info, ok := runtime.SerializerInfoForMediaType(scheme.Codecs.SupportedMediaTypes(), want); ok && info.MediaType == want {
			return encoding{info}
		}
	}
	info, _ := runtime.SerializerInfoForMediaType(scheme.Codecs.SupportedMediaTypes(), runtime.ContentTypeJSON)
	return encoding{info}
}

// of is the format for a resource: what has no Go type is JSON whatever was asked for.
func (e encoding) of(resource string) encoding {
	if resource == ClusterNetworkPolicies {
		return negotiate(runtime.ContentTypeJSON)
	}
	return e
}

func versioned(o runtime.Object) runtime.Object {
	if _, ok := o.(*unstructured.Unstructured); ok {
		return o
	}
	if gvks, _, err := scheme.Scheme.ObjectKinds(o); err == nil {
		o = o.DeepCopyObject()
		o.GetObjectKind().SetGroupVersionKind(gvks[0])
	}
	return o
}

func (e encoding) refuse(w http.ResponseWriter, code int, resource, message string) {
	status := apierrors.NewGenericServerResponse(code, "get", schema.GroupResource{Resource: resource}, "", message, 0, true).Status()
	status.TypeMeta = metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}
	if code == http.StatusGone {
		status.Reason = metav1.StatusReasonExpired
	}
	w.Header().Set("Content-Type", e.info.MediaType)
	w.WriteHeader(code)
	_ = e.info.Serializer.Encode(&status, w)
}

func filterOf(r *http.Request) (f filter, err error) {
	if f.labels, err = labels.Parse(r.URL.Query().Get("labelSelector")); err == nil {
		f.fields, err = fields.ParseSelector(r.URL.Query().Get("fieldSelector"))
	}
	return f, err
}

// newList is an empty list of a resource.
func newList(resource string) runtime.Object {
	for kind := range scheme.Scheme.AllKnownTypes() {
		if strings.HasSuffix(kind.Kind, "List") && kind.Version == "v1" {
			plural, _ := meta.UnsafeGuessKindToResource(kind.GroupVersion().WithKind(strings.TrimSuffix(kind.Kind, "List")))
			if plural.Resource == resource && slices.Contains([]string{"", "discovery.k8s.io", "networking.k8s.io"}, kind.Group) {
				o, _ := scheme.Scheme.New(kind) // it is known
				return o
			}
		}
	}
	return nil
}

func (s *Server) list(w http.ResponseWriter, r *http.Request, e encoding, st *store, resource string) {
	f, err := filterOf(r)
	if err != nil {
		e.refuse(w, http.StatusBadRequest, resource, err.Error())
		return
	}
	st.mu.Lock()
	var objects []runtime.Object
	for _, o := range st.objects {
		if f.matches(o) {
			objects = append(objects, versioned(o))
		}
	}
	st.mu.Unlock()
	slices.SortFunc(objects, func(a, b runtime.Object) int { return strings.Compare(nameOf(a), nameOf(b)) })
	s.lock.Lock()
	version := strconv.FormatUint(s.version, 10)
	s.lock.Unlock()
	next := ""
	q := r.URL.Query()
	if limit, _ := strconv.Atoi(q.Get("limit")); limit > 0 && q.Get("resourceVersion") != "0" {
		from, _ := strconv.Atoi(q.Get("continue"))
		if from+limit < len(objects) {
			next = strconv.Itoa(from + limit)
		}
		objects = objects[from:min(from+limit, len(objects))]
	}
	e = e.of(resource)
	w.Header().Set("Content-Type", e.info.MediaType)
	list := newList(resource)
	if list == nil {
		_ = json.NewEncoder(w).Encode(map[string]any{
			"kind": "ClusterNetworkPolicyList", "apiVersion": "policy.networking.k8s.io/v1alpha2", "items": append([]runtime.Object{}, objects...),
			"metadata": map[string]any{"resourceVersion": version, "continue": next},
		})
		return
	}
	if err := meta.SetList(list, objects); err != nil {
		s.t.Errorf("list of %s: %v", resource, err)
	}
	m, _ := meta.ListAccessor(list) // it is a list
	m.SetResourceVersion(version)
	m.SetContinue(next)
	_ = e.info.Serializer.Encode(versioned(list), w)
}

func nameOf(o runtime.Object) string {
	m, _ := meta.Accessor(o) // it is an object
	return m.GetNamespace() + "/" + m.GetName()
}

func (s *Server) create(w http.ResponseWriter, r *http.Request, e encoding) {
	var o runtime.Object
	body, err := io.ReadAll(r.Body)
	if err == nil {
		o, _, err = scheme.Codecs.UniversalDeserializer().Decode(body, nil, &corev1.Event{})
		if _, ok := o.(*corev1.Event); ok {
			s.Put(o)
			w.Header().Set("Content-Type", e.info.MediaType)
			w.WriteHeader(http.StatusCreated)
			_ = e.info.Serializer.Encode(versioned(o), w)
			return
		}
	}
	e.refuse(w, http.StatusBadRequest, "events", fmt.Sprintf("%T: %v", o, err))
}

// frames writes the events of one watch.
type frames struct {
	encoding
	w      http.ResponseWriter
	writer io.Writer
}

func (s *Server) watch(w http.ResponseWriter, r *http.Request, e encoding, st *store, resource string) {
	q := r.URL.Query()
	f, err := filterOf(r)
	initial := q.Get("sendInitialEvents") == "true"
	s.mu.Lock()
	refuse := initial && s.noInitialEvents
	s.mu.Unlock()
	if err != nil || refuse {
		e.refuse(w, http.StatusUnprocessableEntity, resource, "sendInitialEvents: Forbidden")
		return
	}
	e = e.of(resource)
	w.Header().Set("Content-Type", e.info.MediaType+";stream=watch")
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	out := &frames{encoding: e, w: w, writer: e.info.StreamSerializer.Framer.NewFrameWriter(w)}

	st.mu.Lock()
	generation := st.generation
	from, _ := strconv.ParseUint(q.Get("resourceVersion"), 10, 64)
	if !initial && from < st.oldest {
		st.mu.Unlock()
		status := apierrors.NewResourceExpired(fmt.Sprintf("too old resource version: %d (%d)", from, st.oldest)).Status()
		status.TypeMeta = metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}
		out.send(watch.Error, &status)
		return
	}
	if initial {
		s.lock.Lock()
		from = s.version
		s.lock.Unlock()
		for _, o := range st.objects {
			if f.matches(o) {
				out.send(watch.Added, o)
			}
		}
		out.bookmark(resource, from)
	}
	for st.generation == generation {
		for _, ev := range st.events {
			if ev.version > from {
				from = ev.version
				if t, o := f.seen(ev); t != "" {
					out.send(t, o)
				}
			}
		}
		changed := st.changed
		st.mu.Unlock()
		select {
		case <-r.Context().Done():
			return
		case <-changed:
		}
		st.mu.Lock()
	}
	st.mu.Unlock()
}

func (f *frames) send(t watch.EventType, o runtime.Object) {
	var buf strings.Builder
	if u, ok := o.(*unstructured.Unstructured); ok {
		_ = json.NewEncoder(&buf).Encode(u.Object)
	} else if err := f.info.Serializer.Encode(versioned(o), &buf); err != nil {
		return
	}
	ev := &metav1.WatchEvent{Type: string(t), Object: runtime.RawExtension{Raw: []byte(buf.String())}}
	if f.info.StreamSerializer.Serializer.Encode(ev, f.writer) == nil {
		f.w.(http.Flusher).Flush()
	}
}

// bookmark ends the initial events.
func (f *frames) bookmark(resource string, version uint64) {
	m := metav1.ObjectMeta{
		ResourceVersion: strconv.FormatUint(version, 10), Annotations: map[string]string{metav1.InitialEventsAnnotationKey: "true"},
	}
	list := newList(resource)
	if list == nil {
		u := &unstructured.Unstructured{Object: map[string]any{"kind": "ClusterNetworkPolicy", "apiVersion": "policy.networking.k8s.io/v1alpha2"}}
		u.SetResourceVersion(m.ResourceVersion)
		u.SetAnnotations(m.Annotations)
		f.send(watch.Bookmark, u)
		return
	}
	gvks, _, _ := scheme.Scheme.ObjectKinds(list) // it came from the scheme
	gvk := gvks[0]
	gvk.Kind = strings.TrimSuffix(gvk.Kind, "List")
	o, _ := scheme.Scheme.New(gvk)
	a, _ := meta.Accessor(o)
	a.SetResourceVersion(m.ResourceVersion)
	a.SetAnnotations(m.Annotations)
	f.send(watch.Bookmark, o)
}
