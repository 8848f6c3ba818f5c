// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"net/netip"
	"testing"

	"github.com/margay-cni/margay/pkg/state"
)

const (
	world4 = "192.0.2.1"
	world6 = "2001:db8::1"
)

func TestN1_IsolationPerDirection(t *testing.T) {
	for _, tc := range []struct {
		name, spec   string
		ingress, egr bool // still allowed
	}{
		{"both types", `{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress, Egress]}`, false, false},
		{"ingress", `{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress]}`, false, true},
		{"egress", `{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress]}`, true, false},
		{"types missing", `{podSelector: {matchLabels: {pod: a}}}`, false, true},
		{"types missing, egress section", `{podSelector: {matchLabels: {pod: a}}, egress: [{ports: [{port: 1}]}]}`, false, false},
		{"egress rules without the type", `{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], egress: [{ports: [{port: 1}]}]}`, false, true},
		{"other pod", `{podSelector: {matchLabels: {pod: b}}}`, true, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newCluster()
			policy(t, s, "x/p", tc.spec)
			check(t, s,
				tcp("y/a", "x/a", 80, tc.ingress), tcp(world4, "x/a", 80, tc.ingress), tcp(world6, "x/a", 80, tc.ingress),
				tcp("x/a", "y/a", 80, tc.egr), tcp("x/a", world4, 80, tc.egr), tcp("x/a", world6, 80, tc.egr),
				tcp("z/a", "y/a", 80, true), tcp("z/a", "x/c", 80, true))
		})
	}
}

func TestN2_RulesAreAdditiveAndBothEndsDecide(t *testing.T) {
	s := newCluster()
	policy(t, s, "x/deny", `{podSelector: {}}`)
	policy(t, s, "x/allow-y", `{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {matchLabels: {ns: "y"}}}]}]}`)
	policy(t, s, "x/allow-81", `{podSelector: {matchLabels: {pod: a}}, ingress: [{ports: [{port: 81}]}]}`)
	check(t, s,
		tcp("y/b", "x/a", 80, true), tcp("z/b", "x/a", 80, false), tcp("z/b", "x/a", 81, true), tcp(world4, "x/a", 81, true),
		tcp("y/b", "x/b", 80, false))

	policy(t, s, "y/no-egress", `{podSelector: {matchLabels: {pod: b}}, policyTypes: [Egress], egress: [{ports: [{port: 82}]}]}`)
	check(t, s, tcp("y/b", "x/a", 80, false), tcp("y/b", "x/a", 82, true), tcp("y/a", "x/a", 80, true), tcp("y/b", "x/b", 82, false))
}

func TestN3_EmptyListAndEmptyRule(t *testing.T) {
	for _, tc := range []struct {
		name, spec string
		want       bool
	}{
		{"nil", `{podSelector: {}, policyTypes: [Ingress, Egress]}`, false},
		{"empty list", `{podSelector: {}, policyTypes: [Ingress, Egress], ingress: [], egress: []}`, false},
		{"empty rule", `{podSelector: {}, policyTypes: [Ingress, Egress], ingress: [{}], egress: [{}]}`, true},
		{"empty rule among others", `{podSelector: {}, policyTypes: [Ingress, Egress], ingress: [{ports: [{port: 1}]}, {}], egress: [{}, {ports: [{port: 1}]}]}`, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newCluster()
			policy(t, s, "x/p", tc.spec)
			for _, from := range []string{"y/a", world4, world6} {
				check(t, s, tcp(from, "x/a", 80, tc.want), probe{from, "x/a", state.SCTP, 5, tc.want}, probe{"x/b", from, 1, 0, tc.want})
			}
		})
	}
}

func TestN4_PortsAndPeers(t *testing.T) {
	s := newCluster()
	policy(t, s, "x/p", `
podSelector: {}
ingress:
- from: [{namespaceSelector: {matchLabels: {ns: "y"}}}, {podSelector: {matchLabels: {pod: c}}}]
  ports: [{port: 80}, {port: 53, protocol: UDP}]
- from: [{ipBlock: {cidr: 192.0.2.0/24}}, {ipBlock: {cidr: "2001:db8::/32"}}]
- ports: [{port: 99}]
`)
	check(t, s,
		tcp("y/a", "x/a", 80, true), probe{"y/a", "x/a", state.UDP, 53, true}, tcp("y/a", "x/a", 81, false),
		probe{"y/a", "x/a", state.UDP, 80, false}, probe{"y/a", "x/a", 1, 0, false},
		tcp("x/c", "x/a", 80, true), tcp("x/b", "x/a", 80, false), tcp("z/c", "x/a", 80, false),
		tcp(world4, "x/a", 1, true), tcp(world6, "x/a", 1, true), probe{world4, "x/a", 1, 0, true}, probe{world6, "x/a", 58, 0, true},
		tcp("198.51.100.1", "x/a", 80, false), tcp("198.51.100.1", "x/a", 99, true), tcp("z/c", "x/a", 99, true))
}

