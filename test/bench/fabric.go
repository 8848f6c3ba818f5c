// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/link"
	"github.com/margay-cni/margay/pkg/netns"
)

// The one network of a fabric.
const (
	fabric4 = "172.16.1.0/24"
	fabric6 = "2001:db8:1::/64"

	fabricMTU = 1500 // bytes
)

// fabric is a bridge in a namespace of its own, the switch, with a veth pair to each host.
type fabric struct {
	node   *node
	name   string
	bridge string // the switch's namespace
	hosts  []place
}

func newFabric(n *node, name string) (*fabric, error) {
	f := &fabric{node: n, name: name}
	var err error
	if f.bridge, err = n.namespace(name + "-switch"); err != nil {
		return nil, err
	}
	return f, netns.Do(f.bridge, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "switch"
		noSnooping := false // it may hold neighbour discovery back
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &noSnooping}); err != nil {
			return fmt.Errorf("make the bridge: %w", err)
		}
		return errors.Join(noBridgeFilter(), linkUp("switch"))
	})
}

// noBridgeFilter keeps the netfilter hooks out of the bridges of the calling thread's namespace, where the kernel has them there: a switch
// does not filter.
func noBridgeFilter() error {
	settings, err := filepath.Glob("/proc/sys/net/bridge/bridge-nf-call-*")
	for _, path := range settings {
		err = errors.Join(err, os.WriteFile(path, []byte("0"), 0))
	}
	return err
}

// attach makes a host with the number in its addresses.
func (f *fabric) attach(name string, number uint32) (place, error) {
	h := place{addrs: []netip.Addr{nth(fabric4, number), nth(fabric6, number)}}
	var err error
	if h.path, err = f.node.namespace(f.name + "-" + name); err != nil {
		return h, err
	}
	f.hosts = append(f.hosts, h)
	peer, err := netns.Open(h.path)
	if err != nil {
		return h, err
	}
	defer func() { err = errors.Join(err, peer.Close()) }()
	port := fmt.Sprintf("port%d", number)
	if err := netns.Do(f.bridge, func() error { return addPort(port, peer) }); err != nil {
		return h, err
	}
	if err := netns.Do(h.path, h.configure); err != nil {
		return h, err
	}
	return h, netns.Do(f.bridge, func() error { return link.SyncCarrier(port) })
}

// addPort makes a veth pair from the calling thread's namespace, where it joins the switch, to eth0 of another one.
func addPort(port string, peer *netns.Handle) error {
	bridge, err := netlink.LinkByName("switch")
	if err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MasterIndex = port, bridge.Attrs().Index
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerNamespace = "eth0", netlink.NsFd(peer.FD())
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("make a cable: %w", err)
	}
	return linkUp(port)
}

func linkUp(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(l)
}

// overlay joins the nodes by a VXLAN device on each, as plain as it gets, and returns the second one by its address there.
func (k *cluster) overlay() (place, error) {
	var second place
	for i, n := range k.nodes {
		at := place{path: n.path, addrs: []netip.Addr{nth("172.16.2.0/24", uint32(n.number)), nth("2001:db8:2::/64", uint32(n.number))}}
		other := k.nodes[1-i]
		err := netns.Do(n.path, func() error {
			attrs := netlink.NewLinkAttrs()
			attrs.Name, attrs.MTU = "overlay", 1450
			device := &netlink.Vxlan{LinkAttrs: attrs, VxlanId: 1, Port: 8472, SrcAddr: n.addr(false).AsSlice(), Group: other.addr(false).AsSlice()}
			if err := netlink.LinkAdd(device); err != nil {
				return fmt.Errorf("make the overlay device: %w", err)
			}
			return at.configureDevice("overlay")
		})
		if err != nil {
			return place{}, err
		}
		second = at
	}
	return second, nil
}

// route sends a prefix to a gateway, in the namespace at path.
func route(path, prefix string, via netip.Addr) error {
	_, dst, err := net.ParseCIDR(prefix)
	if err != nil {
		return err
	}
	return netns.Do(path, func() error {
		if err := netlink.RouteReplace(&netlink.Route{Dst: dst, Gw: via.AsSlice()}); err != nil {
			return fmt.Errorf("route %s via %s: %w", prefix, via, err)
		}
		return nil
	})
}

func (f *fabric) close() error {
	errs := []error{f.node.removeNamespace(f.bridge)}
	for _, h := range f.hosts {
		errs = append(errs, f.node.removeNamespace(h.path))
	}
	return errors.Join(errs...)
}

// removeNamespace is the inverse of namespace; what still runs there keeps it alive.
func (n *node) removeNamespace(path string) error {
	return errors.Join(unix.Unmount(path, unix.MNT_DETACH), os.Remove(path))
}
