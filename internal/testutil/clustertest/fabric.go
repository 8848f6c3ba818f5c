// SPDX-License-Identifier: Apache-2.0

package clustertest

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/link"
)

// podRanges hold the pods of all nodes.
var podRanges = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/32")}

// Network is one Ethernet segment with the router on it.
type Network struct {
	// Name is also the name of its bridge in the router.
	Name string
	// Prefixes and Gateways, the router's addresses, are those of the underlay's families, IPv4 before IPv6.
	Prefixes []netip.Prefix
	Gateways []netip.Addr
	members  []*Host
}

// AddNetwork makes a further network.
func (c *Cluster) AddNetwork(name string) *Network {
	c.t.Helper()
	k := 1
	for _, n := range c.networks {
		if n.Name != "outside" {
			k++
		}
	}
	return c.addNetwork(name, netip.MustParsePrefix(fmt.Sprintf("172.16.%d.0/24", k)), netip.MustParsePrefix(fmt.Sprintf("2001:db8:%d::/64", k)))
}

// addNetwork makes a network with the prefixes of the underlay's families.
func (c *Cluster) addNetwork(name string, v4, v6 netip.Prefix) *Network {
	c.t.Helper()
	n := &Network{Name: name}
	for _, isV6 := range c.Families() {
		p := v4
		if isV6 {
			p = v6
		}
		n.Prefixes = append(n.Prefixes, p)
		n.Gateways = append(n.Gateways, last(p, 1))
	}
	c.networks = append(c.networks, n)
	c.Router.NS.Do(func() {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		noSnooping := false // a snooping bridge may hold neighbour discovery back
		c.must(netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &noSnooping}))
		// Set explicitly: else the bridge follows the smallest of its ports.
		c.setMTU(name, c.options.MTU)
		c.up(name, n.Gateways, n.Prefixes)
	})
	return n
}

// Network returns a network by its name.
func (c *Cluster) Network(name string) *Network {
	c.t.Helper()
	for _, n := range c.networks {
		if n.Name == name {
			return n
		}
	}
	c.t.Fatalf("there is no network %s", name)
	return nil
}

func (c *Cluster) configureRouter() {
	c.t.Helper()
	c.Router.NS.Do(func() {
		c.sysctl("net/ipv4/ip_forward", "1")
		c.sysctl("net/ipv6/conf/all/forwarding", "1")
		c.sysctl("net/ipv4/icmp_ratelimit", "0")
		c.sysctl("net/ipv6/icmp/ratelimit", "0")
		c.sysctl("net/ipv4/conf/all/send_redirects", "0")
		c.sysctl("net/ipv4/conf/default/send_redirects", "0")
	})
}

// AddClient adds an external client c<k>, on the network "outside".
func (c *Cluster) AddClient() *Host {
	c.t.Helper()
	return c.AddClientOn(c.Network("outside"))
}

// AddClientOn adds an external client c<k> on any network. It meets its neighbours with the next AddNode or Readdress only.
func (c *Cluster) AddClientOn(network *Network) *Host {
	c.t.Helper()
	c.clients++
	h := c.newHost(fmt.Sprintf("c%d", c.clients))
	h.Addrs = c.attach(h, network, "eth0", 99+c.clients)
	h.NS.Do(func() {
		c.defaultRoutes(network)
		if !c.options.ClientPodRoutes {
			for _, p := range podRanges {
				c.must(netlink.RouteAdd(&netlink.Route{Dst: ipNet(p), Type: unix.RTN_UNREACHABLE}))
			}
		}
	})
	return h
}

// attach connects a host to a network by a device of its own, and returns its addresses there.
func (c *Cluster) attach(h *Host, n *Network, device string, number int) []netip.Addr {
	c.t.Helper()
	peer, err := os.Open(h.NS.Path())
	c.must(err)
	defer peer.Close()
	port := fmt.Sprintf("port%d", len(c.ports))
	c.ports[h.Name+"/"+device] = port
	c.Router.NS.Do(func() {
		bridge, err := netlink.LinkByName(n.Name)
		c.must(err)
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU, attrs.MasterIndex = port, c.options.MTU, bridge.Attrs().Index
		veth := netlink.NewVeth(attrs)
		veth.PeerName, veth.PeerNamespace, veth.PeerMTU = device, netlink.NsFd(int(peer.Fd())), uint32(c.options.MTU)
		c.must(netlink.LinkAdd(veth))
		c.up(port, nil, nil)
	})
	var addrs []netip.Addr
	for _, p := range n.Prefixes {
		addrs = append(addrs, last(p, number))
	}
	h.NS.Do(func() { c.up(device, addrs, n.Prefixes) })
	c.Router.NS.Do(func() {
		c.must(link.SyncCarrier(port))
		c.must(link.SyncCarrier(n.Name))
	})
	n.members = append(n.members, h)
	return addrs
}

