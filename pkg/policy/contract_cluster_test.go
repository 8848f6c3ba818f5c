// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/margay-cni/margay/pkg/state"
)

func TestC1_NoImplicitIsolation(t *testing.T) {
	s := newCluster()
	clusterPolicy(t, s, "p", `
tier: Admin
priority: 0
subject: {pods: {namespaceSelector: {matchLabels: {ns: x}}, podSelector: {matchLabels: {pod: a}}}}
ingress: [{action: Deny, from: [{namespaces: {matchLabels: {ns: "y"}}}], protocols: [{tcp: {destinationPort: {number: 80}}}]}]
`)
	check(t, s,
		tcp("y/a", "x/a", 80, false), tcp("y/a", "x/a", 81, true), probe{"y/a", "x/a", state.UDP, 80, true}, probe{"y/a", "x/a", 1, 0, true},
		tcp("z/a", "x/a", 80, true), tcp(world4, "x/a", 80, true), tcp("y/a", "x/b", 80, true), tcp("y/a", "z/a", 80, true), tcp("x/a", "y/a", 80, true))
	r := compile(t, NewCompiler(), s)
	for key, a := range r.Pods {
		if selected := key.String() == "x/a"; (a.Policy[Ingress] != PolicyNone) != selected || a.Policy[Egress] != PolicyNone {
			t.Errorf("policies of %s = %v, want one for ingress of x/a alone", key, a.Policy)
		}
	}
}

// Lower numbers come first, then rules in their order; the API leaves ties open, here the name decides.
func TestC1_PriorityAndOrder(t *testing.T) {
	const rule = `
tier: Admin
priority: %d
subject: {namespaces: {}}
ingress: [{action: %s, from: [{namespaces: {}}]}]
`
	for _, tc := range []struct {
		name           string
		first, second  int
		action, other  string
		want           bool
		wantFrom, what string
	}{
		{"lower number", 10, 20, "Deny", "Accept", false, "a", "ingress[0]"},
		{"whatever the name", 20, 10, "Deny", "Accept", true, "b", "ingress[0]"},
		{"a tie", 5, 5, "Accept", "Deny", true, "a", "ingress[0]"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newCluster()
			clusterPolicy(t, s, "a", fmt.Sprintf(rule, tc.first, tc.action))
			clusterPolicy(t, s, "b", fmt.Sprintf(rule, tc.second, tc.other))
			check(t, s, tcp("y/a", "x/a", 80, tc.want))
			want := "ClusterNetworkPolicy " + tc.wantFrom + " " + tc.what
			if tc.want { // no denial is left behind an Accept for the same peers; pods of others keep the id
				return
			}
			if got := decider(t, s, "x/a", Ingress, "y/a", state.TCP, 80); got != want {
				t.Errorf("decided by %q, want %q", got, want)
			}
		})
	}
	s := newCluster()
	clusterPolicy(t, s, "p", `
tier: Admin
priority: 1
subject: {namespaces: {matchLabels: {ns: x}}}
ingress:
- {name: web, action: Accept, from: [{namespaces: {}}], protocols: [{tcp: {destinationPort: {number: 80}}}]}
- {action: Deny, from: [{namespaces: {}}], protocols: [{tcp: {destinationPort: {range: {start: 1, end: 100}}}}]}
- {action: Accept, from: [{namespaces: {}}], protocols: [{tcp: {destinationPort: {range: {start: 50, end: 60}}}}]}
`)
	check(t, s, tcp("y/a", "x/a", 80, true), tcp("y/a", "x/a", 55, false), tcp("y/a", "x/a", 101, true), tcp(world6, "x/a", 55, true))
	if got, want := decider(t, s, "x/a", Ingress, "y/a", state.TCP, 80), "ClusterNetworkPolicy p ingress[0] (web)"; got != want {
		t.Errorf("decided by %q, want %q", got, want)
	}
	if got, want := decider(t, s, "x/a", Ingress, "y/a", state.TCP, 101), "ingress default allow"; got != want {
		t.Errorf("decided by %q, want %q", got, want)
	}
}

