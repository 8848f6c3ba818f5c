// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	policyv1alpha2 "sigs.k8s.io/network-policy-api/apis/v1alpha2"

	"github.com/margay-cni/margay/pkg/state"
)

// tier is a group of policies. They are asked in this order (contract row C2).
type tier uint8

const (
	adminTier tier = iota
	networkTier
	baselineTier
)

// action is what a rule does with what it matches (contract row C3).
type action uint8

const (
	accept action = iota
	deny
	pass
)

// cluster is what only a ClusterNetworkPolicy has.
type cluster struct {
	priority   int32
	namespaces labels.Selector // nil: selects no pod, because the subject or the tier is not understood
	denies     [2]bool         // some rule of the direction denies something
	condition  metav1.Condition
}

// Reasons of the condition Accepted.
const (
	// ConditionAccepted is the type of the only condition.
	ConditionAccepted = "margay.io/Accepted"
	// ReasonAccepted says that all of the policy is in force.
	ReasonAccepted = "Accepted"
	// ReasonInvalid says that something is there that no version of the API allows.
	ReasonInvalid = "Invalid"
	// ReasonUnknownField says that something is there that this version of the API does not know.
	ReasonUnknownField = "UnknownField"
	// ReasonDomainNames says that a rule names domainNames.
	ReasonDomainNames = "DomainNamesUnsupported"
)

// maxMessage bounds what a condition says of faults, in bytes; the API server takes 32768 in all.
const maxMessage = 2000

// unsupported is why a part of a ClusterNetworkPolicy is not understood.
type unsupported struct {
	reason  string
	message string
}

func (u *unsupported) Error() string { return u.message }

func unknownField(path string) error {
	return &unsupported{ReasonUnknownField, path + " is not known to this version"}
}

var errDomainNames = &unsupported{ReasonDomainNames, "domainNames are not supported"}

// parseCluster parses a ClusterNetworkPolicy. Its parts that are not understood fail closed (contract row C5): an Accept rule matches
// nothing, any other rule denies everything. Where the subject or the tier is not understood the policy selects no pod: it would have to
// cut off every pod of the cluster otherwise.
func parseCluster(p *state.ClusterNetworkPolicy) *object {
	o := &object{key: state.Key{Name: p.Name}, cluster: cluster{priority: p.Priority}}
	var faults []error
	for _, path := range p.Unknown {
		faults = append(faults, unknownField(path))
	}
	inert := slices.ContainsFunc(p.Unknown, func(path string) bool { return path == "spec" || strings.HasPrefix(path, "spec.subject") })
	switch p.Tier {
	case policyv1alpha2.AdminTier:
		o.tier = adminTier
	case policyv1alpha2.BaselineTier:
		o.tier = baselineTier
	default:
		faults, inert = append(faults, fmt.Errorf("tier %q is neither Admin nor Baseline", p.Tier)), true
	}
	if err := o.parseSubject(&p.Subject); err != nil {
		faults, inert = append(faults, fmt.Errorf("subject: %w", err)), true
	}
	for d, rules := range [2][]state.ClusterNetworkPolicyRule{Egress: p.Egress, Ingress: p.Ingress} {
		for i := range rules {
			faults = append(faults, o.addCluster(Direction(d), i, &rules[i], len(p.Unknown) > 0))
		}
	}
	if inert {
		o.namespaces = nil
	}
	o.err = errors.Join(faults...)
	o.condition = conditionOf(p, o.err)
	if o.err != nil {
		o.err = fmt.Errorf("ClusterNetworkPolicy %s: %w", p.Name, o.err)
	}
	return o
}

func (o *object) parseSubject(s *policyv1alpha2.ClusterNetworkPolicySubject) (err error) {
	switch {
	case (s.Namespaces == nil) == (s.Pods == nil):
		return errors.New("not exactly one of namespaces and pods")
	case s.Namespaces != nil:
		o.subject = labels.Everything()
		o.namespaces, err = metav1.LabelSelectorAsSelector(s.Namespaces)
		return err
	}
	if o.subject, err = metav1.LabelSelectorAsSelector(&s.Pods.PodSelector); err != nil {
		return err
	}
	o.namespaces, err = metav1.LabelSelectorAsSelector(&s.Pods.NamespaceSelector)
	return err
}

