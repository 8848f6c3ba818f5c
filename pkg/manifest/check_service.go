// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metavalidation "k8s.io/apimachinery/pkg/apis/meta/v1/validation"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// maxAffinitySeconds is one day, the API's limit.
const maxAffinitySeconds = 86400

func checkService(c *checker, s *corev1.Service) {
	spec := field.NewPath("spec")
	oneOf(c, spec.Child("type"), s.Spec.Type, "", corev1.ServiceTypeClusterIP, corev1.ServiceTypeNodePort,
		corev1.ServiceTypeLoadBalancer, corev1.ServiceTypeExternalName)
	c.library(metavalidation.ValidateLabels(s.Spec.Selector, spec.Child("selector")))
	if s.Spec.Type == corev1.ServiceTypeExternalName {
		return
	}
	headless := checkClusterIPs(c, s)
	if len(s.Spec.Ports) == 0 && !headless {
		c.errorf(spec.Child("ports"), "is empty: a service needs a port")
	}
	checkServicePorts(c, s)
	for i, ip := range s.Spec.ExternalIPs {
		c.routable(spec.Child("externalIPs").Index(i), ip)
	}
	for i, r := range s.Spec.LoadBalancerSourceRanges {
		c.prefix(spec.Child("loadBalancerSourceRanges").Index(i), strings.TrimSpace(r))
	}
	for i, in := range s.Status.LoadBalancer.Ingress {
		if in.IP != "" {
			c.routable(field.NewPath("status", "loadBalancer", "ingress").Index(i).Child("ip"), in.IP)
		}
	}
	oneOf(c, spec.Child("externalTrafficPolicy"), s.Spec.ExternalTrafficPolicy, "",
		corev1.ServiceExternalTrafficPolicyCluster, corev1.ServiceExternalTrafficPolicyLocal)
	if port := s.Spec.HealthCheckNodePort; port != 0 {
		at := spec.Child("healthCheckNodePort")
		c.port(at, port)
		if s.Spec.Type != corev1.ServiceTypeLoadBalancer || s.Spec.ExternalTrafficPolicy != corev1.ServiceExternalTrafficPolicyLocal {
			c.errorf(at, "%d needs a service of type LoadBalancer with externalTrafficPolicy Local", port)
		}
	}
	if p := s.Spec.InternalTrafficPolicy; p != nil {
		oneOf(c, spec.Child("internalTrafficPolicy"), *p, corev1.ServiceInternalTrafficPolicyCluster, corev1.ServiceInternalTrafficPolicyLocal)
	}
	oneOf(c, spec.Child("sessionAffinity"), s.Spec.SessionAffinity, "", corev1.ServiceAffinityNone, corev1.ServiceAffinityClientIP)
	if a := s.Spec.SessionAffinityConfig; a != nil && a.ClientIP != nil && a.ClientIP.TimeoutSeconds != nil {
		if t := *a.ClientIP.TimeoutSeconds; t < 1 || t > maxAffinitySeconds {
			c.errorf(spec.Child("sessionAffinityConfig", "clientIP", "timeoutSeconds"), "%d is outside 1 to %d", t, maxAffinitySeconds)
		}
	}
}

// checkClusterIPs checks spec.clusterIP and spec.clusterIPs, and says whether the service is headless.
func checkClusterIPs(c *checker, s *corev1.Service) bool {
	one, all := field.NewPath("spec", "clusterIP"), field.NewPath("spec", "clusterIPs")
	if s.Spec.ClusterIP == corev1.ClusterIPNone || (len(s.Spec.ClusterIPs) == 1 && s.Spec.ClusterIPs[0] == corev1.ClusterIPNone) {
		return true
	}
	if s.Spec.ClusterIP == "" && len(s.Spec.ClusterIPs) == 0 {
		c.warnf(one, "is missing: there is no API server to allocate one, so the service is not served")
		return false
	}
	if s.Spec.ClusterIP != "" {
		c.routable(one, s.Spec.ClusterIP)
		if len(s.Spec.ClusterIPs) > 0 && s.Spec.ClusterIPs[0] != s.Spec.ClusterIP {
			c.errorf(all.Index(0), "%q differs from clusterIP %q", s.Spec.ClusterIPs[0], s.Spec.ClusterIP)
		}
	}
	var had [2]bool
	for i, ip := range s.Spec.ClusterIPs {
		a, ok := c.routable(all.Index(i), ip)
		if !ok {
			continue
		}
		family := 0
		if a.Is6() {
			family = 1
		}
		if had[family] {
			c.errorf(all.Index(i), "%s is the second address of its family", a)
		}
		had[family] = true
	}
	return false
}