// detach takes a host's cable away.
func (c *Cluster) detach(h *Host, device string) {
	c.t.Helper()
	c.Router.NS.Do(func() {
		l, err := netlink.LinkByName(c.ports[h.Name+"/"+device])
		c.must(err)
		c.must(netlink.LinkDel(l))
	})
}

// defaultRoutes makes the router the way to everywhere, in the calling thread's namespace.
func (c *Cluster) defaultRoutes(n *Network) {
	c.t.Helper()
	for _, gw := range n.Gateways {
		c.must(netlink.RouteReplace(&netlink.Route{Dst: ipNet(netip.PrefixFrom(unspecified(gw), 0)), Gw: gw.AsSlice()}))
	}
}

// RouteVia makes the router send a prefix to a host: an external or load balancer address, or the pods of a node. The host must have an
// address of the prefix' family.
func (c *Cluster) RouteVia(p netip.Prefix, h *Host) {
	c.t.Helper()
	c.Router.NS.Do(func() {
		c.must(netlink.RouteReplace(&netlink.Route{Dst: ipNet(p), Gw: h.Addr(p.Addr().Is6()).AsSlice()}))
	})
}

// Unroute takes back what RouteVia did.
func (c *Cluster) Unroute(p netip.Prefix, h *Host) {
	c.t.Helper()
	c.Router.NS.Do(func() {
		c.must(netlink.RouteDel(&netlink.Route{Dst: ipNet(p), Gw: h.Addr(p.Addr().Is6()).AsSlice()}))
	})
}

// SetMTU changes the MTU of a host's device and of the other end of its cable, in bytes.
func (c *Cluster) SetMTU(h *Host, device string, mtu int) {
	c.t.Helper()
	port, ok := c.ports[h.Name+"/"+device]
	if !ok {
		c.t.Fatalf("%s has no cable at %s", h.Name, device)
	}
	h.NS.Do(func() { c.setMTU(device, mtu) })
	c.Router.NS.Do(func() { c.setMTU(port, mtu) })
}

// SetNetworkMTU changes the MTU of the router's device on a network, in bytes: a larger packet that it would send there is refused with an
// ICMP error to the sender.
func (c *Cluster) SetNetworkMTU(n *Network, mtu int) {
	c.t.Helper()
	c.Router.NS.Do(func() { c.setMTU(n.Name, mtu) })
}

// meetNeighbours makes all hosts of a network and the router know each other's link-layer addresses, so that no test's first packet waits.
func (c *Cluster) meetNeighbours() {
	c.t.Helper()
	for _, n := range c.networks {
		for i, h := range n.members {
			for f, gw := range n.Gateways {
				c.meet(h, gw)
				for _, other := range n.members[i+1:] {
					if a := other.Addr(gw.Is6()); n.Prefixes[f].Contains(a) {
						c.meet(h, a)
					}
				}
			}
		}
	}
}

func (c *Cluster) meet(h *Host, a netip.Addr) {
	c.t.Helper()
	c.Eventually(fmt.Sprintf("%s reaches its neighbour %s", h.Name, a), func() bool { return h.Ping(a) == nil })
}

// up gives a device its addresses and sets it up, in the calling thread's namespace.
func (c *Cluster) up(device string, addrs []netip.Addr, prefixes []netip.Prefix) {
	c.t.Helper()
	l, err := netlink.LinkByName(device)
	c.must(err)
	for i, a := range addrs {
		c.must(netlink.AddrAdd(l, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a, prefixes[i].Bits())), Flags: unix.IFA_F_NODAD}))
	}
	c.must(netlink.LinkSetUp(l))
}

func (c *Cluster) setMTU(device string, mtu int) {
	c.t.Helper()
	l, err := netlink.LinkByName(device)
	c.must(err)
	if err := netlink.LinkSetMTU(l, mtu); err != nil {
		c.t.Fatalf("set MTU %d of %s: %v", mtu, device, err)
	}
}

// sysctl writes a value in the calling thread's namespace; path is relative to /proc/sys.
func (c *Cluster) sysctl(path, value string) {
	c.t.Helper()
	c.must(os.WriteFile(filepath.Join("/proc/sys", path), []byte(value), 0))
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func unspecified(a netip.Addr) netip.Addr {
	if a.Is6() {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified()
}

// podCIDRs are the pod ranges of node i.
func podCIDRs(i int) []netip.Prefix {
	n := strconv.Itoa(i)
	return []netip.Prefix{netip.MustParsePrefix("10.244." + n + ".0/24"), netip.MustParsePrefix("fd00:244:" + n + "::/64")}
}
