// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// The objects are about as large as those of real clusters: the agent has to read all of that, whatever it keeps.

const (
	servicePort = 80
	targetPort  = 8080
	podsANode   = 50
)

// ipv6Service says that every second service is an IPv6 one.
func ipv6Service(service int) bool { return service%2 == 1 }

func numbered(v6 bool, v4Net [2]byte, v6Net byte, n int) netip.Addr {
	if !v6 {
		a := [4]byte{v4Net[0], v4Net[1]}
		binary.BigEndian.PutUint32(a[:], binary.BigEndian.Uint32(a[:])+uint32(n))
		return netip.AddrFrom4(a)
	}
	a := [16]byte{0xfd, 0, v6Net}
	binary.BigEndian.PutUint32(a[12:], uint32(n))
	return netip.AddrFrom16(a)
}

// serviceAddr is the cluster address of a service.
func serviceAddr(service int) netip.Addr {
	return numbered(ipv6Service(service), [2]byte{10, 96}, 0x96, service+1)
}

// endpointAddr is the address of one of a service's endpoints; there are at most 16.
func endpointAddr(service, endpoint int) netip.Addr {
	return numbered(ipv6Service(service), [2]byte{10, 128}, 0x80, service*16+endpoint)
}

// podAddr is in the range of the pod's node.
func podAddr(pod int, v6 bool) netip.Addr {
	node, host := pod/podsANode, pod%podsANode+2
	if v6 {
		return netip.MustParseAddr(fmt.Sprintf("fd00:40%02x:%x::%x", node/256, node%256, host))
	}
	return netip.AddrFrom4([4]byte{10, byte(64 + node/256), byte(node % 256), byte(host)})
}

func nodeName(n int) string { return fmt.Sprint("n", n+1) }

// putCluster fills the API server with nodes, of which the first is the agent's, and what every cluster has.
func (l *agentLab) putCluster(nodes int) {
	l.api.Put(
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "default"}},
		&networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/12", "fd00:9600::/108"}}},
	)
	for i := range nodes {
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: nodeName(i), Labels: map[string]string{
			"kubernetes.io/hostname": nodeName(i), "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64",
		}}}
		n.Spec.PodCIDRs = []string{
			fmt.Sprintf("10.%d.%d.0/24", 64+i/256, i%256), fmt.Sprintf("fd00:40%02x:%x::/64", i/256, i%256),
		}
		n.Status.Addresses = []corev1.NodeAddress{
			{Type: corev1.NodeInternalIP, Address: numbered(false, [2]byte{172, 20}, 0, i+1).String()},
			{Type: corev1.NodeInternalIP, Address: numbered(true, [2]byte{}, 0x72, i+1).String()},
			{Type: corev1.NodeHostName, Address: nodeName(i)},
		}
		l.api.Put(n)
	}
}

// putServices adds services with so many endpoints each.
func (l *agentLab) putServices(services, endpoints int) {
	for i := range services {
		l.api.Put(apiService(i), endpointSlice(i, endpoints))
	}
}

func serviceName(service int) string { return fmt.Sprintf("service-%05d", service) }

func apiService(service int) *corev1.Service {
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{
		Namespace: "default", Name: serviceName(service), UID: uid(service), Labels: map[string]string{"app": serviceName(service)},
	}}
	ip := serviceAddr(service).String()
	s.Spec = corev1.ServiceSpec{
		Type: corev1.ServiceTypeClusterIP, ClusterIP: ip, ClusterIPs: []string{ip}, Selector: map[string]string{"app": serviceName(service)},
		Ports: []corev1.ServicePort{{Name: "http", Port: servicePort, Protocol: corev1.ProtocolTCP}},
	}
	return s
}