// addCluster parses one rule. Its error says why the rule fails closed.
func (o *object) addCluster(d Direction, index int, p *state.ClusterNetworkPolicyRule, unclear bool) error {
	r := &rule{ref: Rule{Kind: kindClusterNetworkPolicy, Object: o.key, Direction: d, Index: index, Name: p.Name}}
	r.name = r.ref.String()
	err := r.parseCluster(p)
	if err != nil || unclear {
		r.peers, r.ports, r.named = nil, nil, nil
		if r.action != accept {
			r.action, r.anyPeer, r.ports = deny, true, []portPrefix{{}}
		}
	}
	r.seal()
	o.rules[d] = append(o.rules[d], r)
	o.denies[d] = o.denies[d] || r.action == deny
	if err != nil {
		return fmt.Errorf("%s[%d]: %w", d, index, err)
	}
	return nil
}

func (r *rule) parseCluster(p *state.ClusterNetworkPolicyRule) error {
	var faults []error
	for _, path := range p.Unknown {
		faults = append(faults, unknownField(path))
	}
	switch p.Action {
	case policyv1alpha2.ClusterNetworkPolicyRuleActionAccept:
		r.action = accept
	case policyv1alpha2.ClusterNetworkPolicyRuleActionPass:
		r.action = pass
	case policyv1alpha2.ClusterNetworkPolicyRuleActionDeny:
		r.action = deny
	default:
		r.action = deny
		faults = append(faults, fmt.Errorf("action %q is none of Accept, Deny, Pass", p.Action))
	}
	if len(p.Peers) == 0 {
		faults = append(faults, errors.New("no peers"))
	}
	pods := true
	for i := range p.Peers {
		peers, err := parseClusterPeer(&p.Peers[i])
		if err != nil {
			faults = append(faults, fmt.Errorf("peers[%d]: %w", i, err))
		}
		r.peers = append(r.peers, peers...)
		pods = pods && (p.Peers[i].Namespaces != nil || p.Peers[i].Pods != nil)
	}
	if p.Protocols == nil {
		r.ports = []portPrefix{{}}
	} else if len(p.Protocols) == 0 {
		faults = append(faults, errors.New("no protocols"))
	}
	for i := range p.Protocols {
		if err := r.addProtocol(&p.Protocols[i]); err != nil {
			faults = append(faults, fmt.Errorf("protocols[%d]: %w", i, err))
		}
	}
	if len(r.named) > 0 && !pods {
		faults = append(faults, errors.New("destinationNamedPort with peers that are no pods"))
	}
	return errors.Join(faults...)
}

// parseClusterPeer parses one entry of from or to (contract row C4). Networks are several peers.
func parseClusterPeer(p *policyv1alpha2.ClusterNetworkPolicyEgressPeer) ([]*peer, error) {
	set := 0
	for _, is := range []bool{p.Namespaces != nil, p.Pods != nil, p.Nodes != nil, len(p.Networks) > 0, len(p.DomainNames) > 0} {
		if is {
			set++
		}
	}
	switch {
	case set == 0:
		return nil, &unsupported{ReasonUnknownField, "no field that this version knows"}
	case set > 1:
		return nil, errors.New("more than one kind of peer")
	case len(p.DomainNames) > 0:
		return nil, errDomainNames
	case p.Nodes != nil:
		nodes, err := metav1.LabelSelectorAsSelector(p.Nodes)
		if err != nil {
			return nil, err
		}
		return []*peer{{key: "nodes " + selectorKey(nodes), nodes: nodes}}, nil
	case p.Namespaces != nil:
		return podsPeer(p.Namespaces, &metav1.LabelSelector{})
	case p.Pods != nil:
		return podsPeer(&p.Pods.NamespaceSelector, &p.Pods.PodSelector)
	}
	var out []*peer
	for _, cidr := range p.Networks {
		block, err := parsePrefix(string(cidr))
		if err != nil {
			return nil, fmt.Errorf("networks: %w", err)
		}
		out = append(out, &peer{key: "ipBlock " + block.String(), block: block})
	}
	return out, nil
}

