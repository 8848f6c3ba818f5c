// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/margay-cni/margay/pkg/state"
)

// object is a policy in the form that compilations use. It depends on nothing but the policy itself, so it is made once for each
// object that a source publishes.
//
// Whatever cannot be understood narrows what is allowed, never widens it: a peer or port matches nothing, and a NetworkPolicy whose subject
// is unclear isolates its whole namespace and allows nothing. For ClusterNetworkPolicies see parseCluster.
type object struct {
	key    state.Key
	source any    // *state.NetworkPolicy or *state.ClusterNetworkPolicy
	serial uint64 // its own, from 1

	tier     tier
	subject  labels.Selector // nil: every pod of the namespace
	isolates [2]bool
	rules    [2][]*rule
	// isolation is the rule that denies what none of rules allows, and its name.
	isolation     [2]Rule
	isolationName [2]string
	err           error

	cluster // only of a ClusterNetworkPolicy
}

// rule is one ingress or egress rule. Its ports and peers are sets: what they hold is joined by "or".
type rule struct {
	ref      Rule
	name     string // of ref
	action   action // accept in a NetworkPolicy
	anyPeer  bool
	peers    []*peer
	peersKey string // equal keys match equal peers
	ports    []portPrefix
	named    []namedPort
	said     statement // for subjects that resolve no port
}

// peer is one entry of from or to: block and except, or pods in namespaces, or nodes.
type peer struct {
	key        string
	nodes      labels.Selector // nil: no nodes
	block      netip.Prefix    // zero value: not an ipBlock
	except     []netip.Prefix
	namespace  string          // where namespaces is nil
	namespaces labels.Selector // nil: the policy's own namespace
	pods       labels.Selector
}

func parseObject(p *state.NetworkPolicy) *object {
	o := &object{key: p.Key, tier: networkTier}
	for d := range o.isolation {
		o.isolation[d] = Rule{Kind: kindNetworkPolicy, Object: o.key, Direction: Direction(d), Index: Isolation}
		o.isolationName[d] = o.isolation[d].String()
	}
	var faults []error
	subject, err := metav1.LabelSelectorAsSelector(&p.Spec.PodSelector)
	if err != nil {
		faults = append(faults, fmt.Errorf("podSelector: %w", err))
	} else {
		o.subject = subject
	}
	o.isolates[Ingress], o.isolates[Egress] = isolates(&p.Spec)
	for i, r := range p.Spec.Ingress {
		faults = append(faults, o.add(Ingress, i, r.From, r.Ports))
	}
	for i, r := range p.Spec.Egress {
		faults = append(faults, o.add(Egress, i, r.To, r.Ports))
	}
	if subject == nil {
		o.rules = [2][]*rule{}
	}
	if err := errors.Join(faults...); err != nil {
		o.err = fmt.Errorf("NetworkPolicy %s: %w", p.Key, err)
	}
	return o
}

// isolates returns the directions in which the policy isolates (contract row N1).
func isolates(spec *networkingv1.NetworkPolicySpec) (ingress, egress bool) {
	if len(spec.PolicyTypes) == 0 {
		return true, len(spec.Egress) > 0
	}
	return slices.Contains(spec.PolicyTypes, networkingv1.PolicyTypeIngress),
		slices.Contains(spec.PolicyTypes, networkingv1.PolicyTypeEgress)
}

// add parses one rule. Its error names the parts that match nothing.
func (o *object) add(d Direction, index int, peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort) error {
	r := &rule{ref: Rule{Kind: kindNetworkPolicy, Object: o.key, Direction: d, Index: index}}
	r.name = r.ref.String()
	var faults []error
	if len(ports) == 0 {
		r.ports = []portPrefix{{}}
	}
	for i, p := range ports {
		if err := r.addPort(p); err != nil {
			faults = append(faults, fmt.Errorf("%s[%d].ports[%d]: %w", d, index, i, err))
		}
	}
	r.anyPeer = len(peers) == 0
	for i, p := range peers {
		parsed, err := parsePeer(o.key.Namespace, p)
		if err != nil {
			faults = append(faults, fmt.Errorf("%s[%d].peers[%d]: %w", d, index, i, err))
			continue
		}
		r.peers = append(r.peers, parsed)
	}
	r.seal()
	o.rules[d] = append(o.rules[d], r)
	return errors.Join(faults...)
}

