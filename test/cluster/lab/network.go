// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Family says which IP families a cluster has.
type Family string

// The families of clusters. In a dual-stack one IPv4 is the primary family.
const (
	Dual Family = "dual"
	IPv4 Family = "ipv4"
	IPv6 Family = "ipv6"
)

// pick returns what belongs to the cluster's families, the primary one first.
func pick[T any](f Family, v4, v6 T) []T {
	switch f {
	case IPv4:
		return []T{v4}
	case IPv6:
		return []T{v6}
	}
	return []T{v4, v6}
}

// The address plan. The fabric's and the outside's routers have the first address of the prefix.
var (
	fabric4, fabric6     = netip.MustParsePrefix("172.30.0.0/16"), netip.MustParsePrefix("fd00:30::/64")
	outside4, outside6   = netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("2001:db8:64::/64")
	pods4, pods6         = netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/56")
	services4, services6 = netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd00:96::/112")
)

const (
	controlNumber = 1  // the control plane's addresses end in this one
	clientNumber  = 7  // the client's on the outside
	nodeNumber    = 10 // the first node's is one more
	bridge        = "fabric"
	outside       = "outside"
	device        = "eth0"
	mtu           = 1500
)

// number returns the address of a prefix that ends in n, below 256.
func number(p netip.Prefix, n byte) netip.Addr {
	b := p.Addr().AsSlice()
	b[len(b)-1] = n
	a, _ := netip.AddrFromSlice(b)
	return a
}

func (c *Cluster) fabricPrefixes() []netip.Prefix  { return pick(c.Family, fabric4, fabric6) }
func (c *Cluster) outsidePrefixes() []netip.Prefix { return pick(c.Family, outside4, outside6) }

// PodRanges returns the ranges that the nodes' pod ranges are taken from.
func (c *Cluster) PodRanges() []netip.Prefix { return pick(c.Family, pods4, pods6) }

// ClientAddresses returns the addresses of the client outside, one for each family.
func (c *Cluster) ClientAddresses() []netip.Addr { return addresses(c.outsidePrefixes(), clientNumber) }

// ServiceRanges returns the ranges that cluster addresses are taken from.
func (c *Cluster) ServiceRanges() []netip.Prefix { return pick(c.Family, services4, services6) }

// addresses returns one address for each prefix, ending in n.
func addresses(prefixes []netip.Prefix, n byte) []netip.Addr {
	var all []netip.Addr
	for _, p := range prefixes {
		all = append(all, number(p, n))
	}
	return all
}

