// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/firewalltest"
	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/nodetest"
)

// must ends the test where its set-up fails.
func must(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// plainHost is a host behind the node that has nothing to do with Margay: what it sends is the node's stack to forward.
type plainHost struct {
	ns    *netnstest.NS
	addrs []netip.Addr
	node  *nodetest.Node
}

// foreign are addresses of the client's network: the node's route to them is not by the plain host's device.
var foreign = []netip.Addr{netip.MustParseAddr("192.0.2.50"), netip.MustParseAddr("2001:db8:1::50")}

// newPlainHost connects one to the first node of a cluster.
func newPlainHost(t *testing.T, c *nodetest.Cluster) *plainHost {
	t.Helper()
	n := c.Nodes[0]
	p := &plainHost{ns: netnstest.New(t), node: n, addrs: []netip.Addr{netip.MustParseAddr("198.51.100.2"), netip.MustParseAddr("2001:db8:99::2")}}
	gateways := []netip.Addr{netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("2001:db8:99::1")}
	peer, err := os.Open(p.ns.Path())
	must(t, "open the namespace", err)
	defer peer.Close()
	n.NS.Do(func() {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "plain0"
		veth := netlink.NewVeth(attrs)
		veth.PeerName, veth.PeerNamespace = "eth0", netlink.NsFd(int(peer.Fd()))
		must(t, "make a veth pair", netlink.LinkAdd(veth))
	})
	p.ns.Do(func() {
		configure(t, "eth0", p.addrs...)
		configure(t, "lo", foreign...)
	})
	n.NS.Do(func() { configure(t, "plain0", gateways...) })
	for i, gw := range gateways {
		any := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}[i]
		p.ns.Do(func() { route(t, any, gw) })
		network := netip.PrefixFrom(gw, []int{24, 64}[i]).Masked()
		c.Client.Do(func() { route(t, network, n.Addrs[i]) })
		p.ns.Do(func() { await(t, gw) })
	}
	return p
}

// configure brings a device of the calling thread's namespace up with addresses; on the loopback device they are single ones.
func configure(t *testing.T, device string, addrs ...netip.Addr) {
	t.Helper()
	l, err := netlink.LinkByName(device)
	must(t, "look up "+device, err)
	for _, a := range addrs {
		bits := map[bool]int{false: 24, true: 64}[a.Is6()]
		if device == "lo" {
			bits = a.BitLen()
		}
		mask := net.CIDRMask(bits, a.BitLen())
		must(t, "add an address", netlink.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: mask}, Flags: unix.IFA_F_NODAD}))
	}
	must(t, "bring "+device+" up", netlink.LinkSetUp(l))
}

func route(t *testing.T, to netip.Prefix, via netip.Addr) {
	t.Helper()
	dst := &net.IPNet{IP: to.Addr().AsSlice(), Mask: net.CIDRMask(to.Bits(), to.Addr().BitLen())}
	must(t, "add a route", netlink.RouteAdd(&netlink.Route{Dst: dst, Gw: via.AsSlice()}))
}

// await pings until there is an answer: neighbour discovery works only some time after a device came up.
func await(t *testing.T, a netip.Addr) {
	t.Helper()
	for range 20 {
		if exec.Command("ping", "-n", "-c1", "-W1", a.String()).Run() == nil {
			return
		}
	}
	t.Fatalf("no answer from %s", a)
}

// wantForwarding asserts whether the node's stack forwards what the plain host sends to the client's server.
func (p *plainHost) wantForwarding(t *testing.T, c *nodetest.Cluster, want bool) {
	t.Helper()
	families(t, func(t *testing.T, v6 bool) {
		got, err := nodetest.Ask(t, p.ns, "udp", outside(v6))
		if (err == nil) != want {
			t.Errorf("from a plain host through the node's stack = %q, %v; want an answer: %v", got, err, want)
		}
	})
}

// wantForeign asserts whether a packet arrives at the node with a source that is not the plain host's to use. First the node gets one with
// the host's own, which arrives always.
func (p *plainHost) wantForeign(t *testing.T, want bool) {
	t.Helper()
	families(t, func(t *testing.T, v6 bool) {
		var server net.PacketConn
		p.node.NS.Do(func() {
			var err error
			server, err = net.ListenPacket("udp", ":"+strconv.Itoa(firewalltest.UDPPort))
			must(t, "listen", err)
		})
		defer server.Close()
		for _, from := range []netip.Addr{family(p.addrs, v6), family(foreign, v6)} {
			p.ns.Do(func() {
				c, err := net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0)),
					net.UDPAddrFromAddrPort(netip.AddrPortFrom(family(p.node.Addrs, v6), firewalltest.UDPPort)))
				must(t, "open a UDP socket", err)
				defer c.Close()
				_, err = c.Write([]byte("hello"))
				must(t, "send", err)
			})
			must(t, "set a deadline", server.SetReadDeadline(time.Now().Add(nodetest.Timeout)))
			_, _, err := server.ReadFrom(make([]byte, 16))
			if arrives := want || from != family(foreign, v6); (err == nil) != arrives {
				t.Errorf("from %s by the plain host's device: %v, want it to arrive: %v", from, err, arrives)
			}
		}
	})
}