func TestN5_Selectors(t *testing.T) {
	for _, tc := range []struct {
		name, peer string
		allowed    []string
	}{
		{"pods of the namespace", `podSelector: {matchLabels: {pod: b}}`, []string{"x/b"}},
		{"all pods of the namespace", `podSelector: {}`, []string{"x/a", "x/b", "x/c"}},
		{"namespace", `namespaceSelector: {matchLabels: {ns: "y"}}`, []string{"y/a", "y/b", "y/c"}},
		{"namespace by name", `namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: z}}`, []string{"z/a", "z/b", "z/c"}},
		{"all namespaces", `namespaceSelector: {}`, []string{"x/a", "x/b", "x/c", "y/a", "y/b", "y/c", "z/a", "z/b", "z/c"}},
		{"both", `{namespaceSelector: {matchExpressions: [{key: ns, operator: NotIn, values: [x]}]}, podSelector: {matchLabels: {pod: b}}}`, []string{"y/b", "z/b"}},
		{"both empty", `{namespaceSelector: {}, podSelector: {}}`, []string{"x/a", "x/b", "x/c", "y/a", "y/b", "y/c", "z/a", "z/b", "z/c"}},
		{"nobody", `podSelector: {matchLabels: {pod: d}}`, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newCluster()
			policy(t, s, "x/p", `{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{`+trimBraces(tc.peer)+`}]}]}`)
			allowed := map[string]bool{}
			for _, name := range tc.allowed {
				allowed[name] = true
			}
			for key := range s.Pods {
				check(t, s, tcp(key.String(), "x/a", 80, allowed[key.String()]))
			}
			check(t, s, tcp(world4, "x/a", 80, false), tcp(world6, "x/a", 80, false))
		})
	}
}

func trimBraces(s string) string {
	if s[0] == '{' {
		return s[1 : len(s)-1]
	}
	return s
}

func TestN5_LabelChangesReevaluate(t *testing.T) {
	s := newCluster()
	policy(t, s, "x/p", `{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: red}}, podSelector: {matchLabels: {role: client}}}]}]}`)
	check(t, s, tcp("y/a", "x/a", 80, false))
	s.Namespaces["y"] = &state.Namespace{Name: "y", Labels: map[string]string{"team": "red"}}
	check(t, s, tcp("y/a", "x/a", 80, false))
	edit(s, "y/a", func(p *state.Pod) { p.Labels = map[string]string{"role": "client"} })
	check(t, s, tcp("y/a", "x/a", 80, true), tcp("y/b", "x/a", 80, false))
	s.Namespaces["y"] = &state.Namespace{Name: "y"}
	check(t, s, tcp("y/a", "x/a", 80, false))
	edit(s, "x/a", func(p *state.Pod) { p.Labels = map[string]string{"pod": "other"} })
	check(t, s, tcp("y/b", "x/a", 80, true))
}

func TestN5_UnknownNamespace(t *testing.T) {
	s := newCluster()
	delete(s.Namespaces, "y")
	policy(t, s, "x/any", `{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {}}]}]}`)
	policy(t, s, "x/not", `{podSelector: {matchLabels: {pod: b}}, ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: ns, operator: DoesNotExist}]}}]}]}`)
	check(t, s, tcp("y/a", "x/a", 80, true), tcp("y/a", "x/b", 80, false))
}

func TestN6_IPBlockExceptAppliesToPods(t *testing.T) {
	s := newCluster()
	policy(t, s, "x/p", `
podSelector: {matchLabels: {pod: a}}
policyTypes: [Ingress, Egress]
ingress:
- from:
  - ipBlock: {cidr: 10.0.0.0/16, except: [10.0.2.0/24]}
  - ipBlock: {cidr: "fd00::/64", except: ["fd00::2:0/112"]}
egress:
- to:
  - ipBlock: {cidr: 10.0.3.1/32}
  - ipBlock: {cidr: "fd00::3:1/128"}
`)
	check(t, s,
		tcp("z/a", "x/a", 80, true), tcp("y/a", "x/a", 80, false), tcp(world4, "x/a", 80, false), tcp(world6, "x/a", 80, false),
		tcp("10.0.9.9", "x/a", 80, true), tcp("fd00::9", "x/a", 80, true), tcp("10.0.2.99", "x/a", 80, false), tcp("fd00::2:99", "x/a", 80, false),
		tcp("x/a", "z/a", 80, true), tcp("x/a", "z/b", 80, false), tcp("x/a", world4, 80, false))

	// Another rule, and another policy, allow a part of the exception again.
	policy(t, s, "x/again", `
podSelector: {matchLabels: {pod: a}}
ingress:
- from: [{ipBlock: {cidr: 10.0.2.2/32}}, {ipBlock: {cidr: "fd00::2:2/128"}}]
- from: [{podSelector: {matchLabels: {pod: b}}}]
`)
	check(t, s, tcp("y/b", "x/a", 80, true), tcp("y/a", "x/a", 80, false), tcp("x/b", "x/a", 80, true))
}

