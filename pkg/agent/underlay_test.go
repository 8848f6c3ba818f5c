// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/privileged"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/node"
)

var (
	local4, remote4 = netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	tunnel4         = node.Tunnel{Local: local4, Remote: remote4, MTU: 1450}
	tunnel6         = node.Tunnel{Local: netip.MustParseAddr("2001:db8::1"), Remote: netip.MustParseAddr("2001:db8::2"), MTU: 1430}
)

// TestWhoEncapsulates: the programs do where a plain route leads to the node by an Ethernet device, and whatever speaks against it leaves it to
// the overlay device.
func TestWhoEncapsulates(t *testing.T) {
	onLink, routed := underlayRoute{device: 2, onLink: true}, underlayRoute{device: 2}
	for _, tc := range []struct {
		name   string
		change func(w *nodeWatcher, s *survey, r *netlink.Route)
		want   underlayRoute
	}{
		{name: "a neighbour", change: func(*nodeWatcher, *survey, *netlink.Route) {}, want: onLink},
		{name: "behind a router", change: func(_ *nodeWatcher, _ *survey, r *netlink.Route) { r.Gw = net.IPv4(192, 0, 2, 254) }, want: routed},
		{name: "a route with an MTU that fits", change: func(_ *nodeWatcher, _ *survey, r *netlink.Route) { r.MTU = 1500 }, want: onLink},
		{name: "the flag", change: func(w *nodeWatcher, _ *survey, _ *netlink.Route) { w.encapsulation = EncapsulationDevice }},
		{name: "xfrm policies", change: func(_ *nodeWatcher, s *survey, _ *netlink.Route) { s.transforms = errTransforms }},
		{name: "xfrm policies that nobody knows of", change: func(_ *nodeWatcher, s *survey, _ *netlink.Route) { s.transforms = unix.EPERM }},
		{name: "a rule by ports", change: func(_ *nodeWatcher, s *survey, _ *netlink.Route) { s.narrowRules = true }},
		{name: "outer IPv6", change: func(w *nodeWatcher, _ *survey, _ *netlink.Route) { w.want.tunnels = []node.Tunnel{tunnel6} }},
		{name: "no route", change: func(w *nodeWatcher, _ *survey, _ *netlink.Route) {
			w.routeTo = func(_, _ netip.Addr) ([]netlink.Route, error) { return nil, unix.ENETUNREACH }
		}},
		{name: "several ways", change: func(_ *nodeWatcher, _ *survey, r *netlink.Route) {
			r.MultiPath = []*netlink.NexthopInfo{{LinkIndex: 2}, {LinkIndex: 2}}
		}},
		{name: "another family's router", change: func(_ *nodeWatcher, _ *survey, r *netlink.Route) { r.Via = &netlink.Via{AddrFamily: unix.AF_INET6} }},
		{name: "a route with an encapsulation of its own", change: func(_ *nodeWatcher, _ *survey, r *netlink.Route) { r.Encap = &netlink.MPLSEncap{} }},
		{name: "an address of this machine", change: func(_ *nodeWatcher, _ *survey, r *netlink.Route) { r.Type = unix.RTN_LOCAL }},
		{name: "a route with a small MTU", change: func(_ *nodeWatcher, _ *survey, r *netlink.Route) { r.MTU = 1499 }},
		{name: "a device with a small MTU", change: func(_ *nodeWatcher, s *survey, _ *netlink.Route) { s.devices[0].mtu = 1499 }},
		{name: "a device without link layer", change: func(_ *nodeWatcher, s *survey, _ *netlink.Route) { s.devices[0].ethernet = false }},
		{name: "a device that is down", change: func(_ *nodeWatcher, s *survey, _ *netlink.Route) { s.devices[0].up = false }},
		{name: "another device", change: func(_ *nodeWatcher, _ *survey, r *netlink.Route) { r.LinkIndex = 3 }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w, n, facts := networkRig()
			n.devices[0].up, n.devices[0].mtu = true, 1500
			route := netlink.Route{Type: unix.RTN_UNICAST, LinkIndex: 2}
			w.routeTo = func(local, remote netip.Addr) ([]netlink.Route, error) {
				if local != local4 || remote != remote4 {
					t.Errorf("asked for the route from %s to %s, want from %s to %s", local, remote, local4, remote4)
				}
				return []netlink.Route{route}, nil
			}
			w.want = wantsOverlay()
			w.want.tunnels = []node.Tunnel{tunnel4}
			tc.change(w, n.survey, &route)
			w.survey(false)
			ends := tunnelEnds{w.want.tunnels[0].Local, w.want.tunnels[0].Remote}
			if got, known := facts().underlay[ends]; got != tc.want || !known {
				t.Errorf("underlay = %+v, %v, want %+v", got, known, tc.want)
			}
		})
	}
}

