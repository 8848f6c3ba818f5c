// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/policy"
	"github.com/margay-cni/margay/pkg/state"
)

// world is a random cluster of dual-stack pods whose labels, namespaces and policies change.
type world struct {
	r       *rand.Rand
	records []*endpoint.Record
	outside []netip.Addr
}

const worldPods = 6

func newWorld(r *rig, seed uint64) *world {
	w := &world{r: rand.New(rand.NewPCG(seed, 1)), outside: []netip.Addr{
		netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.200"), netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8:1::1"),
	}}
	for n := range worldPods {
		rec := r.pod(fmt.Sprintf("p%d", n), 10+n, fmt.Sprintf("10.0.0.%d", n+1), fmt.Sprintf("fd00::%d", n+1))
		rec.Namespace = fmt.Sprintf("ns%d", n%2)
		w.records = append(w.records, rec)
	}
	return w
}

func (w *world) pick(values ...string) string { return values[w.r.IntN(len(values))] }

func (w *world) selector() *metav1.LabelSelector {
	if w.r.IntN(4) == 0 {
		return &metav1.LabelSelector{}
	}
	return &metav1.LabelSelector{MatchLabels: map[string]string{"app": w.pick("a", "b", "c")}}
}

func (w *world) peer() networkingv1.NetworkPolicyPeer {
	switch w.r.IntN(5) {
	case 0:
		return networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: "192.0.2.0/24", Except: []string{w.pick("192.0.2.0/25", "192.0.2.1/32")}}}
	case 1:
		return networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: w.pick("2001:db8::/32", "::/0", "0.0.0.0/0", "10.0.0.0/30")}}
	case 2:
		return networkingv1.NetworkPolicyPeer{NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"team": w.pick("x", "y")}}, PodSelector: w.selector()}
	case 3:
		return networkingv1.NetworkPolicyPeer{NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"team": w.pick("x", "y")}}}
	}
	return networkingv1.NetworkPolicyPeer{PodSelector: w.selector()}
}

func (w *world) ports() []networkingv1.NetworkPolicyPort {
	if w.r.IntN(2) == 0 {
		return nil
	}
	proto := corev1.ProtocolTCP
	port := intstr.FromInt32(int32(80 + w.r.IntN(2)))
	p := networkingv1.NetworkPolicyPort{Protocol: &proto, Port: &port}
	if end := port.IntVal + 3; w.r.IntN(3) == 0 {
		p.EndPort = &end
	}
	return []networkingv1.NetworkPolicyPort{p}
}

func (w *world) policy(key state.Key) *state.NetworkPolicy {
	p := &state.NetworkPolicy{Key: key}
	p.Spec.PodSelector = *w.selector()
	if w.r.IntN(3) > 0 {
		p.Spec.PolicyTypes = append(p.Spec.PolicyTypes, networkingv1.PolicyTypeIngress)
		for range w.r.IntN(3) {
			rule := networkingv1.NetworkPolicyIngressRule{Ports: w.ports()}
			for range w.r.IntN(3) {
				rule.From = append(rule.From, w.peer())
			}
			p.Spec.Ingress = append(p.Spec.Ingress, rule)
		}
	}
	if w.r.IntN(3) > 0 || len(p.Spec.PolicyTypes) == 0 {
		p.Spec.PolicyTypes = append(p.Spec.PolicyTypes, networkingv1.PolicyTypeEgress)
		for range w.r.IntN(3) {
			rule := networkingv1.NetworkPolicyEgressRule{Ports: w.ports()}
			for range w.r.IntN(3) {
				rule.To = append(rule.To, w.peer())
			}
			p.Spec.Egress = append(p.Spec.Egress, rule)
		}
	}
	return p
}

// next changes some things of the last snapshot and keeps the others.
func (w *world) next(last *state.Snapshot) *state.Snapshot {
	s := state.NewSnapshot()
	for n := range 2 {
		name := fmt.Sprintf("ns%d", n)
		if old := last.Namespaces[name]; old != nil && w.r.IntN(3) > 0 {
			s.Namespaces[name] = old
			continue
		}
		s.Namespaces[name] = &state.Namespace{Name: name, Labels: map[string]string{"team": w.pick("x", "y", "z"), "kubernetes.io/metadata.name": name}}
	}
	for _, r := range w.records {
		key := state.Key{Namespace: r.Namespace, Name: r.Name}
		if old := last.Pods[key]; old != nil && w.r.IntN(3) > 0 {
			s.Pods[key] = old
			continue
		}
		s.Pods[key] = &state.Pod{Key: key, UID: r.UID, Node: "n1", Local: true, Ready: true, IPs: r.Addresses,
			Labels: map[string]string{"app": w.pick("a", "b", "c", "d")}}
	}
	for n := range 4 {
		key := state.Key{Namespace: fmt.Sprintf("ns%d", n%2), Name: fmt.Sprintf("policy%d", n)}
		switch old := last.NetworkPolicies[key]; {
		case old != nil && w.r.IntN(2) == 0:
			s.NetworkPolicies[key] = old
		case w.r.IntN(3) > 0:
			s.NetworkPolicies[key] = w.policy(key)
		}
	}
	return s
}

