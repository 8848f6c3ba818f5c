// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"net/netip"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	policyv1alpha2 "sigs.k8s.io/network-policy-api/apis/v1alpha2"

	"github.com/margay-cni/margay/pkg/state"
)

// largeCluster has 100 namespaces of apps with 10 replicas, dual stack, 1 pod in 47 local; the policies say in turn: nobody, one app to another,
// the namespace and a range of ports, out to the world but not into the cluster.
func largeCluster(pods, policies int) *state.Snapshot {
	const namespaces = 100
	s := state.NewSnapshot()
	ns := func(i int) string { return fmt.Sprintf("ns-%d", i%namespaces) }
	for i := range namespaces {
		s.Namespaces[ns(i)] = &state.Namespace{Name: ns(i), Labels: map[string]string{"kubernetes.io/metadata.name": ns(i)}}
	}
	for i := range pods {
		k := state.Key{Namespace: ns(i), Name: fmt.Sprintf("pod-%d", i)}
		s.Pods[k] = &state.Pod{
			Key: k, Local: i%47 == 0,
			Labels: map[string]string{"app": fmt.Sprintf("app-%d", i/namespaces/10), "pod-template-hash": fmt.Sprintf("%08x", i/namespaces/10), "tier": "backend"},
			IPs: []netip.Addr{
				netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}),
				netip.MustParseAddr(fmt.Sprintf("fd00::%x:%x", i>>16, i&0xffff)),
			},
			Ports: []state.ContainerPort{{Name: "web", Protocol: state.TCP, Port: 8080}},
		}
	}
	for i := range policies {
		k := state.Key{Namespace: ns(i), Name: fmt.Sprintf("policy-%d", i)}
		s.NetworkPolicies[k] = &state.NetworkPolicy{Key: k, Spec: largePolicy(i / namespaces)}
	}
	return s
}

func largePolicy(i int) networkingv1.NetworkPolicySpec {
	app := func(i int) *metav1.LabelSelector {
		return &metav1.LabelSelector{MatchLabels: map[string]string{"app": fmt.Sprintf("app-%d", i%5)}}
	}
	spec := networkingv1.NetworkPolicySpec{PodSelector: *app(i), PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}}
	port, low, end := intstr.FromString("web"), intstr.FromInt32(int32(8000+i)), int32(9000)
	switch i % 4 {
	case 1:
		spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{
			From:  []networkingv1.NetworkPolicyPeer{{PodSelector: app(i + 1)}},
			Ports: []networkingv1.NetworkPolicyPort{{Port: &port}},
		}}
	case 2:
		spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{
			From:  []networkingv1.NetworkPolicyPeer{{NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"kubernetes.io/metadata.name": fmt.Sprintf("ns-%d", i)}}}},
			Ports: []networkingv1.NetworkPolicyPort{{Port: &low, EndPort: &end}},
		}}
	case 3:
		spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeEgress}
		spec.Egress = []networkingv1.NetworkPolicyEgressRule{{To: []networkingv1.NetworkPolicyPeer{
			{IPBlock: &networkingv1.IPBlock{CIDR: "0.0.0.0/0", Except: []string{"10.0.0.0/8"}}},
			{IPBlock: &networkingv1.IPBlock{CIDR: "::/0", Except: []string{"fd00::/8"}}},
		}}}
	}
	return spec
}

