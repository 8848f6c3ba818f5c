// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"net/netip"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"
	policyv1alpha2 "sigs.k8s.io/network-policy-api/apis/v1alpha2"
)

// most is how many rules, peers, protocols, networks and names the API takes in one list (contract row C1).
const most = 25

// failsClosed is said of fields that the API's version does not know: they are not simply ignored (contract row C5).
const failsClosed = "unknown field: what it belongs to fails closed"

// checkClusterNetworkPolicy checks what the experimental CRD does (contract rows C1, C4, C6). Where a field is unknown, that nothing else is
// there is no error: the rule fails closed, and the rest of the file counts.
func checkClusterNetworkPolicy(c *checker, p *policyv1alpha2.ClusterNetworkPolicy) {
	for i := range c.faults {
		if strings.HasPrefix(c.faults[i].path, "spec") {
			c.faults[i].message = failsClosed
		}
	}
	spec := field.NewPath("spec")
	oneOf(c, spec.Child("tier"), p.Spec.Tier, policyv1alpha2.AdminTier, policyv1alpha2.BaselineTier)
	if p.Spec.Priority < 0 || p.Spec.Priority > 1000 {
		c.errorf(spec.Child("priority"), "%d is outside 0 to 1000", p.Spec.Priority)
	}
	subject := spec.Child("subject")
	c.exactlyOne(subject, "namespaces or pods", p.Spec.Subject.Namespaces != nil, p.Spec.Subject.Pods != nil)
	c.clusterSelectors(subject, p.Spec.Subject.Namespaces, p.Spec.Subject.Pods)
	c.atMost(spec.Child("ingress"), len(p.Spec.Ingress))
	c.atMost(spec.Child("egress"), len(p.Spec.Egress))
	for i, r := range p.Spec.Ingress {
		at := spec.Child("ingress").Index(i)
		c.clusterRule(at, r.Name, r.Action, r.Protocols)
		c.between(at.Child("from"), len(r.From))
		for j, peer := range r.From {
			from := at.Child("from").Index(j)
			c.exactlyOne(from, "namespaces or pods", peer.Namespaces != nil, peer.Pods != nil)
			c.clusterSelectors(from, peer.Namespaces, peer.Pods)
		}
	}
	for i, r := range p.Spec.Egress {
		at := spec.Child("egress").Index(i)
		c.clusterRule(at, r.Name, r.Action, r.Protocols)
		c.between(at.Child("to"), len(r.To))
		for j := range r.To {
			c.egressPeer(at.Child("to").Index(j), &r.To[j], r.Protocols)
		}
	}
}

func (c *checker) clusterRule(at *field.Path, name string, action policyv1alpha2.ClusterNetworkPolicyRuleAction, protocols []policyv1alpha2.ClusterNetworkPolicyProtocol) {
	oneOf(c, at.Child("action"), action, policyv1alpha2.ClusterNetworkPolicyRuleActionAccept,
		policyv1alpha2.ClusterNetworkPolicyRuleActionDeny, policyv1alpha2.ClusterNetworkPolicyRuleActionPass)
	if len(name) > 100 {
		c.errorf(at.Child("name"), "has %d bytes, want at most 100", len(name))
	}
	if protocols != nil {
		c.between(at.Child("protocols"), len(protocols))
	}
	for i, p := range protocols {
		at := at.Child("protocols").Index(i)
		c.exactlyOne(at, "tcp, udp, sctp or destinationNamedPort", p.TCP != nil, p.UDP != nil, p.SCTP != nil, p.DestinationNamedPort != "")
		if p.TCP != nil {
			c.destination(at.Child("tcp"), p.TCP.DestinationPort)
		}
		if p.UDP != nil {
			c.destination(at.Child("udp"), p.UDP.DestinationPort)
		}
		if p.SCTP != nil {
			c.destination(at.Child("sctp"), p.SCTP.DestinationPort)
		}
		if p.DestinationNamedPort != "" {
			c.texts(at.Child("destinationNamedPort"), p.DestinationNamedPort, validation.IsValidPortName(p.DestinationNamedPort))
		}
	}
}

