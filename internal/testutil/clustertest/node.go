// SPDX-License-Identifier: Apache-2.0

package clustertest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/containernetworking/cni/libcni"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"github.com/margay-cni/margay/conf"
	"github.com/margay-cni/margay/pkg/datapath"
)

// Node is a machine of the cluster.
type Node struct {
	*Host
	// Index is the number in the node's addresses and pod ranges.
	Index int
	// PodCIDRs are its pods' ranges, IPv4 and IPv6.
	PodCIDRs []netip.Prefix
	// Config says where its bpffs and its run directory are.
	Config datapath.Config
	// Cgroup is the directory of its cgroup2, empty where the machine has no such hierarchy. Command starts programs in it.
	Cgroup string
	// Object is what the agents are told of it. A test that changes it calls Apply.
	Object *corev1.Node

	// NICs are its devices, eth0 first.
	NICs []NIC

	cni   *libcni.CNIConfig
	conf  *libcni.NetworkConfigList
	pods  []*Pod
	agent *process
}

// NIC is a node's device on a network.
type NIC struct {
	Device  string
	Network *Network
	Addrs   []netip.Addr
}

// AddNode adds a node to a running cluster and starts its agent. The manifest names it; WaitSettled waits until everybody knows.
func (c *Cluster) AddNode(segment *Network) *Node {
	c.t.Helper()
	n := c.newNode(segment)
	c.meetNeighbours()
	c.write()
	if !c.options.NoAgents {
		c.startAgent(n)
	}
	return n
}

// newNode makes a node and its object.
func (c *Cluster) newNode(segment *Network) *Node {
	c.t.Helper()
	c.lastNode++
	i := c.lastNode
	n := &Node{Host: c.newHost(fmt.Sprintf("n%d", i)), Index: i, PodCIDRs: podCIDRs(i)}
	home := filepath.Join(c.dir, n.Name)
	n.Config = datapath.Config{BPFFS: filepath.Join(home, "bpf"), Run: filepath.Join(home, "run")}
	c.must(os.MkdirAll(n.Config.Run, 0o755))
	c.t.Cleanup(func() { c.unmount(n) })
	c.makeCgroup(n)
	n.Addrs = c.AttachNode(n, segment).Addrs
	n.NS.Do(func() { c.defaultRoutes(segment) })
	c.podRoutes(n, c.RouteVia)
	n.cni = libcni.NewCNIConfigWithCacheDir([]string{filepath.Dir(c.binary("margay"))}, filepath.Join(home, "cni"), nil)
	n.conf = c.conflist(n)
	n.Object = nodeObject(n)
	c.nodes = append(c.nodes, n)
	c.put(n.Object)
	return n
}

// conflist is the shipped configuration list with the node's directories and ranges.
func (c *Cluster) conflist(n *Node) *libcni.NetworkConfigList {
	c.t.Helper()
	var list map[string]any
	c.must(json.Unmarshal(conf.Conflist, &list))
	plugin := list["plugins"].([]any)[0].(map[string]any)
	plugin["bpffs"], plugin["runDir"], plugin["logLevel"] = n.Config.BPFFS, n.Config.Run, "error"
	var ranges []any
	for _, p := range n.PodCIDRs {
		ranges = append(ranges, []any{map[string]any{"subnet": p.String()}})
	}
	plugin["ipam"].(map[string]any)["ranges"] = ranges
	text, err := json.Marshal(list)
	c.must(err)
	out, err := libcni.NetworkConfFromBytes(text)
	c.must(err)
	return out
}

// AttachNode gives a node another device, eth1 and so on, on a network. Its addresses are not in the node's object, and there are no routes
// by it but the network's own.
func (c *Cluster) AttachNode(n *Node, network *Network) NIC {
	c.t.Helper()
	nic := NIC{Device: fmt.Sprintf("eth%d", len(n.NICs)), Network: network}
	nic.Addrs = c.attach(n.Host, network, nic.Device, 10+n.Index)
	n.NICs = append(n.NICs, nic)
	return nic
}

// podRoutes changes the router's routes to the node's pods, where it has any.
func (c *Cluster) podRoutes(n *Node, change func(netip.Prefix, *Host)) {
	c.t.Helper()
	for _, p := range n.PodCIDRs {
		if c.options.PodRoutes && n.Addr(p.Addr().Is6()).IsValid() {
			change(p, n.Host)
		}
	}
}

