// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/netns"
)

// work is where everything of the demo is that has a file, on a tmpfs of its own.
const work = "/run/margay-demo"

// host is a network namespace with a cable to the router: a node, or the client outside.
type host struct {
	name  string
	ns    string         // namespace file
	addrs []netip.Prefix // IPv4, IPv6; the router has the same with the last number 1
	extra []netip.Prefix // further addresses, of the client only
}

// addr returns the host's address of a family: 0 is IPv4, 1 is IPv6.
func (h *host) addr(family int) netip.Addr {
	return h.addrs[family].Addr()
}

// fabric is a router with a network for each host. A device of the router has the name of the host at its other end.
type fabric struct {
	router string // namespace file
}

// private gives the demo a /run of its own; nodes have their directories there. It ends with the mount namespace.
func private() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=0755"); err != nil {
		return fmt.Errorf("mount a private /run: %w", err)
	}
	return os.MkdirAll(work, 0o755)
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

// newFabric makes the router and tries, before anything depends on it, what the nodes will need of the kernel.
func newFabric() (*fabric, error) {
	router, err := newNamespace("router")
	if err != nil {
		return nil, err
	}
	return &fabric{router}, netns.Do(router, func() error {
		overlay := &netlink.Vxlan{LinkAttrs: netlink.NewLinkAttrs(), FlowBased: true, GBP: true, Port: 8472}
		overlay.Name = "try"
		if err := netlink.LinkAdd(overlay); err != nil {
			return fmt.Errorf("the kernel makes no VXLAN device (CONFIG_VXLAN): %w", err)
		}
		return errors.Join(
			netlink.LinkDel(overlay),
			os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0),
			os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0),
		)
	})
}

// connect makes a host with its cable to the router, by which its default routes lead.
func (f *fabric) connect(h *host) (err error) {
	if h.ns, err = newNamespace(h.name); err != nil {
		return err
	}
	peer, err := netns.Open(h.ns)
	if err != nil {
		return err
	}
	defer peer.Close()
	var gateways []netip.Prefix
	for _, p := range h.addrs {
		gateways = append(gateways, netip.PrefixFrom(p.Masked().Addr().Next(), p.Bits()))
	}
	err = netns.Do(f.router, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = h.name
		veth := netlink.NewVeth(attrs)
		veth.PeerName, veth.PeerNamespace = "eth0", netlink.NsFd(peer.FD())
		return errors.Join(netlink.LinkAdd(veth), configure(h.name, gateways))
	})
	if err != nil {
		return fmt.Errorf("connect %s: %w", h.name, err)
	}
	return netns.Do(h.ns, func() error {
		errs := []error{configure("eth0", append(h.addrs, h.extra...))}
		for i, gw := range gateways {
			route := &netlink.Route{Dst: everywhere(gw.Addr()), Gw: gw.Addr().AsSlice(), Src: h.addr(i).AsSlice()}
			errs = append(errs, netlink.RouteAdd(route))
		}
		return errors.Join(errs...)
	})
}

// everywhere is the destination of a default route.
func everywhere(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: make(net.IP, a.BitLen()/8), Mask: net.CIDRMask(0, a.BitLen())}
}

func configure(device string, addrs []netip.Prefix) error {
	l, err := netlink.LinkByName(device)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		n := &net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Addr().BitLen())}
		if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: n, Flags: unix.IFA_F_NODAD}); err != nil {
			return fmt.Errorf("give %s to %s: %w", a, device, err)
		}
	}
	return netlink.LinkSetUp(l)
}

// removeNamespaces takes every network namespace away. Mounts and /run end with the mount namespace.
func removeNamespaces() error {
	paths, err := filepath.Glob(filepath.Join(work, "*.netns"))
	errs := []error{err}
	for _, path := range paths {
		errs = append(errs, unix.Unmount(path, unix.MNT_DETACH), os.Remove(path))
	}
	return errors.Join(errs...)
}
