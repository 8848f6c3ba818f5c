// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/pkg/state"
)

func TestPoliciesShareIDs(t *testing.T) {
	s, c := newCluster(), NewCompiler()
	// The same said in different ways, in different namespaces.
	policy(t, s, "x/p", `{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {ns: z}}}, {ipBlock: {cidr: 10.1.2.3/8}}], ports: [{port: 80}, {port: 80, endPort: 81}]}]}`)
	policy(t, s, "y/q", `{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}}, {namespaceSelector: {matchExpressions: [{key: ns, operator: In, values: [z]}]}}], ports: [{port: 80, endPort: 81, protocol: TCP}]}, {ports: [{port: none}]}]}`)
	policy(t, s, "z/named", `{podSelector: {}, ingress: [{ports: [{port: web}]}]}`)
	policy(t, s, "z/wide", `{podSelector: {matchLabels: {pod: c}}, ingress: [{ports: [{port: 80}]}, {}]}`)
	r := compile(t, c, s)
	id := func(pod string) uint32 {
		ns, name, _ := strings.Cut(pod, "/")
		return r.Pods[key(ns, name)].Policy[Ingress]
	}
	for _, pod := range []string{"x/b", "x/c"} {
		if id(pod) != id("x/a") {
			t.Errorf("policy of %s = %d, want %d as its neighbour", pod, id(pod), id("x/a"))
		}
	}
	if id("z/a") == id("z/b") {
		t.Errorf("policy of z/a and z/b = %d, want two: web is another number", id("z/a"))
	}
	if id("x/a") < FirstPolicy || id("x/a") > MaxPolicy {
		t.Errorf("policy id %d is outside %d to %d", id("x/a"), FirstPolicy, MaxPolicy)
	}
	if id("y/b") != PolicyNone {
		t.Errorf("policy of y/b = %d, want none", id("y/b"))
	}
	// In and = are different requirements of one meaning; the selectors are compared as written.
	s = clone(s)
	policy(t, s, "x/p", `{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: ns, operator: In, values: [z]}]}}, {ipBlock: {cidr: 10.1.2.3/8}}], ports: [{port: 80}, {port: 80, endPort: 81}]}]}`)
	r = compile(t, c, s)
	if id("x/a") != id("y/a") {
		t.Errorf("policies of x/a and y/a = %d and %d, want one", id("x/a"), id("y/a"))
	}
}

func TestEntriesNameTheFirstRule(t *testing.T) {
	s := newCluster()
	policy(t, s, "x/b", `{podSelector: {}, ingress: [{ports: [{port: 81}]}, {ports: [{port: 80}]}]}`)
	policy(t, s, "x/a", `{podSelector: {}, ingress: [{ports: [{port: 80}]}]}`)
	r := compile(t, NewCompiler(), s)
	k := load(r)
	for _, tc := range []struct {
		port uint16
		want string
	}{
		{80, "NetworkPolicy x/a ingress[0]"},
		{81, "NetworkPolicy x/b ingress[0]"},
		{82, "NetworkPolicy x/a ingress isolation"},
	} {
		_, e := k.judge(r.Pods[key("x", "a")].Policy[Ingress], Ingress, addresses(s, "y/a")[0], state.TCP, tc.port)
		if got := r.Rules[e.Rule].String(); got != tc.want {
			t.Errorf("rule for port %d = %q, want %q", tc.port, got, tc.want)
		}
	}
}