// seal works out what follows from peers and ports.
func (r *rule) seal() {
	keys := make([]string, 0, len(r.peers))
	for _, p := range r.peers {
		keys = append(keys, p.key)
	}
	slices.Sort(keys)
	r.peersKey = strings.Join(slices.Compact(keys), " | ")
	if r.anyPeer {
		r.peersKey = "any"
	}
	r.said = r.statement(r.ports, r.named)
}

// addPort parses one entry of ports (contract row N7).
func (r *rule) addPort(p networkingv1.NetworkPolicyPort) error {
	protocol := state.TCP
	if p.Protocol != nil {
		switch *p.Protocol {
		case corev1.ProtocolTCP:
		case corev1.ProtocolUDP:
			protocol = state.UDP
		case corev1.ProtocolSCTP:
			protocol = state.SCTP
		default:
			return fmt.Errorf("protocol %q is unknown", *p.Protocol)
		}
	}
	switch {
	case p.Port == nil && p.EndPort != nil:
		return errors.New("endPort without port")
	case p.Port == nil:
		r.ports = append(r.ports, portPrefix{protocol: protocol, bits: protocolBits})
		return nil
	case p.Port.Type == intstr.String && p.EndPort != nil:
		return fmt.Errorf("endPort with port name %q", p.Port.StrVal)
	case p.Port.Type == intstr.String && p.Port.StrVal == "":
		return errors.New("port name is empty")
	case p.Port.Type == intstr.String:
		r.named = append(r.named, namedPort{name: p.Port.StrVal, protocol: protocol})
		return nil
	}
	low := p.Port.IntVal
	high := low
	if p.EndPort != nil {
		high = *p.EndPort
	}
	if low < 1 || high > 65535 || high < low {
		return fmt.Errorf("ports %d to %d are no range inside 1 to 65535", low, high)
	}
	r.ports = append(r.ports, rangePrefixes(protocol, uint16(low), uint16(high))...)
	return nil
}

// parsePeer parses one entry of from or to (contract rows N5 and N6).
func parsePeer(namespace string, p networkingv1.NetworkPolicyPeer) (*peer, error) {
	if p.IPBlock != nil {
		if p.PodSelector != nil || p.NamespaceSelector != nil {
			return nil, errors.New("ipBlock together with a selector")
		}
		return parseBlock(p.IPBlock)
	}
	if p.PodSelector == nil && p.NamespaceSelector == nil {
		return nil, errors.New("neither ipBlock nor a selector that Margay knows")
	}
	out := &peer{namespace: namespace, pods: labels.Everything()}
	var err error
	if p.PodSelector != nil {
		if out.pods, err = metav1.LabelSelectorAsSelector(p.PodSelector); err != nil {
			return nil, fmt.Errorf("podSelector: %w", err)
		}
	}
	out.key = fmt.Sprintf("pods %s in namespace %q", selectorKey(out.pods), namespace)
	if p.NamespaceSelector != nil {
		if out.namespaces, err = metav1.LabelSelectorAsSelector(p.NamespaceSelector); err != nil {
			return nil, fmt.Errorf("namespaceSelector: %w", err)
		}
		out.key = fmt.Sprintf("pods %s in namespaces %s", selectorKey(out.pods), selectorKey(out.namespaces))
	}
	return out, nil
}

func parseBlock(b *networkingv1.IPBlock) (*peer, error) {
	block, err := parsePrefix(b.CIDR)
	if err != nil {
		return nil, fmt.Errorf("ipBlock.cidr: %w", err)
	}
	out := &peer{block: block}
	for _, e := range b.Except {
		except, err := parsePrefix(e)
		if err != nil {
			return nil, fmt.Errorf("ipBlock.except: %w", err)
		}
		out.except = append(out.except, except)
	}
	slices.SortFunc(out.except, netip.Prefix.Compare)
	out.except = slices.Compact(out.except)
	out.key = "ipBlock " + block.String()
	if len(out.except) > 0 {
		out.key += " except " + joinStrings(out.except)
	}
	return out, nil
}

// parsePrefix parses a CIDR. Host bits are ignored, as the API server does, and IPv4-mapped prefixes are the IPv4 prefixes they stand for.
func parsePrefix(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return p, err
	}
	if p.Addr().Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked(), nil
}

// selectorKey is a canonical form: selectors with equal keys select alike.
func selectorKey(s labels.Selector) string {
	requirements, selectable := s.Requirements()
	if !selectable {
		return "{nothing}"
	}
	list := make([]string, 0, len(requirements))
	for _, r := range requirements {
		list = append(list, r.String())
	}
	slices.Sort(list)
	return "{" + strings.Join(slices.Compact(list), ",") + "}"
}
