// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"net/netip"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"pgregory.net/rapid"
	policyv1alpha2 "sigs.k8s.io/network-policy-api/apis/v1alpha2"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/policy"
	"github.com/margay-cni/margay/pkg/state"
)

// policyLab is a node whose policy maps hold what the agent compiles, and the shipped programs to send packets through. Pods A and B are
// a/a and b/b; b/far is on another node.
type policyLab struct {
	*progtest.Fixture
	far []netip.Addr
}

// The names of pods A and B.
var labA, labB = state.Key{Namespace: "a", Name: "a"}, state.Key{Namespace: "b", Name: "b"}

// labVIPs lead pod A back to itself, at port 80.
var labVIPs = addrs("10.96.0.77", "fd00:96::77")

func newPolicyLab(t testing.TB) *policyLab {
	l := &policyLab{Fixture: progtest.New(t), far: addrs("10.244.9.9", "fd00:244:9::9")}
	for i, vip := range labVIPs {
		for kind, proto := range flowProtocols {
			l.AddService(uint32(100*i+int(kind)+1), bpf.NewFrontendKey(uint8(proto), vip, 80), netip.AddrPortFrom(l.A.Addr(vip.Is6()), 80))
		}
	}
	return l
}

func (l *policyLab) snapshot(t *rapid.T) *state.Snapshot {
	s := state.NewSnapshot()
	labels := func(what string) map[string]string {
		return map[string]string{"k": rapid.SampledFrom([]string{"1", "2"}).Draw(t, what)}
	}
	for _, ns := range []string{"a", "b"} {
		s.Namespaces[ns] = &state.Namespace{Name: ns, Labels: labels("namespace")}
	}
	for _, p := range []struct {
		key state.Key
		ips []netip.Addr
	}{{labA, l.A.Addrs}, {labB, l.B.Addrs}, {state.Key{Namespace: "b", Name: "far"}, l.far}} {
		s.Pods[p.key] = &state.Pod{Key: p.key, Labels: labels("pod"), IPs: p.ips, Local: p.key.Name != "far", Ports: []state.ContainerPort{{Name: "web", Protocol: state.TCP, Port: 80}}}
	}
	s.Nodes["here"] = &state.Node{Name: "here", Labels: labels("node"), Addresses: nodetest.NodeAddrs, AllAddresses: nodetest.NodeAddrs}
	for i := range rapid.IntRange(0, 2).Draw(t, "NetworkPolicies") {
		key := state.Key{Namespace: rapid.SampledFrom([]string{"a", "b"}).Draw(t, "of namespace"), Name: string(rune('p' + i))}
		s.NetworkPolicies[key] = &state.NetworkPolicy{Key: key, Spec: l.networkPolicy(t)}
	}
	for i := range rapid.IntRange(0, 3).Draw(t, "ClusterNetworkPolicies") {
		p := l.clusterPolicy(t)
		p.Name = string(rune('p' + i))
		s.ClusterNetworkPolicies[p.Name] = p
	}
	return s
}

func labSelector(t *rapid.T, what string) metav1.LabelSelector {
	return rapid.SampledFrom([]metav1.LabelSelector{
		{}, {MatchLabels: map[string]string{"k": "1"}}, {MatchLabels: map[string]string{"k": "2"}},
	}).Draw(t, what)
}

func (l *policyLab) networks(t *rapid.T) []string {
	all := []string{"0.0.0.0/0", "::/0", "10.0.0.0/8", "fd00::/8", nodetest.NodeAddrs[0].String() + "/32", nodetest.NodeAddrs[1].String() + "/128", nodetest.ClientAddrs[0].String() + "/32", "2001:db8::/32"}
	return rapid.SliceOfN(rapid.SampledFrom(all), 1, 3).Draw(t, "networks")
}