const (
	toEverybody = `{namespaces: {}}, {networks: [0.0.0.0/0, "::/0"]}`
	adminX      = `{tier: Admin, priority: 1, subject: {namespaces: {matchLabels: {ns: x}}}, `
	baselineX   = `{tier: Baseline, priority: 1, subject: {namespaces: {matchLabels: {ns: x}}}, `
)

// The four combinations of tiers for one pod, in each direction by itself: a NetworkPolicy that isolates the other direction does not count.
func TestC2_Tiers(t *testing.T) {
	for _, tc := range []struct {
		name, admin, network, baseline string
		want                           bool
		decides                        string
	}{
		{"nothing", "", "", "", true, ""},
		{"baseline denies", "", "", "Deny", false, "ClusterNetworkPolicy baseline ingress[0]"},
		{"admin denies", "Deny", "allow", "Accept", false, "ClusterNetworkPolicy admin ingress[0]"},
		{"admin accepts", "Accept", "isolate", "Deny", true, "ClusterNetworkPolicy admin ingress[0]"},
		{"admin passes to NetworkPolicy", "Pass", "isolate", "Accept", false, "NetworkPolicy x/p ingress isolation"},
		{"admin passes to a rule of NetworkPolicy", "Pass", "allow", "Deny", true, "NetworkPolicy x/p ingress[0]"},
		{"admin passes to baseline", "Pass", "", "Deny", false, "ClusterNetworkPolicy baseline ingress[0]"},
		{"NetworkPolicy is final", "", "isolate", "Accept", false, "NetworkPolicy x/p ingress isolation"},
		{"NetworkPolicy of the other direction is not", "", "egress", "Deny", false, "ClusterNetworkPolicy baseline ingress[0]"},
		{"baseline passes to the default", "", "", "Pass", true, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newCluster()
			if tc.admin != "" {
				clusterPolicy(t, s, "admin", adminX+`ingress: [{action: `+tc.admin+`, from: [{namespaces: {}}]}]}`)
			}
			if tc.baseline != "" {
				clusterPolicy(t, s, "baseline", baselineX+`ingress: [{action: `+tc.baseline+`, from: [{namespaces: {}}]}]}`)
			}
			if spec := map[string]string{
				"isolate": `{podSelector: {}}`, "allow": `{podSelector: {}, ingress: [{}]}`, "egress": `{podSelector: {}, policyTypes: [Egress], egress: [{}]}`,
			}[tc.network]; spec != "" {
				policy(t, s, "x/p", spec)
			}
			check(t, s, tcp("y/a", "x/a", 80, tc.want), probe{"y/a", "x/a", 1, 0, tc.want}, tcp("y/a", "z/a", 80, true))
			if tc.decides == "" {
				return
			}
			if got := decider(t, s, "x/a", Ingress, "y/a", state.TCP, 80); got != tc.decides {
				t.Errorf("decided by %q, want %q", got, tc.decides)
			}
		})
	}
}

// Accept decides for its own direction only: the other end is still asked.
func TestC3_AcceptIsForOneDirection(t *testing.T) {
	s := newCluster()
	clusterPolicy(t, s, "out", adminX+`egress: [{action: Accept, to: [{namespaces: {}}]}]}`)
	policy(t, s, "y/closed", `{podSelector: {matchLabels: {pod: a}}}`)
	policy(t, s, "x/closed", `{podSelector: {}, policyTypes: [Egress]}`)
	check(t, s, tcp("x/a", "y/a", 80, false), tcp("x/a", "y/b", 80, true), tcp("x/a", world4, 80, false))
}

// Pass skips the rest of its tier, also in policies of later priorities, and nothing of the next tier.
func TestC3_PassSkipsTheTier(t *testing.T) {
	s := newCluster()
	clusterPolicy(t, s, "1", adminX+`ingress: [{action: Pass, from: [{namespaces: {matchLabels: {ns: "y"}}}], protocols: [{tcp: {destinationPort: {number: 80}}}]}, {action: Deny, from: [{namespaces: {matchLabels: {ns: "y"}}}]}]}`)
	clusterPolicy(t, s, "2", `{tier: Admin, priority: 2, subject: {namespaces: {}}, ingress: [{action: Deny, from: [{namespaces: {}}]}]}`)
	check(t, s, tcp("y/a", "x/a", 80, true), tcp("y/a", "x/a", 81, false), tcp("z/a", "x/a", 80, false))
	clusterPolicy(t, s, "3", baselineX+`ingress: [{action: Pass, from: [{namespaces: {}}], protocols: [{destinationNamedPort: web}]}, {action: Deny, from: [{namespaces: {}}]}]}`)
	check(t, s, tcp("y/a", "x/a", 80, true), tcp("y/a", "x/b", 80, false), tcp("y/a", "x/b", 8080, false), tcp("y/a", "x/a", 81, false))
	policy(t, s, "x/p", `{podSelector: {}}`)
	check(t, s, tcp("y/a", "x/a", 80, false))
}