// connection is a question about policy.
type connection struct {
	src, dst netip.Addr
	port     uint16
}

func (c connection) String() string { return fmt.Sprintf("%v → %v:%d", c.src, c.dst, c.port) }

// connections are all that the test asks about.
func (w *world) connections() []connection {
	addrs := w.outside
	for _, r := range w.records {
		addrs = append(addrs[:len(addrs):len(addrs)], r.Addresses...)
	}
	var out []connection
	for _, src := range addrs {
		for _, dst := range addrs {
			if src != dst && src.Is4() == dst.Is4() {
				out = append(out, connection{src, dst, 80}, connection{src, dst, 83})
			}
		}
	}
	return out
}

// decisions evaluates every connection by the contract.
func decisions(s *state.Snapshot, all []connection) map[connection]policy.Decision {
	out := make(map[connection]policy.Decision, len(all))
	for _, c := range all {
		out[c] = policy.Evaluate(s, c.src, c.dst, state.TCP, c.port)
	}
	return out
}

// Between any two writes, what a pod's policies refuse in every snapshot since the kernel was last right is refused. That holds for each end
// by itself, and where not both the pod's policies and its peer's identity change at once: those are two maps, or two entries of one, and
// no order of two writes keeps every mixture closed.
func TestPolicyChangesNeverPassThroughAllow(t *testing.T) {
	// The later seeds are those with which a wrong order was caught while this was written.
	for _, seed := range []uint64{0, 1, 2, 3, 4, 5, 14, 15, 23, 35, 45, 88} {
		for _, fault := range []float64{0, 0.05} {
			t.Run(fmt.Sprintf("seed %d fault %v", seed, fault), func(t *testing.T) {
				k := newKernel(seed)
				r := newRig(t, k, runDir(t))
				w := newWorld(r, seed)
				all := w.connections()
				s := w.next(state.NewSnapshot())
				r.give(s, w.records...)
				since := []map[connection]policy.Decision{decisions(s, all)}
				base := k.positions(all)
				k.check = func(op string) {
					for _, c := range all {
						want, got := eitherAllows(since, c), k.decide(c.src, c.dst, state.TCP, c.port)
						moved := func(end, peer netip.Addr, d uint32) bool {
							return base[end].policies[d] != r.wantEndpoints[end].PolicyId[d] && base[peer].identity != r.policyResult.Identity(peer)
						}
						if (got.Egress && !want.Egress && !moved(c.src, c.dst, bpf.Egress)) ||
							(got.Ingress && !want.Ingress && !moved(c.dst, c.src, bpf.Ingress)) {
							t.Fatalf("after %s: %v allowed = %+v, the snapshots since the last clean round allow %+v", op, c, got, want)
						}
					}
				}
				for round := range 12 {
					k.fault = fault
					s = w.next(s)
					since = append(since, decisions(s, all))
					r.give(s, w.records...)
					for range round % 3 {
						r.work(round%2 == 0)
					}
					k.fault = 0
					r.settle()
					since, base = since[len(since)-1:], k.positions(all)
					for _, c := range all {
						if want, got := since[0][c], k.decide(c.src, c.dst, state.TCP, c.port); got != want {
							t.Fatalf("round %d settled: %v allowed = %+v, want %+v", round, c, got, want)
						}
					}
				}
			})
		}
	}
}

// position is what the kernel makes of one address.
type position struct {
	identity uint32
	policies [2]uint32
}

func (k *fakeKernel) positions(all []connection) map[netip.Addr]position {
	out := map[netip.Addr]position{}
	for _, c := range all {
		out[c.src] = position{k.identity(c.src), k.endpoints.entries[bpf.NewAddr(c.src)].PolicyId}
	}
	return out
}

func eitherAllows(snapshots []map[connection]policy.Decision, c connection) policy.Decision {
	var d policy.Decision
	for _, s := range snapshots {
		d.Egress, d.Ingress = d.Egress || s[c].Egress, d.Ingress || s[c].Ingress
	}
	return d
}

// A flow whose verdict the new snapshot changes is judged again, and by then the maps say the new thing.
func TestChangedVerdictsAreJudgedAgain(t *testing.T) {
	for seed := range uint64(20) {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			k := newKernel(seed)
			r := newRig(t, k, runDir(t))
			w := newWorld(r, seed)
			all := w.connections()
			s := w.next(state.NewSnapshot())
			r.give(s, w.records...)
			device := map[netip.Addr]int{}
			for _, rec := range w.records {
				for _, a := range rec.Addresses {
					device[a] = rec.HostIfindex
				}
			}
			for round := range 10 {
				before := decisions(s, all)
				clear(k.endpointEpochs)
				s = w.next(s)
				r.give(s, w.records...)
				for c, now := range decisions(s, all) {
					if now != before[c] && k.endpointEpochs[device[c.src]]+k.endpointEpochs[device[c.dst]] == 0 {
						t.Fatalf("round %d: %v allowed went from %+v to %+v without an epoch raised", round, c, before[c], now)
					}
				}
			}
		})
	}
}

