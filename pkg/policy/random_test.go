// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"pgregory.net/rapid"

	"github.com/margay-cni/margay/pkg/state"
)

// The random world is small, so that policies, pods and packets meet.
var (
	randomNamespaces = []string{"a", "b", "c"}
	randomPorts      = []uint16{0, 1, 79, 80, 81, 443, 65535}
	randomProtocols  = []state.Protocol{state.TCP, state.UDP, state.SCTP, 1, 58}
	randomCIDRs      = []string{
		"0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/29", "10.0.0.0/30", "10.0.0.4/30", "10.0.0.5/32", "10.0.0.6/32", "192.0.2.0/24",
		"::/0", "::/1", "::ffff:10.0.0.0/125", "fd00::/8", "fd00::/125", "fd00::/126", "fd00::4/126", "fd00::5/128", "fd00::6/128", "2001:db8::/32",
	}
	randomAddresses = func() []netip.Addr {
		list := []netip.Addr{
			netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("10.9.9.9"), netip.MustParseAddr("198.51.100.1"),
			netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("fd09::9"), netip.MustParseAddr("2001:db9::1"),
		}
		for i := range 8 {
			list = append(list, podAddress(i, false), podAddress(i, true))
		}
		for i := range 3 {
			list = append(list, nodeAddress(i, false), nodeAddress(i, true))
		}
		return list
	}()
)

func podAddress(i int, six bool) netip.Addr {
	if six {
		return netip.MustParseAddr(fmt.Sprintf("fd00::%x", i))
	}
	return netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})
}

func drawLabels(t *rapid.T, name string) map[string]string {
	return rapid.MapOfN(rapid.SampledFrom([]string{"k", "l"}), rapid.SampledFrom([]string{"1", "2"}), 0, 2).Draw(t, name)
}

func drawSelector(t *rapid.T, name string) *metav1.LabelSelector {
	s := &metav1.LabelSelector{}
	if rapid.IntRange(0, 2).Draw(t, name+" everything") == 0 {
		return s
	}
	s.MatchLabels = drawLabels(t, name)
	if rapid.IntRange(0, 2).Draw(t, name+" expression") == 0 {
		e := metav1.LabelSelectorRequirement{
			Key: rapid.SampledFrom([]string{"k", "l"}).Draw(t, name+" key"),
			Operator: rapid.SampledFrom([]metav1.LabelSelectorOperator{
				metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn, metav1.LabelSelectorOpExists, metav1.LabelSelectorOpDoesNotExist,
			}).Draw(t, name+" operator"),
		}
		if e.Operator == metav1.LabelSelectorOpIn || e.Operator == metav1.LabelSelectorOpNotIn {
			e.Values = rapid.SliceOfN(rapid.SampledFrom([]string{"1", "2"}), 0, 2).Draw(t, name+" values") // none: invalid
		}
		s.MatchExpressions = append(s.MatchExpressions, e)
	}
	return s
}

func drawPort(t *rapid.T) networkingv1.NetworkPolicyPort {
	var p networkingv1.NetworkPolicyPort
	if rapid.Bool().Draw(t, "has protocol") {
		protocol := rapid.SampledFrom([]corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP, "ESP"}).Draw(t, "protocol")
		p.Protocol = &protocol
	}
	switch rapid.IntRange(0, 4).Draw(t, "port kind") {
	case 0:
	case 1, 2:
		p.Port = &intstr.IntOrString{Type: intstr.String, StrVal: rapid.SampledFrom([]string{"web", "dns", "none", ""}).Draw(t, "port name")}
	default:
		p.Port = &intstr.IntOrString{Type: intstr.Int, IntVal: int32(rapid.SampledFrom(randomPorts).Draw(t, "port"))}
		if rapid.Bool().Draw(t, "has endPort") {
			end := int32(rapid.SampledFrom(randomPorts).Draw(t, "endPort"))
			p.EndPort = &end
		}
	}
	return p
}