func TestN6_DefaultRoutesAreOneFamily(t *testing.T) {
	for _, tc := range []struct {
		name, cidr   string
		want4, want6 bool
	}{
		{"IPv4", "0.0.0.0/0", true, false},
		{"IPv6", "::/0", false, true},
		{"around the mapped range", "::/1", false, true},
		{"mapped", "::ffff:0.0.0.0/96", true, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newCluster()
			policy(t, s, "x/p", `{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: "`+tc.cidr+`"}}]}]}`)
			check(t, s, tcp("x/a", world4, 80, tc.want4), tcp("x/a", world6, 80, tc.want6),
				tcp("x/a", "10.0.3.1", 80, tc.want4), tcp("x/a", "10.0.7.7", 80, tc.want4))
		})
	}
}

func TestN6_DefaultRouteHoldsPods(t *testing.T) {
	s := newCluster()
	policy(t, s, "x/p", `{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: "::/0", except: ["fd00::/8"]}}, {ipBlock: {cidr: 0.0.0.0/0, except: [10.0.0.0/8]}}]}]}`)
	check(t, s, tcp("x/a", world4, 80, true), tcp("x/a", world6, 80, true), tcp("x/a", "y/a", 80, false), tcp("x/a", "fd12::1", 80, false))
}

func TestN7_Ports(t *testing.T) {
	s := newCluster()
	policy(t, s, "x/p", `
podSelector: {matchLabels: {pod: a}}
policyTypes: [Ingress, Egress]
ingress:
- ports: [{port: 80, endPort: 91}, {protocol: UDP}]
egress:
- ports: [{port: 1000, endPort: 1000}, {port: 65000, endPort: 65535, protocol: SCTP}]
`)
	check(t, s,
		tcp("y/a", "x/a", 79, false), tcp("y/a", "x/a", 80, true), tcp("y/a", "x/a", 85, true), tcp("y/a", "x/a", 91, true), tcp("y/a", "x/a", 92, false),
		probe{"y/a", "x/a", state.UDP, 7, true}, probe{"y/a", "x/a", state.SCTP, 80, false}, probe{"y/a", "x/a", 1, 0, false},
		tcp("x/a", world6, 1000, true), tcp("x/a", world6, 1001, false),
		probe{"x/a", world4, state.SCTP, 64999, false}, probe{"x/a", world4, state.SCTP, 65000, true}, probe{"x/a", world4, state.SCTP, 65535, true})
}

func TestN8_NamedPorts(t *testing.T) {
	s := newCluster()
	policy(t, s, "x/in", `{podSelector: {}, ingress: [{ports: [{port: web}]}]}`)
	policy(t, s, "y/out", `{podSelector: {}, policyTypes: [Egress], egress: [{ports: [{port: web}, {port: dns, protocol: UDP}], to: [{namespaceSelector: {matchLabels: {ns: z}}}]}]}`)
	policy(t, s, "z/unknown", `{podSelector: {matchLabels: {pod: c}}, policyTypes: [Ingress, Egress], ingress: [{ports: [{port: no-such}]}], egress: [{ports: [{port: no-such}]}]}`)
	check(t, s,
		tcp("z/a", "x/a", 80, true), tcp("z/a", "x/a", 8080, false), tcp("z/a", "x/b", 8080, true), tcp("z/a", "x/b", 80, false),
		probe{"z/a", "x/a", state.UDP, 80, false},
		tcp("y/a", "z/a", 80, true), tcp("y/a", "z/b", 8080, true), tcp("y/a", "z/b", 80, false), tcp("y/a", "x/a", 80, false),
		probe{"y/a", "z/b", state.UDP, 53, true}, tcp("y/a", world4, 80, false), tcp("y/a", world6, 80, false),
		tcp("x/a", "z/c", 80, false), tcp("z/c", "x/a", 80, false), tcp("z/c", world4, 80, false))

	// The wrong protocol for the name.
	policy(t, s, "x/in", `{podSelector: {}, ingress: [{ports: [{port: dns}]}]}`)
	check(t, s, tcp("z/a", "x/a", 53, false), probe{"z/a", "x/a", state.UDP, 53, false})

	// Without peers, a name still means pods only; in an ipBlock it means the pods inside.
	policy(t, s, "y/out", `{podSelector: {}, policyTypes: [Egress], egress: [{ports: [{port: web}]}]}`)
	check(t, s, tcp("y/a", "z/b", 8080, true), tcp("y/a", world4, 8080, false), tcp("y/a", world6, 80, false))
	policy(t, s, "y/out", `{podSelector: {}, policyTypes: [Egress], egress: [{ports: [{port: web}], to: [{ipBlock: {cidr: 10.0.3.0/24}}, {ipBlock: {cidr: "fd00::3:0/112"}}]}]}`)
	check(t, s, tcp("y/a", "z/b", 8080, true), tcp("y/a", "z/a", 80, true), tcp("y/a", "10.0.3.77", 80, false), tcp("y/a", "x/b", 8080, false))
}