// Networks match pods and ICMP, nodes all addresses of the status; pods on the host's network are nodes and nothing else.
func TestC4_Peers(t *testing.T) {
	s := newCluster()
	addr := func(list ...string) (out []netip.Addr) {
		for _, a := range list {
			out = append(out, netip.MustParseAddr(a))
		}
		return out
	}
	s.Nodes["gpu"] = &state.Node{Name: "gpu", Labels: map[string]string{"gpu": "yes"}, Addresses: addr("172.16.0.1", "fd10::1"), AllAddresses: addr("172.16.0.1", "fd10::1", "203.0.113.1")}
	s.Nodes["other"] = &state.Node{Name: "other", Addresses: addr("172.16.0.2", "fd10::2"), AllAddresses: addr("172.16.0.2", "fd10::2")}
	k := key("y", "host")
	s.Pods[k] = &state.Pod{Key: k, Local: true, HostNetwork: true, Labels: map[string]string{"pod": "a"}, IPs: addr("172.16.0.1", "fd10::1")}
	clusterPolicy(t, s, "p", adminX+`egress: [
  {action: Deny, to: [{nodes: {matchLabels: {gpu: "yes"}}}], protocols: [{tcp: {destinationPort: {number: 10250}}}]},
  {action: Deny, to: [{networks: [10.0.3.0/24, "fd00::3:0/112", 192.0.2.0/24, 172.16.0.0/30]}], protocols: [{udp: {}}, {tcp: {destinationPort: {range: {start: 80, end: 81}}}}]},
  {action: Deny, to: [{networks: [10.0.3.2/32]}]},
  {action: Deny, to: [{pods: {namespaceSelector: {matchLabels: {ns: "y"}}, podSelector: {matchLabels: {pod: a}}}}]}]}`)
	check(t, s,
		tcp("x/a", "172.16.0.1", 10250, false), tcp("x/a", "fd10::1", 10250, false), tcp("x/a", "203.0.113.1", 10250, false),
		tcp("x/a", "172.16.0.2", 10250, true), tcp("x/a", "fd10::2", 10250, true), tcp("x/a", "172.16.0.1", 443, true),
		tcp("x/a", "172.16.0.1", 80, false), tcp("x/a", "172.16.0.2", 80, false), tcp("x/a", "203.0.113.1", 80, true), tcp("x/a", "fd10::1", 80, true),
		tcp("x/a", "z/a", 80, false), tcp("x/a", "z/a", 82, true), probe{"x/a", "z/a", state.UDP, 53, false}, probe{"x/a", "z/a", state.SCTP, 53, true},
		probe{"x/a", "10.0.3.2", 1, 0, false}, probe{"x/a", "10.0.3.1", 1, 0, true}, tcp("x/a", world4, 80, false), tcp("x/a", world6, 80, true),
		tcp("x/a", "y/a", 1, false), tcp("x/a", "y/b", 1, true))
	// Node labels and addresses come and go.
	s = clone(s)
	s.Nodes["gpu"] = &state.Node{Name: "gpu", AllAddresses: addr("172.16.0.1")}
	s.Nodes["other"] = &state.Node{Name: "other", Labels: map[string]string{"gpu": "yes"}, AllAddresses: addr("172.16.0.2", "203.0.113.1")}
	check(t, s, tcp("x/a", "172.16.0.1", 10250, true), tcp("x/a", "172.16.0.2", 10250, false), tcp("x/a", "203.0.113.1", 10250, false))
	// The subject is no hostNetwork pod either.
	clusterPolicy(t, s, "q", `{tier: Admin, priority: 0, subject: {namespaces: {}}, ingress: [{action: Deny, from: [{namespaces: {}}]}]}`)
	r := compile(t, NewCompiler(), s)
	if _, ok := r.Pods[k]; ok {
		t.Errorf("Pods has hostNetwork pod %s, want none", k)
	}
	check(t, s, tcp("z/a", "172.16.0.1", 80, true), tcp("172.16.0.1", "z/a", 80, true))
}

