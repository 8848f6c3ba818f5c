// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"net"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/link"
)

func TestChoose(t *testing.T) {
	global := []netip.Addr{netip.MustParseAddr("192.0.2.1")}
	for name, tt := range map[string]struct {
		c    chooser
		d    device
		want string
	}{
		"nic with an address":            {d: device{name: "eth0", kind: "device", ethernet: true, addrs: global}, want: "global address"},
		"nic with a default route":       {d: device{name: "eth0", kind: "device", ethernet: true, addrs: global, defaultRoute: true}, want: "default route"},
		"nic without an address":         {d: device{name: "eth1", kind: "device", ethernet: true}},
		"loopback":                       {d: device{name: "lo", loopback: true, addrs: global}},
		"our pod's device":               {d: device{name: "mgy0123", kind: "veth", ethernet: true, addrs: global}},
		"adopted pod's device":           {c: chooser{pods: map[int]bool{7: true}}, d: device{index: 7, name: "veth1", kind: "veth", ethernet: true, addrs: global}},
		"veth with an address":           {d: device{name: "veth1", kind: "veth", ethernet: true, addrs: global}, want: "global address"},
		"veth that has just come":        {c: chooser{fresh: map[int]bool{7: true}}, d: device{index: 7, name: "veth1", kind: "veth", ethernet: true, addrs: global}},
		"another container's bridge":     {d: device{name: "docker0", kind: "bridge", ethernet: true, addrs: global}},
		"bridge that leads to the world": {d: device{name: "br0", kind: "bridge", ethernet: true, addrs: global, defaultRoute: true}, want: "default route"},
		"tunnel without Ethernet":        {d: device{name: "wg0", kind: "wireguard", addrs: global}},
		"tunnel that is named":           {c: chooser{patterns: []string{"wg*"}}, d: device{name: "wg0", kind: "wireguard", addrs: global}, want: "named by wg*"},
		"bond":                           {d: device{name: "bond0", kind: "bond", ethernet: true, addrs: global}, want: "global address"},
		"bond's member":                  {d: device{name: "eth0", kind: "device", ethernet: true}},
		"VLAN":                           {d: device{name: "eth0.100", kind: "vlan", ethernet: true, addrs: global}, want: "global address"},
		"dummy":                          {d: device{name: "kube-ipvs0", kind: "dummy", ethernet: true, addrs: global}},
		"named":                          {c: chooser{patterns: []string{"en*", "br?"}}, d: device{name: "br1", kind: "bridge", ethernet: true}, want: "named by br?"},
		"not named":                      {c: chooser{patterns: []string{"en*"}}, d: device{name: "eth0", kind: "device", ethernet: true, defaultRoute: true}},
		"loopback is nobody's device":    {c: chooser{patterns: []string{"*"}}, d: device{name: "lo", loopback: true}},
		"named, but a pod's":             {c: chooser{patterns: []string{"*"}}, d: device{name: "mgy1", kind: "veth", ethernet: true}},
		"named, but an adopted pod's":    {c: chooser{patterns: []string{"*"}, pods: map[int]bool{7: true}}, d: device{index: 7, name: "v", kind: "veth", ethernet: true}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := tt.c.choose(tt.d); got != tt.want {
				t.Errorf("choose() = %q, want %q", got, tt.want)
			}
		})
	}
}

