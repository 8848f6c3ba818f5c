// SPDX-License-Identifier: Apache-2.0

package state

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
)

// The functions in this file turn API objects into the trimmed ones. They apply the API server's defaults where those matter, so that
// objects from a file and from the API end up equal, and they skip what they cannot read: judging an object is its source's task.

// labelServiceProxyName on a service says that another proxy serves it (row I1).
const labelServiceProxyName = "service.kubernetes.io/service-proxy-name"

// AnnotationServiceReturn on a service overrides the agent's default way back for its answers (docs/services.md).
const AnnotationServiceReturn = "margay.io/service-return"

// taintToBeDeleted is what the cluster autoscaler puts on a node that it is about to delete (row H2).
const taintToBeDeleted = "ToBeDeletedByClusterAutoscaler"

// AnnotationLoadBalancing on a service overrides the agent's default way of choosing backends (docs/services.md).
const AnnotationLoadBalancing = "margay.io/load-balancing"

// DefaultAffinitySeconds is the ClientIP affinity timeout of a service that names none.
const DefaultAffinitySeconds = uint32(corev1.DefaultClientIPServiceAffinitySeconds)

// FromNamespace converts a namespace and gives it the label that carries its name (row N5).
func FromNamespace(n *corev1.Namespace) *Namespace {
	out := ImplicitNamespace(n.Name)
	for k, v := range n.Labels {
		if k != corev1.LabelMetadataName {
			out.Labels[k] = v
		}
	}
	return out
}

// ImplicitNamespace is a namespace that no object describes, but some object lives in.
func ImplicitNamespace(name string) *Namespace {
	return &Namespace{Name: name, Labels: map[string]string{corev1.LabelMetadataName: name}}
}

// FromPod converts a pod; node is this node's name.
func FromPod(p *corev1.Pod, node string) *Pod {
	out := &Pod{
		Key:         keyOf(p.Namespace, p.Name),
		UID:         string(p.UID),
		Labels:      maps.Clone(p.Labels),
		Node:        p.Spec.NodeName,
		Local:       p.Spec.NodeName != "" && p.Spec.NodeName == node,
		HostNetwork: p.Spec.HostNetwork,
		Finished:    p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed,
		Terminating: p.DeletionTimestamp != nil,
	}
	for _, ip := range p.Status.PodIPs {
		out.IPs = appendAddr(out.IPs, ip.IP)
	}
	if len(out.IPs) == 0 {
		out.IPs = appendAddr(out.IPs, p.Status.PodIP)
	}
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			out.Ready = c.Status == corev1.ConditionTrue
		}
	}
	for _, c := range p.Spec.InitContainers {
		// A sidecar is an init container that keeps running: its ports count (KEP-753).
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			out.Ports = appendPorts(out.Ports, c.Ports)
		}
	}
	for _, c := range p.Spec.Containers {
		out.Ports = appendPorts(out.Ports, c.Ports)
	}
	return out
}

func appendPorts(out []ContainerPort, ports []corev1.ContainerPort) []ContainerPort {
	for _, p := range ports {
		proto, known := ParseProtocol(p.Protocol)
		port, valid := portNumber(p.ContainerPort)
		if known && valid {
			out = append(out, ContainerPort{Name: p.Name, Protocol: proto, Port: port})
		}
	}
	return out
}

// FromService converts a service. It returns nil for one that takes no part in load balancing: headless, without a cluster address,
// ExternalName, or another proxy's (rows I1, I2).
func FromService(s *corev1.Service) *Service {
	if _, other := s.Labels[labelServiceProxyName]; other || s.Spec.Type == corev1.ServiceTypeExternalName {
		return nil
	}
	out := &Service{
		Key:             keyOf(s.Namespace, s.Name),
		Type:            ServiceType(s.Spec.Type),
		ClusterIPs:      clusterIPs(&s.Spec),
		Selector:        maps.Clone(s.Spec.Selector),
		InternalLocal:   s.Spec.InternalTrafficPolicy != nil && *s.Spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal,
		PublishNotReady: s.Spec.PublishNotReadyAddresses,
		Return:          ServiceReturn(s.Annotations[AnnotationServiceReturn]),
		Balancing:       LoadBalancing(s.Annotations[AnnotationLoadBalancing]),
	}
	if len(out.ClusterIPs) == 0 {
		return nil
	}
	out.HealthCheckNodePort, _ = portNumber(s.Spec.HealthCheckNodePort)
	if out.Type == "" {
		out.Type = ClusterIP
	}
	for _, ip := range s.Spec.ExternalIPs {
		out.ExternalIPs = appendAddr(out.ExternalIPs, ip)
	}
	for _, in := range s.Status.LoadBalancer.Ingress {
		if in.IPMode == nil || *in.IPMode == corev1.LoadBalancerIPModeVIP {
			out.LoadBalancerIPs = appendAddr(out.LoadBalancerIPs, in.IP)
		}
	}
	for _, r := range s.Spec.LoadBalancerSourceRanges {
		out.LoadBalancerSourceRanges = appendPrefix(out.LoadBalancerSourceRanges, strings.TrimSpace(r))
	}
	// The field means something only where there is outside traffic (row V2).
	if out.Type != ClusterIP || len(out.ExternalIPs) > 0 {
		out.ExternalLocal = s.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal
	}
	if s.Spec.SessionAffinity == corev1.ServiceAffinityClientIP {
		out.AffinitySeconds = affinitySeconds(s.Spec.SessionAffinityConfig)
	}
	for _, p := range s.Spec.Ports {
		if port, ok := fromServicePort(p, out.Type); ok {
			out.Ports = append(out.Ports, port)
		}
	}
	return out
}