func drawPeer(t *rapid.T) networkingv1.NetworkPolicyPeer {
	var p networkingv1.NetworkPolicyPeer
	switch rapid.IntRange(0, 6).Draw(t, "peer kind") {
	case 0, 1, 2:
		p.IPBlock = &networkingv1.IPBlock{
			CIDR:   rapid.SampledFrom(randomCIDRs).Draw(t, "cidr"),
			Except: rapid.SliceOfN(rapid.SampledFrom(randomCIDRs), 0, 2).Draw(t, "except"),
		}
	case 3:
		p.PodSelector = drawSelector(t, "peer pods")
	case 4:
		p.NamespaceSelector = drawSelector(t, "peer namespaces")
	case 5:
		p.NamespaceSelector, p.PodSelector = drawSelector(t, "peer namespaces"), drawSelector(t, "peer pods")
	}
	return p
}

func drawPolicy(t *rapid.T, key state.Key) *state.NetworkPolicy {
	np := &state.NetworkPolicy{Key: key}
	np.Spec.PodSelector = *drawSelector(t, "subject")
	np.Spec.PolicyTypes = rapid.SliceOfNDistinct(
		rapid.SampledFrom([]networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress}), 0, 2, rapid.ID,
	).Draw(t, "types")
	peers, ports := rapid.Custom(drawPeer), rapid.Custom(drawPort)
	for range rapid.IntRange(0, 2).Draw(t, "ingress rules") {
		np.Spec.Ingress = append(np.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{
			From: rapid.SliceOfN(peers, 0, 2).Draw(t, "from"), Ports: rapid.SliceOfN(ports, 0, 2).Draw(t, "ports"),
		})
	}
	for range rapid.IntRange(0, 2).Draw(t, "egress rules") {
		np.Spec.Egress = append(np.Spec.Egress, networkingv1.NetworkPolicyEgressRule{
			To: rapid.SliceOfN(peers, 0, 2).Draw(t, "to"), Ports: rapid.SliceOfN(ports, 0, 2).Draw(t, "ports"),
		})
	}
	return np
}

func drawPod(t *rapid.T, key state.Key) *state.Pod {
	p := &state.Pod{Key: key, Labels: drawLabels(t, "pod labels")}
	p.Local = rapid.IntRange(0, 3).Draw(t, "local") > 0
	p.HostNetwork = rapid.IntRange(0, 9).Draw(t, "hostNetwork") == 0
	p.Finished = rapid.IntRange(0, 9).Draw(t, "finished") == 0
	p.Terminating = rapid.IntRange(0, 9).Draw(t, "terminating") == 0
	for _, six := range []bool{false, true} {
		if rapid.IntRange(0, 3).Draw(t, "has address") > 0 {
			p.IPs = append(p.IPs, podAddress(rapid.IntRange(0, 7).Draw(t, "address"), six))
		}
	}
	p.Ports = rapid.SliceOfN(rapid.Custom(func(t *rapid.T) state.ContainerPort {
		return state.ContainerPort{
			Name:     rapid.SampledFrom([]string{"web", "dns", ""}).Draw(t, "name"),
			Protocol: rapid.SampledFrom(randomProtocols[:3]).Draw(t, "protocol"),
			Port:     rapid.SampledFrom(randomPorts).Draw(t, "port"),
		}
	}), 0, 2).Draw(t, "container ports")
	return p
}

// change replaces, adds or removes one object.
func change(t *rapid.T, s *state.Snapshot) {
	if rapid.IntRange(0, 3).Draw(t, "in no namespace") == 0 {
		changeCluster(t, s)
		return
	}
	ns := rapid.SampledFrom(randomNamespaces).Draw(t, "namespace")
	key := state.Key{Namespace: ns, Name: rapid.SampledFrom([]string{"0", "1", "2"}).Draw(t, "name")}
	remove := rapid.IntRange(0, 4).Draw(t, "remove") == 0
	switch kind := rapid.IntRange(0, 5).Draw(t, "kind"); {
	case kind == 0 && remove:
		delete(s.Namespaces, ns)
	case kind == 0:
		s.Namespaces[ns] = &state.Namespace{Name: ns, Labels: drawLabels(t, "namespace labels")}
	case kind < 4 && remove:
		delete(s.Pods, key)
	case kind < 4:
		s.Pods[key] = drawPod(t, key)
	case remove:
		delete(s.NetworkPolicies, key)
	default:
		s.NetworkPolicies[key] = drawPolicy(t, key)
	}
}