func TestFacts(t *testing.T) {
	v4, v6, bridge := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("10.1.0.1")
	s := survey{devices: []device{
		{index: 2, name: "eth0", kind: "device", ethernet: true, addrs: []netip.Addr{v4, v6}},
		{index: 3, name: "cni0", kind: "bridge", ethernet: true, addrs: []netip.Addr{bridge}},
	}}
	addrs, chosen, _ := s.facts(chooser{})
	want := map[netip.Addr]uint32{v4: bpf.NodeAddrLocal | bpf.NodeAddrNodePort, v6: bpf.NodeAddrLocal | bpf.NodeAddrNodePort, bridge: bpf.NodeAddrLocal}
	if diff := cmp.Diff(want, addrs, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("addresses (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]DeviceStatus{{Name: "eth0", Ifindex: 2, Reason: "global address"}}, chosen); diff != "" {
		t.Errorf("devices (-want +got):\n%s", diff)
	}
}

func TestFingerprintKnowsMTUs(t *testing.T) {
	of := func(name string, mtu int, protocol netlink.RouteProtocol) string {
		d := &device{index: 2, name: name, mtu: mtu}
		s := &survey{nodeRoutes: map[link.NodeRoute]bool{}}
		s.addRoute(netlink.Route{LinkIndex: 2, Family: unix.AF_INET, Protocol: protocol}, map[int]*device{2: d})
		return s.fingerprint()
	}
	if of("eth0", 1500, 3) == of("eth0", 1400, 3) {
		t.Errorf("fingerprint does not change with the MTU of a device that a route leads to")
	}
	if of("mgy1", 1500, 3) != of("mgy1", 1400, 3) || of("veth1", 1500, link.RouteProtocol) != of("veth1", 1400, link.RouteProtocol) {
		t.Errorf("fingerprint changes with the MTU of a pod")
	}
	if of("eth0", 1500, link.NodeRouteProtocol) == (&survey{}).fingerprint() {
		t.Errorf("fingerprint does not know a route to another node")
	}
}

func TestFingerprintKnowsGateways(t *testing.T) {
	of := func(r netlink.Route) string {
		s := &survey{nodeRoutes: map[link.NodeRoute]bool{}}
		s.addRoute(r, map[int]*device{2: {index: 2, name: "eth0", mtu: 1500}})
		return s.fingerprint()
	}
	via := func(a string) *netlink.Via { return &netlink.Via{AddrFamily: unix.AF_INET6, Addr: net.ParseIP(a)} }
	for name, pair := range map[string][2]netlink.NexthopInfo{
		"IPv4":                    {{Gw: net.ParseIP("192.0.2.1")}, {Gw: net.ParseIP("192.0.2.2")}},
		"IPv6":                    {{Gw: net.ParseIP("fe80::1")}, {Gw: net.ParseIP("fe80::2")}},
		"IPv4 by an IPv6 gateway": {{Via: via("fe80::1")}, {Via: via("fe80::2")}},
	} {
		single := func(h netlink.NexthopInfo) string { return of(netlink.Route{LinkIndex: 2, Gw: h.Gw, Via: h.Via}) }
		if single(pair[0]) == single(pair[1]) {
			t.Errorf("%s: fingerprint does not change with the gateway", name)
		}
		multi := func(h netlink.NexthopInfo) string {
			h.LinkIndex = 2
			return of(netlink.Route{MultiPath: []*netlink.NexthopInfo{{LinkIndex: 2}, &h}})
		}
		if multi(pair[0]) == multi(pair[1]) {
			t.Errorf("%s: fingerprint does not change with one of two gateways", name)
		}
	}
}

func TestUsableAddresses(t *testing.T) {
	d := &device{}
	for _, a := range []struct {
		prefix string
		flags  int
	}{
		{"192.0.2.1/24", unix.IFA_F_PERMANENT}, {"192.0.2.2/24", unix.IFA_F_SECONDARY},
		{"2001:db8::1/64", unix.IFA_F_TEMPORARY}, {"2001:db8::2/64", unix.IFA_F_DEPRECATED}, {"2001:db8::3/64", unix.IFA_F_TENTATIVE},
		{"2001:db8::4/64", unix.IFA_F_DADFAILED}, {"2001:db8::5/64", unix.IFA_F_PERMANENT},
	} {
		n, err := netlink.ParseIPNet(a.prefix)
		if err != nil {
			t.Fatal(err)
		}
		d.addAddress(netip.MustParsePrefix(a.prefix).Addr(), netlink.Addr{IPNet: n, Flags: a.flags})
	}
	if got, want := fmt.Sprint(d.usable), "[192.0.2.1 192.0.2.2 2001:db8::5]"; got != want {
		t.Errorf("usable addresses = %s, want %s", got, want)
	}
	if got := fmt.Sprint(d.networks[:1], len(d.networks), len(d.addrs)); got != "[192.0.2.1/24] 7 7" {
		t.Errorf("networks = %v, want all seven with their lengths", d.networks)
	}
}

func TestOverlayIsNoDeviceOfTheNode(t *testing.T) {
	d := device{index: 9, name: "margay.vxlan", kind: "vxlan", ethernet: true, overlay: true, addrs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}}
	for _, c := range []chooser{{}, {patterns: []string{"*"}}} {
		if got := c.choose(d); got != "" {
			t.Errorf("chooser%+v.choose(overlay) = %q, want it never chosen", c, got)
		}
	}
}
