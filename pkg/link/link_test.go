// SPDX-License-Identifier: Apache-2.0

package link

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/privileged"
)

var families = map[string][]netip.Addr{
	"IPv4":       {netip.MustParseAddr("10.9.0.5")},
	"IPv6":       {netip.MustParseAddr("fd09::5")},
	"dual stack": {netip.MustParseAddr("10.9.0.5"), netip.MustParseAddr("fd09::5")},
}

func defaultRoutes(addresses []netip.Addr) []Route {
	var out []Route
	for _, a := range addresses {
		out = append(out, Route{Dst: netip.PrefixFrom(GatewayOf(a), 0).Masked()})
	}
	return out
}

func dial(t *testing.T, ns *netnstest.NS) *Conn {
	t.Helper()
	f, err := os.Open(ns.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c, err := Dial(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

type pair struct {
	hostNS, podNS *netnstest.NS
	host, pod     *Conn
	hostDev       Device
	podDev        Device
}

func newPair(t *testing.T, mtu int) *pair {
	t.Helper()
	privileged.Require(t)
	p := &pair{hostNS: netnstest.New(t), podNS: netnstest.New(t)}
	p.host, p.pod = dial(t, p.hostNS), dial(t, p.podNS)
	f, err := os.Open(p.hostNS.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	podMAC, hostMAC := MACs("c1", "eth0")
	pod, host, err := p.pod.AddVeth(VethSpec{
		PodName: "eth0", HostName: HostName("c1", "eth0"), PodMAC: podMAC, HostMAC: hostMAC, MTU: mtu, HostNS: int(f.Fd()),
	})
	if err != nil {
		t.Fatal(err)
	}
	if p.podDev, err = p.pod.DeviceByIndex(pod); err != nil {
		t.Fatal(err)
	}
	if p.hostDev, err = p.host.DeviceByIndex(host); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *pair) configs(addresses []netip.Addr) (Pod, Host) {
	return Pod{Index: p.podDev.Index, Addresses: addresses, Routes: defaultRoutes(addresses), GatewayMAC: p.hostDev.MAC},
		Host{Index: p.hostDev.Index, PodMAC: p.podDev.MAC, Addresses: addresses}
}

func TestAddVeth(t *testing.T) {
	p := newPair(t, 1400)
	podMAC, hostMAC := MACs("c1", "eth0")
	if p.podDev.Name != "eth0" || p.podDev.MTU != 1400 || !bytes.Equal(p.podDev.MAC, podMAC) || p.podDev.Up {
		t.Errorf("pod's end is %+v, want eth0, MTU 1400, MAC %s, down", p.podDev, podMAC)
	}
	if p.hostDev.Name != HostName("c1", "eth0") || p.hostDev.MTU != 1400 || !bytes.Equal(p.hostDev.MAC, hostMAC) || p.hostDev.Up {
		t.Errorf("host's end is %+v, want %s, MTU 1400, MAC %s, down", p.hostDev, HostName("c1", "eth0"), hostMAC)
	}
	if p.hostDev.Peer != p.podDev.Index || p.podDev.Peer != p.hostDev.Index {
		t.Errorf("ends point at %d and %d, want each other (%d, %d)", p.hostDev.Peer, p.podDev.Peer, p.podDev.Index, p.hostDev.Index)
	}
	for ns, name := range map[*netnstest.NS]string{p.podNS: "eth0", p.hostNS: p.hostDev.Name} {
		if got := addressAssignment(t, ns, name); got != "3" {
			t.Errorf("addr_assign_type of %s = %s, want 3 (set by its maker, so that udev leaves it alone)", name, got)
		}
	}
	for c, name := range map[*Conn]string{p.pod: "eth0", p.host: p.hostDev.Name} {
		l, err := c.h.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		if tx, rx := l.Attrs().NumTxQueues, l.Attrs().NumRxQueues; tx != vethQueues || rx != vethQueues {
			t.Errorf("%s has %d and %d queues, want %d each", name, tx, rx, vethQueues)
		}
	}
	if err := p.host.Delete(p.hostDev.Index); err != nil {
		t.Fatal(err)
	}
	if err := p.host.Delete(p.hostDev.Index); err != nil {
		t.Errorf("Delete() of a device that is gone = %v, want nil", err)
	}
	if _, err := p.pod.Device("eth0"); !errors.Is(err, ErrNotFound) {
		t.Errorf("Device(eth0) after Delete() of its peer = %v, want ErrNotFound", err)
	}
	if _, err := p.host.DeviceByIndex(p.hostDev.Index); !errors.Is(err, ErrNotFound) {
		t.Errorf("DeviceByIndex() after Delete() = %v, want ErrNotFound", err)
	}
}

// addressAssignment reads a device's addr_assign_type from a sysfs of its namespace, mounted in a private mount namespace of a thread
// that ends afterwards.
func addressAssignment(t *testing.T, ns *netnstest.NS, device string) string {
	t.Helper()
	dir := t.TempDir()
	out := make(chan string, 1)
	go func() {
		runtime.LockOSThread()
		err := errors.Join(
			unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS),
			unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		)
		f, openErr := os.Open(ns.Path())
		if err = errors.Join(err, openErr); err == nil {
			err = errors.Join(unix.Setns(int(f.Fd()), unix.CLONE_NEWNET), unix.Mount("sysfs", dir, "sysfs", 0, ""))
		}
		text, readErr := os.ReadFile(filepath.Join(dir, "class/net", device, "addr_assign_type"))
		if err = errors.Join(err, readErr); err != nil {
			out <- err.Error()
			return
		}
		out <- strings.TrimSpace(string(text))
	}()
	return <-out
}

func TestAddVethNameTaken(t *testing.T) {
	p := newPair(t, 1500)
	f, err := os.Open(p.hostNS.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for name, spec := range map[string]VethSpec{
		"in the pod":  {PodName: "eth0", HostName: "mgyother", HostNS: int(f.Fd())},
		"in the host": {PodName: "eth1", HostName: p.hostDev.Name, HostNS: int(f.Fd())},
	} {
		t.Run(name, func(t *testing.T) {
			if _, _, err := p.pod.AddVeth(spec); !errors.Is(err, ErrExists) {
				t.Errorf("AddVeth() = %v, want ErrExists", err)
			}
		})
	}
}

// Real packets in both directions, with nobody who could answer ARP or ND for the gateway.
func TestConfigureCarriesPackets(t *testing.T) {
	for name, addresses := range families {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, 1500)
			pod, host := p.configs(addresses)
			for range 2 { // repeatable
				if err := p.pod.ConfigurePod(pod); err != nil {
					t.Fatal(err)
				}
				if err := p.host.ConfigureHost(host); err != nil {
					t.Fatal(err)
				}
			}
			for _, a := range addresses {
				var ln net.Listener
				p.podNS.Do(func() {
					var err error
					if ln, err = net.Listen("tcp", netip.AddrPortFrom(a, 8080).String()); err != nil {
						t.Fatalf("listen in the pod: %v", err) // IPv6: fails on a tentative address
					}
				})
				defer ln.Close()
				node := nodeAddress(t, p.hostNS, a)
				p.hostNS.Do(func() {
					d := net.Dialer{Timeout: 5 * time.Second, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(node, 0))}
					conn, err := d.Dial("tcp", netip.AddrPortFrom(a, 8080).String())
					if err != nil {
						t.Fatalf("connect from the node to %s: %v", a, err)
					}
					_ = conn.Close()
				})
			}
			p.hostNS.Do(func() {
				links, err := netlink.AddrList(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: host.Index}}, netlink.FAMILY_V6)
				if err != nil || len(links) != 0 {
					t.Errorf("host device has addresses %v, %v, want none", links, err)
				}
			})
		})
	}
}

