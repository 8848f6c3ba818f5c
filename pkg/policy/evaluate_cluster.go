// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	policyv1alpha2 "sigs.k8s.io/network-policy-api/apis/v1alpha2"

	"github.com/margay-cni/margay/pkg/state"
)

// tierVerdict asks the ClusterNetworkPolicies of one tier. It returns their last word: Accept, Deny, or Pass also where no rule matches.
func (c connection) tierVerdict(tier policyv1alpha2.Tier, subject *state.Pod, ingress bool, peer *state.Pod, addr netip.Addr) policyv1alpha2.ClusterNetworkPolicyRuleAction {
	var list []*state.ClusterNetworkPolicy
	for _, p := range c.snapshot.ClusterNetworkPolicies {
		if p.Tier == tier && c.isSubject(p, subject) {
			list = append(list, p)
		}
	}
	slices.SortFunc(list, func(a, b *state.ClusterNetworkPolicy) int {
		return cmp.Or(cmp.Compare(a.Priority, b.Priority), strings.Compare(a.Name, b.Name))
	})
	for _, p := range list {
		for _, r := range rulesOf(p, ingress) {
			if !understood(r) || len(p.Unknown) > 0 {
				if r.Action == policyv1alpha2.ClusterNetworkPolicyRuleActionAccept {
					continue
				}
				return policyv1alpha2.ClusterNetworkPolicyRuleActionDeny
			}
			if c.clusterPeersMatch(r, peer, addr) && c.protocolsMatch(r) {
				return r.Action
			}
		}
	}
	return policyv1alpha2.ClusterNetworkPolicyRuleActionPass
}

func rulesOf(p *state.ClusterNetworkPolicy, ingress bool) []state.ClusterNetworkPolicyRule {
	if ingress {
		return p.Ingress
	}
	return p.Egress
}

// subjectSelectors returns nil for a subject that is not understood.
func subjectSelectors(p *state.ClusterNetworkPolicy) (namespaces, pods labels.Selector) {
	for _, path := range p.Unknown {
		if path == "spec" || strings.HasPrefix(path, "spec.subject") {
			return nil, nil
		}
	}
	both := policyv1alpha2.NamespacedPod{}
	switch {
	case p.Subject.Namespaces != nil && p.Subject.Pods == nil:
		both.NamespaceSelector = *p.Subject.Namespaces
	case p.Subject.Namespaces == nil && p.Subject.Pods != nil:
		both = *p.Subject.Pods
	default:
		return nil, nil
	}
	namespaces, err1 := metav1.LabelSelectorAsSelector(&both.NamespaceSelector)
	pods, err2 := metav1.LabelSelectorAsSelector(&both.PodSelector)
	if err1 != nil || err2 != nil {
		return nil, nil
	}
	return namespaces, pods
}

func (c connection) isSubject(p *state.ClusterNetworkPolicy, pod *state.Pod) bool {
	namespaces, pods := subjectSelectors(p)
	if namespaces == nil || !pods.Matches(labels.Set(pod.Labels)) {
		return false
	}
	ns, known := c.snapshot.Namespaces[pod.Namespace]
	return namespaces.Empty() || known && namespaces.Matches(labels.Set(ns.Labels))
}

// unclear reports whether it depends on the labels of a namespace that nobody knows yet whether something is denied to the pod.
func (c connection) unclear(pod *state.Pod, ingress bool) bool {
	if _, known := c.snapshot.Namespaces[pod.Namespace]; known {
		return false
	}
	for _, p := range c.snapshot.ClusterNetworkPolicies {
		namespaces, pods := subjectSelectors(p)
		if namespaces == nil || namespaces.Empty() || !pods.Matches(labels.Set(pod.Labels)) ||
			p.Tier != policyv1alpha2.AdminTier && p.Tier != policyv1alpha2.BaselineTier {
			continue
		}
		for _, r := range rulesOf(p, ingress) {
			closed := !understood(r) || len(p.Unknown) > 0
			if r.Action == policyv1alpha2.ClusterNetworkPolicyRuleActionDeny || closed && r.Action != policyv1alpha2.ClusterNetworkPolicyRuleActionAccept {
				return true
			}
		}
	}
	return false
}

// understood reports whether all of a rule means something to this version of the API.
func understood(r state.ClusterNetworkPolicyRule) bool {
	switch r.Action {
	case policyv1alpha2.ClusterNetworkPolicyRuleActionAccept, policyv1alpha2.ClusterNetworkPolicyRuleActionDeny, policyv1alpha2.ClusterNetworkPolicyRuleActionPass:
	default:
		return false
	}
	if len(r.Unknown) > 0 || len(r.Peers) == 0 || r.Protocols != nil && len(r.Protocols) == 0 {
		return false
	}
	named := false
	for _, p := range r.Protocols {
		named = named || p.DestinationNamedPort != ""
		var ports []*policyv1alpha2.Port
		if p.TCP != nil {
			ports = append(ports, p.TCP.DestinationPort)
		}
		if p.UDP != nil {
			ports = append(ports, p.UDP.DestinationPort)
		}
		if p.SCTP != nil {
			ports = append(ports, p.SCTP.DestinationPort)
		}
		if len(ports) > 1 || (len(ports) == 1) == (p.DestinationNamedPort != "") {
			return false
		}
		if len(ports) == 1 && ports[0] != nil && !sensible(*ports[0]) {
			return false
		}
	}
	for _, p := range r.Peers {
		if named && (p.Nodes != nil || len(p.Networks) > 0) {
			return false
		}
		if !sensiblePeer(p) {
			return false
		}
	}
	return true
}