func TestHiddenEntriesAreDropped(t *testing.T) {
	s := newCluster()
	policy(t, s, "x/p", `
podSelector: {matchLabels: {pod: a}}
ingress:
- ports: [{port: 80, endPort: 95}]
- from: [{namespaceSelector: {matchLabels: {ns: z}}, podSelector: {matchLabels: {pod: a}}}]
  ports: [{port: 85}, {port: 1000}, {}, {protocol: UDP, port: 7}]
`)
	r := compile(t, NewCompiler(), s)
	p, z := r.Pods[key("x", "a")].Policy[Ingress], r.Pods[key("z", "a")].Identity
	got := map[Key]Verdict{}
	for k, e := range r.Entries {
		got[k] = e.Verdict
	}
	want := map[Key]Verdict{
		{Policy: p, Identity: AnyIdentity, Direction: Ingress}:                                  Deny,
		{Policy: p, Identity: AnyIdentity, Direction: Ingress, Protocol: 6, Port: 80, Bits: 20}: Allow,
		{Policy: p, Identity: z, Direction: Ingress, Protocol: 6, Bits: 8}:                      Allow,
		{Policy: p, Identity: z, Direction: Ingress, Protocol: 17, Port: 7, Bits: 24}:           Allow,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("entries (-want +got):\n%s", diff)
	}
}

func TestNumbersAreStable(t *testing.T) {
	s, c := newCluster(), NewCompiler()
	policy(t, s, "x/p", `{podSelector: {}, ingress: [{from: [{namespaceSelector: {}}]}]}`)
	policy(t, s, "y/p", `{podSelector: {}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: "::/0"}}]}]}`)
	before := compile(t, c, s)
	s = clone(s)
	addPod(s, key("a", "new"), nil, "10.0.0.77", "fd00::77")
	delete(s.Pods, key("z", "a"))
	policy(t, s, "a/p", `{podSelector: {}}`)
	policy(t, s, "y/a", `{podSelector: {matchLabels: {pod: b}}, ingress: [{from: [{podSelector: {}}]}]}`)
	after := compile(t, c, s)
	for p, id := range before.Identities {
		if got, ok := after.Identities[p]; ok && got != id {
			t.Errorf("Identities[%s] = %d, want %d as before", p, got, id)
		}
	}
	for k, a := range before.Pods {
		b, ok := after.Pods[k]
		if ok && k != key("y", "b") && a != b {
			t.Errorf("Pods[%s] = %v, want %v as before", k, b, a)
		}
	}
	for n, rule := range before.Rules {
		if got := after.Rules[n]; got != rule {
			t.Errorf("Rules[%d] = %v, want %v as before", n, got, rule)
		}
	}
}