func podsPeer(inNamespaces, pods *metav1.LabelSelector) ([]*peer, error) {
	out := &peer{}
	var err1, err2 error
	out.namespaces, err1 = metav1.LabelSelectorAsSelector(inNamespaces)
	out.pods, err2 = metav1.LabelSelectorAsSelector(pods)
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	out.key = fmt.Sprintf("pods %s in namespaces %s", selectorKey(out.pods), selectorKey(out.namespaces))
	return []*peer{out}, nil
}

// addProtocol parses one entry of protocols (contract row C6).
func (r *rule) addProtocol(p *policyv1alpha2.ClusterNetworkPolicyProtocol) error {
	set := 0
	var protocol state.Protocol
	var port *policyv1alpha2.Port
	if p.TCP != nil {
		set, protocol, port = set+1, state.TCP, p.TCP.DestinationPort
	}
	if p.UDP != nil {
		set, protocol, port = set+1, state.UDP, p.UDP.DestinationPort
	}
	if p.SCTP != nil {
		set, protocol, port = set+1, state.SCTP, p.SCTP.DestinationPort
	}
	if p.DestinationNamedPort != "" {
		set++
	}
	switch {
	case set == 0:
		return &unsupported{ReasonUnknownField, "no field that this version knows"}
	case set > 1:
		return errors.New("more than one kind of protocol")
	case p.DestinationNamedPort != "":
		r.named = append(r.named, namedPort{name: p.DestinationNamedPort})
		return nil
	case port == nil: // the object's raw form had nothing else either
		r.ports = append(r.ports, portPrefix{protocol: protocol, bits: protocolBits})
		return nil
	case port.Number == 0 && port.Range == nil:
		return &unsupported{ReasonUnknownField, "destinationPort has no field that this version knows"}
	case port.Number != 0 && port.Range != nil:
		return errors.New("destinationPort has both number and range")
	}
	low, high := port.Number, port.Number
	if port.Range != nil {
		low, high = port.Range.Start, port.Range.End
	}
	if low < 1 || high > 65535 || high < low {
		return fmt.Errorf("ports %d to %d are no range inside 1 to 65535", low, high)
	}
	r.ports = append(r.ports, rangePrefixes(protocol, uint16(low), uint16(high))...)
	return nil
}

// conditionOf says what the policy's status should (contract row C9).
func conditionOf(p *state.ClusterNetworkPolicy, err error) metav1.Condition {
	c := metav1.Condition{
		Type: ConditionAccepted, Status: metav1.ConditionTrue, ObservedGeneration: p.Generation,
		Reason: ReasonAccepted, Message: "every rule is in force",
	}
	if err == nil {
		return c
	}
	c.Status, c.Reason, c.Message = metav1.ConditionFalse, ReasonInvalid, strings.ReplaceAll(err.Error(), "\n", "; ")
	var why *unsupported
	if errors.As(err, &why) {
		c.Reason = why.reason
	}
	if len(c.Message) > maxMessage {
		c.Message = strings.ToValidUTF8(c.Message[:maxMessage], "") + " …"
	}
	c.Message += ". An Accept rule that is not understood matches nothing, any other denies everything; without subject or tier no pod is selected"
	return c
}

// compareObjects orders policies as they are asked: by tier and priority, and where the API leaves it open by name.
func compareObjects(a, b *object) int {
	return cmp.Or(cmp.Compare(a.tier, b.tier), cmp.Compare(a.priority, b.priority), compareKeys(a.key, b.key))
}
