// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"errors"
	"maps"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/margay-cni/margay/pkg/state"
)

// copyOf is the Result as it is now.
func copyOf(r *Result) *Result {
	out := *r
	out.Identities, out.Pods, out.Restricted, out.Entries = maps.Clone(r.Identities), maps.Clone(r.Pods), maps.Clone(r.Restricted), maps.Clone(r.Entries)
	out.Rules, out.Invalid, out.Conditions = maps.Clone(r.Rules), maps.Clone(r.Invalid), maps.Clone(r.Conditions)
	return &out
}

// exchangeSome puts equal copies in the place of some objects, as sources do that read everything anew.
func exchangeSome(t *rapid.T, s *state.Snapshot) {
	for key, p := range s.Pods {
		if rapid.Bool().Draw(t, "other object") {
			other := *p
			other.IPs, other.Labels = slices.Clone(p.IPs), maps.Clone(p.Labels)
			s.Pods[key] = &other
		}
	}
	for name, ns := range s.Namespaces {
		if rapid.Bool().Draw(t, "other object") {
			s.Namespaces[name] = &state.Namespace{Name: name, Labels: maps.Clone(ns.Labels)}
		}
	}
}

// logs are a source's, for all that it can change.
type logs struct {
	namespaces, nodes, cluster state.Log[string]
	pods, network              state.Log[state.Key]
}

// note has the snapshot say what it has that the one before had not.
func (l *logs) note(before, now *state.Snapshot) {
	noteChanged(&l.namespaces, before.Namespaces, now.Namespaces)
	noteChanged(&l.nodes, before.Nodes, now.Nodes)
	noteChanged(&l.cluster, before.ClusterNetworkPolicies, now.ClusterNetworkPolicies)
	noteChanged(&l.pods, before.Pods, now.Pods)
	noteChanged(&l.network, before.NetworkPolicies, now.NetworkPolicies)
	now.Journals = state.Journals{
		Namespaces: l.namespaces.Journal(), Nodes: l.nodes.Journal(), ClusterNetworkPolicies: l.cluster.Journal(),
		Pods: l.pods.Journal(), NetworkPolicies: l.network.Journal(),
	}
}

func noteChanged[K comparable, V any](log *state.Log[K], before, now map[K]*V) {
	for k := range bothKeys(before, now) {
		if before[k] != now[k] {
			log.Note(k)
		}
	}
}

// TestUpdateEqualsCompile changes a random world step by step. After every step the result of Update must be that of a compiler that compiled
// everything anew each time, numbers included, and judge as the policies are written; and what Update says of its changes must be true.
func TestUpdateEqualsCompile(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		one, other := NewCompiler(), NewCompiler()
		s := drawSnapshot(t)
		var before *Result
		var source logs
		journals := rapid.Bool().Draw(t, "journals")
		for range rapid.IntRange(2, 8).Draw(t, "steps") {
			got, changes, err := one.Update(s)
			want, err2 := other.Compile(s)
			if err != nil || err2 != nil {
				t.Fatalf("Update() = %v, Compile() = %v", err, err2)
			}
			if diff := cmp.Diff(want, got, equateErrors); diff != "" {
				t.Fatalf("Update() is not what Compile() is (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(other.Export(), one.Export()); diff != "" {
				t.Fatalf("numbers after Update() are not those after Compile() (-want +got):\n%s", diff)
			}
			compareVerdicts(t, s, got)
			if before != nil {
				checkChanges(t, before, got, changes)
			}
			before = copyOf(got)
			last := s
			s = clone(s)
			for range rapid.IntRange(0, 3).Draw(t, "changes") {
				change(t, s)
			}
			exchangeSome(t, s)
			if s.Journals = (state.Journals{}); journals {
				source.note(last, s)
			}
		}
	})
}