func endpointSlice(service, endpoints int) *discoveryv1.EndpointSlice {
	name, tcp, port, yes, no := "http", corev1.ProtocolTCP, int32(targetPort), true, false
	family := discoveryv1.AddressTypeIPv4
	if ipv6Service(service) {
		family = discoveryv1.AddressTypeIPv6
	}
	s := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "default", Name: serviceName(service) + "-x7k2p", UID: uid(service), Labels: map[string]string{
				discoveryv1.LabelServiceName: serviceName(service), "app": serviceName(service), discoveryv1.LabelManagedBy: "endpointslice-controller.k8s.io",
			},
		},
		AddressType: family, Ports: []discoveryv1.EndpointPort{{Name: &name, Port: &port, Protocol: &tcp}},
	}
	for e := range endpoints {
		node := nodeName(e + 1)
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{endpointAddr(service, e).String()}, NodeName: &node,
			Conditions: discoveryv1.EndpointConditions{Ready: &yes, Serving: &yes, Terminating: &no},
			TargetRef:  &corev1.ObjectReference{Kind: "Pod", Namespace: "default", Name: fmt.Sprintf("%s-5d8f9c7b6d-%05d", serviceName(service), e), UID: uid(e)},
		})
	}
	return s
}

func uid(n int) types.UID {
	return types.UID(fmt.Sprintf("0f1e2d3c-aaaa-bbbb-cccc-%012x", n))
}

// apiPod has what real pods carry along. version changes a label.
func apiPod(pod, version int) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
		Namespace: "default", Name: fmt.Sprintf("web-5d8f9c7b6d-%05d", pod), UID: uid(pod),
		Labels: map[string]string{
			"app": fmt.Sprint("web-", pod/podsANode), "pod-template-hash": "5d8f9c7b6d", "app.kubernetes.io/name": "web", "version": fmt.Sprint(version),
		},
		ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "kube-controller-manager", FieldsV1: metav1.NewFieldsV1(`{"f":"` + strings.Repeat("x", 2000) + `"}`)}},
	}}
	for c := range 2 {
		container := corev1.Container{Name: fmt.Sprint("c", c), Image: "registry.example/team/web:1.2.3",
			Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: targetPort, Protocol: corev1.ProtocolTCP}}}
		for e := range 10 {
			container.Env = append(container.Env, corev1.EnvVar{Name: fmt.Sprint("VARIABLE_", e), Value: strings.Repeat("v", 40)})
		}
		p.Spec.Containers = append(p.Spec.Containers, container)
	}
	p.Spec.NodeName = nodeName(pod / podsANode)
	p.Status.Phase = corev1.PodRunning
	p.Status.PodIP = podAddr(pod, false).String()
	p.Status.PodIPs = []corev1.PodIP{{IP: p.Status.PodIP}, {IP: podAddr(pod, true).String()}}
	p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	return p
}

// servicesAFile is how many services a manifest has.
const servicesAFile = 100

// writeManifest writes the file that a service is in. That service has so many endpoints, the others of the file the usual number.
func writeManifest(dir string, service, endpoints, others int) error {
	var b strings.Builder
	first := service - service%servicesAFile
	for s := first; s < first+servicesAFile; s++ {
		n := others
		if s == service {
			n = endpoints
		}
		family := "IPv4"
		if ipv6Service(s) {
			family = "IPv6"
		}
		fmt.Fprintf(&b, "---\n{apiVersion: v1, kind: Service, metadata: {name: %s}, spec: {clusterIPs: [%q], ports: [{port: %d}]}}\n",
			serviceName(s), serviceAddr(s), servicePort)
		fmt.Fprintf(&b, "---\n{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: %s, ports: [{name: \"\", port: %d}],\n"+
			"  metadata: {name: %s, labels: {kubernetes.io/service-name: %s}}, endpoints: [", family, targetPort, serviceName(s), serviceName(s))
		for e := range n {
			fmt.Fprintf(&b, "{addresses: [%q], nodeName: %s},", endpointAddr(s, e), nodeName(e+1))
		}
		b.WriteString("]}\n")
	}
	path := filepath.Join(dir, fmt.Sprintf("services-%d.yaml", first/servicesAFile))
	if err := os.WriteFile(path+".new", []byte(b.String()), 0o644); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}