// nodeAddress gives the node an address of a's family on its loopback device.
func nodeAddress(t *testing.T, ns *netnstest.NS, a netip.Addr) netip.Addr {
	t.Helper()
	node := netip.MustParseAddr("192.168.77.1")
	if a.Is6() {
		node = netip.MustParseAddr("fd77::1")
	}
	ns.Do(func() {
		err := netlink.AddrReplace(nil, &netlink.Addr{IPNet: hostNet(node), LinkIndex: 1, Flags: unix.IFA_F_NODAD})
		if err != nil {
			t.Fatal(err)
		}
	})
	return node
}

func TestConfigurePodWhereIPv6IsDisabled(t *testing.T) {
	p := newPair(t, 1500)
	p.podNS.Do(func() {
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", []byte("1"), 0); err != nil {
			t.Fatal(err)
		}
	})
	addresses := families["dual stack"]
	pod, _ := p.configs(addresses)
	if err := p.pod.ConfigurePod(pod); !errors.Is(err, ErrIPv6Disabled) {
		t.Fatalf("ConfigurePod() without EnableIPv6 = %v, want ErrIPv6Disabled", err)
	}
	pod.EnableIPv6 = func() (err error) {
		p.podNS.Do(func() { err = EnableIPv6("eth0") })
		return err
	}
	if err := p.pod.ConfigurePod(pod); err != nil {
		t.Fatalf("ConfigurePod() = %v, want nil", err)
	}
	if err := p.pod.VerifyPod(pod); err != nil {
		t.Errorf("VerifyPod() = %v, want nil", err)
	}
}

