// SPDX-License-Identifier: Apache-2.0

package state

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

func apiService(tweak func(*corev1.Service)) *corev1.Service {
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "web", Name: "api"},
		Spec:       corev1.ServiceSpec{ClusterIP: "10.96.0.1", ClusterIPs: []string{"10.96.0.1", "fd00:96::1"}, Ports: []corev1.ServicePort{{Port: 80}}},
	}
	tweak(s)
	return s
}

func TestI1_I2_ServicesThatTakeNoPart(t *testing.T) {
	for name, tweak := range map[string]func(*corev1.Service){
		"headless":         func(s *corev1.Service) { s.Spec.ClusterIP, s.Spec.ClusterIPs = "None", []string{"None"} },
		"no address":       func(s *corev1.Service) { s.Spec.ClusterIP, s.Spec.ClusterIPs = "", nil },
		"ExternalName":     func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeExternalName },
		"another's (I1)":   func(s *corev1.Service) { s.Labels = map[string]string{"service.kubernetes.io/service-proxy-name": ""} },
		"headless, alone":  func(s *corev1.Service) { s.Spec.ClusterIP, s.Spec.ClusterIPs = "None", nil },
		"unreadable alone": func(s *corev1.Service) { s.Spec.ClusterIP, s.Spec.ClusterIPs = "x", nil },
	} {
		if got := FromService(apiService(tweak)); got != nil {
			t.Errorf("%s: FromService() = %+v, want nil", name, got)
		}
	}
}

func TestFromService(t *testing.T) {
	local := corev1.ServiceInternalTrafficPolicyLocal
	for _, tc := range []struct {
		name  string
		tweak func(*corev1.Service)
		want  func(*Service)
	}{
		{"plain", func(*corev1.Service) {}, func(*Service) {}},
		{"only clusterIP", func(s *corev1.Service) { s.Spec.ClusterIPs = nil }, func(s *Service) { s.ClusterIPs = addrs("10.96.0.1") }},
		{"V2: a ClusterIP without outside address has no external policy", func(s *corev1.Service) { s.Spec.ExternalTrafficPolicy = "Local" }, func(*Service) {}},
		{"V2: one with outside addresses has", func(s *corev1.Service) {
			s.Spec.ExternalTrafficPolicy, s.Spec.ExternalIPs = "Local", []string{"192.0.2.1", "2001:db8::1"}
		}, func(s *Service) { s.ExternalLocal, s.ExternalIPs = true, addrs("192.0.2.1", "2001:db8::1") }},
		{"NodePort", func(s *corev1.Service) {
			s.Spec.Type, s.Spec.ExternalTrafficPolicy, s.Spec.InternalTrafficPolicy = "NodePort", "Local", &local
			s.Spec.Ports[0] = corev1.ServicePort{Name: "x", Protocol: "SCTP", Port: 1, NodePort: 30000, TargetPort: intstr.FromString("y")}
		}, func(s *Service) {
			s.Type, s.ExternalLocal, s.InternalLocal = NodePort, true, true
			s.Ports = []ServicePort{{Name: "x", Protocol: SCTP, Port: 1, NodePort: 30000, TargetName: "y"}}
		}},
		{"return mode", func(s *corev1.Service) {
			s.Annotations = map[string]string{"margay.io/service-return": "dsr"}
		}, func(s *Service) { s.Return = ReturnDSR }},
		{"a return mode that nobody knows is kept", func(s *corev1.Service) {
			s.Annotations = map[string]string{"margay.io/service-return": "teleport"}
		}, func(s *Service) { s.Return = "teleport" }},
		{"V11: affinity", func(s *corev1.Service) { s.Spec.SessionAffinity = "ClientIP" }, func(s *Service) { s.AffinitySeconds = 10800 }},
		{"H1: health check port", func(s *corev1.Service) { s.Spec.HealthCheckNodePort = 30999 }, func(s *Service) { s.HealthCheckNodePort = 30999 }},
		{"NodePort of a ClusterIP is none", func(s *corev1.Service) { s.Spec.Ports[0].NodePort = 30000 }, func(*Service) {}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			want := &Service{Key: Key{"web", "api"}, Type: ClusterIP, ClusterIPs: addrs("10.96.0.1", "fd00:96::1"), Ports: []ServicePort{{Protocol: TCP, Port: 80, TargetPort: 80}}}
			tc.want(want)
			if diff := cmp.Diff(want, FromService(apiService(tc.tweak)), sameAddr); diff != "" {
				t.Errorf("FromService() (-want +got):\n%s", diff)
			}
		})
	}
}

