// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

func checkNetworkPolicy(c *checker, p *networkingv1.NetworkPolicy) {
	spec := field.NewPath("spec")
	c.selector(spec.Child("podSelector"), &p.Spec.PodSelector)
	for i, t := range p.Spec.PolicyTypes {
		oneOf(c, spec.Child("policyTypes").Index(i), t, networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress)
	}
	for i, r := range p.Spec.Ingress {
		at := spec.Child("ingress").Index(i)
		checkPolicyPorts(c, at.Child("ports"), r.Ports)
		checkPeers(c, at.Child("from"), r.From)
	}
	for i, r := range p.Spec.Egress {
		at := spec.Child("egress").Index(i)
		checkPolicyPorts(c, at.Child("ports"), r.Ports)
		checkPeers(c, at.Child("to"), r.To)
	}
}

func checkPolicyPorts(c *checker, list *field.Path, ports []networkingv1.NetworkPolicyPort) {
	for i, p := range ports {
		at := list.Index(i)
		if p.Protocol != nil {
			c.protocol(at.Child("protocol"), *p.Protocol)
		}
		if p.Port != nil {
			c.portOrName(at.Child("port"), *p.Port)
		}
		if p.EndPort == nil {
			continue
		}
		switch end := at.Child("endPort"); {
		case p.Port == nil || p.Port.Type != intstr.Int:
			c.errorf(end, "%d needs a port that is a number", *p.EndPort)
		case *p.EndPort < p.Port.IntVal || *p.EndPort > 65535:
			c.errorf(end, "%d is outside %d to 65535", *p.EndPort, p.Port.IntVal)
		}
	}
}

func checkPeers(c *checker, list *field.Path, peers []networkingv1.NetworkPolicyPeer) {
	for i, p := range peers {
		at := list.Index(i)
		switch {
		case p.IPBlock == nil && p.PodSelector == nil && p.NamespaceSelector == nil:
			c.errorf(at, "is empty: a peer needs podSelector, namespaceSelector or ipBlock")
		case p.IPBlock != nil && (p.PodSelector != nil || p.NamespaceSelector != nil):
			c.errorf(at.Child("ipBlock"), "cannot be combined with a selector")
		case p.IPBlock != nil:
			checkIPBlock(c, at.Child("ipBlock"), p.IPBlock)
		default:
			c.selector(at.Child("podSelector"), p.PodSelector)
			c.selector(at.Child("namespaceSelector"), p.NamespaceSelector)
		}
	}
}

func checkIPBlock(c *checker, at *field.Path, b *networkingv1.IPBlock) {
	block, ok := c.prefix(at.Child("cidr"), b.CIDR)
	for i, s := range b.Except {
		except, valid := c.prefix(at.Child("except").Index(i), s)
		if ok && valid && (except.Bits() <= block.Bits() || !block.Contains(except.Addr())) {
			c.errorf(at.Child("except").Index(i), "%s is not inside %s", except, block)
		}
	}
}