func clusterIPs(spec *corev1.ServiceSpec) []netip.Addr {
	var out []netip.Addr
	for _, ip := range spec.ClusterIPs {
		out = appendAddr(out, ip)
	}
	if len(spec.ClusterIPs) == 0 {
		out = appendAddr(out, spec.ClusterIP)
	}
	return out
}

func affinitySeconds(c *corev1.SessionAffinityConfig) uint32 {
	if c == nil || c.ClientIP == nil || c.ClientIP.TimeoutSeconds == nil || *c.ClientIP.TimeoutSeconds <= 0 {
		return DefaultAffinitySeconds
	}
	return uint32(*c.ClientIP.TimeoutSeconds)
}

func fromServicePort(p corev1.ServicePort, t ServiceType) (ServicePort, bool) {
	proto, known := ParseProtocol(p.Protocol)
	port, valid := portNumber(p.Port)
	out := ServicePort{Name: p.Name, Protocol: proto, Port: port, TargetName: p.TargetPort.StrVal}
	if t == NodePort || t == LoadBalancer {
		out.NodePort, _ = portNumber(p.NodePort)
	}
	if out.TargetName == "" {
		if out.TargetPort, _ = portNumber(p.TargetPort.IntVal); out.TargetPort == 0 {
			out.TargetPort = port
		}
	}
	return out, known && valid
}

// FromEndpointSlice converts a slice. It returns nil for one that the contract ignores: of a headless service, of no service, or of
// names instead of addresses (rows I3, I4).
func FromEndpointSlice(s *discoveryv1.EndpointSlice) *EndpointSlice {
	service := s.Labels[discoveryv1.LabelServiceName]
	_, headless := s.Labels[corev1.IsHeadlessService]
	if service == "" || headless || (s.AddressType != discoveryv1.AddressTypeIPv4 && s.AddressType != discoveryv1.AddressTypeIPv6) {
		return nil
	}
	key := keyOf(s.Namespace, s.Name)
	out := &EndpointSlice{
		Key:     key,
		Service: Key{Namespace: key.Namespace, Name: service},
		IPv6:    s.AddressType == discoveryv1.AddressTypeIPv6,
	}
	// What is no time means unknown, as no annotation does: it only serves to measure.
	out.Triggered, _ = time.Parse(time.RFC3339Nano, s.Annotations[corev1.EndpointsLastChangeTriggerTime])
	for _, p := range s.Ports {
		if port, ok := fromSlicePort(p); ok {
			out.Ports = append(out.Ports, port)
		}
	}
	// Slices hold most of what the agent knows of services: they are given no room to grow.
	out.Endpoints = make([]Endpoint, 0, len(s.Endpoints))
	for i := range s.Endpoints {
		if e, ok := fromEndpoint(&s.Endpoints[i]); ok && e.Addr.Is6() == out.IPv6 {
			out.Endpoints = append(out.Endpoints, e)
		}
	}
	return out
}

func fromSlicePort(p discoveryv1.EndpointPort) (SlicePort, bool) {
	if p.Port == nil {
		return SlicePort{}, false
	}
	out := SlicePort{Protocol: TCP}
	var valid bool
	if out.Port, valid = portNumber(*p.Port); !valid {
		return SlicePort{}, false
	}
	if p.Name != nil {
		out.Name = *p.Name
	}
	if p.Protocol != nil {
		out.Protocol, valid = ParseProtocol(*p.Protocol)
	}
	return out, valid
}