func TestReplicasShareIdentities(t *testing.T) {
	s := newCluster()
	labels := map[string]string{"app": "web"}
	addPod(s, key("x", "w1"), labels, "10.0.8.1", "fd00::8:1")
	addPod(s, key("x", "w2"), labels, "10.0.8.2", "fd00::8:2")
	addPod(s, key("y", "w3"), labels, "10.0.8.3", "fd00::8:3")
	addPod(s, key("x", "w4"), labels, "10.0.8.4", "fd00::8:4")
	s.Pods[key("x", "w4")].Ports = []state.ContainerPort{{Name: "web", Protocol: state.TCP, Port: 1}}
	r := compile(t, NewCompiler(), s)
	id := func(pod string) uint32 { return r.Identity(addresses(s, pod)[0]) }
	if id("x/w1") != id("x/w2") || id("x/w1") != r.Identity(addresses(s, "x/w1")[1]) {
		t.Error("replicas, or the families of one, have different identities, want one")
	}
	for _, other := range []string{"y/w3", "x/w4"} {
		if id("x/w1") == id(other) {
			t.Errorf("identity of %s = %d as x/w1, want another", other, id(other))
		}
	}
	if id("x/w1") < FirstIdentity {
		t.Errorf("identity %d is below %d", id("x/w1"), FirstIdentity)
	}
	// An ipBlock on one family splits the identity, for that family.
	policy(t, s, "x/p", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.8.2/32}}]}]}`)
	r = compile(t, NewCompiler(), s)
	if id("x/w1") == id("x/w2") || id("x/w1") != r.Identity(addresses(s, "x/w2")[1]) {
		t.Error("want x/w2's IPv4 identity to differ from x/w1's and its IPv6 identity to be the same")
	}
}

func TestPodsWithoutAddressAreReady(t *testing.T) {
	s := newCluster()
	policy(t, s, "x/p", `{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}, {ipBlock: {cidr: 0.0.0.0/0}}, {ipBlock: {cidr: "::/0"}}]}]}`)
	k := key("x", "soon")
	s.Pods[k] = &state.Pod{Key: k, Labels: map[string]string{"pod": "b"}, Local: true}
	r := compile(t, NewCompiler(), s)
	a := r.Pods[k]
	if want := r.Pods[key("x", "b")].Policy; a.Policy != want {
		t.Errorf("policy of a pod without address = %v, want %v as its replica", a.Policy, want)
	}
	if e, ok := r.Entries[Key{Policy: a.Policy[Ingress], Identity: a.Identity, Direction: Ingress}]; !ok || e.Verdict != Allow {
		t.Errorf("no entry allows identity %d of the pod without address, want one by its labels", a.Identity)
	}
	if want := map[string]bool{"x": true, "y": false, "z": false}; !cmp.Equal(want, r.Restricted) {
		t.Errorf("Restricted = %v, want %v", r.Restricted, want)
	}
}

func TestInvalidPartsAllowNothing(t *testing.T) {
	for _, tc := range []struct{ name, spec, want string }{
		{"cidr", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0}}]}]}`, "ingress[0].peers[0]: ipBlock.cidr"},
		{"except", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/33]}}]}]}`, "ipBlock.except"},
		{"mixed peer", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}, podSelector: {}}]}]}`, "together with a selector"},
		{"unknown peer", `{podSelector: {}, ingress: [{from: [{}]}]}`, "neither ipBlock nor a selector"},
		{"peer selector", `{podSelector: {}, ingress: [{from: [{podSelector: {matchExpressions: [{key: a, operator: Near}]}}]}]}`, "podSelector"},
		{"protocol", `{podSelector: {}, ingress: [{ports: [{protocol: ESP}]}]}`, "ingress[0].ports[0]"},
		{"port 0", `{podSelector: {}, ingress: [{ports: [{port: 0}]}]}`, "0 to 0"},
		{"port too large", `{podSelector: {}, ingress: [{ports: [{port: 65536}]}]}`, "65536"},
		{"backwards", `{podSelector: {}, ingress: [{ports: [{port: 90, endPort: 80}]}]}`, "90 to 80"},
		{"endPort alone", `{podSelector: {}, ingress: [{ports: [{endPort: 80}]}]}`, "endPort without port"},
		{"endPort with name", `{podSelector: {}, ingress: [{ports: [{port: web, endPort: 80}]}]}`, "endPort with port name"},
		{"empty name", `{podSelector: {}, ingress: [{ports: [{port: ""}]}]}`, "port name is empty"},
		{"subject", `{podSelector: {matchExpressions: [{key: a, operator: Near}]}, ingress: [{}]}`, "podSelector"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newCluster()
			policy(t, s, "x/p", tc.spec)
			check(t, s, tcp("y/a", "x/a", 80, false), tcp("x/b", "x/a", 80, false), tcp("x/a", "y/a", 80, true))
			err := compile(t, NewCompiler(), s).Invalid[key("x", "p")]
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("Invalid = %v, want an error with %q", err, tc.want)
			}
		})
	}
}