// Contract row V3: what the status says is served, whatever type and class say, unless its mode is Proxy or it is only a name.
func TestV3_LoadBalancerStatusDecides(t *testing.T) {
	vip, proxy, class := corev1.LoadBalancerIPModeVIP, corev1.LoadBalancerIPModeProxy, "example.org/somebody-elses"
	ingress := []corev1.LoadBalancerIngress{
		{IP: "192.0.2.1"}, {IP: "2001:db8::1", IPMode: &vip}, {IP: "192.0.2.2", IPMode: &proxy}, {IP: "2001:db8::2", IPMode: &proxy}, {Hostname: "h"},
	}
	for name, tweak := range map[string]func(*corev1.Service){
		"LoadBalancer": func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeLoadBalancer },
		"of another class": func(s *corev1.Service) {
			s.Spec.Type, s.Spec.LoadBalancerClass = corev1.ServiceTypeLoadBalancer, &class
		},
		"of another type by now":     func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeClusterIP },
		"with no NodePort allocated": func(s *corev1.Service) { s.Spec.Type, s.Spec.Ports[0].NodePort = corev1.ServiceTypeLoadBalancer, 0 },
	} {
		got := FromService(apiService(func(s *corev1.Service) { tweak(s); s.Status.LoadBalancer.Ingress = ingress }))
		if diff := cmp.Diff(addrs("192.0.2.1", "2001:db8::1"), got.LoadBalancerIPs, sameAddr); diff != "" {
			t.Errorf("service %s: LoadBalancerIPs (-want +got):\n%s", name, diff)
		}
	}
}

func TestI6_I8_FromEndpointSlice(t *testing.T) {
	number, no, yes := int32(8080), false, true
	name, node := "http", "node-a"
	slice := func(tweak func(*discoveryv1.EndpointSlice)) *discoveryv1.EndpointSlice {
		s := &discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Namespace: "web", Name: "s", Labels: map[string]string{"kubernetes.io/service-name": "api"}},
			AddressType: "IPv6",
			Ports:       []discoveryv1.EndpointPort{{Name: &name, Port: &number}, {Name: &name}},
			Endpoints: []discoveryv1.Endpoint{
				{Addresses: []string{"fd00::1", "fd00::2"}, NodeName: &node},
				{Addresses: []string{"10.0.0.1"}},
				{Addresses: []string{"fd00::3"}, Conditions: discoveryv1.EndpointConditions{Ready: &no, Serving: &no, Terminating: &yes},
					Hints: &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: "z"}}, ForNodes: []discoveryv1.ForNode{{Name: "n"}}}},
			},
		}
		tweak(s)
		return s
	}
	// I6: only the first address, no port without number; I8: conditions that are not set.
	want := &EndpointSlice{
		Key: Key{"web", "s"}, Service: Key{"web", "api"}, IPv6: true, Ports: []SlicePort{{"http", TCP, 8080}},
		Endpoints: []Endpoint{
			{Addr: addrs("fd00::1")[0], Node: "node-a", Ready: true, Serving: true},
			{Addr: addrs("fd00::3")[0], Terminating: true, ForZones: []string{"z"}, ForNodes: []string{"n"}},
		},
	}
	if diff := cmp.Diff(want, FromEndpointSlice(slice(func(*discoveryv1.EndpointSlice) {})), sameAddr); diff != "" {
		t.Errorf("FromEndpointSlice() (-want +got):\n%s", diff)
	}
	want.Triggered = time.Date(2026, 1, 2, 3, 4, 5, 6000000, time.UTC)
	annotated := slice(func(s *discoveryv1.EndpointSlice) {
		s.Annotations = map[string]string{"endpoints.kubernetes.io/last-change-trigger-time": "2026-01-02T03:04:05.006Z"}
	})
	if diff := cmp.Diff(want, FromEndpointSlice(annotated), sameAddr); diff != "" {
		t.Errorf("FromEndpointSlice() with the time of its change (-want +got):\n%s", diff)
	}
}

func TestI3_I4_SlicesThatTakeNoPart(t *testing.T) {
	for name, tweak := range map[string]func(*discoveryv1.EndpointSlice){
		"headless (I3)":   func(s *discoveryv1.EndpointSlice) { s.Labels["service.kubernetes.io/headless"] = "" },
		"no service (I3)": func(s *discoveryv1.EndpointSlice) { s.Labels = nil },
		"FQDN (I4)":       func(s *discoveryv1.EndpointSlice) { s.AddressType = "FQDN" },
	} {
		s := &discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Namespace: "web", Name: "s", Labels: map[string]string{"kubernetes.io/service-name": "api"}},
			AddressType: "IPv4", Endpoints: []discoveryv1.Endpoint{{Addresses: []string{"10.0.0.1"}}},
		}
		if got := FromEndpointSlice(s); got == nil || len(got.Endpoints) != 1 {
			t.Fatalf("%s: before, FromEndpointSlice() = %+v, want its endpoint", name, got)
		}
		tweak(s)
		if got := FromEndpointSlice(s); got != nil {
			t.Errorf("%s: FromEndpointSlice() = %+v, want nil", name, got)
		}
	}
}

