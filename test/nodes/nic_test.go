// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/clustertest"
	"github.com/margay-cni/margay/pkg/agent"
	"github.com/margay-cni/margay/pkg/pins"
)

// twoNICs is a cluster whose n2 has a second device, on a network of its own with another of the router's ports. The default routes are by
// eth0. A service of n2 itself is behind hostNodePort.
type twoNICs struct {
	*remote
	n2   *clustertest.Node
	eth1 clustertest.NIC
	// near is a client on eth1's network.
	near *clustertest.Host
}

const hostNodePort = 30200

// onAllAddresses has NodePorts served on the second device's addresses, too; the default is the primary ones.
var onAllAddresses = []string{"--nodeport-addresses", "all"}

func newTwoNICs(t *testing.T) *twoNICs {
	t.Helper()
	c := &twoNICs{remote: newRemote(t, clustertest.Options{RoutingMode: "vxlan", SecondNIC: []string{"n2"}, AgentFlags: onAllAddresses})}
	c.n2 = c.Node("n2")
	c.eth1 = c.n2.NICs[1]
	c.near = c.AddClientOn(c.eth1.Network)
	c.AddHostPod(c.n2, "n2", map[string]string{"app": "host"})
	c.Apply(clustertest.NodePortService("host", 10, map[string]string{"app": "host"}, 80, hostPort, hostNodePort))
	for _, a := range c.eth1.Addrs {
		c.Eventually("the client on the second network reaches the node there", func() bool { return c.near.Ping(a) == nil })
	}
	c.WaitSettled()
	return c
}

// addr is eth1's address of a family.
func (c *twoNICs) addr(v6 bool) netip.Addr {
	return c.eth1.Addrs[map[bool]int{false: 0, true: 1}[v6]]
}