// Nodes that no policy tells apart are one identity, so entries do not grow with the cluster.
func TestC4_ManyNodesAreFewEntries(t *testing.T) {
	entries := func(nodes int) int {
		s := newCluster()
		for i := range nodes {
			a := netip.AddrFrom4([4]byte{172, 16, byte(i >> 8), byte(i)})
			s.Nodes[fmt.Sprint(i)] = &state.Node{Name: fmt.Sprint(i), Labels: map[string]string{"name": fmt.Sprint(i)}, AllAddresses: []netip.Addr{a}}
		}
		clusterPolicy(t, s, "p", adminX+`egress: [{action: Deny, to: [{nodes: {}}]}]}`)
		return len(compile(t, NewCompiler(), s).Entries)
	}
	if one, many := entries(1), entries(1000); one != many || one == 0 {
		t.Errorf("%d entries for one node, %d for 1000, want the same", one, many)
	}
}

// What is not understood fails closed, one rule at a time, and the condition says so.
func TestC5_FailsClosed(t *testing.T) {
	for _, tc := range []struct {
		name, peer, protocols, reason string
	}{
		{"peer of a newer version", `{universe: {}}`, ``, ReasonUnknownField},
		{"and a known one", `{namespaces: {}}, {universe: {}}`, ``, ReasonUnknownField},
		{"a field within", `{pods: {podSelector: {}, age: 1}}`, ``, ReasonUnknownField},
		{"protocol of a newer version", `{namespaces: {}}`, `[{icmp: {}}]`, ReasonUnknownField},
		{"and a known one, protocol", `{namespaces: {}}`, `[{tcp: {destinationPort: {number: 80}}}, {icmp: {}}]`, ReasonUnknownField},
		{"source port", `{namespaces: {}}`, `[{tcp: {sourcePort: {number: 80}}}]`, ReasonUnknownField},
		{"port of a newer version", `{namespaces: {}}`, `[{tcp: {destinationPort: {set: [1]}}}]`, ReasonUnknownField},
		{"two protocols in one", `{namespaces: {}}`, `[{tcp: {destinationPort: {number: 80}}, udp: {destinationPort: {number: 80}}}]`, ReasonInvalid},
		{"two kinds of peer in one", `{namespaces: {}, nodes: {}}`, ``, ReasonInvalid},
		{"empty peer", `{}`, ``, ReasonUnknownField},
		{"no protocols", `{namespaces: {}}`, `[]`, ReasonInvalid},
		{"empty protocol", `{namespaces: {}}`, `[{}]`, ReasonUnknownField},
		{"selector", `{namespaces: {matchExpressions: [{key: a, operator: Like}]}}`, ``, ReasonInvalid},
		{"network", `{networks: [10.0.0.0/8, all]}`, ``, ReasonInvalid},
		{"range", `{namespaces: {}}`, `[{tcp: {destinationPort: {range: {start: 9, end: 1}}}}]`, ReasonInvalid},
		{"named port with networks", `{networks: [10.0.0.0/8]}`, `[{destinationNamedPort: web}]`, ReasonInvalid},
		{"domain names", `{domainNames: [example.com]}`, ``, ReasonDomainNames},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for action, want := range map[string]bool{"Accept": true, "Deny": false, "Pass": false, "Log": false} {
				s := newCluster()
				protocols := ""
				if tc.protocols != "" {
					protocols = ", protocols: " + tc.protocols
				}
				p := clusterPolicy(t, s, "p", adminX+`egress: [{action: `+action+`, to: [`+tc.peer+`]`+protocols+`}, {action: Deny, to: [{namespaces: {matchLabels: {ns: z}}}]}]}`)
				check(t, s, tcp("x/a", "y/a", 80, want), tcp("x/a", world4, 80, want), probe{"x/a", world6, 58, 0, want}, tcp("x/a", "z/a", 80, false), tcp("y/a", "z/a", 80, true))
				r := compile(t, NewCompiler(), s)
				c := r.Conditions[p.Name]
				reason := tc.reason
				if action == "Log" && reason != ReasonUnknownField && reason != ReasonDomainNames {
					reason = ReasonInvalid
				}
				if c.Type != ConditionAccepted || c.Status != metav1.ConditionFalse || c.Reason != reason || c.ObservedGeneration != 7 || !strings.Contains(c.Message, "egress[0]") {
					t.Errorf("%s: condition = %+v, want %s False with reason %s", action, c, ConditionAccepted, reason)
				}
				if r.Invalid[state.Key{Name: "p"}] == nil {
					t.Errorf("%s: Invalid does not name the policy: %v", action, r.Invalid)
				}
			}
		})
	}
}

