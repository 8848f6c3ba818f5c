// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
	policyv1alpha2 "sigs.k8s.io/network-policy-api/apis/v1alpha2"

	"github.com/margay-cni/margay/pkg/state"
)

// Decision is how policies judge one connection at its two ends (contract rows N2 and C2).
type Decision struct {
	Egress  bool // the source's policies allow it, or the source is no pod
	Ingress bool // the destination's policies allow it, or the destination is no pod
}

// Allowed reports whether both ends allow the connection.
func (d Decision) Allowed() bool {
	return d.Egress && d.Ingress
}

// Evaluate judges one connection by reading the policies as the API describes them, one after the other, for pods on any node. It shares
// nothing with the compiler, whose oracle it is in tests; it is slow. Dst and port are those after service translation.
//
// Two things are outside policy and not known to it: traffic of a pod with its own node, and of a pod with itself (contract row N10;
// what ClusterNetworkPolicies say of them is Entry.Cluster).
func Evaluate(s *state.Snapshot, src, dst netip.Addr, proto state.Protocol, port uint16) Decision {
	from, to := podAt(s, src), podAt(s, dst)
	c := connection{snapshot: s, proto: proto, port: port, destination: to}
	d := Decision{Egress: true, Ingress: true}
	if from != nil {
		d.Egress = c.allows(from, networkingv1.PolicyTypeEgress, to, dst.Unmap())
	}
	if to != nil {
		d.Ingress = c.allows(to, networkingv1.PolicyTypeIngress, from, src.Unmap())
	}
	return d
}

// podAt finds the pod that an address belongs to; the comments of owners say which one that is.
func podAt(s *state.Snapshot, a netip.Addr) *state.Pod {
	has := func(list []netip.Addr) bool {
		for _, b := range list {
			if b.Unmap().WithZone("") == a.Unmap().WithZone("") {
				return true
			}
		}
		return false
	}
	for _, n := range s.Nodes {
		if has(n.Addresses) || has(n.AllAddresses) {
			return nil
		}
	}
	var found *state.Pod
	for _, p := range s.Pods {
		if p.Finished || !has(p.IPs) {
			continue
		}
		if p.HostNetwork {
			return nil
		}
		if found == nil || found.Terminating && !p.Terminating ||
			found.Terminating == p.Terminating && p.Key.String() < found.Key.String() {
			found = p
		}
	}
	return found
}

// connection is what a rule's ports are compared with.
type connection struct {
	snapshot    *state.Snapshot
	proto       state.Protocol
	port        uint16
	destination *state.Pod
}

// allows judges one direction of the subject's policies, tier by tier (contract row C2).
func (c connection) allows(subject *state.Pod, direction networkingv1.PolicyType, peer *state.Pod, addr netip.Addr) bool {
	ingress := direction == networkingv1.PolicyTypeIngress
	if c.unclear(subject, ingress) {
		return false
	}
	switch c.tierVerdict(policyv1alpha2.AdminTier, subject, ingress, peer, addr) {
	case policyv1alpha2.ClusterNetworkPolicyRuleActionAccept:
		return true
	case policyv1alpha2.ClusterNetworkPolicyRuleActionDeny:
		return false
	}
	if isolated, allowed := c.networkPolicies(subject, direction, peer, addr); isolated {
		return allowed
	}
	return c.tierVerdict(policyv1alpha2.BaselineTier, subject, ingress, peer, addr) != policyv1alpha2.ClusterNetworkPolicyRuleActionDeny
}