// strictRPFilter has the node's stack refuse what comes in by another device than answers would leave by.
func (c *twoNICs) strictRPFilter(t *testing.T) {
	t.Helper()
	c.n2.NS.Do(func() {
		files, err := filepath.Glob("/proc/sys/net/ipv4/conf/*/rp_filter")
		if err != nil || len(files) == 0 {
			t.Fatalf("reverse path filters: %v, %v", files, err)
		}
		for _, file := range files {
			if err := os.WriteFile(file, []byte("1"), 0); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// addDefaultRoutes gives eth1 default routes that the kernel takes only for what must leave there.
func (c *twoNICs) addDefaultRoutes(t *testing.T) {
	t.Helper()
	c.n2.NS.Do(func() {
		l, err := netlink.LinkByName(c.eth1.Device)
		if err != nil {
			t.Fatal(err)
		}
		for _, gw := range c.eth1.Network.Gateways {
			any := &net.IPNet{IP: make([]byte, len(gw.AsSlice())), Mask: net.CIDRMask(0, gw.BitLen())}
			if err := netlink.RouteAdd(&netlink.Route{Dst: any, Gw: gw.AsSlice(), LinkIndex: l.Attrs().Index, Priority: 4096}); err != nil {
				t.Fatal(err)
			}
		}
	})
	c.WaitSettled()
}

// TestAnswersLeaveByTheDeviceTheyCameInOn: a node with two devices answers each client by the one that it asked through, though the kernel
// would answer by the first: whether there is another default route or none, and past a strict reverse path filter.
func TestAnswersLeaveByTheDeviceTheyCameInOn(t *testing.T) {
	c := newTwoNICs(t)
	c.answer(t, "no other default route", true)
	c.addDefaultRoutes(t)
	c.answer(t, "another default route", true)
	c.strictRPFilter(t)
	c.answer(t, "strict reverse path filter", false) // which has its say in what is for the node's own stack
}

// answer has both clients ask the services of every pod, and perhaps of the node itself, by n2's second device.
func (c *twoNICs) answer(t *testing.T, what string, host bool) {
	eth0, eth1 := newCapture(t, c.n2.Host, "eth0"), newCapture(t, c.n2.Host, "eth1")
	servers := map[uint16]*clustertest.Host{}
	for i, p := range c.pods {
		servers[uint16(nodePorts+i+1)] = p.Host
	}
	if host {
		servers[hostNodePort] = c.n2.Host
	}
	for _, v6 := range c.Families() {
		for name, client := range map[string]*clustertest.Host{"client on the network": c.near, "client beyond the router": c.Client} {
			for port, server := range servers {
				t.Run(what+"/"+clustertest.FamilyName(v6)+"/"+name+", service of "+server.Name, func(t *testing.T) {
					to := netip.AddrPortFrom(c.addr(v6), port)
					if server == c.n2.Host {
						// Not UDP: this server lets the kernel choose the source of its answers, which goes by the route to the client.
						want := "n2 " + client.Addr(v6).String()
						if got, err := client.Ask("tcp", to); err != nil || got != want {
							t.Errorf("tcp from %s to %s = %q, %v; want %q", client.Name, to, got, err, want)
						}
					} else {
						asks(t, client, to, server)
					}
					if got := eth1.sent(to.Addr(), client.Addr(v6)); got < 2 {
						t.Errorf("answers that left by eth1 = %d, want all of them", got)
					}
					if got := eth0.sent(to.Addr(), client.Addr(v6)); got != 0 {
						t.Errorf("answers that left by eth0 = %d, want none", got)
					}
				})
			}
		}
		to := c.n2.AddrPort(v6, nodePorts+2)
		asks(t, c.Client, to, c.pods[1].Host)
		if got := eth0.sent(to.Addr(), c.Client.Addr(v6)); got < 2 {
			t.Errorf("%s: answers of the first address that left by eth0 = %d, want all of them", what, got)
		}
	}
}

// TestMasqueradeAsTheDeviceThatIsUsed: a pod's traffic to the outside has the address of the device that it leaves by.
func TestMasqueradeAsTheDeviceThatIsUsed(t *testing.T) {
	const port = 7070
	c := newTwoNICs(t)
	c.near.Serve(port)
	c.Client.Serve(port)
	for _, v6 := range c.Families() {
		for server, source := range map[*clustertest.Host]netip.Addr{c.near: c.addr(v6), c.Client: c.n2.Addr(v6)} {
			for _, network := range []string{"tcp", "udp"} {
				want := server.Name + " " + source.String()
				if got, err := c.pods[1].Ask(network, server.AddrPort(v6, port)); err != nil || got != want {
					t.Errorf("%s from the pod on n2 to %s = %q, %v; want %q", network, server.Name, got, err, want)
				}
			}
		}
	}
}

// serves tells whether the agent's status has its programs on a device, without a fault.
func serves(c *clustertest.Cluster, n *clustertest.Node, device string) bool {
	return slices.ContainsFunc(c.Status(n).Last.Devices, func(d agent.DeviceStatus) bool { return d.Name == device && d.Error == "" })
}

// hasPrograms tells whether Margay's filters are at both hooks of a device, or at none.
func hasPrograms(t *testing.T, n *clustertest.Node, device string) (filters int) {
	t.Helper()
	n.NS.Do(func() {
		l, err := netlink.LinkByName(device)
		if err != nil {
			t.Fatal(err)
		}
		for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
			found, err := netlink.FilterList(l, parent)
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range found {
				if f.Attrs().Handle == pins.FilterHandle && f.Attrs().Priority == pins.FilterPriority {
					filters++
				}
			}
		}
	})
	return filters
}

// TestDevicesComeAndGo: a device gets the programs when it comes, loses them with its addresses, and gets them again; the status says so,
// and NodePorts are served there when it does.
func TestDevicesComeAndGo(t *testing.T) {
	c := newRemote(t, clustertest.Options{Nodes: 2, RoutingMode: "vxlan", AgentFlags: onAllAddresses})
	n2 := c.Node("n2")
	if serves(c.Cluster, n2, "eth1") {
		t.Fatal("the status has a device that is not there")
	}
	nic := c.AttachNode(n2, c.AddNetwork("second"))
	near := c.AddClientOn(nic.Network)
	asksAll := func(what string) {
		t.Helper()
		c.WaitSettled()
		if got := hasPrograms(t, n2, nic.Device); got != 2 {
			t.Errorf("%s: filters on it = %d, want 2", what, got)
		}
		for _, a := range nic.Addrs {
			c.Eventually("the client on the second network reaches the node there", func() bool { return near.Ping(a) == nil })
			asks(t, near, netip.AddrPortFrom(a, nodePorts+1), c.pods[0].Host)
			asks(t, near, netip.AddrPortFrom(a, nodePorts+2), c.pods[1].Host)
		}
	}
	asksAll("a device that came")

	change := func(f func(netlink.Link, *netlink.Addr) error) {
		n2.NS.Do(func() {
			l, err := netlink.LinkByName(nic.Device)
			if err != nil {
				t.Fatal(err)
			}
			for i, a := range nic.Addrs {
				mask := net.CIDRMask(nic.Network.Prefixes[i].Bits(), a.BitLen())
				if err := f(l, &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: mask}, Flags: unix.IFA_F_NODAD}); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
	change(netlink.AddrDel)
	c.Eventually("a device without addresses has no programs", func() bool {
		return !serves(c.Cluster, n2, nic.Device) && hasPrograms(t, n2, nic.Device) == 0
	})
	change(netlink.AddrAdd)
	asksAll("a device that has addresses again")

	n2.NS.Do(func() {
		l, err := netlink.LinkByName(nic.Device)
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.LinkDel(l); err != nil {
			t.Fatal(err)
		}
	})
	n2.NICs = n2.NICs[:1]
	c.Eventually("the status does not have a device that has gone", func() bool { return !serves(c.Cluster, n2, nic.Device) })
	c.WaitSettled()
	for _, v6 := range c.Families() {
		asks(t, c.Client, n2.AddrPort(v6, nodePorts+1), c.pods[0].Host)
	}
}

// TestDevicePatterns: the flag --devices takes the choice: a device that it does not name has no programs and serves no NodePorts, even
// though it has an address.
func TestDevicePatterns(t *testing.T) {
	for pattern, want := range map[string]bool{"eth0": false, "eth?": true, "nothing*,eth0,eth1": true} {
		t.Run(pattern, func(t *testing.T) {
			c := clustertest.New(t, clustertest.Options{
				Nodes: 1, SecondNIC: []string{"n1"}, AgentFlags: onAllAddresses, NodeFlags: map[string][]string{"n1": {"--devices", pattern}},
			})
			n := c.Node("n1")
			p := c.AddPod(n, "p", map[string]string{"app": "p"})
			p.Serve(podPort)
			near := c.AddClientOn(n.NICs[1].Network)
			c.Apply(clustertest.NodePortService("p", 1, map[string]string{"app": "p"}, 80, podPort, nodePorts))
			c.WaitSettled()
			if got := serves(c, n, "eth1") && hasPrograms(t, n, "eth1") == 2; got != want || !serves(c, n, "eth0") {
				t.Errorf("devices with programs: %v; want eth0, and eth1: %v", c.Status(n).Last.Devices, want)
			}
			for i, v6 := range c.Families() {
				asks(t, c.Client, n.AddrPort(v6, nodePorts), p.Host)
				a := n.NICs[1].Addrs[i]
				c.Eventually("the client on the second network reaches the node there", func() bool { return near.Ping(a) == nil })
				got, err := near.Ask("tcp", netip.AddrPortFrom(a, nodePorts))
				if (err == nil) != want {
					t.Errorf("the NodePort on eth1 = %q, %v; want an answer: %v", got, err, want)
				}
			}
		})
	}
}
