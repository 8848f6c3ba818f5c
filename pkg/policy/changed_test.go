// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/pkg/state"
)

func key(ns, name string) state.Key { return state.Key{Namespace: ns, Name: name} }

// addPod adds a pod of another node to the snapshot.
func addPod(s *state.Snapshot, k state.Key, labels map[string]string, ips ...string) {
	p := &state.Pod{Key: k, Labels: labels}
	for _, ip := range ips {
		p.IPs = append(p.IPs, netip.MustParseAddr(ip))
	}
	s.Pods[k] = p
}

func TestChanged(t *testing.T) {
	// What x/a, x/b and x/c receive is under ids that name pods a, pods of namespaces with color red, and an ipBlock.
	base := func(t *testing.T) *state.Snapshot {
		s := newCluster()
		policy(t, s, "x/pods", `{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {pod: a}}}]}]}`)
		policy(t, s, "x/reds", `{podSelector: {matchLabels: {pod: b}}, ingress: [{from: [{namespaceSelector: {matchLabels: {color: red}}}]}]}`)
		policy(t, s, "x/block", `{podSelector: {matchLabels: {pod: c}}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/16, except: [10.0.5.0/24]}}, {ipBlock: {cidr: "fd00::/64", except: ["fd00::5:0/112"]}}]}]}`)
		return s
	}
	for _, tc := range []struct {
		name   string
		change func(t *testing.T, s *state.Snapshot)
		want   []string // pods of namespace x whose former ingress id is raised; "none" is PolicyNone
	}{
		{"nothing", func(*testing.T, *state.Snapshot) {}, nil},
		{"further IPv4 address of a known identity, outside every region", func(t *testing.T, s *state.Snapshot) {
			edit(s, "y/a", func(p *state.Pod) { p.IPs = append(p.IPs[:2:2], netip.MustParseAddr("192.168.0.1")) })
		}, []string{"a"}},
		{"replica that one policy names, outside every region", func(t *testing.T, s *state.Snapshot) {
			addPod(s, key("y", "a2"), map[string]string{"pod": "a"}, "192.168.0.1")
			s.Pods[key("y", "a2")].Ports = s.Pods[key("y", "a")].Ports
		}, []string{"a"}},
		{"pod that no policy names, outside every region", func(t *testing.T, s *state.Snapshot) {
			addPod(s, key("y", "d"), map[string]string{"pod": "d"}, "192.168.0.1", "fd77::1")
		}, nil},
		{"pod that no policy names, in a region that one allows", func(t *testing.T, s *state.Snapshot) {
			addPod(s, key("y", "d"), map[string]string{"pod": "d"}, "10.0.9.9")
		}, []string{"c"}},
		{"IPv6 pod that no policy names, in an exception", func(t *testing.T, s *state.Snapshot) {
			addPod(s, key("y", "d"), map[string]string{"pod": "d"}, "fd00::5:5")
		}, nil},
		{"named pod goes", func(t *testing.T, s *state.Snapshot) { delete(s.Pods, key("z", "a")) }, []string{"a", "c"}},
		{"namespace label", func(t *testing.T, s *state.Snapshot) {
			s.Namespaces["y"] = &state.Namespace{Name: "y", Labels: map[string]string{"ns": "y", "color": "red"}}
		}, []string{"b"}},
		{"policy that selects nobody here", func(t *testing.T, s *state.Snapshot) {
			policy(t, s, "x/other", `{podSelector: {matchLabels: {pod: d}}, ingress: [{from: [{ipBlock: {cidr: 10.0.5.5/32}}]}]}`)
		}, nil},
		{"policy for a pod that was open", func(t *testing.T, s *state.Snapshot) { policy(t, s, "y/p", `{podSelector: {matchLabels: {pod: c}}}`) }, []string{"none"}},
		{"policy text", func(t *testing.T, s *state.Snapshot) {
			policy(t, s, "x/reds", `{podSelector: {matchLabels: {pod: b}}, ingress: [{from: [{namespaceSelector: {matchLabels: {color: green}}}]}]}`)
		}, []string{"b"}},
		{"policy goes", func(t *testing.T, s *state.Snapshot) { delete(s.NetworkPolicies, key("x", "reds")) }, []string{"b"}},
		{"region splits another where no pod is", func(t *testing.T, s *state.Snapshot) {
			policy(t, s, "x/reds2", `{podSelector: {matchLabels: {pod: b}}, ingress: [{from: [{ipBlock: {cidr: 10.0.9.0/24}}]}]}`)
		}, []string{"b", "c"}},
		{"region appears in the world", func(t *testing.T, s *state.Snapshot) {
			policy(t, s, "x/reds2", `{podSelector: {matchLabels: {pod: b}}, ingress: [{from: [{ipBlock: {cidr: "2001:db8::/32"}}]}]}`)
		}, []string{"b"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, c := base(t), NewCompiler()
			old := compile(t, c, s)
			s = clone(s)
			tc.change(t, s)
			got := map[uint32]bool{}
			for _, id := range Changed(old, compile(t, c, s)) {
				got[id] = true
			}
			want := map[string]bool{}
			for _, name := range tc.want {
				want[name] = true
			}
			if got[PolicyNone] != want["none"] {
				t.Errorf("Changed() has id 0: want %v, got %v", want["none"], got[PolicyNone])
			}
			for _, name := range []string{"a", "b", "c"} {
				if id := old.Pods[key("x", name)].Policy[Ingress]; got[id] != want[name] {
					t.Errorf("Changed() has id %d of pod %s: want %v, got %v", id, name, want[name], got[id])
				}
			}
		})
	}
}

func TestChangedWithUnknownPast(t *testing.T) {
	s := newCluster()
	policy(t, s, "x/p", `{podSelector: {}, policyTypes: [Ingress, Egress]}`)
	r := compile(t, NewCompiler(), s)
	a := r.Pods[key("x", "a")].Policy
	want := []uint32{PolicyNone, PolicyNodeOnly, min(a[0], a[1]), max(a[0], a[1])}
	if diff := cmp.Diff(want, Changed(nil, r)); diff != "" {
		t.Errorf("Changed(nil, r) (-want +got):\n%s", diff)
	}
}

// A Result that was read back from the kernel's maps has no rule names; it must do as the past.
func TestChangedAfterRestart(t *testing.T) {
	s, c := newCluster(), NewCompiler()
	policy(t, s, "x/p", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: "::/0"}}, {podSelector: {}}]}]}`)
	r := compile(t, c, s)
	past := &Result{Identities: r.Identities, Pods: r.Pods, Entries: r.Entries}
	if got := Changed(past, compile(t, restart(t, c), s)); len(got) != 0 {
		t.Errorf("Changed(past, same) = %v, want none", got)
	}
}
