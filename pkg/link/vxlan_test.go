// SPDX-License-Identifier: Apache-2.0

package link

import (
	"errors"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/privileged"
)

func overlay() VXLAN {
	return VXLAN{Name: "margay.vxlan", Port: 8472, MTU: 1430, MAC: OverlayMAC("n1")}
}

func ensure(t *testing.T, c *Conn, want VXLAN) Device {
	t.Helper()
	d, err := c.EnsureVXLAN(want)
	if err != nil {
		t.Fatalf("EnsureVXLAN: %v", err)
	}
	return d
}

func TestVXLANIsMadeOnceAndFollowsItsMTU(t *testing.T) {
	privileged.Require(t)
	ns := netnstest.New(t)
	c := dial(t, ns)
	d := ensure(t, c, overlay())
	if d.Up || d.MTU != 1430 || d.MAC.String() != OverlayMAC("n1").String() || d.Kind != "vxlan" {
		t.Errorf("device = %+v, want a VXLAN device that is down, with MTU 1430 and the node's MAC", d)
	}
	l, err := c.h.LinkByIndex(d.Index)
	if err != nil {
		t.Fatal(err)
	}
	v := l.(*netlink.Vxlan)
	if !v.FlowBased || !v.GBP || v.Learning || v.Port != 8472 || v.Alias != OverlayAlias || v.RawFlags&unix.IFF_NOARP == 0 {
		t.Errorf("device = %+v, want external, gbp, nolearning, port 8472, noarp, and our alias", v)
	}
	if err := c.SetUp(d.Index); err != nil {
		t.Fatal(err)
	}
	if again := ensure(t, c, overlay()); again.Index != d.Index || !again.Up {
		t.Errorf("the second EnsureVXLAN = %+v, want the same device %d, up", again, d.Index)
	}
	if addrs, err := c.Addresses(d.Index); err != nil || len(addrs) > 0 {
		t.Errorf("addresses of the device that is up = %v, %v, want none", addrs, err)
	}
	larger := overlay()
	larger.MTU = 8930
	if got := ensure(t, c, larger); got.Index != d.Index || got.MTU != 8930 {
		t.Errorf("device = %+v, want the same one with MTU 8930", got)
	}
	if err := c.DeleteVXLANs(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Device("margay.vxlan"); !errors.Is(err, ErrNotFound) {
		t.Errorf("device after DeleteVXLANs: %v, want %v", err, ErrNotFound)
	}
}

func TestVXLANThatDiffersIsMadeAnew(t *testing.T) {
	privileged.Require(t)
	for name, spoil := range map[string]string{
		"other port":    "ip link add margay.vxlan type vxlan external gbp dstport 4789",
		"no group":      "ip link add margay.vxlan type vxlan external dstport 8472",
		"one id":        "ip link add margay.vxlan type vxlan id 1 gbp dstport 8472",
		"another name":  "ip link add old.vxlan alias old type vxlan external gbp dstport 8472",
		"nothing there": "true",
	} {
		t.Run(name, func(t *testing.T) {
			ns := netnstest.New(t)
			c := dial(t, ns)
			ns.Do(func() {
				run(t, spoil)
				if name == "another name" {
					run(t, "ip link set old.vxlan alias "+strings.ReplaceAll(OverlayAlias, " ", "\x00"))
				}
			})
			d := ensure(t, c, overlay())
			l, err := c.h.LinkByIndex(d.Index)
			if err != nil {
				t.Fatal(err)
			}
			if v := l.(*netlink.Vxlan); !isOverlay(v, 8472) {
				t.Errorf("device = %+v, want the overlay device", v)
			}
			if err := c.SetUp(d.Index); err != nil {
				t.Errorf("bring it up, which takes the port: %v", err)
			}
			if _, err := c.Device("old.vxlan"); !errors.Is(err, ErrNotFound) {
				t.Errorf("our device of another name: %v, want %v", err, ErrNotFound)
			}
		})
	}
}

// run runs a command whose words may hold spaces written as NUL.
func run(t *testing.T, command string) string {
	t.Helper()
	words := strings.Fields(command)
	for i := range words {
		words[i] = strings.ReplaceAll(words[i], "\x00", " ")
	}
	out, err := exec.Command(words[0], words[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", command, err, out)
	}
	return string(out)
}

func TestVXLANDoesNotTakeSomebodyElsesDevice(t *testing.T) {
	privileged.Require(t)
	ns := netnstest.New(t)
	c := dial(t, ns)
	ns.Do(func() { run(t, "ip link add margay.vxlan type veth peer name other") })
	if _, err := c.EnsureVXLAN(overlay()); !errors.Is(err, ErrExists) {
		t.Errorf("EnsureVXLAN over a veth device: %v, want %v", err, ErrExists)
	}
	if d, err := c.Device("margay.vxlan"); err != nil || d.Kind != "veth" {
		t.Errorf("device = %+v, %v, want the veth as it was", d, err)
	}
}

func TestVXLANPortIsTaken(t *testing.T) {
	privileged.Require(t)
	ns := netnstest.New(t)
	c := dial(t, ns)
	ns.Do(func() { run(t, "ip link add flannel.1 type vxlan external gbp dstport 8472") })
	if _, err := c.EnsureVXLAN(overlay()); !errors.Is(err, unix.EEXIST) || !strings.Contains(err.Error(), "UDP port 8472") {
		t.Errorf("EnsureVXLAN beside another one's device = %v, want an error that names the port", err)
	}
	if _, err := c.Device("flannel.1"); err != nil {
		t.Errorf("the other one's device: %v, want it as it was", err)
	}
}

func TestNodeRoutes(t *testing.T) {
	privileged.Require(t)
	for name, f := range map[string]struct{ network, gw, gw2, own, remote, near, self, pod string }{
		"IPv4": {"192.0.2.1/24", "192.0.2.2", "192.0.2.3", "10.1.0.0/24", "10.2.0.0/24", "10.3.0.0/24", "192.0.2.1", "10.1.0.9/32"},
		"IPv6": {"2001:db8::1/64", "2001:db8::2", "2001:db8::3", "fd00:1::/64", "fd00:2::/64", "fd00:3::/64", "2001:db8::1", "fd00:1::9/128"},
	} {
		t.Run(name, func(t *testing.T) {
			ns := netnstest.New(t)
			c := dial(t, ns)
			d := ensure(t, c, overlay())
			if err := c.SetUp(d.Index); err != nil {
				t.Fatal(err)
			}
			ip := func(args string) string {
				var out string
				ns.Do(func() { out = run(t, "ip "+args) })
				return out
			}
			ip("link add eth0 type veth peer name wan0")
			ip("link set wan0 up")
			ip("link set eth0 up")
			nodad := ""
			if name == "IPv6" {
				nodad = " nodad"
			}
			ip("address add " + f.network + " dev eth0" + nodad)
			eth0, err := c.Device("eth0")
			if err != nil {
				t.Fatal(err)
			}
			if err := c.waitLocal([]netip.Addr{netip.MustParseAddr(f.self)}); err != nil {
				t.Fatal(err)
			}
			// A pod's route and an administrator's for one of our prefixes stay.
			ip("route add " + f.pod + " dev eth0 proto 77")
			ip("route add " + f.remote + " dev eth0 metric 5")
			others := otherRoutes(t, c)

			own, remote, near := netip.MustParsePrefix(f.own), netip.MustParsePrefix(f.remote), netip.MustParsePrefix(f.near)
			want := []NodeRoute{
				{Dst: own},
				{Dst: remote, Device: d.Index, Source: netip.MustParseAddr(f.self)},
				{Dst: near, Device: eth0.Index, Gateway: netip.MustParseAddr(f.gw)},
			}
			check := func(what string, changed int) {
				t.Helper()
				got, err := c.SyncNodeRoutes(want, false)
				if err != nil || got != changed {
					t.Errorf("%s: SyncNodeRoutes = %d, %v, want %d changes", what, got, err, changed)
				}
				have, err := c.NodeRoutes()
				if err != nil {
					t.Fatal(err)
				}
				byDst := cmpopts.SortSlices(func(a, b NodeRoute) bool { return a.Dst.Compare(b.Dst) < 0 })
				if diff := cmp.Diff(want, have, byDst, cmpopts.EquateEmpty(), cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
					cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
					t.Errorf("%s: routes (-want +got):\n%s", what, diff)
				}
			}
			check("at the start", 3)
			check("again", 0)
			want[2].Gateway = netip.MustParseAddr(f.gw2)
			check("another next hop", 1)
			want[2] = NodeRoute{Dst: near, Device: d.Index}
			want[1].Source = netip.Addr{}
			check("another device, another source", 2)
			want[1] = NodeRoute{Dst: remote}
			check("unreachable now", 1)
			if changed, err := c.SyncNodeRoutes(want[:1], true); changed != 0 || err != nil {
				t.Errorf("SyncNodeRoutes of fewer, keeping = %d, %v, want no change", changed, err)
			}
			check("none lost", 0)
			want = want[:1]
			check("two less", 2)
			want = nil
			check("none", 1)
			if diff := cmp.Diff(others, otherRoutes(t, c)); diff != "" {
				t.Errorf("routes that are not ours (-before +after):\n%s", diff)
			}
		})
	}
}

// otherRoutes are the routes of the main table that SyncNodeRoutes has nothing to do with.
func otherRoutes(t *testing.T, c *Conn) []string {
	t.Helper()
	list, err := c.h.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, r := range list {
		if r.Protocol != NodeRouteProtocol {
			out = append(out, r.String())
		}
	}
	slices.Sort(out)
	return out
}

func TestOverlayMACsDiffer(t *testing.T) {
	a, b := OverlayMAC("n1"), OverlayMAC("n2")
	if a.String() == b.String() || a[0]&3 != 2 {
		t.Errorf("OverlayMAC = %s and %s, want two local unicast addresses", a, b)
	}
}