// What was killed is finished by the next start: no verdict changes unnoticed, whatever the instant of the kill.
func TestKillBetweenAnyTwoWritesLosesNoEndpointEpoch(t *testing.T) {
	for kill := 1; kill < 400; kill += 3 {
		k := newKernel(3)
		run := runDir(t)
		r := newRig(t, k, run)
		w := newWorld(r, 5)
		all := w.connections()
		first := w.next(state.NewSnapshot())
		second := w.next(first)
		r.give(first, w.records...)
		before := decisions(first, all)
		clear(k.endpointEpochs)
		k.killAfter = kill
		killed := survives(func() { r.give(second, w.records...) })
		k.killAfter = 0
		r = newRig(t, k, run)
		for _, rec := range w.records {
			r.host.devices[rec.HostIfindex] = rec.HostIfName
		}
		r.give(second, w.records...)
		for c, now := range decisions(second, all) {
			if got := k.decide(c.src, c.dst, state.TCP, c.port); got != now {
				t.Fatalf("kill at %d: %v allowed = %+v, want %+v", kill, c, got, now)
			}
			var raised int
			for _, rec := range w.records {
				for _, a := range rec.Addresses {
					if a == c.src || a == c.dst {
						raised += k.endpointEpochs[rec.HostIfindex]
					}
				}
			}
			if now != before[c] && raised == 0 {
				t.Fatalf("kill at %d: %v allowed went from %+v to %+v without an epoch raised", kill, c, before[c], now)
			}
		}
		if !killed {
			return
		}
	}
}

func denyAll(namespace string) *state.NetworkPolicy {
	return &state.NetworkPolicy{
		Key: state.Key{Namespace: namespace, Name: "deny"},
		Spec: networkingv1.NetworkPolicySpec{
			PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress},
		},
	}
}

func TestWriteOrder(t *testing.T) {
	k := newKernel(1)
	r := newRig(t, k, runDir(t))
	rec := r.pod("web", 10, "10.0.0.1", "fd00::1")
	s := state.NewSnapshot()
	r.give(s, rec)
	k.written()
	s = state.NewSnapshot()
	deny := denyAll("default")
	s.NetworkPolicies[deny.Key] = deny
	r.give(s, rec)
	want := []string{"put policy", "put policy", "put pending", "put pending", "put endpoints", "put endpoints", "raise endpoints"}
	if diff := cmp.Diff(want, k.written()); diff != "" {
		t.Errorf("operations when a policy comes (-want +got):\n%s", diff)
	}
	r.give(state.NewSnapshot(), rec)
	want = []string{"put pending", "put pending", "put endpoints", "put endpoints", "raise endpoints", "delete policy", "delete policy"}
	if diff := cmp.Diff(want, k.written()); diff != "" {
		t.Errorf("operations when it goes (-want +got):\n%s", diff)
	}
}

func TestFullPolicyMapKeepsTheLastGoodPolicy(t *testing.T) {
	k := newKernel(1)
	r := newRig(t, k, runDir(t))
	web, free := r.pod("web", 10, "10.0.0.1"), r.pod("free", 11, "10.0.0.2")
	free.Namespace = "other"
	s := state.NewSnapshot()
	deny := denyAll("default")
	s.NetworkPolicies[deny.Key] = deny
	r.give(s, web, free)
	good := k.endpoints.entries[bpf.NewAddr(web.Addresses[0])].PolicyId

	k.policy.max = len(k.policy.entries)
	s = state.NewSnapshot()
	open := denyAll("default")
	open.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{Ports: []networkingv1.NetworkPolicyPort{{Port: &intstr.IntOrString{IntVal: 80}}}}}
	s.NetworkPolicies[open.Key] = open
	other := denyAll("other")
	other.Spec.Egress = []networkingv1.NetworkPolicyEgressRule{{Ports: []networkingv1.NetworkPolicyPort{{Port: &intstr.IntOrString{IntVal: 80}}}}}
	s.NetworkPolicies[other.Key] = other
	r.give(s, web, free)
	if got := k.endpoints.entries[bpf.NewAddr(web.Addresses[0])].PolicyId; got[bpf.Ingress] != good[bpf.Ingress] {
		t.Errorf("policy ids of the isolated pod with a full map = %v, want ingress as before %v", got, good)
	}
	if got := k.endpoints.entries[bpf.NewAddr(free.Addresses[0])].PolicyId; got[bpf.Ingress] == 0 || got[bpf.Egress] == 0 {
		t.Errorf("policy ids of the pod that becomes isolated with a full map = %v, want none 0", got)
	}
	if len(r.last.Faults) != 1 || r.last.Faults[0].Map != "policy" || r.last.Faults[0].Cure == "" {
		t.Errorf("faults = %+v, want one of the policy map with a cure", r.last.Faults)
	}
	k.policy.max = 1 << 20
	r.settle()
	if !k.decide(netip.MustParseAddr("192.0.2.1"), web.Addresses[0], state.TCP, 80).Allowed() {
		t.Errorf("with room in the map 192.0.2.1 → web:80 is refused, want allowed")
	}
}