func TestN9_OtherProtocolStillIsolates(t *testing.T) {
	for proto, number := range map[string]state.Protocol{"SCTP": state.SCTP, "UDP": state.UDP} {
		t.Run(proto, func(t *testing.T) {
			s := newCluster()
			policy(t, s, "x/p", `{podSelector: {matchLabels: {pod: a}}, ingress: [{ports: [{protocol: `+proto+`, port: 80}]}]}`)
			check(t, s, tcp("y/a", "x/a", 80, false), probe{"y/a", "x/a", number, 80, true}, probe{"y/a", "x/a", number, 81, false})
		})
	}
}

func TestN11_HostNetworkPods(t *testing.T) {
	s := newCluster()
	node4, node6 := netip.MustParseAddr("172.16.0.1"), netip.MustParseAddr("fd10::1")
	s.Nodes["n"] = &state.Node{Name: "n", Addresses: []netip.Addr{node4, node6}}
	key := state.Key{Namespace: "x", Name: "host"}
	s.Pods[key] = &state.Pod{Key: key, Labels: map[string]string{"pod": "b"}, Local: true, HostNetwork: true, IPs: []netip.Addr{node4, node6}}
	policy(t, s, "x/all", `{podSelector: {}, policyTypes: [Ingress, Egress], ingress: [{from: [{podSelector: {}}]}], egress: [{to: [{podSelector: {}}]}]}`)
	check(t, s, tcp("x/b", "x/a", 80, true), tcp("x/host", "x/a", 80, false), tcp("x/a", "x/host", 80, false), tcp("y/a", "x/host", 80, true))
	policy(t, s, "x/node", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 172.16.0.0/24}}, {ipBlock: {cidr: "fd10::/64"}}]}]}`)
	check(t, s, tcp("x/host", "x/a", 80, true))

	// Not even a pod that claims a node's address gets it.
	edit(s, "y/a", func(p *state.Pod) { p.IPs = []netip.Addr{node4, node6} })
	r := compile(t, NewCompiler(), s)
	if _, ok := r.Pods[key]; ok {
		t.Errorf("Pods has hostNetwork pod %s, want none", key)
	}
	for _, a := range []netip.Addr{node4, node6} {
		if id, ok := r.Identities[netip.PrefixFrom(a, a.BitLen())]; ok {
			t.Errorf("Identities[%s] = %d, want none for a node's address", a, id)
		}
	}
}

func TestFinishedPodsAreNotThere(t *testing.T) {
	s := newCluster()
	policy(t, s, "x/p", `{podSelector: {}, ingress: [{from: [{namespaceSelector: {}}]}]}`)
	edit(s, "y/a", func(p *state.Pod) { p.Finished = true })
	check(t, s, tcp("y/a", "x/a", 80, false), tcp("y/b", "x/a", 80, true))
	r := compile(t, NewCompiler(), s)
	if _, ok := r.Pods[state.Key{Namespace: "y", Name: "a"}]; ok {
		t.Error("Pods has a finished pod, want none")
	}
}

func TestTwoPodsClaimOneAddress(t *testing.T) {
	s := newCluster()
	policy(t, s, "x/p", `{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {matchLabels: {ns: z}}}]}]}`)
	ips := s.Pods[state.Key{Namespace: "y", Name: "a"}].IPs
	edit(s, "z/a", func(p *state.Pod) { p.IPs = ips })
	check(t, s, tcp("y/a", "x/a", 80, false))
	edit(s, "y/a", func(p *state.Pod) { p.Terminating = true })
	check(t, s, tcp("z/a", "x/a", 80, true))
}
