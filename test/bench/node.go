// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/netns"
)

// node is this process's network namespace, with a datapath, and a directory for all that the plugins keep.
type node struct {
	bin string // directory of the built binaries
	dir string // tmpfs: what the plugins write costs the same for all of them
	cfg datapath.Config
	dp  *datapath.Datapath
}

// stateDir is where the programs keep everything, below the directory of the binaries.
func stateDir(bin string) string { return filepath.Join(bin, "state") }

type mount struct{ path, filesystem string }

// sharedState is where the programs of a CNI keep what they were not told to keep elsewhere: the run has it to itself.
var sharedState = []mount{{"/run", "tmpfs"}, {"/var/lib/cni", "tmpfs"}, {"/sys/fs/bpf", "bpf"}}

// makeMountPoints makes the directories of sharedState that are not there, and returns what takes them away again.
func makeMountPoints() (remove func(), err error) {
	var made []string
	remove = func() {
		for _, path := range made {
			_ = os.Remove(path) // somebody else's by now, if there is something in it
		}
	}
	for _, place := range sharedState {
		if err := os.Mkdir(place.path, 0o755); err == nil {
			made = append(made, place.path)
		} else if !os.IsExist(err) {
			return remove, err
		}
	}
	return remove, nil
}

func newNode(ctx context.Context, bin string) (*node, error) {
	n := &node{bin: bin, dir: stateDir(bin)}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return nil, fmt.Errorf("make mounts private: %w", err)
	}
	if err := os.Mkdir(n.dir, 0o755); err != nil {
		return nil, err
	}
	for _, place := range append([]mount{{n.dir, "tmpfs"}}, sharedState...) {
		if err := unix.Mount(place.filesystem, place.path, place.filesystem, 0, ""); err != nil {
			return nil, fmt.Errorf("mount %s on %s: %w", place.filesystem, place.path, err)
		}
	}
	if err := loopbackUp(); err != nil {
		return nil, err
	}
	n.cfg = datapath.Config{BPFFS: filepath.Join(n.dir, "bpf"), Run: filepath.Join(n.dir, "run")}
	var err error
	if n.dp, err = datapath.Ensure(ctx, n.cfg); err != nil {
		return nil, fmt.Errorf("load the datapath: %w", err)
	}
	return n, nil
}

func (n *node) close() error {
	return n.dp.Close()
}

func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring lo up: %w", err)
	}
	return nil
}

// namespaceSysctls are the same in every pod, whoever connects it. Without duplicate address detection, because ptp waits for its end (a
// second and more) and Margay need not; without it both do the same work. tcp_tw_reuse lets a client connect more often than it has ports.
var namespaceSysctls = map[string]string{
	"net/ipv6/conf/default/accept_dad": "0",
	"net/ipv6/conf/all/accept_dad":     "0",
	"net/ipv4/tcp_tw_reuse":            "1",
	"net/ipv4/ip_local_port_range":     "10000 65000",
}

// namespace makes a pod's network namespace and returns its path.
func (n *node) namespace(name string) (string, error) {
	path := filepath.Join(n.dir, "ns-"+name)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return "", err
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			var errs []error
			for key, value := range namespaceSysctls {
				errs = append(errs, os.WriteFile(filepath.Join("/proc/sys", key), []byte(value), 0))
			}
			return errors.Join(append(errs, loopbackUp(), unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""))...)
		}()
	}()
	if err := <-done; err != nil {
		return "", fmt.Errorf("make network namespace: %w", err)
	}
	return path, nil
}

// namespaces makes several.
func (n *node) namespaces(prefix string, count int) ([]string, error) {
	var paths []string
	for i := range count {
		path, err := n.namespace(fmt.Sprintf("%s%d", prefix, i))
		if err != nil {
			return nil, err
		}
		paths = append(paths, path)
	}
	return paths, nil
}

// place is somewhere that traffic starts or ends: a namespace and its addresses.
type place struct {
	path  string
	addrs []netip.Addr // IPv4, IPv6
}

func (p place) addr(v6 bool) netip.Addr {
	for _, a := range p.addrs {
		if a.Is6() == v6 {
			return a
		}
	}
	return netip.Addr{}
}

// pod adds a pod through the plugin, dual stack.
func (n *node) pod(ctx context.Context, name string) (place, *added, error) {
	return n.podWith(ctx, name, nil)
}

// podWith adds keys to the plugin's configuration.
func (n *node) podWith(ctx context.Context, name string, keys map[string]any) (place, *added, error) {
	path, err := n.namespace(name)
	if err != nil {
		return place{}, nil, err
	}
	_, out, err := n.margayWith(keys, "pods", "10.244.0.0/16", "fd00:244::/64").run(ctx, "ADD", name, path)
	if err != nil {
		return place{}, nil, err
	}
	a, err := parseAdded(out)
	if err != nil {
		return place{}, nil, err
	}
	return place{path: path, addrs: a.addrs}, a, nil
}

// barePair joins two new namespaces by a veth pair, with no plugin and no program.
func (n *node) barePair(number int) (a, b place, err error) {
	ends := []*place{&a, &b}
	for i, end := range ends {
		if end.path, err = n.namespace(fmt.Sprintf("bare%d-%d", number, i)); err != nil {
			return a, b, err
		}
		end.addrs = []netip.Addr{
			netip.AddrFrom4([4]byte{10, 99, byte(number), byte(i + 1)}), netip.MustParseAddr(fmt.Sprintf("fd00:99:0:%x::%x", number, i+1)),
		}
	}
	peer, err := netns.Open(b.path)
	if err != nil {
		return a, b, err
	}
	defer func() { err = errors.Join(err, peer.Close()) }()
	err = netns.Do(a.path, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "eth0"
		veth := netlink.NewVeth(attrs)
		veth.PeerName, veth.PeerNamespace = "eth0", netlink.NsFd(peer.FD())
		return netlink.LinkAdd(veth)
	})
	for _, end := range ends {
		err = errors.Join(err, netns.Do(end.path, end.configure))
	}
	return a, b, err
}

// configure gives eth0 the place's addresses. The calling thread is in its namespace.
func (p *place) configure() error { return p.configureDevice("eth0") }

// configureDevice does the same to another device.
func (p *place) configureDevice(name string) error {
	device, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	for _, a := range p.addrs {
		bits := 24
		if a.Is6() {
			bits = 64
		}
		prefix := netip.PrefixFrom(a, bits).String()
		na, err := netlink.ParseAddr(prefix)
		if err != nil {
			return err
		}
		na.Flags = unix.IFA_F_NODAD
		if err := netlink.AddrAdd(device, na); err != nil {
			return fmt.Errorf("add address %s: %w", prefix, err)
		}
	}
	return netlink.LinkSetUp(device)
}

// program returns where a program of the node's datapath is pinned.
func (n *node) program(name string) string {
	return filepath.Join(n.cfg.BPFFS, "progs", n.dp.Build(), name)
}
