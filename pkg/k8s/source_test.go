// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"

	"github.com/margay-cni/margay/internal/testutil/apitest"
	"github.com/margay-cni/margay/pkg/state"
)

func TestEverythingIsRead(t *testing.T) {
	s := apitest.New(t)
	s.Put(apiNode("n1", "10.244.1.0/24", "fd00:244:1::/64"), apiNamespace("web"), apiPod(1), apiService("api", "10.96.0.1", "fd00:96::1"),
		apiSlice("api-4", "api", "IPv4", "10.0.0.1"), apiSlice("api-6", "api", "IPv6", "fd00::1"),
		&networkingv1.NetworkPolicy{ObjectMeta: meta1("deny", nil)})
	r := run(t, inPod(t, s))
	got := r.until("a snapshot", anything)
	pod := got.Pods[key("p1")]
	if pod == nil || !pod.Local || !pod.Ready || len(pod.IPs) != 2 || pod.UID != "uid-p1" || pod.Labels["app"] != "web" || len(pod.Ports) != 1 {
		t.Errorf("pod = %+v, want what policies and services use of it", pod)
	}
	if got.Services[key("api")] == nil || len(got.EndpointSlices) != 2 || got.Nodes["n1"] == nil || got.Namespaces["web"] == nil || got.NetworkPolicies[key("deny")] == nil {
		t.Errorf("snapshot = %+v, want everything", got)
	}
	for _, q := range s.Requests("pods") {
		if !strings.HasPrefix(q.Accept, "application/vnd.kubernetes.protobuf") || q.Protocol != "HTTP/2.0" || q.ServerName != "kubernetes.default.svc" {
			t.Errorf("request = %+v, want protobuf over HTTP/2 from kubernetes.default.svc", q)
		}
	}
	s.Delete(apiPod(1))
	r.until("the pod to go", func(s *state.Snapshot) bool { return len(s.Pods) == 0 })
	if p := r.source.Problems(); len(p) != 0 {
		t.Errorf("problems = %v, want none", p)
	}
}

// A server that is too old to stream lists, and for ServiceCIDRs, is asked for lists.
func TestOldServer(t *testing.T) {
	s := apitest.New(t)
	s.RefuseInitialEvents()
	s.Serve(apitest.ClusterNetworkPolicies)
	s.Unserve("servicecidrs")
	s.PutJSON(tierPolicy("one", ""))
	s.Put(apiNode("n1"))
	for i := range 700 {
		s.Put(apiPod(i))
	}
	r := run(t, inPod(t, s))
	got := r.until("a snapshot", anything)
	if len(got.Pods) != 700 || len(got.ClusterNetworkPolicies) != 1 {
		t.Errorf("%d pods and %d policies, want 700 and 1", len(got.Pods), len(got.ClusterNetworkPolicies))
	}
	s.Expire("pods")
	s.Delete(apiPod(3))
	s.Put(apiPod(1000))
	r.until("the change", func(s *state.Snapshot) bool {
		return s.Pods[key("p3")] == nil && s.Pods[key("p1000")] != nil && len(s.Pods) == 700
	})
}

// A watch whose version the server has forgotten begins anew; no snapshot has less than there is.
func TestExpiredVersion(t *testing.T) {
	s := apitest.New(t)
	s.Put(apiNode("n1"))
	for i := range 100 {
		s.Put(apiPod(i))
	}
	r := run(t, inPod(t, s))
	first := r.until("a snapshot", anything)
	for i := range 5 {
		s.Delete(apiPod(i))
		s.Expire("pods")
	}
	last := r.until("the deletes", func(s *state.Snapshot) bool { return len(s.Pods) == 95 })
	for _, got := range r.all() {
		if len(got.Pods) < 95 || got.Nodes["n1"] == nil {
			t.Errorf("a snapshot with %d pods, want at least 95", len(got.Pods))
		}
	}
	if first.Pods[key("p50")] != last.Pods[key("p50")] {
		t.Error("a pod that did not change is another object")
	}
}

// The server is away for a while: that is a problem and no change.
func TestServerIsAway(t *testing.T) {
	s := apitest.New(t)
	s.Put(apiNode("n1", "10.244.1.0/24"), apiPod(1), apiService("api", "10.96.0.1", "fd00:96::1"))
	r := run(t, inPod(t, s))
	r.until("a snapshot", anything)
	began := time.Now()
	s.Stop()
	eventually(t, "a problem", func() bool { return strings.Contains(fmt.Sprint(r.source.Problems()), "cannot be reached since") })
	t.Logf("noticed after %v", time.Since(began).Round(time.Millisecond))
	s.Put(apiPod(2))
	s.Delete(apiPod(1))
	if n := len(r.all()); n != 1 {
		t.Errorf("%d snapshots, want 1", n)
	}
	began = time.Now()
	s.Start()
	r.until("what happened meanwhile", func(s *state.Snapshot) bool { return s.Pods[key("p1")] == nil && s.Pods[key("p2")] != nil })
	t.Logf("caught up after %v", time.Since(began).Round(time.Millisecond))
	eventually(t, "no problem", func() bool { return len(r.source.Problems()) == 0 })
}