func TestCompileErrorsLeaveNumbersAlone(t *testing.T) {
	s, c := newCluster(), NewCompiler()
	policy(t, s, "x/p", `{podSelector: {}, ingress: [{from: [{namespaceSelector: {}}]}]}`)
	compile(t, c, s)
	before := c.Export()
	more := clone(s)
	policy(t, more, "y/p", `{podSelector: {}, ingress: [{from: [{namespaceSelector: {}}]}, {ports: [{port: 1}]}]}`)
	for _, limits := range []Limits{{Prefixes: 5, Entries: 1000}, {Prefixes: 1000, Entries: 11}} {
		c.Limits = limits
		if _, err := c.Compile(more); !errors.Is(err, ErrLimit) {
			t.Errorf("Compile() with %+v = %v, want ErrLimit", limits, err)
		}
	}
	c.Limits = DefaultLimits()
	c.policies.last = FirstPolicy
	if _, err := c.Compile(more); !errors.Is(err, ErrExhausted) {
		t.Errorf("Compile() without policy ids = %v, want ErrExhausted", err)
	}
	if diff := cmp.Diff(before, c.Export()); diff != "" {
		t.Errorf("numbers after errors (-want +got):\n%s", diff)
	}
}

func TestPolicyIDsAreUsedAgainAfterQuarantine(t *testing.T) {
	s := state.NewSnapshot()
	s.Pods[key("x", "a")] = &state.Pod{Key: key("x", "a"), Local: true}
	c := NewCompiler()
	c.policies.last = FirstPolicy + quarantine
	lastUse := map[uint32]int{}
	for i := range 3 * quarantine {
		if i == quarantine {
			c = restart(t, c)
			c.policies.last = FirstPolicy + quarantine
		}
		policy(t, s, "x/p", fmt.Sprintf(`{podSelector: {}, ingress: [{ports: [{port: %d}]}]}`, i+1))
		id := compile(t, c, s).Pods[key("x", "a")].Policy[Ingress]
		if last, ok := lastUse[id]; ok && i-last <= quarantine {
			t.Fatalf("compilation %d uses id %d of compilation %d again, want it to rest for %d", i, id, last, quarantine)
		}
		lastUse[id] = i
	}
	c.policies.last = FirstPolicy + quarantine/2
	c.policies.Freed = c.policies.Freed[:0]
	policy(t, s, "x/p", `{podSelector: {}}`)
	if _, err := c.Compile(s); !errors.Is(err, ErrExhausted) {
		t.Errorf("Compile() with every id in use or resting = %v, want ErrExhausted", err)
	}
}

func TestImportRefusesNonsense(t *testing.T) {
	good := Space{}
	for _, tc := range []struct {
		name string
		n    Numbers
		want string
	}{
		{"version", Numbers{Version: 2}, "version 2"},
		{"twice", Numbers{Version: 1, Identities: good, Policies: Space{Next: 20, Assigned: map[string]uint32{"a": 17, "b": 17}}}, "both"},
		{"freed and assigned", Numbers{Version: 1, Policies: Space{Next: 20, Assigned: map[string]uint32{"a": 17}, Freed: []Freed{{Number: 17}}}}, "both"},
		{"reserved", Numbers{Version: 1, Identities: Space{Next: 20, Assigned: map[string]uint32{"a": 3}}}, "number 3"},
		{"not yet given", Numbers{Version: 1, Rules: Space{Next: 3, Assigned: map[string]uint32{"a": 3}}}, "number 3"},
		{"too large", Numbers{Version: 1, Policies: Space{Next: MaxPolicy + 2}}, "next number"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := NewCompiler()
			before := c.Export()
			if err := c.Import(tc.n); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("Import() = %v, want an error with %q", err, tc.want)
			}
			if diff := cmp.Diff(before, c.Export()); diff != "" {
				t.Errorf("numbers after a refused import (-want +got):\n%s", diff)
			}
		})
	}
	c := NewCompiler()
	if err := c.Import(Numbers{Version: 1, Policies: Space{Next: 100}, Identities: Space{Next: 1000}}); err != nil {
		t.Fatalf("Import() of Next alone = %v", err)
	}
	s := newCluster()
	policy(t, s, "x/p", `{podSelector: {}}`)
	if a := compile(t, c, s).Pods[key("x", "a")]; a.Policy[Ingress] != 100 || a.Identity < 1000 {
		t.Errorf("assignment after Next alone = %+v, want policy 100 and an identity from 1000", a)
	}
}