func (l *policyLab) networkPolicy(t *rapid.T) networkingv1.NetworkPolicySpec {
	spec := networkingv1.NetworkPolicySpec{PodSelector: labSelector(t, "subject")}
	spec.PolicyTypes = rapid.SampledFrom([][]networkingv1.PolicyType{{"Ingress"}, {"Egress"}, {"Ingress", "Egress"}}).Draw(t, "types")
	port := func() (out []networkingv1.NetworkPolicyPort) {
		if rapid.Bool().Draw(t, "any port") {
			return nil
		}
		p := intstr.FromInt32(80)
		return []networkingv1.NetworkPolicyPort{{Port: &p}}
	}
	peers := func() (out []networkingv1.NetworkPolicyPeer) {
		if rapid.Bool().Draw(t, "pods") {
			pods, namespaces := labSelector(t, "pods"), labSelector(t, "namespaces")
			return []networkingv1.NetworkPolicyPeer{{PodSelector: &pods, NamespaceSelector: &namespaces}}
		}
		for _, n := range l.networks(t) {
			out = append(out, networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: n}})
		}
		return out
	}
	for range rapid.IntRange(0, 1).Draw(t, "rules") {
		spec.Ingress = append(spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: peers(), Ports: port()})
		spec.Egress = append(spec.Egress, networkingv1.NetworkPolicyEgressRule{To: peers(), Ports: port()})
	}
	return spec
}

func (l *policyLab) clusterPolicy(t *rapid.T) *state.ClusterNetworkPolicy {
	p := &state.ClusterNetworkPolicy{
		Tier: rapid.SampledFrom([]policyv1alpha2.Tier{"Admin", "Baseline"}).Draw(t, "tier"), Priority: rapid.Int32Range(0, 2).Draw(t, "priority"),
	}
	p.Subject.Pods = &policyv1alpha2.NamespacedPod{NamespaceSelector: labSelector(t, "subject namespaces"), PodSelector: labSelector(t, "subject pods")}
	rules := func(egress bool) (out []state.ClusterNetworkPolicyRule) {
		for range rapid.IntRange(0, 3).Draw(t, "rules") {
			out = append(out, l.clusterRule(t, egress))
		}
		return out
	}
	p.Ingress, p.Egress = rules(false), rules(true)
	return p
}

func (l *policyLab) clusterRule(t *rapid.T, egress bool) state.ClusterNetworkPolicyRule {
	r := state.ClusterNetworkPolicyRule{Action: rapid.SampledFrom([]policyv1alpha2.ClusterNetworkPolicyRuleAction{"Accept", "Deny", "Pass"}).Draw(t, "action")}
	var peer policyv1alpha2.ClusterNetworkPolicyEgressPeer
	selector := labSelector(t, "peer")
	switch kind := rapid.IntRange(0, 3).Draw(t, "peer kind"); {
	case kind == 0 && egress:
		for _, n := range l.networks(t) {
			peer.Networks = append(peer.Networks, policyv1alpha2.CIDR(n))
		}
	case kind == 1 && egress:
		peer.Nodes = &selector
	default:
		peer.Namespaces = &selector
	}
	r.Peers = append(r.Peers, peer)
	switch rapid.IntRange(0, 3).Draw(t, "protocols") {
	case 0:
		r.Protocols = []policyv1alpha2.ClusterNetworkPolicyProtocol{{TCP: &policyv1alpha2.ClusterNetworkPolicyProtocolTCP{DestinationPort: &policyv1alpha2.Port{Range: &policyv1alpha2.PortRange{Start: 79, End: 90}}}}}
	case 1:
		r.Protocols = []policyv1alpha2.ClusterNetworkPolicyProtocol{{UDP: &policyv1alpha2.ClusterNetworkPolicyProtocolUDP{}}, {SCTP: &policyv1alpha2.ClusterNetworkPolicyProtocolSCTP{DestinationPort: &policyv1alpha2.Port{Number: 80}}}}
	}
	return r
}

// give compiles the snapshot and fills the kernel's maps.
func (l *policyLab) give(t testing.TB, s *state.Snapshot) {
	t.Helper()
	r, err := policy.NewCompiler().Compile(s)
	if err != nil {
		t.Fatal(err)
	}
	want := newPolicyMaps(r, s.Pods)
	fill(t, l.DP.Maps.Policy, want.policy)
	fill(t, l.DP.Maps.IPCache, want.ipcache)
	for _, p := range []struct {
		key state.Key
		pod *nodetest.Pod
	}{{labA, l.A}, {labB, l.B}} {
		for _, a := range p.pod.Addrs {
			e := bpf.Endpoint{Ifindex: uint32(p.pod.Ifindex), Mac: [6]byte(p.pod.MAC), HostMac: [6]byte(p.pod.HostMAC), Identity: r.Identity(a), PolicyId: r.Pods[p.key].Policy}
			if err := l.DP.PutEndpoint(a, e); err != nil {
				t.Fatal(err)
			}
		}
	}
	l.ClearFlows(t)
}