func checkServicePorts(c *checker, s *corev1.Service) {
	names := map[string]int{}
	type number struct {
		protocol corev1.Protocol
		port     int32
	}
	numbers, nodePorts := map[number]int{}, map[number]int{}
	for i, p := range s.Spec.Ports {
		at := field.NewPath("spec", "ports").Index(i)
		c.port(at.Child("port"), p.Port)
		c.protocol(at.Child("protocol"), p.Protocol)
		if p.TargetPort != (intstr.IntOrString{}) {
			c.portOrName(at.Child("targetPort"), p.TargetPort)
		}
		if p.Protocol == "" {
			p.Protocol = corev1.ProtocolTCP
		}
		if p.Name == "" && len(s.Spec.Ports) > 1 {
			c.errorf(at.Child("name"), "is missing: a service with several ports needs their names")
		} else if first, twice := names[p.Name]; twice {
			c.errorf(at.Child("name"), "%q is also the name of spec.ports[%d]", p.Name, first)
		}
		if first, twice := numbers[number{p.Protocol, p.Port}]; twice {
			c.errorf(at.Child("port"), "%d with %s is also spec.ports[%d]", p.Port, p.Protocol, first)
		}
		names[p.Name], numbers[number{p.Protocol, p.Port}] = i, i
		checkNodePort(c, s, i)
		if p.NodePort != 0 {
			if first, twice := nodePorts[number{p.Protocol, p.NodePort}]; twice {
				c.errorf(at.Child("nodePort"), "%d with %s is also that of spec.ports[%d]", p.NodePort, p.Protocol, first)
			}
			nodePorts[number{p.Protocol, p.NodePort}] = i
		}
	}
}

func checkNodePort(c *checker, s *corev1.Service, i int) {
	at := field.NewPath("spec", "ports").Index(i).Child("nodePort")
	switch port := s.Spec.Ports[i].NodePort; {
	case port == 0 && s.Spec.Type == corev1.ServiceTypeNodePort:
		c.warnf(at, "is missing: there is no API server to allocate one, so there is none")
	case port != 0 && s.Spec.Type != corev1.ServiceTypeNodePort && s.Spec.Type != corev1.ServiceTypeLoadBalancer:
		c.errorf(at, "%d needs a service of type NodePort or LoadBalancer", port)
	case port != 0:
		c.port(at, port)
	}
}

func checkEndpointSlice(c *checker, s *discoveryv1.EndpointSlice) {
	if s.Labels[discoveryv1.LabelServiceName] == "" {
		c.warnf(field.NewPath("metadata", "labels"), "%s is missing: the slice belongs to no service", discoveryv1.LabelServiceName)
	}
	oneOf(c, field.NewPath("addressType"), s.AddressType, discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6, discoveryv1.AddressTypeFQDN)
	if s.AddressType == discoveryv1.AddressTypeFQDN {
		c.warnf(field.NewPath("addressType"), "slices of FQDN are ignored")
		return
	}
	for i, p := range s.Ports {
		at := field.NewPath("ports").Index(i)
		if p.Port == nil {
			c.warnf(at, "has no port: it is ignored")
		} else {
			c.port(at.Child("port"), *p.Port)
		}
		if p.Protocol != nil {
			c.protocol(at.Child("protocol"), *p.Protocol)
		}
	}
	for i, e := range s.Endpoints {
		at := field.NewPath("endpoints").Index(i).Child("addresses")
		if len(e.Addresses) == 0 {
			c.errorf(at, "is empty: an endpoint needs an address")
			continue
		}
		a, ok := c.routable(at.Index(0), e.Addresses[0])
		if ok && a.Is6() != (s.AddressType == discoveryv1.AddressTypeIPv6) {
			c.errorf(at.Index(0), "%s is no %s address", a, s.AddressType)
		}
	}
}
