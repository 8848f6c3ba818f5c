// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"path/filepath"

	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/pkg/agent"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/netns"
)

// contender is a way to give the nodes of a cluster a network: a CNI and what serves the services.
type contender struct {
	id, name string
	plugins  string // directory of the CNI plugins
	// conflist is a node's list of plugins.
	conflist func(*clusterNode) ([]byte, error)
	// daemons are the programs that run on a node, with their arguments; none is no service at all.
	daemons func(*clusterNode) ([][]string, error)
	// settled says whether a node is as it will be after a while, for those whose daemons put something off; nil: it is when they are at rest.
	settled func(*clusterNode) (bool, error)
	// routes gives every node routes to the pods of the others.
	routes bool
	// overlay has the nodes' own traffic go by a VXLAN device of the kernel.
	overlay bool
}

// onFirst is the contender with its daemons on the first node alone, for what needs no more.
func (c contender) onFirst() *contender {
	all := c.daemons
	c.daemons = func(on *clusterNode) ([][]string, error) {
		if on.number > 1 {
			return nil, nil
		}
		return all(on)
	}
	return &c
}

// Nodes without anything, for traffic between the nodes themselves: by the fabric, and by the kernel's own VXLAN over it, which no CNI that
// encapsulates can do without.
var (
	bare      = &contender{id: "bare", name: "host ↔ host"}
	bareVXLAN = &contender{id: "bare-vxlan", name: "host ↔ host, VXLAN", overlay: true}
)

// margayCluster is Margay with flags for its agent.
func (n *node) margayCluster(id, name string, flags ...string) *contender {
	return &contender{
		id: id, name: name, plugins: n.bin,
		conflist: func(on *clusterNode) ([]byte, error) {
			return list(map[string]any{
				"type": "margay", "bpffs": on.bpffs(), "runDir": on.run(), "logLevel": "error",
				"ipam": map[string]any{"type": "margay-ipam", "ranges": ranges(on.podRanges())},
			})
		},
		daemons: func(on *clusterNode) ([][]string, error) {
			argv := []string{filepath.Join(n.bin, "margay-agent"), "--node", on.name, "--kubeconfig", on.api.Kubeconfig(), "--state-dir", "",
				"--bpffs", on.bpffs(), "--run", on.run(), "--log-level", "warn"}
			return [][]string{append(argv, flags...)}, nil
		},
		settled: margaySettled,
	}
}

// margaySettled says whether the node's devices have their tcx links, where the kernel has any.
func margaySettled(on *clusterNode) (settled bool, err error) {
	d, err := datapath.Open(datapath.Config{BPFFS: on.bpffs(), Run: on.run()})
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if has, err := d.HasTCX(); !has || err != nil {
		return err == nil, err
	}
	err = netns.Do(on.path, func() error {
		settled = true
		for device, programs := range map[string][]string{
			"eth0": {bpf.ProgFromNetdev, bpf.ProgToNetdev}, agent.DefaultVXLANDevice: {bpf.ProgFromOverlay, bpf.ProgToOverlay},
		} {
			l, err := netlink.LinkByName(device)
			if err != nil {
				return err
			}
			for _, p := range programs {
				settled = settled && d.Linked(l.Attrs().Index, p)
			}
		}
		return nil
	})
	return settled, err
}

// referenceCluster is ptp, host-local and portmap with static routes between the nodes, and kube-proxy.
func (n *node) referenceCluster(mode string) *contender {
	return &contender{
		id: mode, name: "ptp + kube-proxy " + mode, plugins: n.bin, routes: true,
		conflist: func(on *clusterNode) ([]byte, error) {
			return list(
				map[string]any{"type": "ptp", "ipMasq": false, "ipam": map[string]any{
					"type": "host-local", "dataDir": filepath.Join(on.dir, "host-local"), "ranges": ranges(on.podRanges()),
					"routes": []any{map[string]any{"dst": "0.0.0.0/0"}, map[string]any{"dst": "::/0"}},
				}},
				map[string]any{"type": "portmap", "capabilities": map[string]any{"portMappings": true}},
			)
		},
		daemons: func(on *clusterNode) ([][]string, error) {
			config := filepath.Join(on.dir, "kube-proxy.json")
			return [][]string{{filepath.Join(n.bin, "kube-proxy"), "--config", config}}, on.writeJSON(config, proxyConfig(on, mode))
		},
	}
}

// proxyConfig is kube-proxy's own default but for the mode, the pods' ranges, and the size of the connection table, which is the whole
// machine's.
func proxyConfig(on *clusterNode, mode string) map[string]any {
	return map[string]any{
		"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration", "mode": mode,
		"clientConnection": map[string]any{"kubeconfig": on.api.Kubeconfig()}, "hostnameOverride": on.name,
		"detectLocalMode": "ClusterCIDR", "clusterCIDR": clusterPods4 + "," + clusterPods6, "oomScoreAdj": 0,
		"conntrack": map[string]any{"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
	}
}

// list is a configuration list of plugins.
func list(plugins ...map[string]any) ([]byte, error) {
	return json.Marshal(map[string]any{"cniVersion": cniVersion, "name": "cluster", "plugins": plugins})
}
