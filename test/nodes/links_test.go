// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/internal/testutil/clustertest"
	"github.com/margay-cni/margay/pkg/agent"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/datapath"
)

// nodeLinks counts the tcx links on a node's NIC and overlay device.
func nodeLinks(t *testing.T, n *clustertest.Node, d *datapath.Datapath) (links int) {
	t.Helper()
	n.NS.Do(func() {
		for device, programs := range map[string][]string{
			"eth0": {bpf.ProgFromNetdev, bpf.ProgToNetdev}, agent.DefaultVXLANDevice: {bpf.ProgFromOverlay, bpf.ProgToOverlay},
		} {
			l, err := netlink.LinkByName(device)
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range programs {
				if d.Linked(l.Attrs().Index, p) {
					links++
				}
			}
		}
	})
	return links
}

// TestLinksLiveWithTheAgent: the node's devices have tcx links while an agent runs, unless it is told otherwise. However it ends, they end
// with it, and the filters below them go on.
func TestLinksLiveWithTheAgent(t *testing.T) {
	c := newRemote(t, clustertest.Options{Nodes: 2, RoutingMode: "vxlan"})
	n := c.Node("n1")
	d, err := datapath.Open(n.Config)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	want := 4
	if has, err := d.HasTCX(); err != nil {
		t.Fatal(err)
	} else if !has {
		want = 0
	}
	check := func(what string, want int) {
		t.Helper()
		c.Eventually(what, func() bool { return nodeLinks(t, n, d) == want })
		if got := hasPrograms(t, n, "eth0"); got != 2 {
			t.Errorf("%s: filters on eth0 = %d, want 2", what, got)
		}
		for _, v6 := range c.Families() {
			asks(t, c.Client, n.AddrPort(v6, nodePorts+1), c.pods[0].Host)
			asks(t, c.Client, n.AddrPort(v6, nodePorts+2), c.pods[1].Host)
			asks(t, c.pods[0].Host, c.pods[1].AddrPort(v6, podPort), c.pods[1].Host)
		}
	}
	check("an agent runs", want)
	c.KillAgent(n)
	check("it is killed", 0)
	c.StartAgent(n)
	check("it runs again", want)
	c.StopAgent(n)
	check("it ends", 0)
	c.StartAgent(n, "--tcx=false")
	c.WaitSettled()
	check("it runs without links", 0)
}
