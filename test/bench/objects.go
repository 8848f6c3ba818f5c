// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// Ranges of every cluster.
const (
	clusterPods4 = "10.244.0.0/16"
	clusterPods6 = "fd00:244::/32"
	serviceCIDR4 = "10.96.0.0/14"
	serviceCIDR6 = "fd00:96::/108"
)

// nth returns an address of a range: its first one and so many on.
func nth(cidr string, n uint32) netip.Addr {
	base := netip.MustParsePrefix(cidr).Addr().As16()
	low := binary.BigEndian.Uint32(base[12:])
	binary.BigEndian.PutUint32(base[12:], low+n)
	return netip.AddrFrom16(base).Unmap()
}

// clusterService is a service of both families with one TCP port, 80, without a selector: its endpoints are what it is given.
type clusterService struct {
	name     string
	number   uint32 // in the ranges of cluster addresses
	nodePort int32  // 0: none
	target   int32  // port of the endpoints
}

func (s clusterService) addr(v6 bool) netip.Addr {
	if v6 {
		return nth(serviceCIDR6, s.number)
	}
	return nth(serviceCIDR4, s.number)
}

// endpoint is a backend, a pod.
type endpoint struct {
	addrs []netip.Addr // IPv4, IPv6
	node  string
}

// objects are the service and its endpoint slices, one for each family.
func (s clusterService) objects(endpoints ...endpoint) []runtime.Object {
	v4, v6 := s.addr(false).String(), s.addr(true).String()
	both := corev1.IPFamilyPolicyRequireDualStack
	o := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: s.name}, Spec: corev1.ServiceSpec{
		Type: corev1.ServiceTypeClusterIP, ClusterIP: v4, ClusterIPs: []string{v4, v6}, IPFamilyPolicy: &both,
		IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol}, SessionAffinity: corev1.ServiceAffinityNone,
		Ports: []corev1.ServicePort{{Name: "tcp", Protocol: corev1.ProtocolTCP, Port: 80, TargetPort: intstr.FromInt32(s.target), NodePort: s.nodePort}},
	}}
	if s.nodePort != 0 {
		o.Spec.Type = corev1.ServiceTypeNodePort
		o.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyCluster
	}
	return append([]runtime.Object{o}, s.slices(endpoints...)...)
}

func (s clusterService) slices(endpoints ...endpoint) (out []runtime.Object) {
	yes, no, name, tcp := true, false, "tcp", corev1.ProtocolTCP
	for family, kind := range []discoveryv1.AddressType{discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6} {
		o := &discoveryv1.EndpointSlice{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: "default", Name: s.name + "-" + strings.ToLower(string(kind)), Labels: map[string]string{discoveryv1.LabelServiceName: s.name},
			},
			AddressType: kind, Ports: []discoveryv1.EndpointPort{{Name: &name, Port: &s.target, Protocol: &tcp}},
		}
		for _, e := range endpoints {
			o.Endpoints = append(o.Endpoints, discoveryv1.Endpoint{
				Addresses: []string{e.addrs[family].String()}, NodeName: &e.node,
				Conditions: discoveryv1.EndpointConditions{Ready: &yes, Serving: &yes, Terminating: &no},
			})
		}
		out = append(out, o)
	}
	return out
}

// otherServices are so many services that nobody asks, each with two endpoints on another node.
func otherServices(count int) (out []runtime.Object) {
	for i := range uint32(count) {
		s := clusterService{name: fmt.Sprintf("other-%d", i), number: 1000 + i, target: echoPort}
		var endpoints []endpoint
		for k := range uint32(2) {
			addrs := []netip.Addr{nth("10.245.0.0/16", 2*i+k+1), nth("fd00:245::/64", 2*i+k+1)}
			endpoints = append(endpoints, endpoint{addrs, "node2"})
		}
		out = append(out, s.objects(endpoints...)...)
	}
	return out
}

// clusterObjects are what every cluster has: its namespace, its nodes, its range of services.
func clusterObjects(nodes []*clusterNode) []runtime.Object {
	out := []runtime.Object{
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "default"}},
		&networkingv1.ServiceCIDR{
			ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{serviceCIDR4, serviceCIDR6}},
		},
	}
	for _, n := range nodes {
		o := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: n.name}, Spec: corev1.NodeSpec{PodCIDR: n.ranges[0], PodCIDRs: n.ranges}}
		for _, a := range n.addrs {
			o.Status.Addresses = append(o.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a.String()})
		}
		out = append(out, o)
	}
	return out
}
