// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// shipped is the directory of the manifests that the demo starts with; what it applies afterwards is in later.
const shipped = "conf/demo"

// cluster is the demo's two nodes, a router, and a client outside. The directory of manifests stands for the API server: both agents
// follow it, and the demo writes into it what kubelet and cloud controller would report.
type cluster struct {
	fabric    *fabric
	a, b      *node
	client    *host
	manifests string
	pods      map[string]*corev1.Pod // those of the shipped manifests, by name, until they run
}

// newCluster makes everything but pods. What there is must be removed even after an error. Documentation addresses: they exist only in the
// demo's namespaces.
func newCluster() (*cluster, error) {
	c := &cluster{
		a:         &node{host: host{name: "node-a", addrs: prefixes("192.0.2.11/24", "2001:db8:a::11/64")}, podCIDRs: prefixes("10.244.1.0/24", "fd00:244:1::/64")},
		b:         &node{host: host{name: "node-b", addrs: prefixes("203.0.113.12/24", "2001:db8:b::12/64")}, podCIDRs: prefixes("10.244.2.0/24", "fd00:244:2::/64")},
		client:    &host{name: "outside", addrs: prefixes("198.51.100.100/24", "2001:db8:c::100/64"), extra: prefixes("198.51.100.101/24", "2001:db8:c::101/64")},
		manifests: filepath.Join(work, "manifests"),
		pods:      map[string]*corev1.Pod{},
	}
	err := private()
	if err != nil {
		return c, err
	}
	if c.fabric, err = newFabric(); err != nil {
		return c, err
	}
	if err := c.fabric.connect(c.client); err != nil {
		return c, err
	}
	for _, n := range c.nodes() {
		if err := errors.Join(c.fabric.connect(&n.host), n.prepare()); err != nil {
			return c, err
		}
	}
	if err := os.MkdirAll(c.manifests, 0o755); err != nil {
		return c, err
	}
	return c, errors.Join(c.writeNodes(), c.writeShipped())
}

func prefixes(texts ...string) (out []netip.Prefix) {
	for _, s := range texts {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func (c *cluster) nodes() []*node {
	return []*node{c.a, c.b}
}

// writeNodes writes the Node objects.
func (c *cluster) writeNodes() error {
	for _, n := range c.nodes() {
		o := &corev1.Node{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"}, ObjectMeta: metav1.ObjectMeta{Name: n.name}}
		for _, p := range n.podCIDRs {
			o.Spec.PodCIDRs = append(o.Spec.PodCIDRs, p.String())
		}
		o.Spec.PodCIDR = o.Spec.PodCIDRs[0]
		for _, a := range n.addrs {
			o.Status.Addresses = append(o.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a.Addr().String()})
		}
		if err := c.writeObject(n.name, o); err != nil {
			return err
		}
	}
	return nil
}

// writeShipped writes the shipped manifests, all but the pods: those are written when they run, with their addresses.
func (c *cluster) writeShipped() error {
	files, err := filepath.Glob(filepath.Join(shipped, "*.yaml"))
	if err != nil || len(files) == 0 {
		return errors.Join(fmt.Errorf("no manifest in %s", shipped), err)
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			return err
		}
		var rest []string
		for doc := range strings.SplitSeq(string(text), "\n---\n") {
			p := &corev1.Pod{}
			if err := yaml.Unmarshal([]byte(doc), p); err == nil && p.Kind == "Pod" {
				c.pods[p.Name] = p
				continue
			}
			rest = append(rest, doc)
		}
		if err := c.write(filepath.Base(f), []byte(strings.Join(rest, "\n---\n"))); err != nil {
			return err
		}
	}
	return nil
}

// podRuns tells the agents of a pod and its addresses, as kubelet does.
func (c *cluster) podRuns(p *pod) error {
	o := c.pods[p.name]
	o.Status.Phase, o.Status.PodIP = corev1.PodRunning, p.addrs[0].String()
	for _, a := range p.addrs {
		o.Status.PodIPs = append(o.Status.PodIPs, corev1.PodIP{IP: a.String()})
	}
	return c.writeObject("pod-"+p.name, o)
}

func (c *cluster) writeObject(name string, o any) error {
	text, err := yaml.Marshal(o)
	if err != nil {
		return err
	}
	return c.write(name+".yaml", text)
}

// apply copies a manifest of shipped/later into the directory that the agents follow, over one of the same name.
func (c *cluster) apply(name string) error {
	text, err := os.ReadFile(filepath.Join(shipped, "later", name))
	if err != nil {
		return err
	}
	return c.write(name, text)
}

// withdraw removes what apply brought.
func (c *cluster) withdraw(name string) error {
	return os.Remove(filepath.Join(c.manifests, name))
}

// write replaces a file of the directory at once.
func (c *cluster) write(name string, text []byte) error {
	tmp := filepath.Join(c.manifests, "."+name)
	return errors.Join(os.WriteFile(tmp, text, 0o644), os.Rename(tmp, filepath.Join(c.manifests, name)))
}

// remove takes everything away that the end of the mount namespace does not.
func (c *cluster) remove() error {
	return errors.Join(c.a.killAgent(), c.b.killAgent(), removeNamespaces())
}