func sensible(p policyv1alpha2.Port) bool {
	if p.Range == nil {
		return p.Number >= 1 && p.Number <= 65535
	}
	return p.Number == 0 && p.Range.Start >= 1 && p.Range.Start <= p.Range.End && p.Range.End <= 65535
}

func sensiblePeer(p policyv1alpha2.ClusterNetworkPolicyEgressPeer) bool {
	var selectors []*metav1.LabelSelector
	kinds := 0
	if p.Namespaces != nil {
		kinds, selectors = kinds+1, append(selectors, p.Namespaces)
	}
	if p.Nodes != nil {
		kinds, selectors = kinds+1, append(selectors, p.Nodes)
	}
	if p.Pods != nil {
		kinds, selectors = kinds+1, append(selectors, &p.Pods.NamespaceSelector, &p.Pods.PodSelector)
	}
	if len(p.Networks) > 0 {
		kinds++
	}
	for _, s := range selectors {
		if _, err := metav1.LabelSelectorAsSelector(s); err != nil {
			return false
		}
	}
	for _, n := range p.Networks {
		if _, err := netip.ParsePrefix(string(n)); err != nil {
			return false
		}
	}
	return kinds == 1 && len(p.DomainNames) == 0
}

// clusterPeersMatch and protocolsMatch are for rules that are understood.
func (c connection) clusterPeersMatch(r state.ClusterNetworkPolicyRule, pod *state.Pod, addr netip.Addr) bool {
	for _, p := range r.Peers {
		switch {
		case p.Namespaces != nil || p.Pods != nil:
			selects := policyv1alpha2.NamespacedPod{}
			if p.Pods != nil {
				selects = *p.Pods
			} else {
				selects.NamespaceSelector = *p.Namespaces
			}
			if pod != nil && c.podIsIn(selects, pod) {
				return true
			}
		case p.Nodes != nil:
			if c.nodeHas(p.Nodes, addr) {
				return true
			}
		default:
			for _, cidr := range p.Networks {
				n := netip.MustParsePrefix(string(cidr))
				if n.Addr().Is4In6() && n.Bits() >= 96 {
					n = netip.PrefixFrom(n.Addr().Unmap(), n.Bits()-96)
				}
				if n.Contains(addr) {
					return true
				}
			}
		}
	}
	return false
}

func (c connection) podIsIn(p policyv1alpha2.NamespacedPod, pod *state.Pod) bool {
	namespaces, err1 := metav1.LabelSelectorAsSelector(&p.NamespaceSelector)
	pods, err2 := metav1.LabelSelectorAsSelector(&p.PodSelector)
	if err1 != nil || err2 != nil || !pods.Matches(labels.Set(pod.Labels)) {
		return false
	}
	if ns, known := c.snapshot.Namespaces[pod.Namespace]; known {
		return namespaces.Matches(labels.Set(ns.Labels))
	}
	return namespaces.Empty()
}

func (c connection) nodeHas(nodes *metav1.LabelSelector, addr netip.Addr) bool {
	selector, err := metav1.LabelSelectorAsSelector(nodes)
	if err != nil {
		return false
	}
	for _, n := range c.snapshot.Nodes {
		if !selector.Matches(labels.Set(n.Labels)) {
			continue
		}
		for _, a := range append(slices.Clone(n.Addresses), n.AllAddresses...) {
			if a.Unmap() == addr {
				return true
			}
		}
	}
	return false
}

func (c connection) protocolsMatch(r state.ClusterNetworkPolicyRule) bool {
	for _, p := range r.Protocols {
		switch {
		case p.TCP != nil && c.proto == state.TCP && c.portIn(p.TCP.DestinationPort),
			p.UDP != nil && c.proto == state.UDP && c.portIn(p.UDP.DestinationPort),
			p.SCTP != nil && c.proto == state.SCTP && c.portIn(p.SCTP.DestinationPort):
			return true
		case p.DestinationNamedPort != "" && c.destination != nil:
			for _, declared := range c.destination.Ports {
				if declared.Name == p.DestinationNamedPort && declared.Protocol == c.proto && declared.Port == c.port && c.port != 0 {
					return true
				}
			}
		}
	}
	return r.Protocols == nil
}

func (c connection) portIn(p *policyv1alpha2.Port) bool {
	switch {
	case p == nil:
		return true
	case p.Range != nil:
		return int32(c.port) >= p.Range.Start && int32(c.port) <= p.Range.End
	}
	return int32(c.port) == p.Number
}
