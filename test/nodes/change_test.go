// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/internal/testutil/clustertest"
	"github.com/margay-cni/margay/pkg/endpoint"
)

// talks requires that both pods, and the nodes that they are on, answer each other in both families.
func talks(t *testing.T, what string, a, b *clustertest.Pod) {
	t.Helper()
	for _, v6 := range []bool{false, true} {
		for _, pair := range [][2]*clustertest.Pod{{a, b}, {b, a}} {
			from, to := pair[0], pair[1]
			want := to.Name + " " + from.Addr(v6).String()
			if got, err := from.Ask("tcp", to.AddrPort(v6, 8080)); err != nil || got != want {
				t.Errorf("%s: %s from %s to %s = %q, %v, want %q", what, clustertest.FamilyName(v6), from.Name, to.Name, got, err, want)
			}
			if err := to.Node.Ping(from.Addr(v6)); err != nil {
				t.Errorf("%s: from node %s: %v", what, to.Node.Name, err)
			}
		}
	}
}

// TestNodesChange: a node that comes, gets other addresses or ranges, or goes is picked up by agents at work, and a connection between
// two others does not notice.
func TestNodesChange(t *testing.T) {
	for _, mode := range []string{"vxlan", "direct", "auto"} {
		t.Run(mode, func(t *testing.T) {
			c := clustertest.New(t, clustertest.Options{Nodes: 2, RoutingMode: mode, PodRoutes: true})
			a, b := c.AddPod(c.Node("n1"), "a", nil), c.AddPod(c.Node("n2"), "b", nil)
			a.Serve(8080)
			b.Serve(8080)
			c.WaitSettled()
			talks(t, "at the start", a, b)
			conn, err := a.Dial("tcp", b.AddrPort(false, 8080), 0)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			undisturbed := func(what string) {
				t.Helper()
				if _, err := conn.Ask(); err != nil {
					t.Errorf("%s: the connection between two other nodes: %v", what, err)
				}
			}

			n3 := c.AddNode(c.Network("segment2"))
			third := c.AddPod(n3, "third", nil)
			third.Serve(8080)
			c.WaitSettled()
			talks(t, "a node that came", a, third)
			undisturbed("a node came")

			c.Readdress(n3, 77)
			c.WaitSettled()
			talks(t, "a node with other addresses", a, third)
			undisturbed("another's addresses changed")

			c.SetPodCIDRs(n3, netip.MustParsePrefix("10.245.3.0/24"), netip.MustParsePrefix("fd00:245:3::/64"))
			moved := c.AddPod(n3, "moved", nil)
			moved.Serve(8080)
			c.WaitSettled()
			talks(t, "a node with other ranges", b, moved)
			undisturbed("another's ranges changed")

			c.RemoveNode(n3)
			c.WaitSettled()
			undisturbed("another node went")
			talks(t, "after a node went", a, b)
		})
	}
}

// TestMTUFollowsTheUnderlay: a changed device MTU reaches what pods may send, at both ends of their pairs.
func TestMTUFollowsTheUnderlay(t *testing.T) {
	for name, tt := range map[string]struct {
		mode     string
		underlay clustertest.Underlay
		less     int
	}{
		"vxlan over IPv4": {"vxlan", clustertest.IPv4Only, 50}, "vxlan over IPv6": {"vxlan", clustertest.IPv6Only, 70},
		"direct": {"direct", clustertest.DualStack, 0},
	} {
		t.Run(name, func(t *testing.T) {
			c := clustertest.New(t, clustertest.Options{Nodes: 2, RoutingMode: tt.mode, Underlay: tt.underlay, PodRoutes: true})
			n := c.Node("n1")
			p := c.AddPod(n, "p", nil)
			for _, underlay := range []int{1500, 1400} {
				c.SetMTU(n.Host, "eth0", underlay)
				c.Eventually("the pod's MTU", func() bool {
					file, err := endpoint.ReadNode(n.Config.Run)
					return err == nil && file.MTU == underlay-tt.less && deviceMTU(p) == file.MTU
				})
			}
		})
	}
}

// deviceMTU is the MTU of the pod's interface; 0 where it cannot be read.
func deviceMTU(p *clustertest.Pod) (mtu int) {
	p.NS.Do(func() {
		if l, err := netlink.LinkByName("eth0"); err == nil {
			mtu = l.Attrs().MTU
		}
	})
	return mtu
}