func BenchmarkCompile(b *testing.B) {
	for _, size := range []struct{ pods, policies int }{{5000, 1000}, {5000, 10000}} {
		s := largeCluster(size.pods, size.policies)
		name := fmt.Sprintf("pods=%d/policies=%d", size.pods, size.policies)
		b.Run(name+"/first", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				r, err := NewCompiler().Compile(s)
				if err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(float64(len(r.Entries)), "entries")
			}
		})
		// One policy changes its text; what the agent does with it then.
		b.Run(name+"/change", func(b *testing.B) {
			b.ReportAllocs()
			c := NewCompiler()
			if _, _, err := c.Update(s); err != nil {
				b.Fatal(err)
			}
			s, k := clone(s), state.Key{Namespace: "ns-0", Name: "policy-0"}
			for i := 0; b.Loop(); i++ {
				s.NetworkPolicies[k] = &state.NetworkPolicy{Key: k, Spec: largePolicy(i)}
				if _, _, err := c.Update(s); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// manyClusterPolicies are 100 ClusterNetworkPolicies of 25 rules in each direction, in both tiers: from namespaces and apps by labels, to
// networks and nodes, by ports, ranges and names. Each is about a tenth of the namespaces.
func manyClusterPolicies(s *state.Snapshot) {
	actions := []policyv1alpha2.ClusterNetworkPolicyRuleAction{"Accept", "Deny", "Pass"}
	for i := range 100 {
		s.Nodes[fmt.Sprint(i)] = &state.Node{
			Name: fmt.Sprint(i), Labels: map[string]string{"rack": fmt.Sprint(i % 10)}, AllAddresses: []netip.Addr{netip.AddrFrom4([4]byte{172, 16, 0, byte(i)})},
		}
		p := &state.ClusterNetworkPolicy{Name: fmt.Sprintf("cnp-%d", i), Tier: policyv1alpha2.AdminTier, Priority: int32(i)}
		if i%2 == 1 {
			p.Tier = policyv1alpha2.BaselineTier
		}
		var names []string
		for j := range 10 {
			names = append(names, fmt.Sprintf("ns-%d", 10*j+i%10))
		}
		p.Subject.Namespaces = &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "kubernetes.io/metadata.name", Operator: "In", Values: names}}}
		for j := range 25 {
			r := state.ClusterNetworkPolicyRule{Action: actions[(i+j)%3]}
			port := &policyv1alpha2.Port{Number: int32(1000 + 25*i + j)}
			if j%3 == 0 {
				port = &policyv1alpha2.Port{Range: &policyv1alpha2.PortRange{Start: int32(1001 + 100*i + j), End: int32(1500 + 100*i + j)}}
			}
			r.Protocols = []policyv1alpha2.ClusterNetworkPolicyProtocol{{TCP: &policyv1alpha2.ClusterNetworkPolicyProtocolTCP{DestinationPort: port}}}
			pods := policyv1alpha2.ClusterNetworkPolicyEgressPeer{Pods: &policyv1alpha2.NamespacedPod{
				NamespaceSelector: metav1.LabelSelector{MatchLabels: map[string]string{"kubernetes.io/metadata.name": fmt.Sprintf("ns-%d", (i+j)%100)}},
				PodSelector:       metav1.LabelSelector{MatchLabels: map[string]string{"app": fmt.Sprintf("app-%d", j%5)}},
			}}
			in := r
			in.Peers = []policyv1alpha2.ClusterNetworkPolicyEgressPeer{pods}
			p.Ingress = append(p.Ingress, in)
			switch j % 3 {
			case 0:
				pods = policyv1alpha2.ClusterNetworkPolicyEgressPeer{Networks: []policyv1alpha2.CIDR{policyv1alpha2.CIDR(fmt.Sprintf("192.%d.0.0/16", i))}}
			case 1:
				pods = policyv1alpha2.ClusterNetworkPolicyEgressPeer{Nodes: &metav1.LabelSelector{MatchLabels: map[string]string{"rack": fmt.Sprint(j % 10)}}}
			}
			out := r
			out.Peers = []policyv1alpha2.ClusterNetworkPolicyEgressPeer{pods}
			p.Egress = append(p.Egress, out)
		}
		s.ClusterNetworkPolicies[p.Name] = p
	}
}

func BenchmarkCompileClusterPolicies(b *testing.B) {
	for _, tc := range []struct {
		name     string
		policies int // NetworkPolicies
		everyone bool
	}{{"cnp=100x25", 0, false}, {"cnp=100x25/np=1000", 1000, false}, {"cnp=100x25/everyone", 0, true}} {
		s := largeCluster(5000, tc.policies)
		manyClusterPolicies(s)
		if tc.everyone { // the common baseline: nobody talks to anybody else
			s.ClusterNetworkPolicies["deny"] = &state.ClusterNetworkPolicy{
				Name: "deny", Tier: policyv1alpha2.BaselineTier, Priority: 1000, Subject: policyv1alpha2.ClusterNetworkPolicySubject{Namespaces: &metav1.LabelSelector{}},
				Ingress: []state.ClusterNetworkPolicyRule{{Action: "Deny", Peers: []policyv1alpha2.ClusterNetworkPolicyEgressPeer{{Namespaces: &metav1.LabelSelector{}}}}},
			}
		}
		b.Run(tc.name+"/first", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				r, err := NewCompiler().Compile(s)
				if err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(float64(len(r.Entries)), "entries")
			}
		})
		b.Run(tc.name+"/change", func(b *testing.B) {
			c := NewCompiler()
			if _, _, err := c.Update(s); err != nil {
				b.Fatal(err)
			}
			s := clone(s)
			for b.Loop() {
				p := *s.ClusterNetworkPolicies["cnp-0"]
				p.Priority = 1 - p.Priority
				s.ClusterNetworkPolicies["cnp-0"] = &p
				if _, _, err := c.Update(s); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