// Unknown fields of the policy itself make all its rules unclear. Without subject or tier nobody knows which pods it would be about: none.
func TestC5_UnclearPolicy(t *testing.T) {
	for _, tc := range []struct {
		name, spec          string
		accepted, untouched bool // what an Accept rule, and what nothing else than a Deny rule for z, names
	}{
		{"known", adminX + `%s}`, true, true},
		{"field of the spec", adminX + `schedule: night, %s}`, false, false},
		{"field of the subject", `{tier: Admin, priority: 1, subject: {namespaces: {}, accounts: {}}, %s}`, false, true},
		{"subject", `{tier: Admin, priority: 1, subject: {accounts: {}}, %s}`, false, true},
		{"two subjects", `{tier: Admin, priority: 1, subject: {namespaces: {}, pods: {podSelector: {}}}, %s}`, false, true},
		{"selector of the subject", `{tier: Admin, priority: 1, subject: {pods: {podSelector: {matchExpressions: [{key: a, operator: Like}]}}}, %s}`, false, true},
		{"tier", `{tier: Cellar, priority: 1, subject: {namespaces: {}}, %s}`, false, true},
		{"no spec", `{}%.0s`, false, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newCluster()
			policy(t, s, "x/closed", `{podSelector: {matchLabels: {pod: b}}, policyTypes: [Egress]}`)
			p := clusterPolicy(t, s, "p", fmt.Sprintf(tc.spec, `egress: [{action: Accept, to: [{namespaces: {matchLabels: {ns: "y"}}}]}, {action: Deny, to: [{namespaces: {matchLabels: {ns: z}}}]}]`))
			check(t, s, tcp("x/b", "y/a", 80, tc.accepted), tcp("x/a", world4, 80, tc.untouched), tcp("x/a", "z/a", 80, tc.untouched && tc.name != "known"))
			if c := compile(t, NewCompiler(), s).Conditions[p.Name]; (c.Status == metav1.ConditionTrue) != (tc.name == "known") {
				t.Errorf("condition = %+v", c)
			}
		})
	}
}

func TestC6_Protocols(t *testing.T) {
	s := newCluster()
	clusterPolicy(t, s, "p", adminX+`
ingress: [
  {action: Deny, from: [{namespaces: {}}], protocols: [{tcp: {destinationPort: {number: 443}}}, {udp: {destinationPort: {range: {start: 1000, end: 1100}}}}, {sctp: {}}, {destinationNamedPort: web}, {destinationNamedPort: none}]}],
egress: [
  {action: Deny, to: [{namespaces: {}}], protocols: [{destinationNamedPort: web}, {destinationNamedPort: dns}]},
  {action: Deny, to: [{namespaces: {matchLabels: {ns: z}}}]}]}`)
	check(t, s,
		tcp("y/a", "x/a", 443, false), tcp("y/a", "x/a", 444, true), probe{"y/a", "x/a", state.UDP, 443, true},
		probe{"y/a", "x/a", state.UDP, 999, true}, probe{"y/a", "x/a", state.UDP, 1000, false}, probe{"y/a", "x/a", state.UDP, 1100, false}, probe{"y/a", "x/a", state.UDP, 1101, true},
		probe{"y/a", "x/a", state.SCTP, 7, false}, probe{"y/a", "x/a", 1, 0, true},
		tcp("y/a", "x/a", 80, false), tcp("y/a", "x/a", 8080, true), tcp("y/a", "x/b", 8080, false), tcp("y/a", "x/b", 80, true), probe{"y/a", "x/a", state.UDP, 80, true},
		tcp("x/a", "y/a", 80, false), tcp("x/a", "y/b", 80, true), tcp("x/a", "y/b", 8080, false), probe{"x/a", "y/b", state.UDP, 53, false}, tcp("x/a", "y/b", 53, true),
		tcp("x/a", world4, 80, true), tcp("x/a", "z/a", 7, false), probe{"x/a", "z/a", 1, 0, false}, probe{"x/a", "z/a", 132, 0, false})
}

