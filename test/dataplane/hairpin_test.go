// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"net"
	"net/netip"
	"testing"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/pkg/bpf"
)

// TestRow19_HairpinOfIsolatedPod: a pod that policy lets talk to nobody still reaches itself through its service, because its own address is
// what is judged, not the service's that it sees; a changed policy and a second opening of the same ports find that flow again.
func TestRow19_HairpinOfIsolatedPod(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	b, other := n.AddPod("b"), n.AddPod("other")
	nodetest.Serve(t, b.NS, "b", 8080)
	addServices(n, b)
	n.IdentifyPod(b, identityB, policyB, policyB) // nothing is allowed
	families(t, func(t *testing.T, v6 bool) {
		for network := range protocols {
			if got, err := nodetest.Ask(t, other.NS, network, netip.AddrPortFrom(family(vips, v6), 80)); err == nil {
				t.Errorf("%s from another pod = %q, want no answer", network, got)
			}
			for _, to := range []netip.AddrPort{netip.AddrPortFrom(family(vips, v6), 80), netip.AddrPortFrom(family(nodetest.NodeAddrs, v6), 30080)} {
				want := "b " + to.Addr().String()
				for _, what := range []string{"first", "again"} {
					conn, err := nodetest.Dial(t, b.NS, network, to, 4000+int(to.Port()))
					if err != nil {
						t.Fatalf("%s to itself by %s, %s: %v", network, to, what, err)
					}
					for _, policy := range []uint32{policyB, bpf.PolicyNone, policyB} {
						n.IdentifyPod(b, identityB, policy, policy)
						got, err := conn.Ask()
						wantAnswer(t, network+" to itself by "+to.String()+", "+what, got, err, want)
					}
					if tcp, ok := conn.Conn.(*net.TCPConn); ok {
						wantNoError(t, "end by reset", tcp.SetLinger(0)) // no TIME_WAIT: the next one has the same ports
					}
					wantNoError(t, "close", conn.Close())
				}
			}
		}
	})
}