func TestVerifySeesEachDamage(t *testing.T) {
	v4, v6 := families["dual stack"][0], families["dual stack"][1]
	anywhere4, anywhere6 := netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")
	for name, c := range map[string]struct {
		damage func(pod, host *netlink.Handle, p *pair) error
		want   string
	}{
		"IPv4 address": {func(pod, _ *netlink.Handle, p *pair) error {
			return pod.AddrDel(nil, &netlink.Addr{IPNet: hostNet(v4), LinkIndex: p.podDev.Index})
		}, "pod address 10.9.0.5 is missing"},
		"IPv6 address": {func(pod, _ *netlink.Handle, p *pair) error {
			return pod.AddrDel(nil, &netlink.Addr{IPNet: hostNet(v6), LinkIndex: p.podDev.Index})
		}, "pod address fd09::5 is missing"},
		"IPv4 default route": {func(pod, _ *netlink.Handle, p *pair) error {
			return pod.RouteDel(&netlink.Route{LinkIndex: p.podDev.Index, Dst: ipNet(anywhere4)})
		}, "route 0.0.0.0/0 via 169.254.1.1 is missing"},
		"IPv6 default route": {func(pod, _ *netlink.Handle, p *pair) error {
			return pod.RouteDel(&netlink.Route{LinkIndex: p.podDev.Index, Dst: ipNet(anywhere6)})
		}, "route ::/0 via fe80::1 is missing"},
		"pod neighbour": {func(pod, _ *netlink.Handle, p *pair) error {
			return pod.NeighDel(&netlink.Neigh{LinkIndex: p.podDev.Index, IP: Gateway4.AsSlice(), Family: unix.AF_INET})
		}, "neighbour 169.254.1.1 is missing"},
		"pod neighbour's MAC": {func(pod, _ *netlink.Handle, p *pair) error {
			return pod.NeighSet(&netlink.Neigh{LinkIndex: p.podDev.Index, IP: Gateway6.AsSlice(), Family: unix.AF_INET6,
				State: netlink.NUD_PERMANENT, HardwareAddr: p.podDev.MAC})
		}, "neighbour fe80::1 is"},
		"IPv4 host route": {func(_, host *netlink.Handle, p *pair) error {
			return host.RouteDel(&netlink.Route{LinkIndex: p.hostDev.Index, Dst: hostNet(v4), Scope: netlink.SCOPE_LINK})
		}, "route 10.9.0.5/32 is missing"},
		"IPv6 host route": {func(_, host *netlink.Handle, p *pair) error {
			return host.RouteDel(&netlink.Route{LinkIndex: p.hostDev.Index, Dst: hostNet(v6)})
		}, "route fd09::5/128 is missing"},
		"host neighbour": {func(_, host *netlink.Handle, p *pair) error {
			return host.NeighDel(&netlink.Neigh{LinkIndex: p.hostDev.Index, IP: v6.AsSlice(), Family: unix.AF_INET6})
		}, "neighbour fd09::5 is missing"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, 1500)
			pod, host := p.configs(families["dual stack"])
			if err := errors.Join(p.pod.ConfigurePod(pod), p.host.ConfigureHost(host)); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(p.pod.VerifyPod(pod), p.host.VerifyHost(host)); err != nil {
				t.Fatalf("Verify = %v before the damage, want nil", err)
			}
			if err := c.damage(p.pod.h, p.host.h, p); err != nil {
				t.Fatal(err)
			}
			err := errors.Join(p.pod.VerifyPod(pod), p.host.VerifyHost(host))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Verify = %v, want %q", err, c.want)
			}
		})
	}
}