// Denials of a ClusterNetworkPolicy hold where NetworkPolicy has no say: the programs know them by this mark.
func TestC7_ClusterDenialsAreMarked(t *testing.T) {
	s := newCluster()
	policy(t, s, "x/p", `{podSelector: {}, policyTypes: [Ingress, Egress], egress: [{ports: [{port: 82}]}]}`)
	clusterPolicy(t, s, "admin", adminX+`egress: [{action: Deny, to: [{namespaces: {}}], protocols: [{tcp: {destinationPort: {number: 80}}}]}, {action: Pass, to: [{namespaces: {}}], protocols: [{tcp: {destinationPort: {number: 81}}}]}]}`)
	clusterPolicy(t, s, "baseline", `{tier: Baseline, priority: 1, subject: {namespaces: {matchLabels: {ns: "y"}}}, egress: [{action: Deny, to: [{namespaces: {}}]}]}`)
	r := compile(t, NewCompiler(), s)
	k := load(r)
	for _, tc := range []struct {
		pod     string
		port    uint16
		allowed bool
		cluster bool
	}{{"x/a", 80, false, true}, {"x/a", 81, false, false}, {"x/a", 82, true, false}, {"x/a", 83, false, false}, {"y/a", 80, false, true}} {
		ns, name, _ := strings.Cut(tc.pod, "/")
		allowed, e := k.judge(r.Pods[key(ns, name)].Policy[Egress], Egress, addresses(s, "x/a")[0], state.TCP, tc.port)
		if allowed != tc.allowed || e.Cluster != tc.cluster {
			t.Errorf("%s to x/a:%d: allowed %v, of a cluster policy %v; want %v, %v", tc.pod, tc.port, allowed, e.Cluster, tc.allowed, tc.cluster)
		}
	}
}

// Names are not resolved, so a rule that has some allows nothing and says why.
func TestC8_DomainNamesWait(t *testing.T) {
	s := newCluster()
	clusterPolicy(t, s, "names", adminX+`egress: [{action: Accept, to: [{domainNames: ["*.example.com"]}]}, {action: Accept, to: [{namespaces: {matchLabels: {ns: "y"}}}]}, {action: Deny, to: [`+toEverybody+`]}]}`)
	check(t, s, tcp("x/a", world4, 443, false), tcp("x/a", world6, 443, false), tcp("x/a", "y/a", 443, true))
	if c := compile(t, NewCompiler(), s).Conditions["names"]; c.Reason != ReasonDomainNames {
		t.Errorf("condition = %+v, want reason %s", c, ReasonDomainNames)
	}
}

func TestC9_Conditions(t *testing.T) {
	s := newCluster()
	clusterPolicy(t, s, "good", adminX+`ingress: [{action: Deny, from: [{namespaces: {}}]}]}`)
	long := clusterPolicy(t, s, "long", adminX+`egress: [{action: Deny, to: [{networks: ["`+strings.Repeat("0", 40000)+`"]}]}]}`)
	r := compile(t, NewCompiler(), s)
	want := metav1.Condition{Type: ConditionAccepted, Status: metav1.ConditionTrue, Reason: ReasonAccepted, Message: "every rule is in force", ObservedGeneration: 7}
	if got := r.Conditions["good"]; got != want {
		t.Errorf("condition = %+v, want %+v", got, want)
	}
	if got := r.Conditions[long.Name]; got.Status != metav1.ConditionFalse || len(got.Message) > 32768 {
		t.Errorf("condition with a message of %d bytes: %s, want False and at most 32768", len(got.Message), got.Status)
	}
	// It is the same on every node: nothing of this one is in it.
	for _, p := range s.Pods {
		edit(s, p.String(), func(p *state.Pod) { p.Local = false })
	}
	if got := compile(t, NewCompiler(), s).Conditions["good"]; got != want {
		t.Errorf("condition on a node without pods = %+v, want %+v", got, want)
	}
}