// TestUnderlayIsFollowed: the kernel is asked again when something has changed, and not before.
func TestUnderlayIsFollowed(t *testing.T) {
	w, n, facts := networkRig()
	n.devices[0].up, n.devices[0].mtu = true, 1500
	asked := 0
	w.routeTo = func(_, _ netip.Addr) ([]netlink.Route, error) {
		asked++
		return []netlink.Route{{Type: unix.RTN_UNICAST, LinkIndex: 2}}, nil
	}
	w.survey(false)
	if facts().underlay != nil {
		t.Errorf("underlay = %v before the other nodes are known, want none", facts().underlay)
	}
	w.want = wantsOverlay()
	w.want.tunnels = []node.Tunnel{tunnel4}
	w.survey(false)
	ends, before := tunnelEnds{local4, remote4}, asked
	w.survey(true)
	if asked != before || facts().underlay[ends].device != 2 {
		t.Errorf("asked %d times more although nothing changed; underlay = %v", asked-before, facts().underlay)
	}
	for _, tc := range []struct {
		what   string
		change func()
	}{
		{"a route", func() { n.routes = append(n.routes, "another") }},
		{"a device", func() { n.devices[0].mtu = 1600 }},
		{"the tunnels: one more", func() { w.want.tunnels = []node.Tunnel{tunnel4, tunnel6} }},
		{"the tunnels: one less", func() { w.want.tunnels = []node.Tunnel{tunnel4} }},
	} {
		before := asked
		tc.change()
		w.survey(false)
		if asked == before {
			t.Errorf("%s changed, and nobody asked for the route", tc.what)
		}
	}
	n.transforms = errTransforms
	w.survey(false)
	if got := facts().underlay[ends]; got != (underlayRoute{}) {
		t.Errorf("underlay with xfrm policies = %+v, want none", got)
	}
	n.transforms = nil
	w.survey(false)
	if got := facts().underlay[ends]; got.device != 2 {
		t.Errorf("underlay without them again = %+v, want by device 2", got)
	}
}

// TestEncapsulationReachesTheMaps: who encapsulates is written with the node, and an agent that does not know yet leaves it as it was.
func TestEncapsulationReachesTheMaps(t *testing.T) {
	k := newKernel(1)
	k.watchNodes(t)
	r := newRig(t, k, runDir(t))
	facts := twoFamilies()
	facts.underlay = map[tunnelEnds]underlayRoute{{local4, remote4}: {device: 2, onLink: true}}
	r.takeFacts(*facts)
	r.give(nodesOnly(self, other))
	want := bpf.Node{Addr: bpf.NewAddr(remote4), Local: bpf.NewAddr(local4), Mtu: 1450, Ifindex: 2, Flags: bpf.NodeOnLink}
	if got := k.nodes.entries[1]; got != want {
		t.Errorf("nodes[1] = %+v, want %+v", got, want)
	}
	epoch := k.routeEpoch
	unknown := twoFamilies()
	r.takeFacts(*unknown)
	r.settle()
	if got := k.nodes.entries[1]; got != want || k.routeEpoch != epoch {
		t.Errorf("nodes[1] = %+v before the routes are known, epoch %d, want %+v and %d", got, k.routeEpoch, want, epoch)
	}
	byDevice := twoFamilies()
	byDevice.underlay = map[tunnelEnds]underlayRoute{{local4, remote4}: {}}
	r.takeFacts(*byDevice)
	r.settle()
	want.Ifindex, want.Flags = 0, 0
	if got := k.nodes.entries[1]; got != want || k.routeEpoch == epoch {
		t.Errorf("nodes[1] = %+v, epoch %d, want %+v and a new epoch", got, k.routeEpoch, want)
	}
}