func drawSnapshot(t *rapid.T) *state.Snapshot {
	s := state.NewSnapshot()
	if rapid.IntRange(0, 3).Draw(t, "has node") == 0 {
		s.Nodes["n"] = &state.Node{Name: "n", Addresses: []netip.Addr{podAddress(7, false), podAddress(7, true)}}
	}
	for _, ns := range randomNamespaces {
		s.Namespaces[ns] = &state.Namespace{Name: ns, Labels: drawLabels(t, "namespace labels")}
	}
	for range rapid.IntRange(0, 30).Draw(t, "objects") {
		change(t, s)
	}
	return s
}

func TestCompiledVerdictsEqualEvaluate(t *testing.T) {
	rapid.Check(t, checkVerdicts)
}

func FuzzCompile(f *testing.F) {
	f.Fuzz(rapid.MakeFuzz(checkVerdicts))
}

func checkVerdicts(t *rapid.T) {
	s := drawSnapshot(t)
	r, err := NewCompiler().Compile(s)
	if err != nil {
		t.Fatalf("Compile() = %v", err)
	}
	compareVerdicts(t, s, r)
	checkShape(t, s, r)
}

// compareVerdicts compares the kernel model with the oracle for every local pod, every address, and a few ports.
func compareVerdicts(t *rapid.T, s *state.Snapshot, r *Result) {
	k := load(r)
	for _, self := range randomAddresses {
		pod := podAt(s, self)
		if pod == nil || !pod.Local {
			continue
		}
		if got, want := k.identity(self), r.Identity(self); got != want {
			t.Fatalf("Identity(%s), want %d as in the map, got %d", self, got, want)
		}
		for _, peer := range randomAddresses {
			if peer.Is4() != self.Is4() {
				continue
			}
			for _, proto := range randomProtocols {
				for _, port := range randomPorts {
					in, _ := k.judge(r.Pods[pod.Key].Policy[Ingress], Ingress, peer, proto, port)
					if want := Evaluate(s, peer, self, proto, port).Ingress; in != want {
						t.Fatalf("%s to pod %s (%s) %s/%d: want %v, got %v", peer, pod.Key, self, proto, port, want, in)
					}
					out, _ := k.judge(r.Pods[pod.Key].Policy[Egress], Egress, peer, proto, port)
					if want := Evaluate(s, self, peer, proto, port).Egress; out != want {
						t.Fatalf("pod %s (%s) to %s %s/%d: want %v, got %v", pod.Key, self, peer, proto, port, want, out)
					}
				}
			}
		}
	}
}

// checkShape checks what every Result promises, whatever the policies.
func checkShape(t *rapid.T, s *state.Snapshot, r *Result) {
	for key, p := range s.Pods {
		if _, got := r.Pods[key]; got != (p.Local && !p.HostNetwork && !p.Finished) {
			t.Fatalf("Pods has %s: got %v", key, got)
		}
	}
	inUse := map[uint32]Direction{}
	for key, a := range r.Pods {
		for d, id := range a.Policy {
			if _, ok := r.Entries[Key{Policy: id, Identity: AnyIdentity, Direction: Direction(d)}]; id >= FirstPolicy && !ok {
				t.Fatalf("pod %s: policy %d has no entry for any identity", key, id)
			}
			if other, ok := inUse[id]; ok && id >= FirstPolicy && other != Direction(d) {
				t.Fatalf("policy %d is used for both directions", id)
			}
			inUse[id] = Direction(d)
		}
	}
	for key, e := range r.Entries {
		if _, ok := inUse[key.Policy]; !ok {
			t.Fatalf("entry %+v is of a policy that no pod has", key)
		}
		if _, ok := r.Rules[e.Rule]; !ok || e.Rule == 0 {
			t.Fatalf("entry %+v names rule %d, which is not in Rules", key, e.Rule)
		}
	}
}

