// SPDX-License-Identifier: Apache-2.0

package link

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/privileged"
)

func TestHostPair(t *testing.T) {
	privileged.Require(t)
	ns := netnstest.New(t)
	c := dial(t, ns)
	host, service, err := c.EnsureHostPair()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []Device{host, service} {
		l, err := c.h.LinkByIndex(d.Index)
		if err != nil {
			t.Fatal(err)
		}
		if a := l.Attrs(); !d.Up || a.RawFlags&unix.IFF_NOARP == 0 || a.MTU != hostPairMTU {
			t.Errorf("%s: up %v, flags %x, MTU %d, want up, without ARP, %d", d.Name, d.Up, a.RawFlags, a.MTU, hostPairMTU)
		}
	}
	if again, other, err := c.EnsureHostPair(); err != nil || again.Index != host.Index || other.Index != service.Index {
		t.Errorf("EnsureHostPair() again = %v, %v, %v, want the same pair", again, other, err)
	}
	// Somebody gave one end another name, and changed the other.
	l, _ := c.h.LinkByIndex(service.Index)
	if err := errors.Join(c.h.LinkSetDown(l), c.h.LinkSetName(l, "stray")); err != nil {
		t.Fatal(err)
	}
	host, service, err = c.EnsureHostPair()
	if err != nil || host.Peer != service.Index || service.Peer != host.Index || !host.Up || !service.Up {
		t.Errorf("EnsureHostPair() after damage = %v, %v, %v, want a whole pair", host, service, err)
	}

	// Another device under the name is not ours to remove.
	if err := c.Delete(host.Index); err != nil {
		t.Fatal(err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = HostDevice
	if err := c.h.LinkAdd(&netlink.Vxlan{LinkAttrs: attrs, VxlanId: 7, Port: 7777}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.EnsureHostPair(); !errors.Is(err, ErrExists) {
		t.Errorf("EnsureHostPair() with a VXLAN device of that name = %v, want ErrExists", err)
	}
}

func TestSyncServiceRoutes(t *testing.T) {
	privileged.Require(t)
	ns := netnstest.New(t)
	c := dial(t, ns)
	host, _, err := c.EnsureHostPair()
	if err != nil {
		t.Fatal(err)
	}
	source4, source6 := nodeAddress(t, ns, netip.MustParseAddr("10.9.0.5")), nodeAddress(t, ns, netip.MustParseAddr("fd09::5"))
	one := ServiceRoute{Dst: netip.MustParsePrefix("10.96.0.0/12"), Source: source4, MTU: 1450}
	two := ServiceRoute{Dst: netip.MustParsePrefix("fd00:96::/112"), Source: source6, MTU: 1450}
	for _, step := range []struct {
		name    string
		want    []ServiceRoute
		keep    bool
		changed int
		have    int
	}{
		{"both", []ServiceRoute{one, two}, false, 2, 2},
		{"again", []ServiceRoute{one, two}, false, 0, 2},
		{"another MTU", []ServiceRoute{one, {Dst: two.Dst, Source: two.Source, MTU: 1400}}, false, 2, 2},
		{"none, but nothing may go", nil, true, 0, 2},
		{"one", []ServiceRoute{one}, false, 1, 1},
		{"none", nil, false, 1, 0},
	} {
		if changed, err := c.SyncServiceRoutes(host.Index, step.want, step.keep); err != nil || changed != step.changed {
			t.Errorf("%s: SyncServiceRoutes() = %d, %v, want %d", step.name, changed, err, step.changed)
		}
		have := 0
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			list, err := c.h.RouteListFiltered(family, &netlink.Route{Protocol: ServiceRouteProtocol}, netlink.RT_FILTER_PROTOCOL)
			if err != nil {
				t.Fatal(err)
			}
			have += len(list)
			for _, r := range list {
				if got, err := c.h.RouteGet(r.Dst.IP); err != nil || len(got) == 0 || got[0].LinkIndex != host.Index || !got[0].Src.Equal(r.Src) {
					t.Errorf("%s: the kernel sends to %s by %v, %v, want device %d and source %s", step.name, r.Dst, got, err, host.Index, r.Src)
				}
			}
		}
		if have != step.have {
			t.Errorf("%s: %d routes, want %d", step.name, have, step.have)
		}
	}
}

// TestServiceRoutesGiveWay: a route that somebody else made for the prefix, with the metric that the kernel gives without being asked, comes
// first in either family, such as that to a pod whose address is an external one of a service as well. Our routes of another metric are replaced.
func TestServiceRoutesGiveWay(t *testing.T) {
	privileged.Require(t)
	for _, a := range []netip.Addr{netip.MustParseAddr("10.244.0.9"), netip.MustParseAddr("fd00:244::9")} {
		t.Run(a.String(), func(t *testing.T) {
			ns := netnstest.New(t)
			c := dial(t, ns)
			host, service, err := c.EnsureHostPair()
			if err != nil {
				t.Fatal(err)
			}
			r := ServiceRoute{Dst: netip.PrefixFrom(a, a.BitLen()), MTU: 1450}
			sync := func(want int) {
				t.Helper()
				if changed, err := c.SyncServiceRoutes(host.Index, []ServiceRoute{r}, false); err != nil || changed != want {
					t.Errorf("SyncServiceRoutes() = %d, %v, want %d", changed, err, want)
				}
			}
			if err := c.h.RouteAdd(&netlink.Route{
				Dst: ipNet(r.Dst), LinkIndex: host.Index, Gw: GatewayOf(a).AsSlice(), Flags: int(netlink.FLAG_ONLINK), MTU: r.MTU,
				Protocol: ServiceRouteProtocol, Priority: 1000,
			}); err != nil {
				t.Fatal(err)
			}
			sync(2)
			sync(0)
			if err := c.h.RouteAdd(&netlink.Route{Dst: ipNet(r.Dst), LinkIndex: service.Index, Scope: netlink.SCOPE_LINK}); err != nil {
				t.Fatal(err)
			}
			sync(0)
			if got, err := c.h.RouteGet(a.AsSlice()); err != nil || len(got) == 0 || got[0].LinkIndex != service.Index {
				t.Errorf("the kernel sends to %s by %v, %v, want somebody else's device %d", a, got, err, service.Index)
			}
		})
	}
}