func fromEndpoint(e *discoveryv1.Endpoint) (Endpoint, bool) {
	if len(e.Addresses) == 0 {
		return Endpoint{}, false
	}
	a := appendAddr(nil, e.Addresses[0])
	if len(a) == 0 {
		return Endpoint{}, false
	}
	out := Endpoint{
		Addr:        a[0],
		Node:        deref(e.NodeName, ""),
		Zone:        deref(e.Zone, ""),
		Ready:       deref(e.Conditions.Ready, true),
		Serving:     deref(e.Conditions.Serving, true),
		Terminating: deref(e.Conditions.Terminating, false),
	}
	if e.Hints != nil {
		for _, z := range e.Hints.ForZones {
			out.ForZones = append(out.ForZones, z.Name)
		}
		for _, n := range e.Hints.ForNodes {
			out.ForNodes = append(out.ForNodes, n.Name)
		}
	}
	return out, true
}

// FromNetworkPolicy converts a policy: policyTypes and the ports' protocols are filled in (rows N1, N7).
func FromNetworkPolicy(p *networkingv1.NetworkPolicy) *NetworkPolicy {
	out := &NetworkPolicy{Key: keyOf(p.Namespace, p.Name), Spec: *p.Spec.DeepCopy()}
	if len(out.Spec.PolicyTypes) == 0 {
		out.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
		if len(out.Spec.Egress) > 0 {
			out.Spec.PolicyTypes = append(out.Spec.PolicyTypes, networkingv1.PolicyTypeEgress)
		}
	}
	for _, r := range out.Spec.Ingress {
		defaultProtocols(r.Ports)
	}
	for _, r := range out.Spec.Egress {
		defaultProtocols(r.Ports)
	}
	return out
}

func defaultProtocols(ports []networkingv1.NetworkPolicyPort) {
	for i := range ports {
		if ports[i].Protocol == nil {
			tcp := corev1.ProtocolTCP
			ports[i].Protocol = &tcp
		}
	}
}

// FromNode converts a node.
func FromNode(n *corev1.Node) *Node {
	out := &Node{Name: n.Name, Labels: maps.Clone(n.Labels), Leaving: n.DeletionTimestamp != nil}
	for _, t := range n.Spec.Taints {
		out.Leaving = out.Leaving || t.Key == taintToBeDeleted
	}
	for _, a := range n.Status.Addresses {
		out.AllAddresses = appendAddr(out.AllAddresses, a.Address) // a Hostname or DNS name is none
		if a.Type == corev1.NodeInternalIP {
			out.Addresses = appendAddr(out.Addresses, a.Address)
		}
	}
	for _, c := range n.Spec.PodCIDRs {
		out.PodCIDRs = appendPrefix(out.PodCIDRs, c)
	}
	if len(n.Spec.PodCIDRs) == 0 {
		out.PodCIDRs = appendPrefix(out.PodCIDRs, n.Spec.PodCIDR)
	}
	return out
}

// FromServiceCIDR converts a range of cluster addresses. One that is being deleted counts until it is gone: addresses are still taken from it.
func FromServiceCIDR(c *networkingv1.ServiceCIDR) *ServiceCIDR {
	out := &ServiceCIDR{Name: c.Name}
	for _, cidr := range c.Spec.CIDRs {
		out.Prefixes = appendPrefix(out.Prefixes, cidr)
	}
	return out
}

// ParseProtocol returns the number of a protocol as the API writes it; none means TCP, the API's default everywhere.
func ParseProtocol(p corev1.Protocol) (Protocol, bool) {
	switch p {
	case corev1.ProtocolTCP, "":
		return TCP, true
	case corev1.ProtocolUDP:
		return UDP, true
	case corev1.ProtocolSCTP:
		return SCTP, true
	}
	return 0, false
}

func keyOf(namespace, name string) Key {
	if namespace == "" {
		namespace = corev1.NamespaceDefault
	}
	return Key{Namespace: namespace, Name: name}
}

func portNumber(p int32) (uint16, bool) {
	if p < 1 || p > 65535 {
		return 0, false
	}
	return uint16(p), true
}

// appendAddr appends the address that s holds, without zone and never in mapped form; nothing when s holds none, or one again.
func appendAddr(out []netip.Addr, s string) []netip.Addr {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return out
	}
	if a = a.Unmap(); slices.Contains(out, a) {
		return out
	}
	return append(out, a)
}

func appendPrefix(out []netip.Prefix, s string) []netip.Prefix {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return out
	}
	return append(out, p.Masked())
}

func deref[T any](p *T, none T) T {
	if p == nil {
		return none
	}
	return *p
}
