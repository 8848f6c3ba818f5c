// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"net/netip"
	"testing"

	"github.com/margay-cni/margay/internal/testutil/clustertest"
	"github.com/margay-cni/margay/internal/testutil/firewalltest"
)

// TestForwardDropStrictRPFilterFullConntrackWithAgents: as soon as conntrack knows a connection, the agents keep it away from the overlay, so
// that on nodes with firewalls and without room in their conntrack tables pods and clients reach the pods of every other node. The rules come
// back when somebody reloads the firewall, and go with the overlay. Test/dataplane takes the conditions one by one.
//
// The limit is the machine's, so no other test runs meanwhile.
func TestForwardDropStrictRPFilterFullConntrackWithAgents(t *testing.T) {
	const outsidePort = 7070
	r := newRemote(t, clustertest.Options{RoutingMode: "vxlan", AgentFlags: []string{"--resync", "1s"}})
	r.Client.Serve(outsidePort)
	hasTable := func(n *clustertest.Node) bool {
		_, err := n.Output("nft", "list", "table", "inet", "margay")
		return err == nil
	}
	for i, n := range r.Nodes() {
		if hasTable(n) {
			t.Errorf("%s has the table, and nothing tracks connections", n.Name)
		}
		firewalltest.NFTables.Harden(t, n.NS, r.pods[i].NS)
	}
	for _, n := range r.Nodes() {
		pings(t, n.Host, netip.MustParseAddr("127.0.0.1"))
		r.Eventually("the table comes as soon as something is tracked", func() bool { return hasTable(n) })
	}
	limit := firewalltest.LimitConntrack(t)
	for _, n := range r.Nodes() {
		firewalltest.FillConntrack(t, n.NS, limit)
		if got, err := n.Ask("udp", r.Client.AddrPort(false, outsidePort)); err == nil {
			t.Errorf("a new connection of %s itself with a full conntrack table = %q, want no answer", n.Name, got)
		}
	}
	for _, v6 := range r.Families() {
		for i, from := range r.Nodes() {
			for j, server := range r.pods {
				if i == j {
					continue
				}
				pings(t, r.pods[i].Host, server.Addr(v6))
				for _, to := range []netip.AddrPort{server.AddrPort(v6, podPort), clusterIP(j+1, v6)} {
					asks(t, r.pods[i].Host, to, server.Host)
				}
				asks(t, r.Client, from.AddrPort(v6, uint16(nodePorts+j+1)), server.Host)
			}
		}
	}
	for _, n := range r.Nodes() {
		if got := firewalltest.Tracked(t, n.NS); got < limit {
			t.Errorf("connections that conntrack knows on %s = %d, want still %d", n.Name, got, limit)
		}
	}

	n1 := r.Node("n1")
	if out, err := n1.Output("nft", "flush", "ruleset"); err != nil || hasTable(n1) {
		t.Fatalf("nft flush ruleset: %v: %s; our table is still there: %v", err, out, hasTable(n1))
	}
	r.Eventually("the table comes back after the ruleset was flushed", func() bool { return hasTable(n1) })
	r.RemoveNode(r.Node("n2"))
	r.RemoveNode(r.Node("n3"))
	r.Eventually("the table goes with the last other node", func() bool { return !hasTable(n1) })
}
