// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"testing"

	"github.com/margay-cni/margay/internal/testutil/clustertest"
)

// TestEveryClientEveryService asks every kind of service address from every kind of client, over TCP and UDP and in both families. The only
// backend is a pod on n2, which must see the client's own address: a pod's, the outside client's, or one of the asking node's.
func TestEveryClientEveryService(t *testing.T) {
	s := newOutsideServices(t, clustertest.Options{RoutingMode: "vxlan"})
	n1, n2 := s.Node("n1"), s.Node("n2")
	s.routeVia(n1)
	same := s.AddPod(n2, "same-node", nil)
	s.WaitSettled()
	clients := map[string]*clustertest.Host{
		"a pod of another node": s.pods[0].Host, "a pod of the backend's node": same.Host, "another node": n1.Host, "the backend's node": n2.Host,
		"a client outside": s.Client,
	}
	for _, v6 := range s.Families() {
		addresses := s.tunnel.addresses(n1, v6)
		addresses["cluster address"] = clusterIP(int(100+s.tunnel.number), v6)
		for kind, to := range addresses {
			for name, client := range clients {
				if client == s.Client && kind == "cluster address" {
					continue // not routed to from outside
				}
				for _, network := range []string{"tcp", "udp"} {
					got, err := client.Ask(network, to)
					if want := s.pods[1].Name + " " + client.Addr(v6).String(); err != nil || got != want {
						t.Errorf("%s, %s: %s asks the %s %s: %q, %v, want %q", clustertest.FamilyName(v6), network, name, kind, to, got, err, want)
					}
				}
			}
		}
	}
}

// routeVia makes the router send every service's outside addresses to a node.
func (s *outsideServices) routeVia(n *clustertest.Node) {
	for _, one := range []*outsideService{s.tunnel, s.dsr, s.local} {
		one.routeVia(s.Cluster, n)
	}
}