// Promise 2: a pod that starts before anything was compiled for it begins closed wherever a policy could deny it something.
func TestC1_NamespacesWherePodsStartClosed(t *testing.T) {
	for _, tc := range []struct {
		name, subject, rules string
		x, y, elsewhere      bool
	}{
		{"one namespace", `{namespaces: {matchLabels: {ns: x}}}`, `ingress: [{action: Deny, from: [{namespaces: {}}]}]`, true, false, true},
		{"every namespace", `{namespaces: {}}`, `egress: [{action: Deny, to: [{namespaces: {}}]}]`, true, true, true},
		{"some pods of every namespace", `{pods: {podSelector: {matchLabels: {a: b}}}}`, `egress: [{action: Deny, to: [{namespaces: {}}]}]`, true, true, true},
		{"a namespace that is not there", `{namespaces: {matchLabels: {ns: future}}}`, `ingress: [{action: Deny, from: [{namespaces: {}}]}]`, false, false, true},
		{"no denial", `{namespaces: {}}`, `ingress: [{action: Accept, from: [{namespaces: {}}]}, {action: Pass, from: [{namespaces: {}}]}]`, false, false, false},
		{"a denial because nothing is understood", `{namespaces: {matchLabels: {ns: x}}}`, `ingress: [{action: Pass, from: [{universe: {}}]}]`, true, false, true},
		{"no subject that is understood", `{accounts: {}}`, `ingress: [{action: Deny, from: [{namespaces: {}}]}]`, false, false, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newCluster()
			clusterPolicy(t, s, "p", `{tier: Baseline, priority: 1, subject: `+tc.subject+`, `+tc.rules+`}`)
			r := compile(t, NewCompiler(), s)
			if r.Restricted["x"] != tc.x || r.Restricted["y"] != tc.y || r.RestrictedElsewhere != tc.elsewhere {
				t.Errorf("restricted: x %v, y %v, elsewhere %v; want %v, %v, %v", r.Restricted["x"], r.Restricted["y"], r.RestrictedElsewhere, tc.x, tc.y, tc.elsewhere)
			}
		})
	}
	s := newCluster()
	policy(t, s, "y/p", `{podSelector: {}}`)
	if r := compile(t, NewCompiler(), s); !r.RestrictedElsewhere || !r.Restricted["y"] || r.Restricted["x"] {
		t.Errorf("with one NetworkPolicy in y: restricted %v, elsewhere %v", r.Restricted, r.RestrictedElsewhere)
	}
}

// A pod may be known before its namespace is: until then it is closed in the directions in which something could be denied to it.
func TestC1_PodOfUnknownNamespaceStaysClosed(t *testing.T) {
	s := newCluster()
	delete(s.Namespaces, "y")
	clusterPolicy(t, s, "p", `{tier: Admin, priority: 1, subject: {pods: {namespaceSelector: {matchLabels: {ns: z}}, podSelector: {matchLabels: {pod: a}}}}, ingress: [{action: Deny, from: [{namespaces: {matchLabels: {ns: z}}}]}]}`)
	check(t, s, tcp("x/a", "y/a", 80, false), tcp("x/a", "y/b", 80, true), tcp("y/a", "x/a", 80, true), tcp("x/a", "z/a", 80, true), tcp("z/b", "z/a", 80, false))
	if got := compile(t, NewCompiler(), s).Pods[key("y", "a")].Policy; got != [2]uint32{Ingress: PolicyNodeOnly} {
		t.Errorf("policies of y/a = %v, want node-only for ingress", got)
	}
	s.Namespaces["y"] = &state.Namespace{Name: "y", Labels: map[string]string{"ns": "y"}}
	check(t, s, tcp("x/a", "y/a", 80, true))
}
