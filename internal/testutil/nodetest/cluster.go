// SPDX-License-Identifier: Apache-2.0

package nodetest

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/privileged"
	"github.com/margay-cni/margay/pkg/bpf"
)

// The overlay of a Cluster.
const (
	OverlayDevice = "margay.vxlan"
	OverlayVNI    = 28000
	OverlayPort   = 8472
	outerSize4    = 50 // bytes that the outer headers take, from the inner IP header: RFC 7348 §5
	outerSize6    = 70

	addrGenModeNone = 1 // IN6_ADDR_GEN_MODE_NONE of linux/if_link.h
)

// ClusterOptions say how the nodes of a Cluster reach each other.
type ClusterOptions struct {
	// Direct has the nodes route to each other's pods; otherwise the overlay carries them.
	Direct bool
	// OuterV6 makes IPv6 the family of the overlay's outer header.
	OuterV6 bool
	// Device leaves it to the overlay device to encapsulate. It always does with OuterV6; otherwise the programs do.
	Device bool
}

// Cluster is some nodes, each on a network of its own, joined by the external host, which routes between them:
//
//	node 0 ── eth0 · client · eth1 ── node 1
type Cluster struct {
	Nodes  []*Node
	Client *netnstest.NS
	opts   ClusterOptions
}

// NewCluster makes a cluster of that many nodes. It needs root.
func NewCluster(t testing.TB, nodes int, opts ClusterOptions) *Cluster {
	t.Helper()
	privileged.Require(t)
	c := &Cluster{Client: netnstest.New(t), opts: opts}
	c.Client.Do(func() {
		for _, path := range []string{"/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"} {
			if err := os.WriteFile(path, []byte("1"), 0); err != nil {
				t.Fatal(err)
			}
		}
	})
	for i := range nodes {
		n := newNode(t, i)
		n.addClient(c.Client, "eth"+string(rune('0'+i)))
		c.Nodes = append(c.Nodes, n)
	}
	for _, n := range c.Nodes {
		c.join(n)
	}
	for i, n := range c.Nodes {
		n.NS.Do(func() {
			for _, a := range c.Nodes[(i+1)%nodes].Addrs {
				n.resolve(a)
			}
		})
	}
	return c
}

// join gives a node its default routes, its overlay device and its view of the others.
func (c *Cluster) join(n *Node) {
	n.t.Helper()
	overlay := 0
	n.NS.Do(func() {
		for _, gw := range n.clientAddrs() {
			n.must(netlink.RouteAdd(&netlink.Route{Gw: gw.AsSlice(), Dst: ipNet(netip.PrefixFrom(unspecified(gw), 0))}))
		}
		overlay = n.addOverlay(c.opts)
	})
	n.Put(n.DP.Maps.NodeState, uint32(0), bpf.NodeState{
		OverlayIfindex: uint32(overlay), Vni: OverlayVNI, OverlayPort: bpf.Port16(OverlayPort),
	})
	for _, p := range n.PodRanges() {
		n.Put(n.DP.Maps.Routes, bpf.NewRouteKey(p), bpf.Route{Flags: bpf.RouteLocal})
	}
	for _, other := range c.Nodes {
		if other != n {
			n.addPeer(other, overlay, c.opts)
		}
	}
}

func unspecified(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// addOverlay makes the VXLAN device in the calling thread's namespace.
func (n *Node) addOverlay(opts ClusterOptions) int {
	n.t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = OverlayDevice, 1500-outerSize(opts)
	n.must(netlink.LinkAdd(&netlink.Vxlan{LinkAttrs: attrs, FlowBased: true, GBP: true, Port: OverlayPort, Learning: false}))
	l, err := netlink.LinkByName(OverlayDevice)
	n.must(err)
	n.must(netlink.LinkSetARPOff(l))
	n.must(netlink.LinkSetIP6AddrGenMode(l, addrGenModeNone))
	n.must(netlink.LinkSetUp(l))
	n.must(n.DP.AttachOverlay(l.Attrs().Index))
	return l.Attrs().Index
}

func outerSize(opts ClusterOptions) int {
	if opts.OuterV6 {
		return outerSize6
	}
	return outerSize4
}

// addPeer tells the node of another one, and the kernel of the node the ways to its pods.
func (n *Node) addPeer(other *Node, overlay int, opts ClusterOptions) {
	n.t.Helper()
	index := NodeIndex(other)
	family := 0
	if opts.OuterV6 {
		family = 1
	}
	to := bpf.Node{Addr: bpf.NewAddr(other.Addrs[family]), Local: bpf.NewAddr(n.Addrs[family]), Mtu: uint16(1500 - outerSize(opts))}
	if !opts.Device && !opts.OuterV6 {
		to.Ifindex = uint32(n.ClientDevice)
	}
	n.Put(n.DP.Maps.Nodes, index, to)
	flags, via := bpf.NodeAddrRemote|bpf.NodeAddrNodePort|index<<bpf.NodeAddrIndexShift, bpf.Route{Node: uint16(index)}
	if !opts.Direct {
		flags |= bpf.NodeAddrOverlay
		via.Flags = bpf.RouteOverlay
	}
	for i, p := range other.PodRanges() {
		n.Put(n.DP.Maps.Routes, bpf.NewRouteKey(p), via)
		n.Put(n.DP.Maps.NodeAddrs, bpf.NewAddr(other.Addrs[i]), flags)
		n.Identify(netip.PrefixFrom(other.Addrs[i], other.Addrs[i].BitLen()), bpf.IdentityRemoteNode)
		if !opts.Direct {
			n.NS.Do(func() {
				n.must(netlink.RouteAdd(&netlink.Route{LinkIndex: overlay, Dst: ipNet(p), Src: net.IP(n.Addrs[i].AsSlice())}))
			})
		}
	}
}

// NodeIndex is a node's index of the map nodes, the same on every other node.
func NodeIndex(n *Node) uint32 {
	return uint32(n.index) + 1
}

// AddService writes a service on every node, as AddService of a node does, and on each the backends that are its own by their hashes.
func (c *Cluster) AddService(id uint32, frontend bpf.FrontendKey, flags uint32, backends ...netip.AddrPort) {
	for _, n := range c.Nodes {
		n.AddService(id, frontend, backends...)
		for _, b := range backends {
			if n.hasPod(b.Addr()) || slices.Contains(n.Addrs, b.Addr()) {
				list := bpf.BackendByHash | id
				n.Put(n.DP.Maps.Backends, bpf.BackendKey{List: list, Slot: bpf.BackendHash(b)}, bpf.NewBackend(b))
				// For a choice that is not there any more.
				if err := n.DP.Maps.Backends.Update(bpf.BackendKey{List: list}, bpf.NewBackend(b), ebpf.UpdateNoExist); !errors.Is(err, ebpf.ErrKeyExist) {
					n.must(err)
				}
			}
		}
		var s bpf.Service
		n.must(n.DP.Maps.Services.Lookup(&frontend, &s))
		s.Flags = flags
		n.Put(n.DP.Maps.Services, frontend, s)
	}
}

func (n *Node) hasPod(a netip.Addr) bool {
	key, e := bpf.NewAddr(a), bpf.Endpoint{}
	err := n.DP.Maps.Endpoints.Lookup(&key, &e)
	if err != nil && !isMissing(err) {
		n.t.Fatal(err)
	}
	return err == nil
}

func isMissing(err error) bool { return errors.Is(err, ebpf.ErrKeyNotExist) }