func (c *checker) destination(at *field.Path, p *policyv1alpha2.Port) {
	c.exactlyOne(at, "destinationPort", p != nil)
	if p == nil {
		return
	}
	at = at.Child("destinationPort")
	c.exactlyOne(at, "number or range", p.Number != 0, p.Range != nil)
	if p.Number != 0 {
		c.port(at.Child("number"), p.Number)
	}
	if r := p.Range; r != nil {
		c.port(at.Child("range", "start"), r.Start)
		c.port(at.Child("range", "end"), r.End)
		if r.Start >= r.End {
			c.errorf(at.Child("range"), "start %d is not less than end %d", r.Start, r.End)
		}
	}
}

func (c *checker) egressPeer(at *field.Path, p *policyv1alpha2.ClusterNetworkPolicyEgressPeer, protocols []policyv1alpha2.ClusterNetworkPolicyProtocol) {
	c.exactlyOne(at, "namespaces, pods, nodes, networks or domainNames",
		p.Namespaces != nil, p.Pods != nil, p.Nodes != nil, p.Networks != nil, p.DomainNames != nil)
	c.clusterSelectors(at, p.Namespaces, p.Pods)
	if p.Nodes != nil {
		c.selector(at.Child("nodes"), p.Nodes)
	}
	if p.Networks != nil {
		c.between(at.Child("networks"), len(p.Networks))
	}
	for i, n := range p.Networks {
		c.network(at.Child("networks").Index(i), string(n))
	}
	if p.DomainNames != nil {
		c.between(at.Child("domainNames"), len(p.DomainNames))
		c.warnf(at.Child("domainNames"), "are not supported: an Accept rule with them matches nothing, any other denies everything")
	}
	if p.Nodes == nil && p.Networks == nil && p.DomainNames == nil {
		return
	}
	for _, protocol := range protocols {
		if protocol.DestinationNamedPort != "" {
			c.errorf(at, "nodes, networks and domainNames cannot be combined with destinationNamedPort: only pods name their ports")
			return
		}
	}
}

// network checks a CIDR as the CRD does: host bits are an error there.
func (c *checker) network(at *field.Path, s string) {
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil:
		c.errorf(at, "%q is no CIDR", s)
	case p.Addr().Is4In6():
		c.errorf(at, "%q is an IPv4-mapped CIDR: write it as IPv4", s)
	case p != p.Masked():
		c.errorf(at, "%s has bits beyond its length: write %s", p, p.Masked())
	}
}

func (c *checker) clusterSelectors(at *field.Path, namespaces *metav1.LabelSelector, pods *policyv1alpha2.NamespacedPod) {
	if namespaces != nil {
		c.selector(at.Child("namespaces"), namespaces)
	}
	if pods != nil {
		c.selector(at.Child("pods", "namespaceSelector"), &pods.NamespaceSelector)
		c.selector(at.Child("pods", "podSelector"), &pods.PodSelector)
	}
}

// exactlyOne requires one of several fields, unless one that is not known stands there.
func (c *checker) exactlyOne(at *field.Path, names string, set ...bool) {
	n := 0
	for _, is := range set {
		if is {
			n++
		}
	}
	for _, f := range c.faults {
		if n == 0 && f.message == failsClosed && strings.HasPrefix(f.path, at.String()+".") {
			return
		}
	}
	switch {
	case n == 0:
		c.errorf(at, "is empty: want %s", names)
	case n > 1:
		c.errorf(at, "has more than one of %s", names)
	}
}

func (c *checker) atMost(at *field.Path, n int) {
	if n > most {
		c.errorf(at, "has %d items, want at most %d", n, most)
	}
}

func (c *checker) between(at *field.Path, n int) {
	if n == 0 {
		c.errorf(at, "is empty: want 1 to %d items", most)
	}
	c.atMost(at, n)
}