// networkPolicies judges by NetworkPolicies, if they isolate the subject.
func (c connection) networkPolicies(subject *state.Pod, direction networkingv1.PolicyType, peer *state.Pod, addr netip.Addr) (isolated, allowed bool) {
	for _, np := range c.snapshot.NetworkPolicies {
		if np.Namespace != subject.Namespace || !hasType(&np.Spec, direction) {
			continue
		}
		selector, err := metav1.LabelSelectorAsSelector(&np.Spec.PodSelector)
		if err != nil {
			isolated = true
			continue
		}
		if !selector.Matches(labels.Set(subject.Labels)) {
			continue
		}
		isolated = true
		if direction == networkingv1.PolicyTypeIngress {
			for _, r := range np.Spec.Ingress {
				if c.portsMatch(r.Ports) && c.peersMatch(np.Namespace, r.From, peer, addr) {
					return true, true
				}
			}
			continue
		}
		for _, r := range np.Spec.Egress {
			if c.portsMatch(r.Ports) && c.peersMatch(np.Namespace, r.To, peer, addr) {
				return true, true
			}
		}
	}
	return isolated, false
}

func hasType(spec *networkingv1.NetworkPolicySpec, want networkingv1.PolicyType) bool {
	for _, t := range spec.PolicyTypes {
		if t == want {
			return true
		}
	}
	if len(spec.PolicyTypes) > 0 {
		return false
	}
	return want == networkingv1.PolicyTypeIngress || len(spec.Egress) > 0
}

func (c connection) portsMatch(ports []networkingv1.NetworkPolicyPort) bool {
	for _, p := range ports {
		if c.portMatches(p) {
			return true
		}
	}
	return len(ports) == 0
}

func (c connection) portMatches(p networkingv1.NetworkPolicyPort) bool {
	want := corev1.ProtocolTCP
	if p.Protocol != nil {
		want = *p.Protocol
	}
	if string(want) != c.proto.String() {
		return false
	}
	if p.Port == nil {
		return p.EndPort == nil
	}
	if p.Port.Type == intstr.String {
		if c.destination == nil || p.Port.StrVal == "" || p.EndPort != nil {
			return false
		}
		for _, declared := range c.destination.Ports {
			if declared.Name == p.Port.StrVal && declared.Protocol == c.proto && declared.Port == c.port && c.port != 0 {
				return true
			}
		}
		return false
	}
	end := p.Port.IntVal
	if p.EndPort != nil {
		end = *p.EndPort
	}
	return p.Port.IntVal >= 1 && end <= 65535 && int32(c.port) >= p.Port.IntVal && int32(c.port) <= end
}

func (c connection) peersMatch(namespace string, peers []networkingv1.NetworkPolicyPeer, pod *state.Pod, addr netip.Addr) bool {
	for _, p := range peers {
		if p.IPBlock != nil {
			if p.PodSelector == nil && p.NamespaceSelector == nil && inBlock(p.IPBlock, addr) {
				return true
			}
			continue
		}
		if pod != nil && c.podMatches(namespace, p, pod) {
			return true
		}
	}
	return len(peers) == 0
}

func (c connection) podMatches(namespace string, p networkingv1.NetworkPolicyPeer, pod *state.Pod) bool {
	if p.NamespaceSelector == nil && p.PodSelector == nil {
		return false
	}
	if p.NamespaceSelector == nil && pod.Namespace != namespace {
		return false
	}
	if p.NamespaceSelector != nil {
		selector, err := metav1.LabelSelectorAsSelector(p.NamespaceSelector)
		if err != nil {
			return false
		}
		if ns, known := c.snapshot.Namespaces[pod.Namespace]; known {
			if !selector.Matches(labels.Set(ns.Labels)) {
				return false
			}
		} else if !selector.Empty() {
			return false
		}
	}
	if p.PodSelector == nil {
		return true
	}
	selector, err := metav1.LabelSelectorAsSelector(p.PodSelector)
	return err == nil && selector.Matches(labels.Set(pod.Labels))
}

// inBlock reports whether the address is in the block and in none of its exceptions.
func inBlock(b *networkingv1.IPBlock, addr netip.Addr) bool {
	holds := func(cidr string) (bool, error) {
		p, err := netip.ParsePrefix(cidr)
		if err != nil {
			return false, err
		}
		if p.Addr().Is4In6() && p.Bits() >= 96 {
			p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
		}
		return p.Contains(addr), nil
	}
	for _, e := range b.Except {
		if in, err := holds(e); in || err != nil {
			return false
		}
	}
	in, err := holds(b.CIDR)
	return in && err == nil
}