// checkChanges requires that changes name everything in which now differs from before.
func checkChanges(t *rapid.T, before, now *Result, c *Changes) {
	for p := range bothKeys(before.Identities, now.Identities) {
		if _, named := c.Identities[p]; !named && before.Identities[p] != now.Identities[p] {
			t.Fatalf("Changes.Identities lacks %s", p)
		}
	}
	for k := range bothKeys(before.Entries, now.Entries) {
		if _, named := c.Entries[k]; !named && before.Entries[k] != now.Entries[k] {
			t.Fatalf("Changes.Entries lacks %+v", k)
		}
	}
	pods := maps.Equal(before.Pods, now.Pods) && maps.Equal(before.Restricted, now.Restricted) && before.RestrictedElsewhere == now.RestrictedElsewhere
	if !pods && !c.Pods {
		t.Fatal("Changes.Pods is false, want true")
	}
	if !c.Rules && !maps.Equal(before.Rules, now.Rules) {
		t.Fatal("Changes.Rules is false, want true")
	}
	if !c.Conditions && !cmp.Equal(before.Conditions, now.Conditions) {
		t.Fatal("Changes.Conditions is false, want true")
	}
	if diff := cmp.Diff(Changed(before, now), c.Raised); diff != "" {
		t.Fatalf("Changes.Raised is not what Changed() says (-want +got):\n%s", diff)
	}
}

func bothKeys[K comparable, V any](a, b map[K]V) map[K]V {
	out := maps.Clone(a)
	maps.Copy(out, b)
	return out
}

// A snapshot that does not fit leaves the last result and the numbers as they were, and the next one that fits starts anew.
func TestUpdateAfterFailure(t *testing.T) {
	s, c := newCluster(), NewCompiler()
	policy(t, s, "x/p", `{podSelector: {}, ingress: [{from: [{namespaceSelector: {}}]}]}`)
	r, _, err := c.Update(s)
	if err != nil {
		t.Fatal(err)
	}
	before, numbers := copyOf(r), c.Export()
	for _, limits := range []Limits{{Prefixes: len(r.Identities) + 1, Entries: 1 << 20}, {Prefixes: 1 << 20, Entries: len(r.Entries) + 1}} {
		c.Limits = limits
		larger := clone(s)
		addPod(larger, key("y", "d"), map[string]string{"pod": "d"}, "10.77.0.1", "fd77::1")
		policy(t, larger, "y/p", `{podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}`)
		if _, _, err := c.Update(larger); !errors.Is(err, ErrLimit) {
			t.Fatalf("Update() with %+v = %v, want ErrLimit", limits, err)
		}
		if diff := cmp.Diff(before, r, equateErrors); diff != "" {
			t.Errorf("the last result has changed (-want +got):\n%s", diff)
		}
		if diff := cmp.Diff(numbers, c.Export()); diff != "" {
			t.Errorf("numbers have changed (-want +got):\n%s", diff)
		}
		c.Limits = DefaultLimits()
		again, _, err := c.Update(s)
		if err != nil || again == r {
			t.Fatalf("Update() after a failure = %v, the same result: %v; want another one", err, again == r)
		}
		if diff := cmp.Diff(before, again, equateErrors); diff != "" {
			t.Errorf("Update() after a failure (-want +got):\n%s", diff)
		}
		r, before, numbers = again, copyOf(again), c.Export()
	}
}

// One change touches what it is about and nothing else.
func TestUpdateTouchesLittle(t *testing.T) {
	s, c := largeCluster(2000, 1000), NewCompiler()
	if _, _, err := c.Update(s); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name                string
		change              func(s *state.Snapshot)
		entries, identities int // at most
	}{
		{"nothing", func(*state.Snapshot) {}, 0, 0},
		{"a policy that selects nobody here", func(s *state.Snapshot) {
			k := key("ns-0", "new")
			s.NetworkPolicies[k] = &state.NetworkPolicy{Key: k, Spec: largePolicy(1)}
			s.NetworkPolicies[k].Spec.PodSelector.MatchLabels = map[string]string{"app": "none"}
		}, 0, 0},
		{"a replica", func(s *state.Snapshot) {
			p := *s.Pods[key("ns-1", "pod-1")]
			p.Name, p.IPs = "replica", []netip.Addr{netip.MustParseAddr("10.200.0.1")}
			s.Pods[p.Key] = &p
		}, 0, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := clone(s)
			tc.change(s)
			_, changes, err := c.Update(s)
			if err != nil || len(changes.Entries) > tc.entries || len(changes.Identities) > tc.identities {
				t.Errorf("Update() changed %d entries, %d identities, %v, want at most %d and %d",
					len(changes.Entries), len(changes.Identities), err, tc.entries, tc.identities)
			}
		})
	}
}