// Readdress gives a node other addresses on its first network, those with the last number, as a lease that ends does: the old ones go first.
// The router's routes to its pods and its object in the manifest follow.
func (c *Cluster) Readdress(n *Node, number int) {
	c.t.Helper()
	nic := &n.NICs[0]
	nic.Addrs = nil
	for _, p := range nic.Network.Prefixes {
		nic.Addrs = append(nic.Addrs, last(p, number))
	}
	n.NS.Do(func() {
		l, err := netlink.LinkByName(nic.Device)
		c.must(err)
		for i, old := range n.Addrs {
			c.must(netlink.AddrDel(l, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(old, nic.Network.Prefixes[i].Bits()))}))
		}
		c.up(nic.Device, nic.Addrs, nic.Network.Prefixes)
		c.defaultRoutes(nic.Network)
	})
	n.Addrs = nic.Addrs
	c.meetNeighbours()
	c.podRoutes(n, c.RouteVia)
	n.Object.Status.Addresses = nodeAddresses(n.Addrs)
	c.Apply(n.Object)
}

// SetPodCIDRs gives a node other ranges: for the pods that are added from now on, on the router, and in the node's object.
func (c *Cluster) SetPodCIDRs(n *Node, v4, v6 netip.Prefix) {
	c.t.Helper()
	c.podRoutes(n, c.Unroute)
	n.PodCIDRs = []netip.Prefix{v4, v6}
	c.podRoutes(n, c.RouteVia)
	n.conf = c.conflist(n)
	n.Object.Spec.PodCIDR, n.Object.Spec.PodCIDRs = v4.String(), []string{v4.String(), v6.String()}
	c.Apply(n.Object)
}

// RemoveNode takes a node away for good: its object and those of its pods, its agent, its cables, its namespace.
func (c *Cluster) RemoveNode(n *Node) {
	c.t.Helper()
	c.KillAgent(n)
	for _, p := range n.pods {
		delete(c.objects, objectKey(p.Object))
		p.NS.Delete()
	}
	n.pods = nil
	for _, nic := range n.NICs {
		c.detach(n.Host, nic.Device)
	}
	for _, network := range c.networks {
		network.members = slices.DeleteFunc(network.members, func(h *Host) bool { return h == n.Host })
	}
	c.podRoutes(n, c.Unroute)
	n.NS.Delete()
	c.nodes = slices.DeleteFunc(c.nodes, func(other *Node) bool { return other == n })
	c.Delete(n.Object)
}

// Command prepares a program that runs on the node: in its network namespace, provided that Start is called inside n.NS.Do, and in its
// cgroup. The caller ends it before the test does.
func (n *Node) Command(program string, args ...string) *exec.Cmd {
	cmd := exec.Command(program, args...)
	if n.Cgroup != "" {
		if dir, err := os.Open(n.Cgroup); err == nil {
			n.t.Cleanup(func() { dir.Close() })
			cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
		} else {
			n.t.Errorf("open the node's cgroup: %v", err)
		}
	}
	return cmd
}

// makeCgroup gives the node a cgroup of its own.
func (c *Cluster) makeCgroup(n *Node) {
	c.t.Helper()
	for _, root := range []string{"/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
		var st unix.Statfs_t
		if err := unix.Statfs(root, &st); err != nil || st.Type != unix.CGROUP2_SUPER_MAGIC {
			continue
		}
		dir, err := os.MkdirTemp(root, "margay-"+n.Name+"-*")
		if errors.Is(err, unix.EROFS) || errors.Is(err, fs.ErrPermission) {
			continue
		}
		c.must(err)
		n.Cgroup = dir
		c.t.Cleanup(func() {
			// The kernel may still be taking leave of a process that has been waited for.
			var err error
			if !c.within(patience, func() bool { err = unix.Rmdir(dir); return err == nil }) {
				c.t.Errorf("remove cgroup %s: %v", dir, err)
			}
		})
		return
	}
}

// unmount takes the node's bpffs away, and with it every pinned map and program.
func (c *Cluster) unmount(n *Node) {
	err := unix.Unmount(n.Config.BPFFS, unix.MNT_DETACH)
	// EINVAL: it was never mounted, because neither an agent nor a pod was there.
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EINVAL) {
		c.t.Errorf("unmount bpffs of %s: %v", n.Name, err)
	}
}
