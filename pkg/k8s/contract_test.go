// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/margay-cni/margay/internal/testutil/apitest"
	"github.com/margay-cni/margay/pkg/state"
)

// anything accepts the first snapshot.
func anything(*state.Snapshot) bool { return true }

func TestI1_AnotherProxysServices(t *testing.T) {
	s := apitest.New(t)
	plain, other, headless := apiService("plain", "10.96.0.1"), apiService("other", "10.96.0.2", "fd00:96::2"), apiService("headless", "None")
	other.Labels = map[string]string{"service.kubernetes.io/service-proxy-name": "x"}
	s.Put(apiNode("n1"), plain, other, headless)
	r := run(t, inPod(t, s))
	if got := r.until("a snapshot", anything); len(got.Services) != 1 || got.Services[key("plain")] == nil {
		t.Errorf("services = %v, want plain alone", got.Services)
	}
	for _, q := range s.Requests("services") {
		if q.Labels != "!service.kubernetes.io/service-proxy-name" || q.Fields != "spec.clusterIP!=None" {
			t.Errorf("selectors = %q, %q, want those of kube-proxy", q.Labels, q.Fields)
		}
	}
	// Adding the label is a delete, removing it an add.
	plain.Labels, other.Labels = map[string]string{"service.kubernetes.io/service-proxy-name": ""}, nil
	s.Put(plain, other)
	r.until("the labels' change", func(s *state.Snapshot) bool {
		return len(s.Services) == 1 && s.Services[key("other")] != nil
	})
}

func TestI2_ServicesWithoutFrontends(t *testing.T) {
	s := apitest.New(t)
	external, pending := apiService("external", "10.96.0.3"), apiService("pending")
	external.Spec.Type = corev1.ServiceTypeExternalName
	s.Put(external, pending, apiService("plain", "fd00:96::1"))
	r := run(t, inPod(t, s))
	if got := r.until("a snapshot", anything); len(got.Services) != 1 || got.Services[key("plain")] == nil {
		t.Errorf("services = %v, want plain alone", got.Services)
	}
	external.Spec.Type = corev1.ServiceTypeClusterIP
	s.Put(external)
	r.until("the service to take part", func(s *state.Snapshot) bool { return s.Services[key("external")] != nil })
	external.Spec.Type = corev1.ServiceTypeExternalName
	s.Put(external)
	r.until("it to leave", func(s *state.Snapshot) bool { return s.Services[key("external")] == nil })
}

func TestI3_I4_SlicesThatTakeNoPart(t *testing.T) {
	s := apitest.New(t)
	mine := apiSlice("mine", "api", "IPv4", "10.0.0.1")
	nobodys := apiSlice("nobodys", "", "IPv6", "fd00::2")
	nobodys.Labels = nil
	s.Put(mine, apiSlice("mine6", "api", "IPv6", "fd00::1"), nobodys, apiSlice("names", "api", "FQDN", "example.org"))
	r := run(t, inPod(t, s))
	got := r.until("a snapshot", anything)
	if len(got.EndpointSlices) != 2 || got.EndpointSlices[key("mine")] == nil || !got.EndpointSlices[key("mine6")].IPv6 {
		t.Errorf("slices = %v, want mine and mine6", got.EndpointSlices)
	}
	for _, q := range s.Requests("endpointslices") {
		if q.Labels != "!service.kubernetes.io/headless" || q.Fields != "" {
			t.Errorf("selectors = %q, %q, want that of kube-proxy", q.Labels, q.Fields)
		}
	}
	mine.Labels[corev1.IsHeadlessService] = ""
	s.Put(mine)
	r.until("the slice to vanish", func(s *state.Snapshot) bool { return s.EndpointSlices[key("mine")] == nil })
}

// Nothing is published until the last kind has been read, whichever it is.
func TestI10_NothingBeforeEverythingIsRead(t *testing.T) {
	for _, slow := range []string{"pods", "services", "endpointslices", "nodes", "namespaces", "networkpolicies", "servicecidrs", "clusternetworkpolicies"} {
		t.Run(slow, func(t *testing.T) {
			t.Parallel()
			s := apitest.New(t)
			s.Serve(apitest.ClusterNetworkPolicies)
			stall := make(chan struct{})
			s.Fail(slow, apitest.Fault{Stall: stall})
			s.Put(apiNode("n1"), apiNamespace("web"), apiService("api", "10.96.0.1"))
			r := run(t, inPod(t, s))
			eventually(t, "all but one to be read", func() bool {
				left := r.source.Incomplete()
				return len(left) == 1 && left[0] == slow
			})
			s.Put(apiPod(1), apiService("second", "10.96.0.2"))
			time.Sleep(50 * time.Millisecond) // far longer than a snapshot takes to be published
			if got := r.all(); len(got) != 0 {
				t.Errorf("%d snapshots without %s, want none", len(got), slow)
			}
			if p := fmt.Sprint(r.source.Problems()); !strings.Contains(p, "not yet: "+slow) {
				t.Errorf("problems = %s, want what is missing", p)
			}
			close(stall)
			got := r.until("a snapshot", anything)
			if got.Services[key("api")] == nil || len(r.source.Incomplete()) != 0 {
				t.Errorf("services = %v, incomplete = %v, want everything", got.Services, r.source.Incomplete())
			}
		})
	}
}

