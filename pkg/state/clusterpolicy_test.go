// SPDX-License-Identifier: Apache-2.0

package state

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	policyv1alpha2 "sigs.k8s.io/network-policy-api/apis/v1alpha2"
	"sigs.k8s.io/yaml"
)

func readClusterPolicy(t *testing.T, text string) *ClusterNetworkPolicy {
	t.Helper()
	raw, err := yaml.YAMLToJSON([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	p, err := FromClusterNetworkPolicy(raw)
	if err != nil {
		t.Fatalf("FromClusterNetworkPolicy() = %v", err)
	}
	return p
}

func TestC1_FromClusterNetworkPolicy(t *testing.T) {
	got := readClusterPolicy(t, `
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: p, generation: 3, labels: {a: b}, someday: x}
spec:
  tier: Baseline
  priority: 1000
  subject: {pods: {namespaceSelector: {}, podSelector: {matchLabels: {a: b}}}}
  ingress:
  - {name: one, action: Accept, from: [{namespaces: {}}], protocols: [{tcp: {destinationPort: {number: 80}}}, {destinationNamedPort: web}]}
  egress:
  - {action: Deny, to: [{networks: [10.0.0.0/8]}, {nodes: {}}, {domainNames: ["*.example.com"]}]}
  - {action: Pass, to: [{pods: {podSelector: {}}}], protocols: [{udp: {destinationPort: {range: {start: 1, end: 2}}}}, {sctp: {}}]}
`)
	everything := &metav1.LabelSelector{}
	want := &ClusterNetworkPolicy{
		Name: "p", Generation: 3, Tier: policyv1alpha2.BaselineTier, Priority: 1000,
		Subject: policyv1alpha2.ClusterNetworkPolicySubject{Pods: &policyv1alpha2.NamespacedPod{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"a": "b"}},
		}},
		Ingress: []ClusterNetworkPolicyRule{{
			Name: "one", Action: policyv1alpha2.ClusterNetworkPolicyRuleActionAccept,
			Peers: []policyv1alpha2.ClusterNetworkPolicyEgressPeer{{Namespaces: everything}},
			Protocols: []policyv1alpha2.ClusterNetworkPolicyProtocol{
				{TCP: &policyv1alpha2.ClusterNetworkPolicyProtocolTCP{DestinationPort: &policyv1alpha2.Port{Number: 80}}},
				{DestinationNamedPort: "web"},
			},
		}},
		Egress: []ClusterNetworkPolicyRule{
			{Action: policyv1alpha2.ClusterNetworkPolicyRuleActionDeny, Peers: []policyv1alpha2.ClusterNetworkPolicyEgressPeer{
				{Networks: []policyv1alpha2.CIDR{"10.0.0.0/8"}}, {Nodes: everything}, {DomainNames: []policyv1alpha2.DomainName{"*.example.com"}},
			}},
			{
				Action: policyv1alpha2.ClusterNetworkPolicyRuleActionPass,
				Peers:  []policyv1alpha2.ClusterNetworkPolicyEgressPeer{{Pods: &policyv1alpha2.NamespacedPod{}}},
				Protocols: []policyv1alpha2.ClusterNetworkPolicyProtocol{
					{UDP: &policyv1alpha2.ClusterNetworkPolicyProtocolUDP{DestinationPort: &policyv1alpha2.Port{Range: &policyv1alpha2.PortRange{Start: 1, End: 2}}}},
					{SCTP: &policyv1alpha2.ClusterNetworkPolicyProtocolSCTP{}},
				},
			},
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("FromClusterNetworkPolicy() (-want +got):\n%s", diff)
	}
}

func TestC5_UnknownFieldsAreSeen(t *testing.T) {
	const rest = `metadata: {name: p}
spec: {tier: Admin, priority: 1, subject: {namespaces: {}}, `
	for _, tc := range []struct {
		name, spec string
		object     []string // Unknown of the policy
		rule       []string // and of its only rule
		without    string   // what the case says itself
	}{
		{"peer", `ingress: [{action: Deny, from: [{namespaces: {}}, {cluster: x}]}]`, nil, []string{"spec.ingress[0].from[1].cluster"}, ""},
		{"networks are no ingress peer", `ingress: [{action: Deny, from: [{networks: [10.0.0.0/8]}]}]`, nil, []string{"spec.ingress[0].from[0].networks"}, ""},
		{"beside known ones", `egress: [{action: Accept, to: [{pods: {podSelector: {}, age: 1}}]}]`, nil, []string{"spec.egress[0].to[0].pods.age"}, ""},
		{"protocol", `egress: [{action: Accept, to: [{nodes: {}}], protocols: [{icmp: {}}]}]`, nil, []string{"spec.egress[0].protocols[0].icmp"}, ""},
		{"of a protocol", `egress: [{action: Accept, to: [{nodes: {}}], protocols: [{tcp: {sourcePort: 1}}]}]`, nil, []string{"spec.egress[0].protocols[0].tcp.sourcePort"}, ""},
		{"of a rule", `egress: [{action: Pass, to: [{nodes: {}}], log: true, at: night}]`, nil, []string{"spec.egress[0].at", "spec.egress[0].log"}, ""},
		{"another type", `egress: [{action: Pass, to: everybody}]`, nil, []string{"spec.egress[0]"}, ""},
		{"letter case", `egress: [{action: Pass, To: [{nodes: {}}]}]`, nil, []string{"spec.egress[0].To"}, ""},
		{"of the spec", `egress: [{action: Pass, to: [{nodes: {}}]}], from: x`, []string{"spec.from"}, nil, ""},
		{"tier of another type", `egress: [{action: Pass, to: [{nodes: {}}]}], tier: {name: Admin}`, []string{"spec.tier"}, nil, "tier: Admin, "},
		{"of the subject", `egress: [{action: Pass, to: [{nodes: {}}]}], subject: {accounts: {}}`, []string{"spec.subject.accounts"}, nil, "subject: {namespaces: {}}, "},
	} {
		t.Run(tc.name, func(t *testing.T) {
			text := rest + tc.spec + "}"
			if tc.without != "" {
				text = strings.Replace(text, tc.without, "", 1)
			}
			p := readClusterPolicy(t, text)
			if diff := cmp.Diff(tc.object, p.Unknown); diff != "" {
				t.Errorf("Unknown of the policy (-want +got):\n%s", diff)
			}
			rules := append(p.Ingress, p.Egress...)
			if len(rules) != 1 {
				t.Fatalf("%d rules, want 1", len(rules))
			}
			if diff := cmp.Diff(tc.rule, rules[0].Unknown); diff != "" {
				t.Errorf("Unknown of the rule (-want +got):\n%s", diff)
			}
		})
	}
}

func TestFromClusterNetworkPolicyErrors(t *testing.T) {
	for _, raw := range []string{``, `[]`, `{}`, `{"metadata": {}}`, `{"metadata": {"name": "p"}`, `{"metadata": {"name": 1}}`} {
		if p, err := FromClusterNetworkPolicy([]byte(raw)); err == nil {
			t.Errorf("FromClusterNetworkPolicy(%s) = %+v, want an error", raw, p)
		}
	}
}