func TestFromPod(t *testing.T) {
	always := corev1.ContainerRestartPolicyAlways
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "p", UID: "u", DeletionTimestamp: &metav1.Time{}},
		Spec: corev1.PodSpec{
			NodeName:       "node-a",
			InitContainers: []corev1.Container{{Ports: []corev1.ContainerPort{{ContainerPort: 1}}}, {RestartPolicy: &always, Ports: []corev1.ContainerPort{{ContainerPort: 2}}}},
			Containers:     []corev1.Container{{Ports: []corev1.ContainerPort{{Name: "a", ContainerPort: 3, Protocol: "UDP"}}}},
		},
		Status: corev1.PodStatus{
			Phase: corev1.PodFailed, PodIP: "10.0.0.9", PodIPs: []corev1.PodIP{{IP: "10.0.0.1"}, {IP: "fd00::1"}},
			Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}},
		},
	}
	want := &Pod{
		Key: Key{"default", "p"}, UID: "u", IPs: addrs("10.0.0.1", "fd00::1"), Node: "node-a", Local: true, Finished: true, Ready: true, Terminating: true,
		Ports: []ContainerPort{{"", TCP, 2}, {"a", UDP, 3}},
	}
	if diff := cmp.Diff(want, FromPod(p, "node-a"), sameAddr); diff != "" {
		t.Errorf("FromPod() (-want +got):\n%s", diff)
	}
	p.Spec.NodeName, p.Status = "", corev1.PodStatus{PodIP: "fd00::9"}
	if got := FromPod(p, ""); got.Local || got.Ready || !cmp.Equal(got.IPs, addrs("fd00::9"), sameAddr) {
		t.Errorf("FromPod() of a pod on no node = %+v, want not local, not ready, podIP", got)
	}
}

// Contract row I11: of the Node object come the labels (the zone is one), the addresses and the pods' ranges.
func TestI11_FromNode(t *testing.T) {
	n := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: "n", Labels: map[string]string{corev1.LabelTopologyZone: "z"}},
		Spec:       corev1.NodeSpec{PodCIDR: "10.1.0.0/24", PodCIDRs: []string{"10.1.0.0/24", "fd00:1::/64"}},
		Status:     corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: "Hostname", Address: "n"}, {Type: "InternalIP", Address: "192.0.2.1"}, {Type: "InternalIP", Address: "2001:db8::1"}, {Type: "ExternalIP", Address: "192.0.2.9"}}},
	}
	got := FromNode(n)
	if !cmp.Equal(got.Addresses, addrs("192.0.2.1", "2001:db8::1"), sameAddr) || len(got.PodCIDRs) != 2 || got.PodCIDRs[1].String() != "fd00:1::/64" || got.Labels[corev1.LabelTopologyZone] != "z" {
		t.Errorf("FromNode() = %+v", got)
	}
	if want := addrs("192.0.2.1", "2001:db8::1", "192.0.2.9"); !cmp.Equal(got.AllAddresses, want, sameAddr) {
		t.Errorf("FromNode().AllAddresses = %v, want %v (row C4)", got.AllAddresses, want)
	}
}

func TestH2_NodeLeaves(t *testing.T) {
	for _, tc := range []struct {
		name  string
		tweak func(*corev1.Node)
		want  bool
	}{
		{"stays", func(*corev1.Node) {}, false},
		{"tainted otherwise", func(n *corev1.Node) { n.Spec.Taints = []corev1.Taint{{Key: "other"}} }, false},
		{"tainted", func(n *corev1.Node) {
			n.Spec.Taints = []corev1.Taint{{Key: "ToBeDeletedByClusterAutoscaler"}, {Key: "other"}}
		}, true},
		{"being deleted", func(n *corev1.Node) { n.DeletionTimestamp = &metav1.Time{} }, true},
	} {
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"}}
		tc.tweak(n)
		if got := FromNode(n).Leaving; got != tc.want {
			t.Errorf("node that %s: Leaving = %v, want %v", tc.name, got, tc.want)
		}
	}
}
