// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	metavalidation "k8s.io/apimachinery/pkg/apis/meta/v1/validation"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/margay-cni/margay/pkg/state"
)

// checker collects what is wrong with one object. There is no API server to have refused it, so what the compilers
// take for granted is checked here.
type checker struct {
	faults []fault
}

func (c *checker) errorf(at *field.Path, format string, args ...any) {
	c.faults = append(c.faults, fault{path: at.String(), message: fmt.Sprintf(format, args...), severity: Error})
}

func (c *checker) warnf(at *field.Path, format string, args ...any) {
	c.faults = append(c.faults, fault{path: at.String(), message: fmt.Sprintf(format, args...), severity: Warning})
}

// library takes over what a validation function of the API's own library found.
func (c *checker) library(errs field.ErrorList) {
	for _, e := range errs {
		c.faults = append(c.faults, fault{path: e.Field, message: e.ErrorBody(), severity: Error})
	}
}

func (c *checker) texts(at *field.Path, value string, messages []string) {
	for _, m := range messages {
		c.errorf(at, "%q: %s", value, m)
	}
}

func (c *checker) port(at *field.Path, port int32) {
	switch {
	case port == 0:
		c.errorf(at, "is missing or 0, want 1 to 65535")
	case port < 0 || port > 65535:
		c.errorf(at, "%d is outside 1 to 65535", port)
	}
}

func (c *checker) protocol(at *field.Path, p corev1.Protocol) {
	if _, ok := state.ParseProtocol(p); !ok {
		c.errorf(at, "%q is not one of TCP, UDP, SCTP", p)
	}
}

// portOrName checks a number, or the name of a container's port.
func (c *checker) portOrName(at *field.Path, p intstr.IntOrString) {
	if p.Type == intstr.Int {
		c.port(at, p.IntVal)
		return
	}
	c.texts(at, p.StrVal, validation.IsValidPortName(p.StrVal))
}

func (c *checker) addr(at *field.Path, s string) (netip.Addr, bool) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		c.errorf(at, "%q is no IP address", s)
		return a, false
	}
	return a.Unmap(), true
}

// routable checks an address that packets of others will be sent to.
func (c *checker) routable(at *field.Path, s string) (netip.Addr, bool) {
	a, ok := c.addr(at, s)
	if ok && (a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast()) {
		c.errorf(at, "%s is unspecified, loopback, link-local or multicast", a)
		return a, false
	}
	return a, ok
}

func (c *checker) prefix(at *field.Path, s string) (netip.Prefix, bool) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		c.errorf(at, "%q is no CIDR", s)
		return p, false
	}
	if p.Addr().Is4In6() {
		c.errorf(at, "%q is an IPv4-mapped CIDR: write it as IPv4", s)
		return p, false
	}
	if p != p.Masked() {
		c.warnf(at, "%s has bits beyond its length: read as %s", p, p.Masked())
	}
	return p.Masked(), true
}

func (c *checker) selector(at *field.Path, s *metav1.LabelSelector) {
	if _, err := metav1.LabelSelectorAsSelector(s); err != nil {
		c.errorf(at, "%v", err)
	}
}

func oneOf[T ~string](c *checker, at *field.Path, value T, allowed ...T) {
	if !slices.Contains(allowed, value) {
		c.errorf(at, "%q is not one of %v", value, allowed)
	}
}

// meta checks what all objects have.
func (c *checker) meta(m metav1.Object, namespaced bool) {
	at := field.NewPath("metadata")
	switch name := m.GetName(); {
	case name == "" && m.GetGenerateName() != "":
		c.errorf(at.Child("name"), "is missing: nobody makes one from generateName here")
	case name == "":
		c.errorf(at.Child("name"), "is missing")
	default:
		c.texts(at.Child("name"), name, validation.IsDNS1123Subdomain(name))
	}
	switch ns := m.GetNamespace(); {
	case ns != "" && !namespaced:
		c.warnf(at.Child("namespace"), "is ignored: objects of this kind are in no namespace")
	case ns != "":
		c.texts(at.Child("namespace"), ns, validation.IsDNS1123Label(ns))
	}
	c.library(metavalidation.ValidateLabels(m.GetLabels(), at.Child("labels")))
}

func checkNamespace(c *checker, n *corev1.Namespace) {
	if v, ok := n.Labels[corev1.LabelMetadataName]; ok && v != n.Name {
		c.warnf(field.NewPath("metadata", "labels").Key(corev1.LabelMetadataName), "is always %s", n.Name)
	}
}

func checkNode(c *checker, n *corev1.Node) {
	for i, a := range n.Status.Addresses {
		if a.Type == corev1.NodeInternalIP {
			c.routable(field.NewPath("status", "addresses").Index(i).Child("address"), a.Address)
		}
	}
	for i, p := range n.Spec.PodCIDRs {
		c.prefix(field.NewPath("spec", "podCIDRs").Index(i), p)
	}
	if n.Spec.PodCIDR != "" {
		c.prefix(field.NewPath("spec", "podCIDR"), n.Spec.PodCIDR)
	}
}

func checkPod(c *checker, p *corev1.Pod) {
	for i, ip := range p.Status.PodIPs {
		c.routable(field.NewPath("status", "podIPs").Index(i).Child("ip"), ip.IP)
	}
	if p.Status.PodIP != "" {
		c.routable(field.NewPath("status", "podIP"), p.Status.PodIP)
	}
	for list, containers := range map[string][]corev1.Container{"initContainers": p.Spec.InitContainers, "containers": p.Spec.Containers} {
		for i, container := range containers {
			for j, port := range container.Ports {
				at := field.NewPath("spec", list).Index(i).Child("ports").Index(j)
				c.port(at.Child("containerPort"), port.ContainerPort)
				c.protocol(at.Child("protocol"), port.Protocol)
				if port.Name != "" {
					c.texts(at.Child("name"), port.Name, validation.IsValidPortName(port.Name))
				}
			}
		}
	}
}