// inNetns runs f on a thread that is in the network namespace of process pid. Sockets that f makes stay in it; goroutines that f starts
// are elsewhere.
func inNetns(pid int, f func() error) error {
	target, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return err
	}
	defer target.Close()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		if err := unix.Setns(int(target.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter network namespace: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}

// InNetns runs f on a thread that is in the machine's network namespace. Sockets that f makes stay in it, so a client dials there;
// goroutines that f starts are elsewhere.
func (m *Machine) InNetns(f func() error) error {
	pid, err := m.PID()
	if err != nil {
		return err
	}
	return inNetns(pid, f)
}

// setSysctls sets networking settings of the current thread's network namespace.
func setSysctls(values map[string]string) error {
	for name, value := range values {
		if err := os.WriteFile(filepath.Join("/proc/sys/net", name), []byte(value), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// noDAD makes IPv6 addresses usable at once.
var noDAD = map[string]string{"ipv6/conf/all/accept_dad": "0", "ipv6/conf/default/accept_dad": "0"}

// plugControl makes the fabric and the network outside in the control plane's namespace, and lets it route between them.
func (c *Cluster) plugControl(pid int) error {
	return inNetns(pid, func() error {
		err := errors.Join(setSysctls(noDAD), setSysctls(map[string]string{
			"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1",
			// A router that explains itself: no ICMP error is held back.
			"ipv4/icmp_ratelimit": "0", "ipv6/icmp/ratelimit": "0",
			"ipv4/conf/all/send_redirects": "0", "ipv4/conf/default/send_redirects": "0",
		}), up("lo", nil, nil))
		if err != nil {
			return err
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = bridge, mtu
		attrs.HardwareAddr = hardwareAddr(controlNumber) // else it is the lowest one of its ports, and a node that goes takes it along
		noSnooping := false                              // a snooping bridge may hold neighbour discovery back
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &noSnooping}); err != nil {
			return fmt.Errorf("make the bridge: %w", err)
		}
		return up(bridge, addresses(c.fabricPrefixes(), controlNumber), c.fabricPrefixes())
	})
}

// plugNode connects node n to the fabric.
func (c *Cluster) plugNode(n *Node) func(pid int) error {
	return func(pid int) error {
		return c.plug(pid, n.Name, true, byte(nodeNumber+n.Number), c.fabricPrefixes(), nil)
	}
}

// plugClient connects the external client to the network outside.
func (c *Cluster) plugClient(pid int) error {
	return c.plug(pid, outside, false, clientNumber, c.outsidePrefixes(), addresses(c.outsidePrefixes(), controlNumber))
}

// plug makes a cable between the machine with first process pid, where it is eth0, and the control plane's namespace, where it has the
// name port and is on the bridge or has the routers' addresses. The machine gets the addresses that end in n, and default routes.
func (c *Cluster) plug(pid int, port string, bridged bool, n byte, prefixes []netip.Prefix, routers []netip.Addr) error {
	control, err := c.Control().PID()
	if err != nil {
		return err
	}
	peer, err := netns.GetFromPid(pid)
	if err != nil {
		return err
	}
	defer peer.Close()
	err = inNetns(control, func() error {
		if old, err := netlink.LinkByName(port); err == nil { // of the machine's life before
			if err := netlink.LinkDel(old); err != nil {
				return fmt.Errorf("remove the old cable %s: %w", port, err)
			}
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = port, mtu
		if bridged {
			l, err := netlink.LinkByName(bridge)
			if err != nil {
				return err
			}
			attrs.MasterIndex = l.Attrs().Index
		}
		veth := netlink.NewVeth(attrs)
		veth.PeerName, veth.PeerNamespace, veth.PeerMTU = device, netlink.NsFd(int(peer)), mtu
		veth.PeerHardwareAddr = hardwareAddr(n) // the same after a reboot, as a NIC's is
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("make the cable %s: %w", port, err)
		}
		return up(port, routers, prefixes)
	})
	if err != nil {
		return err
	}
	return inNetns(pid, func() error {
		if err := errors.Join(setSysctls(noDAD), up("lo", nil, nil), up(device, addresses(prefixes, n), prefixes)); err != nil {
			return err
		}
		for _, gateway := range addresses(prefixes, controlNumber) {
			if err := netlink.RouteReplace(&netlink.Route{Dst: defaultRoute(gateway), Gw: gateway.AsSlice()}); err != nil {
				return fmt.Errorf("default route by %s: %w", gateway, err)
			}
		}
		return nil
	})
}

// hardwareAddr is the MAC address of the machine whose addresses end in n.
func hardwareAddr(n byte) net.HardwareAddr { return net.HardwareAddr{0x02, 0, 0x1e, 0, 0, n} }

// up gives a device of the current namespace its addresses and brings it up.
func up(name string, addrs []netip.Addr, prefixes []netip.Prefix) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("device %s: %w", name, err)
	}
	for i, a := range addrs {
		addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a, prefixes[i].Bits()))}
		if a.Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrReplace(l, addr); err != nil {
			return fmt.Errorf("address %s of %s: %w", a, name, err)
		}
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("bring %s up: %w", name, err)
	}
	return nil
}

// route makes a machine send a prefix to a next hop.
func (m *Machine) route(to netip.Prefix, via netip.Addr) error {
	return m.InNetns(func() error {
		if err := netlink.RouteReplace(&netlink.Route{Dst: ipNet(to), Gw: via.AsSlice()}); err != nil {
			return fmt.Errorf("route %s by %s on %s: %w", to, via, m.Name, err)
		}
		return nil
	})
}

func defaultRoute(gateway netip.Addr) *net.IPNet {
	if gateway.Is4() {
		return ipNet(netip.PrefixFrom(netip.IPv4Unspecified(), 0))
	}
	return ipNet(netip.PrefixFrom(netip.IPv6Unspecified(), 0))
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
