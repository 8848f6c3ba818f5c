// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"errors"
	"syscall"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	policyv1alpha2 "sigs.k8s.io/network-policy-api/apis/v1alpha2"

	"github.com/margay-cni/margay/internal/testutil/clustertest"
)

// inForce is how long the contract gives a policy to be in force (row N15).
const inForce = 10 * time.Second

// TestN15_N16_PoliciesThroughServices asks as the tests of Kubernetes do, pod to ClusterIP to pod, on one node and across two: within the
// contract's time of being written a policy is in force, what it denies is not answered at all, not even refused, and once the
// policy has gone the answers come again. A ClusterNetworkPolicy does the same (rows C1 and C4).
func TestN15_N16_PoliciesThroughServices(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{})
	web := c.AddPod(c.Node("n1"), "web", map[string]string{"app": "web"})
	web.Serve(8080)
	clients := []*clustertest.Pod{c.AddPod(c.Node("n1"), "near", nil), c.AddPod(c.Node("n2"), "far", nil)}
	c.Apply(clustertest.NodePortService("web", 10, map[string]string{"app": "web"}, 80, 8080, 30080))
	c.WaitSettled()

	subject := metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}
	np := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: "deny"}}
	np.Spec = networkingv1.NetworkPolicySpec{PodSelector: subject, PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}}
	ingress := &policyv1alpha2.ClusterNetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: "deny"}}
	ingress.Spec = policyv1alpha2.ClusterNetworkPolicySpec{
		Tier: policyv1alpha2.BaselineTier, Subject: policyv1alpha2.ClusterNetworkPolicySubject{Pods: &policyv1alpha2.NamespacedPod{PodSelector: subject}},
		Ingress: []policyv1alpha2.ClusterNetworkPolicyIngressRule{{Action: "Deny", From: []policyv1alpha2.ClusterNetworkPolicyIngressPeer{{Namespaces: &metav1.LabelSelector{}}}}},
	}
	egress := &policyv1alpha2.ClusterNetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: "deny"}}
	egress.Spec = policyv1alpha2.ClusterNetworkPolicySpec{
		Tier: policyv1alpha2.AdminTier, Subject: policyv1alpha2.ClusterNetworkPolicySubject{Namespaces: &metav1.LabelSelector{}},
		Egress: []policyv1alpha2.ClusterNetworkPolicyEgressRule{{Action: "Deny", To: []policyv1alpha2.ClusterNetworkPolicyEgressPeer{{Pods: &policyv1alpha2.NamespacedPod{PodSelector: subject}}}}},
	}
	// until asks everybody until all say the same, and returns how long that took.
	until := func(what string, answered bool) {
		t.Helper()
		for _, v6 := range c.Families() {
			for _, client := range clients {
				for _, network := range []string{"tcp", "udp"} {
					start := time.Now()
					for {
						asked := time.Now()
						_, err := client.Ask(network, clusterIP(10, v6))
						if errors.Is(err, syscall.ECONNREFUSED) {
							t.Fatalf("%s: %s from %s was refused: %v", what, network, client.Name, err)
						}
						if (err == nil) == answered {
							break
						}
						if asked.Sub(start) > inForce {
							t.Fatalf("%s: %s from %s to %v after %v: %v, want answered %v", what, network, client.Name, clusterIP(10, v6), inForce, err, answered)
						}
					}
				}
			}
		}
	}
	until("without a policy", true)
	for name, policy := range map[string]runtime.Object{"NetworkPolicy": np, "Baseline tier": ingress, "Admin tier": egress} {
		start := time.Now()
		c.Apply(policy)
		until(name, false)
		took := time.Since(start)
		c.Delete(policy)
		until(name+" gone", true)
		t.Logf("%s: in force for all clients, protocols and families after %v", name, took)
	}
}
