// SPDX-License-Identifier: Apache-2.0

package clustertest

import (
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/intstr"
	policyv1alpha2 "sigs.k8s.io/network-policy-api/apis/v1alpha2"
	"sigs.k8s.io/yaml"
)

// Apply adds objects to the cluster's manifest, or replaces those of the same kind, namespace and name, all in one change. They may be
// corev1's Namespace, Node, Pod and Service, EndpointSlices, NetworkPolicies and ClusterNetworkPolicies; apiVersion and kind are
// filled in, namespace "default" too. The objects are copied.
func (c *Cluster) Apply(objects ...runtime.Object) {
	c.t.Helper()
	for _, o := range objects {
		c.put(o)
	}
	c.write()
}

// Delete removes objects from the manifest in one change.
func (c *Cluster) Delete(objects ...runtime.Object) {
	c.t.Helper()
	for _, o := range objects {
		delete(c.objects, objectKey(o))
	}
	c.write()
}

// put takes an object into the next manifest.
func (c *Cluster) put(o runtime.Object) {
	c.t.Helper()
	meta, ok := o.(metav1.Object)
	kind := typeMeta(o)
	if !ok || kind == nil {
		c.t.Fatalf("objects of type %T are not known to the fixture", o)
	}
	if meta.GetNamespace() == "" && kind.Kind != "Node" && kind.Kind != "Namespace" && kind.Kind != "ClusterNetworkPolicy" {
		meta.SetNamespace("default")
	}
	o.GetObjectKind().SetGroupVersionKind(kind.GroupVersionKind())
	c.objects[objectKey(o)] = o.DeepCopyObject()
}

// typeMeta returns what the YAML of an object calls it, nil for a type of no use here.
func typeMeta(o runtime.Object) *metav1.TypeMeta {
	switch o.(type) {
	case *corev1.Namespace:
		return &metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"}
	case *corev1.Node:
		return &metav1.TypeMeta{APIVersion: "v1", Kind: "Node"}
	case *corev1.Pod:
		return &metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}
	case *corev1.Service:
		return &metav1.TypeMeta{APIVersion: "v1", Kind: "Service"}
	case *discoveryv1.EndpointSlice:
		return &metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice"}
	case *networkingv1.NetworkPolicy:
		return &metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "NetworkPolicy"}
	case *policyv1alpha2.ClusterNetworkPolicy:
		return &metav1.TypeMeta{APIVersion: "policy.networking.k8s.io/v1alpha2", Kind: "ClusterNetworkPolicy"}
	}
	return nil
}

func objectKey(o runtime.Object) string {
	meta := o.(metav1.Object)
	return fmt.Sprintf("%T %s/%s", o, meta.GetNamespace(), meta.GetName())
}

// markerAddr is the cluster address of the services by which WaitSettled recognises a manifest; it is the last of the range.
const markerAddr = "10.96.255.254"

// markerNamespace is where they are.
const markerNamespace = "clustertest"

// markerName is the service that only the current manifest has.
func (c *Cluster) markerName() string {
	return fmt.Sprintf("marker-%d", c.generation)
}

// write replaces the manifest by one with all objects and a new marker.
func (c *Cluster) write() {
	c.t.Helper()
	c.generation++
	items := []runtime.Object{markerService("first"), markerService(c.markerName())}
	for _, key := range slices.Sorted(maps.Keys(c.objects)) {
		items = append(items, c.objects[key])
	}
	text, err := yaml.Marshal(map[string]any{"apiVersion": "v1", "kind": "List", "items": items})
	c.must(err)
	tmp := filepath.Join(c.Manifests(), ".cluster.yaml")
	c.must(os.WriteFile(tmp, text, 0o600))
	c.must(os.Rename(tmp, filepath.Join(c.Manifests(), "cluster.yaml")))
}

func markerService(name string) *corev1.Service {
	s := &corev1.Service{Spec: corev1.ServiceSpec{ClusterIP: markerAddr, Ports: []corev1.ServicePort{{Port: 1}}}}
	s.Namespace, s.Name = markerNamespace, name
	s.APIVersion, s.Kind = "v1", "Service"
	return s
}

func namespaceObject(name string) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
}

func nodeObject(n *Node) *corev1.Node {
	o := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: n.Name}}
	o.Status.Addresses = nodeAddresses(n.Addrs)
	for _, p := range n.PodCIDRs {
		o.Spec.PodCIDRs = append(o.Spec.PodCIDRs, p.String())
	}
	o.Spec.PodCIDR = o.Spec.PodCIDRs[0]
	return o
}

func nodeAddresses(addrs []netip.Addr) (out []corev1.NodeAddress) {
	for _, a := range addrs {
		out = append(out, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a.String()})
	}
	return out
}

func podObject(n *Node, name string, labels map[string]string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, Labels: labels},
		Spec:       corev1.PodSpec{NodeName: n.Name, Containers: []corev1.Container{{Name: "main"}}},
	}
}

func setPodIPs(o *corev1.Pod, addrs []netip.Addr) {
	o.Status.Phase = corev1.PodRunning
	o.Status.PodIP, o.Status.PodIPs = addrs[0].String(), nil
	for _, a := range addrs {
		o.Status.PodIPs = append(o.Status.PodIPs, corev1.PodIP{IP: a.String()})
	}
}

// NodePortService returns a dual stack service for the pods with the labels, in namespace default: TCP and UDP, at 10.96.0.<number> and
// fd00:96::<number> on port, and on nodePort of every node unless that is 0; external and internal traffic policy are Cluster. The agents
// make its endpoint slices themselves.
func NodePortService(name string, number int, selector map[string]string, port, targetPort, nodePort int32) *corev1.Service {
	v4, v6 := fmt.Sprintf("10.96.0.%d", number), fmt.Sprintf("fd00:96::%d", number)
	both := corev1.IPFamilyPolicyRequireDualStack
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}, Spec: corev1.ServiceSpec{
		Type: corev1.ServiceTypeNodePort, Selector: selector, ClusterIP: v4, ClusterIPs: []string{v4, v6}, IPFamilyPolicy: &both,
		IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol},
	}}
	if nodePort == 0 {
		s.Spec.Type = corev1.ServiceTypeClusterIP
	}
	for _, proto := range []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP} {
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{
			Name: map[corev1.Protocol]string{corev1.ProtocolTCP: "tcp", corev1.ProtocolUDP: "udp"}[proto], Protocol: proto,
			Port: port, TargetPort: intstr.FromInt32(targetPort), NodePort: nodePort,
		})
	}
	return s
}
