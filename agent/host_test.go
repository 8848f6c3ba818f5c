// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/pkg/link"
)

// serviceRoutes reads the routes into the host's pair, in the node's namespace.
func serviceRoutes(t *testing.T, n *nodetest.Node) (found []string) {
	t.Helper()
	n.NS.Do(func() {
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			routes, err := netlink.RouteListFiltered(family, &netlink.Route{Protocol: link.ServiceRouteProtocol}, netlink.RT_FILTER_PROTOCOL)
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range routes {
				if l, err := netlink.LinkByIndex(r.LinkIndex); err != nil || l.Attrs().Name != link.HostDevice {
					t.Errorf("route %s leads by device %d, want %s", r.Dst, r.LinkIndex, link.HostDevice)
				}
				found = append(found, r.Dst.String()+" from "+r.Src.String())
			}
		}
	})
	slices.Sort(found)
	return found
}

// Contract row V15, with an agent: the node's own sockets reach what the manifests say, and do so again after somebody was in the way.
func TestV15_AgentServesTheHost(t *testing.T) {
	n := nodetest.New(t)
	pod := n.AddPod("one")
	nodetest.Serve(t, pod.NS, "one", 8080)
	record(t, n, pod, map[string]string{"app": "web"})
	manifests := t.TempDir()
	p := start(t, n, manifests, "--nodeport-addresses", "all")
	put(t, manifests, "web.yaml", serviceYAML)
	asked := func() bool {
		for i, node := range n.Addrs {
			for _, to := range []netip.AddrPort{
				netip.AddrPortFrom([]netip.Addr{netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("fd00:96::10")}[i], 80),
				netip.AddrPortFrom(node, 30080),
				netip.AddrPortFrom([]netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}[i], 30080),
			} {
				if got, err := nodetest.Ask(t, n.NS, "tcp", to); err != nil || got != "one "+node.String() {
					return false
				}
			}
		}
		return true
	}
	eventually(t, "an answer by every address of the service", asked)
	learned := []string{"10.96.0.10/32 from 192.0.2.1", "fd00:96::10/128 from 2001:db8:1::1"}
	if diff := cmp.Diff(learned, serviceRoutes(t, n)); diff != "" {
		t.Errorf("learned routes (-want +got):\n%s", diff)
	}

	clsact := func(device string) *netlink.Clsact {
		l, err := netlink.LinkByName(device)
		if err != nil {
			t.Fatal(err)
		}
		return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
		}}
	}
	for what, damage := range map[string]func() error{
		"the pair is gone": func() error {
			return netlink.LinkDel(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: link.HostDevice}})
		},
		"its programs are gone":              func() error { return netlink.QdiscDel(clsact(link.ServiceDevice)) },
		"the loopback device's program gone": func() error { return netlink.QdiscDel(clsact("lo")) },
		"a route is gone": func() error {
			return netlink.RouteDel(&netlink.Route{Dst: &net.IPNet{IP: net.IPv4(10, 96, 0, 10).To4(), Mask: net.CIDRMask(32, 32)}})
		},
	} {
		n.NS.Do(func() {
			if err := damage(); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
		})
		// The agent's tcx links answer meanwhile. What stays when they end with the agent are the filters.
		eventually(t, "the filters after "+what, func() (ok bool) {
			n.NS.Do(func() {
				pair, err := netlink.LinkByName(link.ServiceDevice)
				ok = err == nil && n.DP.HostAttached(pair.Attrs().Index) == nil
			})
			return ok
		})
		eventually(t, "an answer after "+what, asked)
	}

	// A killed agent changes nothing, and neither does the next.
	p.kill()
	if !asked() {
		t.Error("no answer while there is no agent")
	}
	p = start(t, n, manifests, "--nodeport-addresses", "all")
	rounds := p.status().Rounds
	eventually(t, "full compares", func() bool { return p.status().Rounds > rounds+2 })
	if got := p.writes(); got != 0 {
		t.Errorf("entries written by an agent that was killed and started again = %d, want 0", got)
	}
	if diff := cmp.Diff(learned, serviceRoutes(t, n)); diff != "" {
		t.Errorf("routes after a restart (-want +got):\n%s", diff)
	}
}