// A server that is away when the agent starts is waited for.
func TestServerComesLate(t *testing.T) {
	s := apitest.New(t)
	s.Put(apiNode("n1"))
	s.Stop()
	r := run(t, inPod(t, s))
	eventually(t, "two problems", func() bool {
		p := fmt.Sprint(r.source.Problems())
		return strings.Contains(p, "cannot be reached since") && strings.Contains(p, "nothing is changed until everything has been read")
	})
	if n := len(r.source.Incomplete()); n != len(r.source.all) {
		t.Errorf("%d kinds are missing, want all", n)
	}
	s.Start()
	r.until("a snapshot", anything)
}

// What the agent may not read is a problem that names the cure. Before the first snapshot nothing is published without it.
func TestForbidden(t *testing.T) {
	for _, resource := range []string{"pods", "clusternetworkpolicies"} {
		t.Run(resource, func(t *testing.T) {
			s := apitest.New(t)
			s.Serve(apitest.ClusterNetworkPolicies)
			s.Put(apiNode("n1", "10.244.1.0/24"))
			s.Fail(resource, apitest.Fault{Code: http.StatusForbidden})
			r := run(t, inPod(t, s))
			eventually(t, "a problem", func() bool {
				p := fmt.Sprint(r.source.Problems())
				return strings.Contains(p, resource+": cannot be read since") && strings.Contains(p, "ClusterRole")
			})
			if len(r.all()) != 0 {
				t.Error("a snapshot was published")
			}
			s.Fail(resource, apitest.Fault{})
			r.until("a snapshot", anything)
			eventually(t, "no problem", func() bool { return len(r.source.Problems()) == 0 })
		})
	}
}

// A token that was replaced is used.
func TestTokenIsReplaced(t *testing.T) {
	s := apitest.New(t)
	s.Put(apiNode("n1"))
	cfg := inPod(t, s)
	r := run(t, cfg)
	r.until("a snapshot", anything)
	s.SetToken("second")
	if err := os.WriteFile(filepath.Join(cfg.ServiceAccountDir, "token"), []byte("second"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.Drop()
	s.Put(apiPod(1))
	r.until("the pod", func(s *state.Snapshot) bool { return len(s.Pods) == 1 })
}

func tierPolicy(name, extra string) string {
	return fmt.Sprintf(`{"apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy", "metadata": {"name": %q},
	"spec": {"tier": "Admin", "priority": 1, "subject": {"namespaces": {}}, "ingress": [{"action": "Deny", "from": [{"namespaces": {}%s}]}]}}`, name, extra)
}

// ClusterNetworkPolicies are followed from when their definition is installed until it is removed.
func TestClusterNetworkPolicies(t *testing.T) {
	s := apitest.New(t)
	s.Put(apiNode("n1", "10.244.1.0/24"))
	r := run(t, inPod(t, s))
	if got := r.until("a snapshot", anything); len(got.ClusterNetworkPolicies) != 0 {
		t.Errorf("policies = %v, want none", got.ClusterNetworkPolicies)
	}
	s.Serve(apitest.ClusterNetworkPolicies)
	s.PutJSON(tierPolicy("one", ""))
	r.until("the policy", func(s *state.Snapshot) bool { return len(s.ClusterNetworkPolicies) == 1 })
	// A field of a later version is seen (row C5).
	s.PutJSON(tierPolicy("one", `, "ghosts": {}`))
	r.until("the unknown field", func(s *state.Snapshot) bool {
		p := s.ClusterNetworkPolicies["one"]
		return p != nil && len(p.Ingress) == 1 && slices.Equal(p.Ingress[0].Unknown, []string{"spec.ingress[0].from[0].ghosts"})
	})
	s.PutJSON(tierPolicy("two", ""))
	s.Expire(apitest.ClusterNetworkPolicies)
	r.until("both after a relist", func(s *state.Snapshot) bool { return len(s.ClusterNetworkPolicies) == 2 })
	if p := r.source.Problems(); len(p) != 0 {
		t.Errorf("problems = %v, want none", p)
	}
	began := time.Now()
	s.Unserve(apitest.ClusterNetworkPolicies)
	r.until("the policies to go", func(s *state.Snapshot) bool { return len(s.ClusterNetworkPolicies) == 0 })
	if took := time.Since(began); took < confirmAbsence {
		t.Errorf("policies were gone after %v, want at least %v: a server that starts may not serve them yet", took, confirmAbsence)
	}
}
