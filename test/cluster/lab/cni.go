// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/margay-cni/margay/test/cluster/machine"
)

// podRange is one of a node's pod ranges and the node's address of the same family.
type podRange struct {
	prefix netip.Prefix
	via    netip.Addr
}

// podRanges waits until every node has registered and has its pod ranges, one of each family.
func (c *Cluster) podRanges(ctx context.Context) (map[string][]podRange, error) {
	ranges := map[string][]podRange{}
	err := poll(ctx, 2*time.Minute, 250*time.Millisecond, func() error {
		nodes, err := c.nodeObjects(ctx)
		if err != nil {
			return err
		}
		for _, n := range c.Nodes() {
			object, ok := nodes[n.Name]
			if !ok {
				return fmt.Errorf("node %s has not registered; %s", n.Name, tail(n.Log(Kubelet)))
			}
			prefixes, err := podRanges(object)
			if err != nil {
				return err
			}
			if want := len(c.PodRanges()); len(prefixes) != want {
				return fmt.Errorf("node %s has %d pod ranges, want %d", n.Name, len(prefixes), want)
			}
			ranges[n.Name] = nil
			for _, p := range prefixes {
				for _, a := range n.Addresses() {
					if a.Is4() == p.Addr().Is4() {
						ranges[n.Name] = append(ranges[n.Name], podRange{prefix: p, via: a})
					}
				}
			}
		}
		return nil
	})
	return ranges, err
}

// eachPodRange calls f for each pod range of each node.
func (c *Cluster) eachPodRange(ctx context.Context, f func(n *Node, r podRange) error) error {
	ranges, err := c.podRanges(ctx)
	if err != nil {
		return err
	}
	for _, n := range c.Nodes() {
		for _, r := range ranges[n.Name] {
			if err := f(n, r); err != nil {
				return err
			}
		}
	}
	return nil
}

// installCNI starts the cluster's network.
func (c *Cluster) installCNI(ctx context.Context, log *slog.Logger) error {
	switch c.CNI {
	case "reference":
		return c.installReference(ctx)
	case "margay":
		if !c.margayBuilt() {
			log.Warn("there is no image of Margay, so the nodes stay without network: make image", "image", c.margayImage())
			return nil
		}
		return c.InstallMargay(ctx)
	}
	return nil
}

// hasNetwork reports whether Up installed a network.
func (c *Cluster) hasNetwork() bool {
	return c.CNI == "reference" || c.CNI == "margay" && c.margayBuilt()
}

// installReference sets up what the harness is checked with: ptp and host-local with the nodes' pod ranges, static routes, kube-proxy.
func (c *Cluster) installReference(ctx context.Context) error {
	ranges, err := c.podRanges(ctx)
	if err != nil {
		return err
	}
	err = c.eachNode(func(n *Node) error {
		for _, p := range referencePlugins {
			if err := copyProgram(c.bin(p), n.Disk("/opt/cni/bin/"+p)); err != nil {
				return err
			}
		}
		if err := n.referenceFiles(ranges[n.Name]); err != nil {
			return err
		}
		err := n.SetService(KubeProxy, machine.Service{Argv: []string{c.bin("kube-proxy"), "--config=/etc/kubernetes/kube-proxy.json", "--v=2"}})
		if err != nil {
			return err
		}
		return n.Start(KubeProxy)
	})
	return errors.Join(err, c.referenceRoutes(ctx), c.Apply(ctx, kubeProxyBinding))
}

// referencePlugins are programs of go.mod's tool directives.
var referencePlugins = []string{"ptp", "host-local", "portmap"}

// referenceFiles writes the conflist and kube-proxy's configuration onto the node's disk: /etc is an overlay, so they are written from inside.
func (n *Node) referenceFiles(ranges []podRange) error {
	type object = map[string]any
	var subnets [][]object
	for _, r := range ranges {
		subnets = append(subnets, []object{{"subnet": r.prefix}})
	}
	conflist := object{"cniVersion": "1.0.0", "name": "reference", "plugins": []object{
		{"type": "ptp", "ipMasq": false, "ipam": object{
			"type": "host-local", "ranges": subnets, "dataDir": "/run/cni/ipam",
			"routes": pick(n.c.Family, object{"dst": "0.0.0.0/0"}, object{"dst": "::/0"})}},
		{"type": "portmap", "capabilities": object{"portMappings": true}},
	}}
	proxy := object{"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration", "mode": "nftables",
		"clientConnection": object{"kubeconfig": n.c.pki(KubeProxy + ".conf")}, "hostnameOverride": n.Name,
		"detectLocalMode": "ClusterCIDR", "clusterCIDR": join(n.c.PodRanges()),
		// The size of the connection table is the whole machine's.
		"conntrack": object{"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"}}
	return errors.Join(n.WriteJSON("/etc/cni/net.d/10-reference.conflist", conflist), n.WriteJSON("/etc/kubernetes/kube-proxy.json", proxy))
}

// WriteJSON writes a file inside the node.
func (n *Node) WriteJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return n.WriteFile(path, b)
}

// WriteFile writes a file inside the node, with the directories that it needs.
func (m *Machine) WriteFile(path string, content []byte) error {
	pid, err := m.PID()
	if err != nil {
		return err
	}
	root := fmt.Sprintf("/proc/%d/root", pid) // the machine's mounts, seen through its first process
	if err := os.MkdirAll(filepath.Join(root, filepath.Dir(path)), 0o755); err != nil {
		return err
	}
	temp := filepath.Join(root, path) + ".new"
	if err := os.WriteFile(temp, content, 0o644); err != nil {
		return err
	}
	return os.Rename(temp, filepath.Join(root, path))
}

// referenceRoutes gives every node that is on the routes to the other nodes' pods.
func (c *Cluster) referenceRoutes(ctx context.Context) error {
	return c.eachPodRange(ctx, func(n *Node, r podRange) error {
		for _, other := range c.Nodes() {
			if other.Number == n.Number || !other.Running() {
				continue
			}
			if err := other.route(r.prefix, r.via); err != nil {
				return err
			}
		}
		return nil
	})
}

const kubeProxyBinding = `apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: kube-proxy}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: system:node-proxier}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: system:kube-proxy}]
`

func copyProgram(from, to string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o755)
}