func TestI11_NodesAndServiceCIDRs(t *testing.T) {
	s := apitest.New(t)
	cidr := &networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/16", "fd00:96::/112"}}}
	s.Put(apiNode("n1"), apiNode("n2", "10.244.2.0/24"), cidr)
	r := run(t, inPod(t, s))
	got := r.until("a snapshot", anything)
	if c := got.ServiceCIDRs["kubernetes"]; c == nil || fmt.Sprint(c.Prefixes) != "[10.96.0.0/16 fd00:96::/112]" {
		t.Errorf("service CIDRs = %v, want both", got.ServiceCIDRs)
	}
	if p := fmt.Sprint(r.source.Problems()); !strings.Contains(p, "Node n1: warning: spec.podCIDRs is empty") {
		t.Errorf("problems = %s, want the missing ranges", p)
	}
	s.Put(apiNode("n1", "10.244.1.0/24", "fd00:244:1::/64"))
	r.until("the ranges", func(s *state.Snapshot) bool { return len(s.Nodes["n1"].PodCIDRs) == 2 })
	if p := r.source.Problems(); len(p) != 0 {
		t.Errorf("problems = %v, want none", p)
	}
	leaving := apiNode("n1", "10.244.1.0/24")
	leaving.Spec.Taints = []corev1.Taint{{Key: "ToBeDeletedByClusterAutoscaler"}}
	s.Put(leaving)
	r.until("the taint", func(s *state.Snapshot) bool { return s.Nodes["n1"].Leaving })
	s.Delete(leaving)
	r.until("the node to go", func(s *state.Snapshot) bool { return s.Nodes["n1"] == nil })
	if p := fmt.Sprint(r.source.Problems()); !strings.Contains(p, "Node n1: warning: is not there") {
		t.Errorf("problems = %s, want the missing node", p)
	}
	s.Unserve("servicecidrs")
	r.until("the ranges to go", func(s *state.Snapshot) bool { return len(s.ServiceCIDRs) == 0 })
}

// Many changes become few snapshots, and the last one has them all; what did not change is the identical object.
func TestI12_ChangesAreCoalesced(t *testing.T) {
	const changes = 2000
	s := apitest.New(t)
	s.Put(apiNode("n1"), apiNamespace("web"), apiService("api", "10.96.0.1"))
	r := run(t, inPod(t, s))
	first := r.until("a snapshot", anything)
	began := time.Now()
	for i := range changes {
		s.Put(apiPod(i))
	}
	last := r.until("all pods", func(s *state.Snapshot) bool { return len(s.Pods) == changes })
	took := time.Since(began)
	n := len(r.all()) - 1
	t.Logf("%d changes in %v became %d snapshots", changes, took.Round(time.Millisecond), n)
	if most := int(took/interval) + 2; n > most {
		t.Errorf("%d snapshots in %v, want at most %d", n, took, most)
	}
	if last.Services[key("api")] != first.Services[key("api")] || last.Nodes["n1"] != first.Nodes["n1"] {
		t.Error("an object that did not change is another one")
	}
	if len(first.Pods) != 0 {
		t.Error("a published snapshot was written to")
	}
}

// What Margay does not use of an object changes nothing, however often it changes.
func TestI12_IrrelevantChangesAreNone(t *testing.T) {
	s := apitest.New(t)
	pod, node := apiPod(1), apiNode("n1")
	s.Put(node, pod)
	r := run(t, inPod(t, s))
	first := r.until("a snapshot", anything)
	for i := range 20 {
		pod.Annotations = map[string]string{"beat": fmt.Sprint(i)}
		pod.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "c", RestartCount: int32(i)}}
		node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, LastHeartbeatTime: metav1.Now()}}
		s.Put(node, pod)
	}
	second := apiPod(2)
	s.Put(second)
	last := r.until("a change that counts", func(s *state.Snapshot) bool { return s.Pods[key("p2")] != nil })
	if n := len(r.all()); n != 2 {
		t.Errorf("%d snapshots, want 2", n)
	}
	if last.Pods[key("p1")] != first.Pods[key("p1")] {
		t.Error("the pod is another object, want the identical one")
	}
}
