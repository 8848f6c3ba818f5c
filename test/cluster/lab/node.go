// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/margay-cni/margay/test/cluster/machine"
)

// The nodes' services.
const (
	Containerd = "containerd"
	Kubelet    = "kubelet"
	KubeProxy  = "kube-proxy" // with the CNI reference only
)

// Paths inside a node.
const (
	containerdSocket  = "/run/containerd/containerd.sock"
	kubeletKubeconfig = "/etc/kubernetes/kubelet.conf"
)

// Node is a machine that runs pods.
type Node struct {
	Machine
	Number int // 1 for node1
}

// Addresses returns the node's addresses in the fabric, one for each family of the cluster.
func (n *Node) Addresses() []netip.Addr {
	return addresses(n.c.fabricPrefixes(), byte(nodeNumber+n.Number))
}

// define makes the directory of a new machine.
func (m *Machine) define(s machine.Spec) error {
	if err := os.MkdirAll(m.dir, 0o755); err != nil {
		return err
	}
	return machine.WriteSpec(m.dir, s)
}

// kubeletSysctls are the machine-wide settings that kubelet insists on, with the values that it wants. It sees them, and the real machine
// keeps its own: kernel.panic_on_oops would end all of it at the first fault of a BPF program under test.
var kubeletSysctls = map[string]string{
	"vm/overcommit_memory": "1", "vm/panic_on_oom": "0",
	"kernel/panic": "10", "kernel/panic_on_oops": "1",
	"kernel/keys/root_maxkeys": "1000000", "kernel/keys/root_maxbytes": "25000000",
}

func (n *Node) spec() (machine.Spec, error) {
	files := hostFiles(n.Name)
	files["/etc/containerd/config.toml"] = containerdConfig
	config, err := n.kubeletConfig()
	if err != nil {
		return machine.Spec{}, err
	}
	files["/etc/kubernetes/kubelet.json"] = config
	// Where kubeadm puts it, too: Margay's agent learns from it how to reach the API server.
	kubeconfig, err := os.ReadFile(n.c.pki(n.Name + ".conf"))
	if err != nil {
		return machine.Spec{}, err
	}
	files[kubeletKubeconfig] = string(kubeconfig)
	var addrs []string
	for _, a := range n.Addresses() {
		addrs = append(addrs, a.String())
	}
	return machine.Spec{
		Hostname: n.Name, Keep: []string{n.c.Dir}, Cgroups: n.c.cgroups, Sysctls: kubeletSysctls, Files: files,
		Services: map[string]machine.Service{
			Containerd: {Argv: []string{n.c.bin("containerd"), "--config", "/etc/containerd/config.toml"}},
			Kubelet: {Argv: []string{n.c.bin("kubelet"), "--config=/etc/kubernetes/kubelet.json", "--kubeconfig=" + kubeletKubeconfig,
				"--hostname-override=" + n.Name, "--node-ip=" + strings.Join(addrs, ","), "--cert-dir=/var/lib/kubelet/pki",
				fmt.Sprintf("--node-labels=topology.kubernetes.io/zone=zone%d", n.Number), "--v=2"}},
		},
	}, nil
}

// containerdConfig is for containerd 2.4. NRI wants a socket at a fixed path. Without CAP_SYS_RESOURCE, which test machines may lack, no
// process' OOM score may be lowered.
const containerdConfig = `version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "` + containerdSocket + `"
[plugins.'io.containerd.nri.v1.nri']
  disable = true
[plugins.'io.containerd.cri.v1.images']
  snapshotter = 'overlayfs'
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = 'registry.k8s.io/pause:3.10.2'
[plugins.'io.containerd.cri.v1.runtime']
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = 'io.containerd.runc.v2'
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
      SystemdCgroup = false
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ['/opt/cni/bin']
    conf_dir = '/etc/cni/net.d'
    max_conf_num = 1
    use_internal_loopback = true
`

