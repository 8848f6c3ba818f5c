// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
)

// policyServer holds one ClusterNetworkPolicy, "p", and applies conditions to its status.
type policyServer struct {
	t  *testing.T
	mu sync.Mutex

	conditions []metav1.Condition
	patches    int
	broken     bool
}

func (s *policyServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	const object = "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies/p"
	w.Header().Set("Content-Type", runtime.ContentTypeJSON)
	switch {
	case s.broken:
		w.WriteHeader(http.StatusInternalServerError)
	case r.Method == http.MethodGet && r.URL.Path == object:
		_ = json.NewEncoder(w).Encode(map[string]any{"kind": "ClusterNetworkPolicy", "status": map[string]any{"conditions": s.conditions}})
	case r.Method == http.MethodPatch && r.URL.Path == object+"/status":
		q := r.URL.Query()
		if got := r.Header.Get("Content-Type"); got != "application/apply-patch+yaml" || q.Get("fieldManager") != "margay" || q.Get("force") != "true" {
			s.t.Errorf("patch of type %q with %v, want an apply by margay", got, q)
		}
		var patch struct {
			Kind, APIVersion string
			Status           struct{ Conditions []metav1.Condition }
		}
		body, err := io.ReadAll(r.Body)
		if err := json.Unmarshal(body, &patch); err != nil || patch.Kind != "ClusterNetworkPolicy" || patch.APIVersion != policyGroup.String() {
			s.t.Errorf("patch is %s, %v", body, err)
		}
		if err != nil {
			s.t.Error(err)
		}
		s.conditions, s.patches = patch.Status.Conditions, s.patches+1
		_, _ = w.Write([]byte("{}"))
	default:
		w.WriteHeader(http.StatusNotFound)
		_ = json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure", Reason: metav1.StatusReasonNotFound, Code: 404})
	}
}

func (s *policyServer) look() (patches int, conditions []metav1.Condition) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.patches, s.conditions
}

// node returns a writer as a node has it.
func (s *policyServer) node(url string) *Statuses {
	client, err := rest.RESTClientFor(&rest.Config{Host: url, APIPath: "/apis", ContentConfig: rest.ContentConfig{
		GroupVersion: &policyGroup, NegotiatedSerializer: codecs.WithoutConversion(), ContentType: runtime.ContentTypeJSON,
	}})
	if err != nil {
		s.t.Fatal(err)
	}
	w := &Statuses{
		source: &Source{cfg: Config{Log: slog.New(slog.DiscardHandler)}}, client: client, spread: time.Millisecond, wake: make(chan struct{}, 1),
	}
	go w.deliver(s.t.Context())
	return w
}

// Contract row C9: what became of a policy is in its status, written once however many nodes there are.
func TestC9_StatusOfClusterNetworkPolicies(t *testing.T) {
	s := &policyServer{t: t}
	server := httptest.NewServer(s)
	defer server.Close()
	refused := metav1.Condition{Type: "margay.io/Accepted", Status: metav1.ConditionFalse, Reason: "DomainNamesUnsupported", Message: "m", ObservedGeneration: 1}
	first, second := s.node(server.URL), s.node(server.URL)
	first.ClusterPolicies(map[string]metav1.Condition{"p": refused, "gone": refused})
	eventually(t, "the condition", func() bool { n, c := s.look(); return n == 1 && len(c) == 1 })
	_, wrote := s.look()
	since := wrote[0].LastTransitionTime
	wrote[0].LastTransitionTime = metav1.Time{}
	if diff := cmp.Diff(refused, wrote[0]); diff != "" || since.IsZero() {
		t.Errorf("condition since %v (-want +got):\n%s", since, diff)
	}
	s.mu.Lock()
	s.conditions[0].LastTransitionTime = metav1.NewTime(time.Unix(1000, 0))
	s.mu.Unlock()

	// The second node finds it done. A later generation is written, and as the status is the same, so is since when; the first node, which
	// has not seen that generation yet, leaves it.
	later := refused
	later.ObservedGeneration = 2
	second.ClusterPolicies(map[string]metav1.Condition{"p": refused})
	second.ClusterPolicies(map[string]metav1.Condition{"p": later})
	eventually(t, "the later generation", func() bool { _, c := s.look(); return c[0].ObservedGeneration == 2 })
	stale := refused
	stale.Message = "another"
	first.ClusterPolicies(map[string]metav1.Condition{"p": stale})
	if err := first.write(t.Context(), "p", stale); err != nil {
		t.Error(err)
	}
	if n, c := s.look(); n != 2 || !c[0].LastTransitionTime.Equal(&metav1.Time{Time: time.Unix(1000, 0)}) || c[0].Message != "m" {
		t.Errorf("patches = %d, condition %+v; want 2, and what the second node wrote", n, c[0])
	}

	s.mu.Lock()
	s.broken = true
	s.mu.Unlock()
	if err := second.write(t.Context(), "p", refused); err == nil {
		t.Error("write() to a server that fails = nil, want an error, so that it is tried again")
	}
}