func TestDefaultMTU(t *testing.T) {
	add := func(t *testing.T, c *Conn, name string, mtu int, addresses ...string) int {
		t.Helper()
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = name, mtu
		if err := c.h.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: name + "p", PeerTxQLen: -1}); err != nil {
			t.Fatal(err)
		}
		l, err := c.h.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.h.LinkSetUp(l); err != nil {
			t.Fatal(err)
		}
		for _, a := range addresses {
			na, err := netlink.ParseAddr(a)
			if err != nil {
				t.Fatal(err)
			}
			na.Flags = unix.IFA_F_NODAD
			if err := c.h.AddrAdd(l, na); err != nil {
				t.Fatal(err)
			}
		}
		return l.Attrs().Index
	}
	via := func(t *testing.T, c *Conn, dst, gw string, index int) {
		t.Helper()
		r := &netlink.Route{LinkIndex: index, Dst: ipNet(netip.MustParsePrefix(dst)), Gw: net.ParseIP(gw)}
		if err := c.h.RouteAdd(r); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		setup func(t *testing.T, c *Conn)
		want  int
	}{
		"no default route": {func(*testing.T, *Conn) {}, 0},
		"IPv4": {func(t *testing.T, c *Conn) {
			via(t, c, "0.0.0.0/0", "10.0.0.1", add(t, c, "n0", 1400, "10.0.0.2/24"))
			add(t, c, "n1", 1300, "10.1.0.2/24")
		}, 1400},
		"IPv6": {func(t *testing.T, c *Conn) {
			via(t, c, "::/0", "fd00::1", add(t, c, "n0", 1420, "fd00::2/64"))
		}, 1420},
		"smaller of both": {func(t *testing.T, c *Conn) {
			via(t, c, "0.0.0.0/0", "10.0.0.1", add(t, c, "n0", 9000, "10.0.0.2/24"))
			via(t, c, "::/0", "fd00::1", add(t, c, "n1", 1500, "fd00::2/64"))
		}, 1500},
		"several next hops": {func(t *testing.T, c *Conn) {
			a, b := add(t, c, "n0", 1500, "10.0.0.2/24"), add(t, c, "n1", 1380, "10.1.0.2/24")
			err := c.h.RouteAdd(&netlink.Route{Dst: ipNet(netip.MustParsePrefix("0.0.0.0/0")), MultiPath: []*netlink.NexthopInfo{
				{LinkIndex: a, Gw: net.ParseIP("10.0.0.1")}, {LinkIndex: b, Gw: net.ParseIP("10.1.0.1")}}})
			if err != nil {
				t.Fatal(err)
			}
		}, 1380},
	} {
		t.Run(name, func(t *testing.T) {
			privileged.Require(t)
			conn := dial(t, netnstest.New(t))
			c.setup(t, conn)
			if got, err := conn.DefaultMTU(); got != c.want || err != nil {
				t.Errorf("DefaultMTU() = %d, %v, want %d", got, err, c.want)
			}
		})
	}
}

func TestDerivedNames(t *testing.T) {
	name := HostName("c1", "eth0")
	if len(name) > 15 || !strings.HasPrefix(name, HostPrefix) {
		t.Errorf("HostName() = %q, want at most 15 characters, starting with %s", name, HostPrefix)
	}
	if other := HostName("c1", "eth1"); other == name {
		t.Errorf("HostName() = %q for two interfaces of one container", name)
	}
	pod, host := MACs("c1", "eth0")
	for _, m := range []net.HardwareAddr{pod, host} {
		if m[0]&3 != 2 {
			t.Errorf("MACs() = %s, want a locally administered unicast address", m)
		}
	}
	if bytes.Equal(pod, host) {
		t.Errorf("MACs() = %s for both ends", pod)
	}
}