// withoutSay is the snapshot for traffic in which NetworkPolicy has no say: where a policy isolates, all is allowed (rows N10, C4, C7).
func withoutSay(s *state.Snapshot) *state.Snapshot {
	out := *s
	out.NetworkPolicies = map[state.Key]*state.NetworkPolicy{}
	for key, p := range s.NetworkPolicies {
		open := *p
		open.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{}}
		open.Spec.Egress = []networkingv1.NetworkPolicyEgressRule{{}}
		out.NetworkPolicies[key] = &open
	}
	return &out
}

// TestRandomPoliciesAgreeWithTheRows gives the programs what random policies compile to, and holds what they do with a packet of every
// protocol between every two places against the policies as they are written. A failure prints the seed.
func TestRandomPoliciesAgreeWithTheRows(t *testing.T) {
	t.Parallel()
	l := newPolicyLab(t)
	protocols := map[pkt.Kind]state.Protocol{pkt.TCP: state.TCP, pkt.UDP: state.UDP, pkt.SCTP: state.SCTP, pkt.Ping: 1}
	counts := map[string]int{}
	rapid.Check(t, func(r *rapid.T) {
		s := l.snapshot(r)
		l.give(t, s)
		for _, v6 := range []bool{false, true} {
			i := map[bool]int{true: 1}[v6]
			a, b := asker{pod: l.A}, asker{pod: l.B}
			for n, way := range []struct {
				name     string
				from     asker
				to, post netip.Addr
				judged   *state.Snapshot
			}{
				{"pod to pod", a, l.B.Addr(v6), l.B.Addr(v6), s},
				{"pod to pod", b, l.A.Addr(v6), l.A.Addr(v6), s},
				{"pod to pod elsewhere", a, l.far[i], l.far[i], s},
				{"pod to outside", a, nodetest.ClientAddrs[i], nodetest.ClientAddrs[i], s},
				{"outside to pod", asker{client: nodetest.ClientAddrs[i]}, l.A.Addr(v6), l.A.Addr(v6), s},
				{"pod to its node", a, nodetest.NodeAddrs[i], nodetest.NodeAddrs[i], withoutSay(s)},
				{"pod to itself by service", a, labVIPs[i], l.A.Addr(v6), withoutSay(s)},
			} {
				for kind, proto := range protocols {
					for _, port := range []uint16{80, 91} {
						if kind == pkt.Ping {
							port = 0
							proto = map[bool]state.Protocol{false: 1, true: 58}[v6]
						}
						if way.to != way.post && port != 80 {
							continue
						}
						p := way.from.opens(kind, uint16(4000+1000*n)+port, netip.AddrPortFrom(way.to, port)) // no flow of another way's
						hook := l.FromNetdev()
						if way.from.pod != nil {
							hook = progtest.FromPod(way.from.pod)
						}
						got := l.Run(t, hook, p.Bytes())
						_, denied := got.Drops["policy"]
						d := policy.Evaluate(way.judged, p.Src.Addr(), way.post, proto, port)
						allowed := d.Egress && (d.Ingress || way.post == l.far[i]) // far's ingress is judged at its node
						if denied == allowed {
							r.Fatalf("%s, %s from %v to %v: drops %v, want allowed %v", way.name, kind, p.Src, p.Dst, got.Drops, allowed)
						}
						counts[way.name+map[bool]string{true: ": denied", false: ": allowed"}[denied]]++
					}
				}
			}
		}
	})
	t.Logf("outcomes: %v", counts)
	for _, what := range []string{"pod to pod", "pod to pod elsewhere", "pod to outside", "outside to pod", "pod to its node", "pod to itself by service"} {
		for _, how := range []string{": denied", ": allowed"} {
			if counts[what+how] == 0 && !t.Failed() {
				t.Errorf("%s%s: never; all: %v", what, how, counts)
			}
		}
	}
}
