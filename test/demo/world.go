// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/netns"
)

const (
	conflist  = "conf/10-margay.conflist"
	manifests = "conf/demo"
	work      = "/run/margay-demo" // on a tmpfs of our own
)

// The network between the node and the client outside. Documentation addresses: they exist only in the demo's namespaces.
var (
	nodeAddrs   = []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("2001:db8:1::1/64")}
	clientAddrs = []netip.Prefix{netip.MustParsePrefix("192.0.2.100/24"), netip.MustParsePrefix("2001:db8:1::100/64")}
)

// pod is a network namespace that libcni has connected.
type pod struct {
	name  string
	ns    string
	addrs []netip.Addr // IPv4, IPv6
	took  time.Duration
}

// world is the demo's node, its pods and the client outside.
type world struct {
	node, client string // namespace files
	cni          *libcni.CNIConfig
	network      *libcni.NetworkConfigList
	pods         []*pod
	manifests    string
	agent        *exec.Cmd
	agentLog     *os.File
}

// build makes everything but pods.
func build() (*world, error) {
	if err := private(); err != nil {
		return nil, err
	}
	w := &world{manifests: filepath.Join(work, "manifests")}
	for _, dir := range []string{work, w.manifests} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	}
	if err := copyFiles(filepath.Join(manifests, "*.yaml"), w.manifests); err != nil {
		return nil, err
	}
	var err error
	if w.network, err = libcni.ConfListFromFile(conflist); err != nil {
		return nil, fmt.Errorf("read %s: %w", conflist, err)
	}
	bin, err := filepath.Abs("bin")
	if err != nil {
		return nil, err
	}
	// The plugin's log goes where a runtime would put it: elsewhere.
	log, err := os.Create(filepath.Join(work, "plugin.log"))
	if err != nil {
		return nil, err
	}
	exec := &invoke.DefaultExec{RawExec: &invoke.RawExec{Stderr: log}}
	w.cni = libcni.NewCNIConfigWithCacheDir([]string{bin}, filepath.Join(work, "cni"), exec)
	if w.node, err = newNamespace("node"); err != nil {
		return nil, err
	}
	if w.client, err = newNamespace("outside"); err != nil {
		return nil, err
	}
	return w, w.join()
}

// private makes /run and /sys/fs/bpf the demo's own. bpffs is hidden only where there is one: mounting it is Margay's job.
func private() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=0755"); err != nil {
		return fmt.Errorf("mount a private /run: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs("/sys/fs/bpf", &st); err == nil && st.Type == unix.BPF_FS_MAGIC {
		if err := unix.Mount("bpf", "/sys/fs/bpf", "bpf", 0, ""); err != nil {
			return fmt.Errorf("mount a private bpffs: %w", err)
		}
	}
	return nil
}

func copyFiles(pattern, to string) error {
	files, err := filepath.Glob(pattern)
	if err != nil || len(files) == 0 {
		return errors.Join(fmt.Errorf("no file matches %s", pattern), err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return err
		}
		tmp := filepath.Join(to, "."+filepath.Base(f))
		if err := errors.Join(os.WriteFile(tmp, b, 0o644), os.Rename(tmp, filepath.Join(to, filepath.Base(f)))); err != nil {
			return err
		}
	}
	return nil
}

// newNamespace makes a network namespace, loopback up, bound to a file.
func newNamespace(name string) (string, error) {
	path := filepath.Join(work, name+".netns")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return "", err
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			return errors.Join(netlink.LinkSetUp(lo), unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""))
		}()
	}()
	if err := <-done; err != nil {
		return "", fmt.Errorf("make network namespace %s: %w", name, err)
	}
	return path, nil
}

// join connects node and client by a cable.
func (w *world) join() error {
	peer, err := netns.Open(w.client)
	if err != nil {
		return err
	}
	defer peer.Close()
	err = netns.Do(w.node, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "eth0"
		veth := netlink.NewVeth(attrs)
		veth.PeerName, veth.PeerNamespace = "eth0", netlink.NsFd(peer.FD())
		return errors.Join(netlink.LinkAdd(veth), configure("eth0", nodeAddrs))
	})
	if err != nil {
		return fmt.Errorf("join node and client: %w", err)
	}
	return netns.Do(w.client, func() error { return configure("eth0", clientAddrs) })
}