// TestKernelRoute reads real routes: a neighbour's, one by a router, one with two ways; and what is not one plain way is not taken for it.
func TestKernelRoute(t *testing.T) {
	privileged.Require(t)
	netnstest.New(t).Do(func() {
		run(t, "ip link add eth0 type veth peer name eth1", "ip link set eth1 up", "ip link set eth0 up", "ip addr add 192.0.2.1/24 dev eth0",
			"ip route add 198.51.100.0/24 via 192.0.2.254", "ip route add 203.0.113.0/24 nexthop via 192.0.2.254 nexthop via 192.0.2.253",
			"ip route add 203.0.113.9/32 via 192.0.2.254 mtu 1400", "ip route add 203.0.113.8/32 via inet6 fe80::1 dev eth0")
		eth0, err := net.InterfaceByName("eth0")
		if err != nil {
			t.Fatal(err)
		}
		for remote, want := range map[string]struct {
			plain, gateway bool
			mtu            int
		}{
			"192.0.2.2": {plain: true}, "198.51.100.2": {plain: true, gateway: true}, "203.0.113.2": {}, "203.0.113.9": {plain: true, gateway: true, mtu: 1400},
			"203.0.113.8": {}, "192.0.2.1": {},
		} {
			routes, err := kernelRoute(local4, netip.MustParseAddr(remote))
			if err != nil || len(routes) != 1 {
				t.Errorf("route to %s = %v, %v, want one", remote, routes, err)
				continue
			}
			r := routes[0]
			if isPlain(r) != want.plain || want.plain && (r.LinkIndex != eth0.Index || (r.Gw != nil) != want.gateway || r.MTU != want.mtu) {
				t.Errorf("route to %s = %+v, want %+v", remote, r, want)
			}
		}
		if routes, err := kernelRoute(local4, netip.MustParseAddr("10.9.9.9")); err == nil {
			t.Errorf("route to nowhere = %v, want an error", routes)
		}
	})
}

// TestSurveyNotesRulesAndTransforms: rules by ports and xfrm policies are seen, and the latter tell of themselves.
func TestSurveyNotesRulesAndTransforms(t *testing.T) {
	privileged.Require(t)
	ns := netnstest.New(t)
	expect := func(what string, transforms, narrow bool) {
		t.Helper()
		ns.Do(func() {
			s, err := readSurvey()
			if err != nil || errors.Is(s.transforms, errTransforms) != transforms || s.narrowRules != narrow {
				t.Fatalf("%s: %+v, %v, want xfrm policies: %v, narrow rules: %v", what, s, err, transforms, narrow)
			}
		})
	}
	expect("at first", false, false)
	for _, rule := range []string{"dport 8472", "sport 1-2", "ipproto udp", "uidrange 0-10", "tos 0x10", "oif lo"} {
		ns.Do(func() { run(t, "ip rule add "+rule+" lookup 77") })
		expect(rule, false, true)
		ns.Do(func() { run(t, "ip rule del "+rule+" lookup 77") })
	}
	ns.Do(func() { run(t, "ip rule add fwmark 1 lookup 77", "ip rule add from 192.0.2.0/24 lookup 77") })
	expect("rules by mark and source", false, false)

	ctx, cancel := context.WithCancel(t.Context())
	changes, done := newMailbox[struct{}](), make(chan error, 1)
	ready := make(chan struct{})
	go ns.Do(func() {
		close(ready)
		done <- subscribeTransforms(ctx, changes)
	})
	<-ready
	policy := func(verb string) {
		t.Helper()
		for end := time.Now().Add(5 * time.Second); ; {
			ns.Do(func() { run(t, "ip xfrm policy "+verb+" src 192.0.2.1/32 dst 192.0.2.2/32 dir out") })
			select {
			case <-changes:
				return
			case <-time.After(100 * time.Millisecond): // not subscribed yet
			}
			if time.Now().After(end) {
				t.Fatalf("nobody told of %s", verb)
			}
		}
	}
	policy("update")
	expect("a policy", true, false)
	policy("delete")
	expect("it is gone", false, false)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// run executes commands in the calling thread's namespace.
func run(t *testing.T, commands ...string) {
	t.Helper()
	for _, c := range commands {
		args := strings.Fields(c)
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", c, err, out)
		}
	}
}
