// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/pkg/netns"
)

const conflist = "conf/10-margay.conflist"

// node is a machine: a network namespace, and directories of its own.
type node struct {
	host
	podCIDRs []netip.Prefix // IPv4, IPv6
	home     string
	cni      *libcni.CNIConfig
	network  *libcni.NetworkConfigList
	pods     []*pod
	agent    *exec.Cmd
	agentLog *os.File
}

// pod is a network namespace that libcni has connected.
type pod struct {
	name  string
	ns    string
	node  *node
	addrs []netip.Addr // IPv4, IPv6
	took  time.Duration
}

func (n *node) run() string   { return filepath.Join(n.home, "run") }
func (n *node) bpffs() string { return filepath.Join(n.home, "bpffs") }

// prepare makes the node's directories and reads the conflist for it.
func (n *node) prepare() error {
	n.home = filepath.Join(work, n.name)
	if err := os.MkdirAll(n.run(), 0o755); err != nil {
		return err
	}
	if err := n.configure(); err != nil {
		return err
	}
	bin, err := filepath.Abs("bin")
	if err != nil {
		return err
	}
	// The plugin's log goes where a runtime would put it: elsewhere.
	log, err := os.Create(filepath.Join(n.home, "plugin.log"))
	if err != nil {
		return err
	}
	exec := &invoke.DefaultExec{RawExec: &invoke.RawExec{Stderr: log}}
	n.cni = libcni.NewCNIConfigWithCacheDir([]string{bin}, filepath.Join(n.home, "cni"), exec)
	return nil
}

// configure reads the shipped conflist and puts in what is this node's: its address ranges, and, because both nodes are one machine here,
// its directories.
func (n *node) configure() error {
	text, err := os.ReadFile(conflist)
	if err != nil {
		return err
	}
	var list map[string]any
	if err := json.Unmarshal(text, &list); err != nil {
		return fmt.Errorf("read %s: %w", conflist, err)
	}
	plugin := list["plugins"].([]any)[0].(map[string]any)
	plugin["runDir"], plugin["bpffs"] = n.run(), n.bpffs()
	var ranges []any
	for _, p := range n.podCIDRs {
		ranges = append(ranges, []any{map[string]any{"subnet": p.String()}})
	}
	plugin["ipam"].(map[string]any)["ranges"] = ranges
	if text, err = json.Marshal(list); err != nil {
		return err
	}
	n.network, err = libcni.NetworkConfFromBytes(text)
	return err
}

// attachment is what libcni needs to know of a pod: what kubelet and containerd would say.
func (p *pod) attachment() *libcni.RuntimeConf {
	return &libcni.RuntimeConf{
		ContainerID: "demo-" + p.name, NetNS: p.ns, IfName: "eth0",
		Args: [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "shop"}, {"K8S_POD_NAME", p.name}},
	}
}

// addPod runs ADD through libcni, as a container runtime does.
func (n *node) addPod(ctx context.Context, name string) (*pod, error) {
	p := &pod{name: name, node: n}
	var err error
	if p.ns, err = newNamespace(name); err != nil {
		return nil, err
	}
	var result *types100.Result
	err = netns.Do(n.ns, func() error {
		start := time.Now()
		r, err := n.cni.AddNetworkList(ctx, n.network, p.attachment())
		p.took = time.Since(start)
		if err != nil {
			return err
		}
		result, err = types100.NewResultFromResult(r)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("ADD of %s on %s: %w", name, n.name, err)
	}
	for _, ip := range result.IPs {
		a, _ := netip.AddrFromSlice(ip.Address.IP)
		p.addrs = append(p.addrs, a.Unmap())
	}
	n.pods = append(n.pods, p)
	return p, nil
}

// delPods runs DEL for every pod.
func (n *node) delPods(ctx context.Context) error {
	var errs []error
	for _, p := range n.pods {
		errs = append(errs, netns.Do(n.ns, func() error { return n.cni.DelNetworkList(ctx, n.network, p.attachment()) }))
	}
	n.pods = nil
	return errors.Join(errs...)
}

// startAgent runs margay-agent on the node.
func (n *node) startAgent(manifests string) error {
	var err error
	if n.agentLog, err = os.Create(filepath.Join(n.home, "agent.log")); err != nil {
		return err
	}
	n.agent = exec.Command("bin/margay-agent", "--manifests", manifests, "--node", n.name, "--run", n.run(), "--bpffs", n.bpffs())
	n.agent.Stdout, n.agent.Stderr = n.agentLog, n.agentLog
	return netns.Do(n.ns, n.agent.Start)
}

// killAgent ends the agent without a chance to say goodbye.
func (n *node) killAgent() error {
	if n.agent == nil || n.agent.Process == nil {
		return nil
	}
	err := n.agent.Process.Kill()
	_ = n.agent.Wait() // it was killed: that is no news
	n.agent = nil
	return errors.Join(err, n.agentLog.Close())
}

// ctl prepares a margayctl command on the node; start it by netns.Do.
func (n *node) ctl(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "bin/margayctl", append(args, "--run", n.run(), "--bpffs", n.bpffs())...)
}

// ask runs margayctl on the node and returns what it printed.
func (n *node) ask(ctx context.Context, args ...string) (out string, err error) {
	err = netns.Do(n.ns, func() error {
		b, err := n.ctl(ctx, args...).Output()
		out = string(b)
		return err
	})
	return out, err
}

// uninstall runs margay-install --uninstall on the node and returns how many things it removed.
func (n *node) uninstall(ctx context.Context) (removed int, err error) {
	err = netns.Do(n.ns, func() error {
		args := []string{"--uninstall", "--run-dir", n.run(), "--bpffs", n.bpffs()}
		for _, dir := range []string{"cni-bin-dir", "cni-conf-dir", "state-dir"} {
			args = append(args, "--"+dir, filepath.Join(n.home, "installed", dir))
		}
		out, err := exec.CommandContext(ctx, "bin/margay-install", args...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, strings.TrimSpace(string(out)))
		}
		removed = strings.Count(string(out), "\n")
		return nil
	})
	return removed, err
}

// leftovers lists what a node without pods and without Margay should not have: devices, pins and records.
func (n *node) leftovers() (left []string, err error) {
	err = netns.Do(n.ns, func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			if name := l.Attrs().Name; name != "lo" && name != "eth0" {
				left = append(left, "device "+name)
			}
		}
		return err
	})
	errs := []error{err}
	for _, dir := range []string{n.run(), n.bpffs()} {
		files, err := os.ReadDir(dir)
		for _, f := range files {
			left = append(left, filepath.Join(dir, f.Name()))
		}
		if !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return left, errors.Join(errs...)
}
