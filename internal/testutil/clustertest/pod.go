// SPDX-License-Identifier: Apache-2.0

package clustertest

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/containernetworking/cni/libcni"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	corev1 "k8s.io/api/core/v1"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
)

// Pod is a pod of the cluster.
type Pod struct {
	*Host
	Node *Node
	// Object is what the agents are told of it. A test that changes it, its labels for instance, calls Apply.
	Object *corev1.Pod
}

// PodOption changes the pod's object before anybody sees it.
type PodOption func(*corev1.Pod)

// InNamespace puts the pod into a namespace, which the test applies; it is in "default" otherwise.
func InNamespace(name string) PodOption {
	return func(p *corev1.Pod) { p.Namespace = name }
}

// WithPort gives the pod a named port.
func WithPort(name string, port int32, protocol corev1.Protocol) PodOption {
	return func(p *corev1.Pod) {
		ports := &p.Spec.Containers[0].Ports
		*ports = append(*ports, corev1.ContainerPort{Name: name, ContainerPort: port, Protocol: protocol})
	}
}

// AddPod starts a pod on a node as a cluster does: its object names the node, ADD connects it, its object gets the addresses. Its name is
// unique in the cluster.
func (c *Cluster) AddPod(n *Node, name string, labels map[string]string, options ...PodOption) *Pod {
	c.t.Helper()
	p := c.SchedulePod(n, name, labels, options...)
	c.ConnectPod(p)
	return p
}

// SchedulePod does the first half of AddPod: the pod's object names the node, and it has a namespace without an interface.
func (c *Cluster) SchedulePod(n *Node, name string, labels map[string]string, options ...PodOption) *Pod {
	c.t.Helper()
	p := &Pod{Host: &Host{t: c.t, Name: name, NS: netnstest.New(c.t)}, Node: n, Object: podObject(n, name, labels)}
	for _, option := range options {
		option(p.Object)
	}
	c.Apply(p.Object)
	return p
}

// ConnectPod does the second half of AddPod: ADD connects the pod, and its object gets the addresses.
func (c *Cluster) ConnectPod(p *Pod) {
	c.t.Helper()
	n, name := p.Node, p.Name
	n.NS.Do(func() {
		raw, err := n.cni.AddNetworkList(c.t.Context(), n.conf, p.attachment())
		if err != nil {
			c.t.Fatalf("ADD of %s on %s: %v", name, n.Name, err)
		}
		result, err := types100.NewResultFromResult(raw)
		c.must(err)
		for _, ip := range result.IPs {
			a, _ := netip.AddrFromSlice(ip.Address.IP)
			p.Addrs = append(p.Addrs, a.Unmap())
		}
	})
	slices.SortFunc(p.Addrs, func(a, b netip.Addr) int { return cmp.Compare(a.BitLen(), b.BitLen()) })
	n.pods = append(n.pods, p)
	setPodIPs(p.Object, p.Addrs)
	c.Apply(p.Object)
}

// AddHostPod tells the agents of a pod in the node's own network: it has the node's namespace and addresses, and no ADD.
func (c *Cluster) AddHostPod(n *Node, name string, labels map[string]string, options ...PodOption) *Pod {
	c.t.Helper()
	p := &Pod{Host: &Host{t: c.t, Name: name, NS: n.NS, Addrs: n.Addrs}, Node: n, Object: podObject(n, name, labels)}
	p.Object.Spec.HostNetwork = true
	for _, option := range options {
		option(p.Object)
	}
	setPodIPs(p.Object, p.Addrs)
	c.Apply(p.Object)
	return p
}

// DeletePod ends a pod as a cluster does: its object goes, DEL disconnects it, its namespace is removed. Of a host pod only the object
// goes.
func (c *Cluster) DeletePod(p *Pod) {
	c.t.Helper()
	c.Delete(p.Object)
	if p.Object.Spec.HostNetwork {
		return
	}
	p.Node.NS.Do(func() {
		if err := p.Node.cni.DelNetworkList(c.t.Context(), p.Node.conf, p.attachment()); err != nil {
			c.t.Fatalf("DEL of %s on %s: %v", p.Name, p.Node.Name, err)
		}
	})
	p.NS.Delete()
	p.Node.pods = slices.DeleteFunc(p.Node.pods, func(other *Pod) bool { return other == p })
}

// attachment is what the runtime tells the plugin of the pod.
func (p *Pod) attachment() *libcni.RuntimeConf {
	return &libcni.RuntimeConf{
		ContainerID: p.Node.Name + "-" + p.Name, NetNS: p.NS.Path(), IfName: "eth0",
		Args: [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", p.Object.Namespace}, {"K8S_POD_NAME", p.Object.Name}},
	}
}