// kubeletConfig is for kubelet 1.37. Its own directories for volume plugins are below /var, because /usr is the real machine's.
func (n *Node) kubeletConfig() (string, error) {
	type object = map[string]any
	b, err := json.MarshalIndent(object{
		"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
		"failCgroupV1": false, "cgroupDriver": "cgroupfs", "enforceNodeAllocatable": []string{"pods"},
		"failSwapOn": false, "protectKernelDefaults": false, "oomScoreAdj": 0,
		"containerRuntimeEndpoint": "unix://" + containerdSocket,
		"clusterDNS":               []string{n.c.DNSAddress().String()}, "clusterDomain": Domain, "resolvConf": "/etc/resolv.conf",
		"authentication":         object{"anonymous": object{"enabled": false}, "webhook": object{"enabled": true}, "x509": object{"clientCAFile": n.c.pki("ca.crt")}},
		"authorization":          object{"mode": "Webhook"},
		"makeIPTablesUtilChains": false,
		"volumePluginDir":        "/var/lib/kubelet/volume-plugins",
		// Disk space is the real machine's, and nobody pulls an image that was removed.
		"imageGCHighThresholdPercent": 100,
		"evictionHard":                object{"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%", "nodefs.inodesFree": "1%"},
		"enableSystemLogHandler":      true, "maxPods": 250,
	}, "", "  ")
	return string(b), err
}

// start starts the node's machine, containerd and kubelet.
func (n *Node) start() error {
	if err := n.powerOn(n.c.plugNode(n)); err != nil {
		return err
	}
	if err := n.Start(Containerd); err != nil {
		return err
	}
	return n.Start(Kubelet)
}

// Start starts a service that does not run. Kubelet waits for nothing, and ends when containerd does not answer: so it is started when
// containerd does.
func (n *Node) Start(service string) error {
	if service != Kubelet {
		return n.Machine.Start(service)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if err := n.waitContainerd(ctx); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(n.dir, kubeletFile), []byte(time.Now().String()), 0o600); err != nil {
		return err
	}
	return n.Machine.Start(Kubelet)
}

// kubeletFile was written when kubelet was started the last time.
const kubeletFile = "kubelet-started"

func (m *Machine) kubeletStarted() (time.Time, error) {
	info, err := os.Stat(filepath.Join(m.dir, kubeletFile))
	if err != nil {
		return time.Time{}, err
	}
	return info.ModTime(), nil
}

func (n *Node) waitContainerd(ctx context.Context) error {
	err := poll(ctx, time.Minute, 100*time.Millisecond, func() error {
		_, err := n.ctr(ctx, "version")
		return err
	})
	if err != nil {
		return fmt.Errorf("wait for containerd on %s: %w; %s", n.Name, err, tail(n.Log(Containerd)))
	}
	return nil
}

func (n *Node) ctr(ctx context.Context, args ...string) (string, error) {
	return n.Output(ctx, append([]string{n.c.bin("ctr"), "--address", containerdSocket, "--namespace", "k8s.io"}, args...)...)
}

// ImportImages gives the node's containerd the images in docker-archives.
func (n *Node) ImportImages(ctx context.Context, archives ...string) error {
	for _, a := range archives {
		if err := n.importImage(ctx, a); err != nil {
			return fmt.Errorf("import %s on %s: %w", filepath.Base(a), n.Name, err)
		}
	}
	return nil
}

// importImage reads the archive outside of the node, so that it may lie anywhere.
func (n *Node) importImage(ctx context.Context, archive string) error {
	f, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	argv := []string{n.c.bin("ctr"), "--address", containerdSocket, "--namespace", "k8s.io", "images", "import", "--local", "-"}
	cmd, err := n.Command(ctx, argv...)
	if err != nil {
		return err
	}
	cmd.Stdin = f
	_, err = output(cmd, argv)
	return err
}

// Reboot switches the node off and on again: all its processes, namespaces, mounts and cgroups are new, /run and the BPF file system are
// empty, the disk is as it was. It returns when containerd runs; the node becomes Ready later (WaitReady).
func (n *Node) Reboot(ctx context.Context) error {
	if err := n.PowerOff(); err != nil {
		return err
	}
	return n.PowerOn(ctx)
}

// PowerOn starts a node that was switched off.
func (n *Node) PowerOn(ctx context.Context) error {
	if err := n.start(); err != nil {
		return err
	}
	if n.c.CNI != "reference" {
		return nil
	}
	return errors.Join(n.c.referenceRoutes(ctx), n.Start(KubeProxy))
}

// eachNode calls f for every node at once.
func (c *Cluster) eachNode(f func(n *Node) error) error {
	var g errgroup.Group
	for _, n := range c.Nodes() {
		g.Go(func() error { return f(n) })
	}
	return g.Wait()
}