func configure(device string, addrs []netip.Prefix) error {
	l, err := netlink.LinkByName(device)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		n := &net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Addr().BitLen())}
		if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: n, Flags: unix.IFA_F_NODAD}); err != nil {
			return err
		}
	}
	return netlink.LinkSetUp(l)
}

// attachment is what libcni needs to know of a pod: what kubelet and containerd would say.
func (p *pod) attachment() *libcni.RuntimeConf {
	return &libcni.RuntimeConf{
		ContainerID: "demo-" + p.name, NetNS: p.ns, IfName: "eth0",
		Args: [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "shop"}, {"K8S_POD_NAME", p.name}},
	}
}

// addPod runs ADD through libcni, as a container runtime does.
func (w *world) addPod(ctx context.Context, name string) (*pod, error) {
	p := &pod{name: name}
	var err error
	if p.ns, err = newNamespace(name); err != nil {
		return nil, err
	}
	var result *types100.Result
	err = netns.Do(w.node, func() error {
		start := time.Now()
		r, err := w.cni.AddNetworkList(ctx, w.network, p.attachment())
		p.took = time.Since(start)
		if err != nil {
			return err
		}
		result, err = types100.NewResultFromResult(r)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("ADD of %s: %w", name, err)
	}
	for _, ip := range result.IPs {
		a, _ := netip.AddrFromSlice(ip.Address.IP)
		p.addrs = append(p.addrs, a.Unmap())
	}
	w.pods = append(w.pods, p)
	return p, nil
}

// delPods runs DEL for every pod.
func (w *world) delPods(ctx context.Context) error {
	var errs []error
	for _, p := range w.pods {
		errs = append(errs, netns.Do(w.node, func() error { return w.cni.DelNetworkList(ctx, w.network, p.attachment()) }))
	}
	w.pods = nil
	return errors.Join(errs...)
}

// startAgent runs margay-agent on the node.
func (w *world) startAgent() error {
	var err error
	if w.agentLog, err = os.Create(filepath.Join(work, "agent.log")); err != nil {
		return err
	}
	w.agent = exec.Command("bin/margay-agent", "--manifests", w.manifests, "--node", "demo")
	w.agent.Stdout, w.agent.Stderr = w.agentLog, w.agentLog
	return netns.Do(w.node, w.agent.Start)
}

// killAgent ends the agent without a chance to say goodbye.
func (w *world) killAgent() error {
	if w.agent == nil {
		return nil
	}
	err := w.agent.Process.Kill()
	_ = w.agent.Wait() // it was killed: that is no news
	w.agent = nil
	return errors.Join(err, w.agentLog.Close())
}

// ctl prepares a margayctl command on the node.
func (w *world) ctl(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "bin/margayctl", args...)
}

// leftovers lists what is still there after every pod is gone.
func (w *world) leftovers() (left []string, err error) {
	err = netns.Do(w.node, func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			if name := l.Attrs().Name; name != "lo" && name != "eth0" {
				left = append(left, "device "+name)
			}
		}
		return err
	})
	records, err2 := filepath.Glob("/run/margay/endpoints/*.json")
	left = append(left, records...)
	return left, errors.Join(err, err2)
}

// remove takes the node and the client away. Mounts and /run end with the mount namespace.
func (w *world) remove() error {
	errs := []error{w.killAgent()}
	paths, err := filepath.Glob(filepath.Join(work, "*.netns"))
	errs = append(errs, err)
	for _, path := range paths {
		errs = append(errs, unix.Unmount(path, unix.MNT_DETACH), os.Remove(path))
	}
	return errors.Join(errs...)
}

// count decodes a JSON document of margayctl and counts the list under key.
func count(doc []byte, key string) (int, error) {
	var lists map[string]json.RawMessage
	if err := json.Unmarshal(doc, &lists); err != nil {
		return 0, err
	}
	var list []json.RawMessage
	err := json.Unmarshal(lists[key], &list)
	return len(list), err
}