// flowKey is a flow as one end's policy sees it.
type flowKey struct {
	pod   state.Key
	d     Direction
	peer  netip.Addr
	proto state.Protocol
	port  uint16
}

type flow struct {
	policy  uint32
	allowed bool
	rule    uint32
}

// TestChangedLeavesNoStaleFlow keeps a table of flows as the programs do, judges again only those whose policy id was raised, and requires
// that the table then says what a judgement from scratch would say.
func TestChangedLeavesNoStaleFlow(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s, c := drawSnapshot(t), NewCompiler()
		var old *Result
		flows := map[flowKey]flow{}
		for range rapid.IntRange(2, 5).Draw(t, "steps") {
			r, err := c.Compile(s)
			if err != nil {
				t.Fatalf("Compile() = %v", err)
			}
			raised := Changed(old, r)
			fresh := judgeAll(load(r))
			for key, now := range fresh {
				before, known := flows[key]
				_, stayed := findPod(old, key.pod)
				if !known || !stayed || slices.Contains(raised, before.policy) {
					continue
				}
				if before.allowed != now.allowed || before.rule != now.rule {
					t.Fatalf("flow %+v was judged %+v, would be %+v now, but Changed() = %v", key, before, now, raised)
				}
				if before.policy != now.policy {
					t.Fatalf("flow %+v keeps policy %d, want %d or a raised epoch", key, before.policy, now.policy)
				}
			}
			flows, old = fresh, r
			s = clone(s)
			for range rapid.IntRange(1, 3).Draw(t, "changes") {
				change(t, s)
			}
		}
	})
}

func findPod(r *Result, key state.Key) (Assignment, bool) {
	if r == nil {
		return Assignment{}, false
	}
	a, ok := r.Pods[key]
	return a, ok
}

func judgeAll(k *kernel) map[flowKey]flow {
	out := map[flowKey]flow{}
	for pod, a := range k.pods {
		for d, id := range a.Policy {
			for _, peer := range randomAddresses {
				for _, proto := range randomProtocols[:3] {
					for _, port := range []uint16{80, 443} {
						allowed, e := k.judge(id, Direction(d), peer, proto, port)
						out[flowKey{pod, Direction(d), peer, proto, port}] = flow{id, allowed, e.Rule}
					}
				}
			}
		}
	}
	return out
}

var equateErrors = cmp.Options{cmpopts.EquateComparable(netip.Prefix{}), cmp.Comparer(func(a, b error) bool { return a.Error() == b.Error() })}

func TestCompileIsDeterministicAndSurvivesRestart(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		one, two := NewCompiler(), NewCompiler()
		s := drawSnapshot(t)
		for range rapid.IntRange(1, 3).Draw(t, "steps") {
			want, err1 := one.Compile(s)
			got, err2 := two.Compile(clone(s))
			if err1 != nil || err2 != nil {
				t.Fatalf("Compile() = %v and %v", err1, err2)
			}
			if diff := cmp.Diff(want, got, equateErrors); diff != "" {
				t.Fatalf("two compilers, the same snapshot (-one +two):\n%s", diff)
			}
			if raised := Changed(want, got); len(raised) != 0 {
				t.Fatalf("Changed(same, same) = %v, want none", raised)
			}
			two = restart(t, two)
			again, err := two.Compile(s)
			if err != nil {
				t.Fatalf("Compile() after restart = %v", err)
			}
			if diff := cmp.Diff(want, again, equateErrors); diff != "" {
				t.Fatalf("after Export and Import (-want +got):\n%s", diff)
			}
			s = clone(s)
			change(t, s)
		}
	})
}

// restart moves a compiler's numbers through JSON into a new one.
func restart(t rapid.TB, c *Compiler) *Compiler {
	t.Helper()
	data, err := json.Marshal(c.Export())
	if err != nil {
		t.Fatalf("marshal numbers: %v", err)
	}
	var n Numbers
	if err := json.Unmarshal(data, &n); err != nil {
		t.Fatalf("unmarshal numbers: %v", err)
	}
	out := NewCompiler()
	if err := out.Import(n); err != nil {
		t.Fatalf("Import() = %v", err)
	}
	return out
}
