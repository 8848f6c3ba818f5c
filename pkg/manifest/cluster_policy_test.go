// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/pkg/state"
)

const goodClusterPolicy = `apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata:
  name: p
spec:
  tier: Admin
  priority: 10
  subject:
    namespaces: {}
  ingress:
  - name: web
    action: Accept
    from:
    - pods: {podSelector: {matchLabels: {a: b}}}
    protocols:
    - tcp: {destinationPort: {number: 80}}
    - destinationNamedPort: web
  egress:
  - action: Deny
    to:
    - networks: [10.0.0.0/8, "fd00::/8"]
    - nodes: {}
    protocols:
    - udp: {destinationPort: {range: {start: 1, end: 2}}}
`

func TestC1_ManifestsOfClusterNetworkPolicies(t *testing.T) {
	s := snapshotOf(t, goodClusterPolicy)
	p := s.ClusterNetworkPolicies["p"]
	if p == nil || p.Priority != 10 || len(p.Ingress) != 1 || len(p.Egress) != 1 || len(p.Unknown) > 0 || p.Egress[0].Peers[1].Nodes == nil {
		t.Errorf("ClusterNetworkPolicies = %+v", s.ClusterNetworkPolicies)
	}
	if len(s.Namespaces) != 0 {
		t.Errorf("Namespaces = %v, want none: the policy is in no namespace", s.Namespaces)
	}
	// A file that says it again later does not count.
	c := parse("x.yaml", "n", []byte(goodClusterPolicy))
	if _, problems := assemble([]source{{file: "x.yaml", objects: c.objects}, {file: "y.yaml", objects: c.objects}}); len(problems) != 1 || !strings.Contains(problems[0].String(), "ClusterNetworkPolicy p") {
		t.Errorf("problems of the same policy in two files = %v, want one", problems)
	}
}

