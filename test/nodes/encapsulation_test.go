// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"fmt"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/internal/testutil/clustertest"
	"github.com/margay-cni/margay/pkg/agent"
)

// byDevice counts the packets that a node's overlay device has encapsulated.
func byDevice(t *testing.T, n *clustertest.Node) (packets uint64) {
	t.Helper()
	n.NS.Do(func() {
		l, err := netlink.LinkByName(agent.DefaultVXLANDevice)
		if err != nil {
			t.Fatal(err)
		}
		packets = l.Attrs().Statistics.TxPackets
	})
	return packets
}

// TestProgramsEncapsulateWhereTheyMay: what pods of n1 send goes by the programs to a node on its network and to one behind the router; by the
// overlay device, and so by the node's xfrm policies, from when there is one until there is none; and by the device where the flag says so.
func TestProgramsEncapsulateWhereTheyMay(t *testing.T) {
	r := newRemote(t, clustertest.Options{RoutingMode: "vxlan"})
	n1 := r.Node("n1")
	pod := r.pods[0]
	// ask reports who encapsulated when pods on the other nodes were asked, in both families; an error if one did not answer.
	ask := func() (device bool, err error) {
		before := byDevice(t, n1)
		for _, server := range r.pods[1:] {
			for _, v6 := range []bool{false, true} {
				if _, err := pod.Ask("udp", server.AddrPort(v6, podPort)); err != nil {
					return false, err
				}
			}
		}
		return byDevice(t, n1) != before, nil
	}
	expect := func(what string, want bool) {
		t.Helper()
		r.Eventually(fmt.Sprintf("%s: by the device: %v", what, want), func() bool {
			got, err := ask()
			return err == nil && got == want
		})
	}
	policy := func(words string) {
		t.Helper()
		if out, err := n1.Output("ip", strings.Fields("xfrm policy "+words)...); err != nil {
			t.Fatalf("ip xfrm policy %s: %v\n%s", words, err, out)
		}
	}
	expect("at the start", false)
	out, err := n1.Output("ip", "-4", "route", "get", r.Node("n3").Addr(false).String())
	if err != nil || !strings.Contains(out, " via ") {
		t.Fatalf("route from n1 to n3 = %q, %v, want one by a router", out, err)
	}

	block := "src " + n1.Addr(false).String() + " dst " + r.Node("n2").Addr(false).String() + " proto udp dir out"
	policy("add src 192.0.2.77 dst 192.0.2.78 dir out")
	expect("a policy about somebody else", true)
	policy("add " + block + " action block")
	r.Eventually("the policy holds for what pods send", func() bool { _, err := ask(); return err != nil })
	policy("delete " + block)
	policy("delete src 192.0.2.77 dst 192.0.2.78 dir out")
	expect("no policy any more", false)

	r.StopAgent(n1)
	expect("without agent", false)
	r.StartAgent(n1, "--vxlan-encapsulation", "device")
	expect("the flag", true)
}
