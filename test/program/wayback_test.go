// SPDX-License-Identifier: Apache-2.0

package program

import (
	"net/netip"
	"testing"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/bpf/object"
)

// A client to which the kernel has no route by the device that it asked through is answered there all the same, at the MAC address that it
// came from: also after the routes have changed, whichever side's packet is next.
func TestAnswerWithoutRouteGoesToTheNeighbour(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	unknown := []netip.Addr{netip.MustParseAddr("203.0.113.5"), netip.MustParseAddr("2001:db8:99::5")}
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
			for _, tt := range []struct {
				name   string
				client netip.Addr
				known  bool
			}{{"with a route", of(nodetest.ClientAddrs, v6), true}, {"without", of(unknown, v6), false}} {
				f.ClearFlows(t)
				name := kind.String() + " " + tt.name
				open := fromClient(kind, at(of(nodetest.NodeAddrs, v6), nodePort))
				open.Src = at(tt.client, sport)
				arrived := with(atPod(open, f.B), open.Src, at(f.B.Addr(v6), podPort))
				back := answer(arrived)
				out := with(hop(back), open.Dst, open.Src)
				if !tt.known {
					out.SrcMAC, out.DstMAC = open.DstMAC, open.SrcMAC
				}
				redirected(t, f, name+" opens", f.FromNetdev(), open, arrived)
				for range 2 {
					redirected(t, f, name+" is answered", progtest.FromPod(f.B), back, out)
					must(t, f.DP.RaiseRouteEpoch())
				}
				redirected(t, f, name+" goes on", f.FromNetdev(), data(open), with(atPod(data(open), f.B), open.Src, arrived.Dst))
				redirected(t, f, name+" is answered again", progtest.FromPod(f.B), back, out)
				got, _ := f.Flow(t, key(back))
				if toMAC := got.Flags&bpf.FlowToMAC != 0; toMAC == tt.known || got.Action != bpf.FlowToNetdev {
					t.Errorf("%s: answers' entry: %s, to the neighbour: %v, want %v", name, object.FlowActionName(got.Action), toMAC, !tt.known)
				}
			}
		}
	})
}