func TestC1_ManifestChecks(t *testing.T) {
	replace := func(pairs ...string) string {
		out := goodClusterPolicy
		for i := 0; i < len(pairs); i += 2 {
			if !strings.Contains(out, pairs[i]) {
				t.Fatalf("no %q in the manifest", pairs[i])
			}
			out = strings.Replace(out, pairs[i], pairs[i+1], 1)
		}
		return out
	}
	rules := strings.Repeat("  - {action: Deny, to: [{nodes: {}}]}\n", 25)
	for _, tc := range []struct {
		name, text string
		want       []string // without "x.yaml:LINE: ClusterNetworkPolicy p: "
	}{
		{"good", goodClusterPolicy, nil},
		{"tier", replace("Admin", "Cellar"), []string{`6 spec.tier: "Cellar" is not one of [Admin Baseline]`}},
		{"priority", replace("10\n", "1001\n"), []string{"7 spec.priority: 1001 is outside 0 to 1000"}},
		{"subject", replace("    namespaces: {}\n", "    {}\n"), []string{"8 spec.subject: is empty: want namespaces or pods"}},
		{"two subjects", replace("    namespaces: {}\n", "    namespaces: {}\n    pods: {podSelector: {}}\n"), []string{"8 spec.subject: has more than one of namespaces or pods"}},
		{"too many rules", replace("  egress:\n", "  egress:\n"+rules), []string{"18 spec.egress: has 26 items, want at most 25"}},
		{"no peers", replace("    from:\n    - pods: {podSelector: {matchLabels: {a: b}}}\n", ""), []string{"11 spec.ingress[0].from: is empty: want 1 to 25 items"}},
		{"empty peer", replace("nodes: {}", "{}"), []string{"22 spec.egress[0].to[1]: is empty: want namespaces, pods, nodes, networks or domainNames"}},
		{"two in one", replace("- nodes: {}", "- {nodes: {}, namespaces: {}}"), []string{"22 spec.egress[0].to[1]: has more than one of namespaces, pods, nodes, networks or domainNames"}},
		{"action", replace("Deny", "Drop"), []string{`19 spec.egress[0].action: "Drop" is not one of [Accept Deny Pass]`}},
		{"network", replace("10.0.0.0/8", "10.0.0.1/8"), []string{"21 spec.egress[0].to[0].networks[0]: 10.0.0.1/8 has bits beyond its length: write 10.0.0.0/8"}},
		{"no network", replace("10.0.0.0/8", "all"), []string{`21 spec.egress[0].to[0].networks[0]: "all" is no CIDR`}},
		{"IPv6 network", replace("fd00::/8", "::ffff:10.0.0.0/104"), []string{`21 spec.egress[0].to[0].networks[1]: "::ffff:10.0.0.0/104" is an IPv4-mapped CIDR: write it as IPv4`}},
		{"range", replace("start: 1", "start: 2"), []string{"24 spec.egress[0].protocols[0].udp.destinationPort.range: start 2 is not less than end 2"}},
		{"port", replace("number: 80", "number: 70000"), []string{"16 spec.ingress[0].protocols[0].tcp.destinationPort.number: 70000 is outside 1 to 65535"}},
		{"empty protocol", replace("tcp: {destinationPort: {number: 80}}", "tcp: {}"), []string{"16 spec.ingress[0].protocols[0].tcp: is empty: want destinationPort"}},
		{"named port of nodes", replace("udp: {destinationPort: {range: {start: 1, end: 2}}}", "destinationNamedPort: web"), []string{
			"21 spec.egress[0].to[0]: nodes, networks and domainNames cannot be combined with destinationNamedPort: only pods name their ports",
			"22 spec.egress[0].to[1]: nodes, networks and domainNames cannot be combined with destinationNamedPort: only pods name their ports",
		}},
		{"selector", replace("matchLabels: {a: b}", "matchExpressions: [{key: a, operator: Is}]"), []string{`14 spec.ingress[0].from[0].pods.podSelector: "Is" is not a valid label selector operator`}},
		{"namespace", replace("name: p", "name: p\n  namespace: x"), []string{"5 warning: metadata.namespace: is ignored: objects of this kind are in no namespace"}},
		{"domain names", replace("nodes: {}", "domainNames: [a.example.com]"), []string{"22 warning: spec.egress[0].to[1].domainNames: are not supported: an Accept rule with them matches nothing, any other denies everything"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var want []string
			for _, w := range tc.want {
				line, rest, _ := strings.Cut(w, " ")
				want = append(want, fmt.Sprintf("x.yaml:%s: ClusterNetworkPolicy p: %s", line, rest))
			}
			got := words(parse("x.yaml", "n", []byte(tc.text)).problems)
			if diff := cmp.Diff(sorted(want), sorted(got)); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
		})
	}
}

// A field of a newer version is a warning, so that the file counts, and reaches the compiler, so that the rule fails closed.
func TestC5_UnknownFieldsInManifests(t *testing.T) {
	text := strings.Replace(goodClusterPolicy, "nodes: {}", "universe: {}", 1)
	c := parse("x.yaml", "n", []byte(text))
	want := []string{"x.yaml:22: ClusterNetworkPolicy p: warning: spec.egress[0].to[1].universe: unknown field: what it belongs to fails closed"}
	if diff := cmp.Diff(want, words(c.problems)); diff != "" {
		t.Errorf("problems (-want +got):\n%s", diff)
	}
	s, _ := assemble([]source{{file: "x.yaml", objects: c.objects}})
	var p *state.ClusterNetworkPolicy
	if p = s.ClusterNetworkPolicies["p"]; p == nil || len(p.Egress) != 1 {
		t.Fatalf("ClusterNetworkPolicies = %v, want p", s.ClusterNetworkPolicies)
	}
	if diff := cmp.Diff([]string{"spec.egress[0].to[1].universe"}, p.Egress[0].Unknown); diff != "" {
		t.Errorf("Unknown (-want +got):\n%s", diff)
	}
}
