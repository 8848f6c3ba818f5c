// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/margay-cni/margay/pkg/state"
)

// newCluster has namespaces x, y and z (label ns), each with pods a, b and c (label pod), all local and dual stack. Every pod serves the named
// ports web (TCP), dns (UDP) and sig (SCTP); web is 80, but 8080 in pods b.
func newCluster() *state.Snapshot {
	s := state.NewSnapshot()
	for i, ns := range []string{"x", "y", "z"} {
		s.Namespaces[ns] = &state.Namespace{Name: ns, Labels: map[string]string{"ns": ns, "kubernetes.io/metadata.name": ns}}
		for j, name := range []string{"a", "b", "c"} {
			web := uint16(80)
			if name == "b" {
				web = 8080
			}
			k := state.Key{Namespace: ns, Name: name}
			s.Pods[k] = &state.Pod{
				Key: k, Labels: map[string]string{"pod": name}, Local: true, Ready: true,
				IPs: []netip.Addr{
					netip.AddrFrom4([4]byte{10, 0, byte(i + 1), byte(j + 1)}),
					netip.MustParseAddr(fmt.Sprintf("fd00::%d:%d", i+1, j+1)),
				},
				Ports: []state.ContainerPort{
					{Name: "web", Protocol: state.TCP, Port: web},
					{Name: "dns", Protocol: state.UDP, Port: 53},
					{Name: "sig", Protocol: state.SCTP, Port: 90},
				},
			}
		}
	}
	return s
}

// policy adds a NetworkPolicy, its spec in YAML, to the snapshot.
func policy(t testing.TB, s *state.Snapshot, name, spec string) {
	t.Helper()
	ns, name, _ := strings.Cut(name, "/")
	k := state.Key{Namespace: ns, Name: name}
	np := &state.NetworkPolicy{Key: k}
	if err := yaml.UnmarshalStrict([]byte(spec), &np.Spec); err != nil {
		t.Fatalf("spec of policy %s: %v", k, err)
	}
	s.NetworkPolicies[k] = np
}

// clusterPolicy adds a ClusterNetworkPolicy, its spec in YAML, to the snapshot.
func clusterPolicy(t testing.TB, s *state.Snapshot, name, spec string) *state.ClusterNetworkPolicy {
	t.Helper()
	spec = strings.ReplaceAll("\n"+strings.TrimSpace(spec), "\n", "\n  ")
	raw, err := yaml.YAMLToJSON([]byte("metadata: {name: " + strconv.Quote(name) + ", generation: 7}\nspec:" + spec))
	if err != nil {
		t.Fatalf("spec of cluster policy %s: %v", name, err)
	}
	p, err := state.FromClusterNetworkPolicy(raw)
	if err != nil {
		t.Fatalf("spec of cluster policy %s: %v", name, err)
	}
	s.ClusterNetworkPolicies[name] = p
	return p
}

// decider names the rule that decides about a connection at one end, a local pod.
func decider(t testing.TB, s *state.Snapshot, pod string, d Direction, peer string, proto state.Protocol, port uint16) string {
	t.Helper()
	r := compile(t, NewCompiler(), s)
	ns, name, _ := strings.Cut(pod, "/")
	_, e := load(r).judge(r.Pods[state.Key{Namespace: ns, Name: name}].Policy[d], d, addresses(s, peer)[0], proto, port)
	return r.Rules[e.Rule].String()
}

// clone copies the snapshot's maps; the objects are shared, as a source does.
func clone(s *state.Snapshot) *state.Snapshot {
	out := state.NewSnapshot()
	for k, v := range s.Namespaces {
		out.Namespaces[k] = v
	}
	for k, v := range s.Pods {
		out.Pods[k] = v
	}
	for k, v := range s.NetworkPolicies {
		out.NetworkPolicies[k] = v
	}
	for k, v := range s.ClusterNetworkPolicies {
		out.ClusterNetworkPolicies[k] = v
	}
	for k, v := range s.Nodes {
		out.Nodes[k] = v
	}
	return out
}

// edit replaces a pod by a changed copy.
func edit(s *state.Snapshot, key string, change func(*state.Pod)) {
	ns, name, _ := strings.Cut(key, "/")
	k := state.Key{Namespace: ns, Name: name}
	p := *s.Pods[k]
	change(&p)
	s.Pods[k] = &p
}

func compile(t testing.TB, c *Compiler, s *state.Snapshot) *Result {
	t.Helper()
	r, err := c.Compile(s)
	if err != nil {
		t.Fatalf("Compile() = %v", err)
	}
	return r
}

// probe is one connection and whether it must be allowed. From and to are pods (namespace/name), tried with their addresses of both
// families, or addresses.
type probe struct {
	from, to string
	proto    state.Protocol
	port     uint16
	want     bool
}

func tcp(from, to string, port uint16, want bool) probe {
	return probe{from, to, state.TCP, port, want}
}

// check compiles the snapshot and compares kernel model, oracle and expectation for every probe.
func check(t *testing.T, s *state.Snapshot, probes ...probe) {
	t.Helper()
	k := load(compile(t, NewCompiler(), s))
	for _, p := range probes {
		tried := 0
		for _, src := range addresses(s, p.from) {
			for _, dst := range addresses(s, p.to) {
				if src.Is4() != dst.Is4() {
					continue
				}
				tried++
				name := fmt.Sprintf("%s (%s) to %s (%s) %s/%d", p.from, src, p.to, dst, p.proto, p.port)
				if got := k.connects(t, s, src, dst, p.proto, p.port); got != p.want {
					t.Errorf("%s: compiled verdict, want %v, got %v", name, p.want, got)
				}
				if got := Evaluate(s, src, dst, p.proto, p.port).Allowed(); got != p.want {
					t.Errorf("%s: Evaluate(), want %v, got %v", name, p.want, got)
				}
			}
		}
		if tried == 0 {
			t.Errorf("probe %+v has no pair of addresses", p)
		}
	}
}

// addresses of a pod, or the one that is named.
func addresses(s *state.Snapshot, name string) []netip.Addr {
	if ns, pod, ok := strings.Cut(name, "/"); ok {
		return s.Pods[state.Key{Namespace: ns, Name: pod}].IPs
	}
	return []netip.Addr{netip.MustParseAddr(name)}
}

// connects judges both ends, as far as they are local pods.
func (k *kernel) connects(t testing.TB, s *state.Snapshot, src, dst netip.Addr, proto state.Protocol, port uint16) bool {
	t.Helper()
	if p := podAt(s, src); p != nil && p.Local && !k.allows(t, p.Key, Egress, dst, proto, port) {
		return false
	}
	p := podAt(s, dst)
	return p == nil || !p.Local || k.allows(t, p.Key, Ingress, src, proto, port)
}
