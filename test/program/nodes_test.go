// SPDX-License-Identifier: Apache-2.0

package program

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
	"github.com/margay-cni/margay/pkg/bpf"
)

// bothFamilies runs the test for IPv4 and IPv6, on two nodes without flows.
func bothFamilies(t *testing.T, first, second *progtest.Fixture, test func(t *testing.T, v6 bool)) {
	for name, v6 := range map[string]bool{"IPv4": false, "IPv6": true} {
		t.Run(name, func(t *testing.T) {
			first.ClearFlows(t)
			second.ClearFlows(t)
			test(t, v6)
		})
	}
}

// wire is the packet as the next node's NIC delivers it.
func wire(p pkt.Packet) pkt.Packet {
	p.SrcMAC, p.DstMAC = routerMAC, nodeMAC
	return p
}

// TestPodToPodOfAnotherNode follows a connection from a pod through both nodes and back, over direct routes: what the one lets out is what
// the other takes in.
func TestPodToPodOfAnotherNode(t *testing.T) {
	t.Parallel()
	_, n0, n1 := progtest.NewCluster(t, nodetest.ClusterOptions{Direct: true})
	bothFamilies(t, n0, n1, func(t *testing.T, v6 bool) {
		for _, kind := range kinds {
			name := kind.String()
			open := fromPod(n0.A, kind, at(n1.B.Addr(v6), podPort))
			redirected(t, n0, name+" leaves node 0", progtest.FromPod(n0.A), open, hop(open))
			in := wire(hop(open))
			redirected(t, n1, name+" comes to node 1", n1.FromNetdev(), in, atPod(in, n1.B))
			back := answer(atPod(in, n1.B))
			redirected(t, n1, name+" is answered", progtest.FromPod(n1.B), back, hop(back))
			home := wire(hop(back))
			redirected(t, n0, name+" comes home", n0.FromNetdev(), home, atPod(home, n0.A))
			redirected(t, n0, name+" goes on", progtest.FromPod(n0.A), data(open), hop(data(open)))
		}
	})
}

// TestServiceOnAnotherNode: the asking pod's node translates, the other one sees two pods.
func TestServiceOnAnotherNode(t *testing.T) {
	t.Parallel()
	c, n0, n1 := progtest.NewCluster(t, nodetest.ClusterOptions{Direct: true})
	bothFamilies(t, n0, n1, func(t *testing.T, v6 bool) {
		for i, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
			name, vip, backend := kind.String(), at(of(vips, v6), vipPort), at(n1.B.Addr(v6), podPort)
			serviceID := uint32(1 + i)
			if v6 {
				serviceID += 2
			}
			c.AddService(serviceID, bpf.NewFrontendKey(kind.Proto(v6), vip.Addr(), vip.Port()), 0, backend)
			open := fromPod(n0.A, kind, vip)
			out := hop(with(open, open.Src, backend))
			redirected(t, n0, name+" leaves node 0", progtest.FromPod(n0.A), open, out)
			redirected(t, n1, name+" comes to node 1", n1.FromNetdev(), wire(out), atPod(wire(out), n1.B))
			back := answer(atPod(wire(out), n1.B))
			redirected(t, n1, name+" is answered", progtest.FromPod(n1.B), back, hop(back))
			home := wire(hop(back))
			redirected(t, n0, name+" comes home in the service's name", n0.FromNetdev(), home, atPod(with(home, vip, open.Src), n0.A))
		}
	})
}

// entry is what a flow entry says of the way between nodes.
type entry struct {
	Action          uint8
	Flags           uint16
	In, Out         uint16
	Backend         string
	Mtu             uint16
	Xlate           bpf.FlowKey
	ByOverlay, ByIt bool // it leaves by the overlay device; by the device of the client
}

func entryOf(t *testing.T, f *progtest.Fixture, overlay uint32, k bpf.FlowKey) *entry {
	t.Helper()
	e, ok := f.Flow(t, k)
	if !ok {
		return nil
	}
	out := &entry{
		Action: e.Action, Flags: e.Flags, In: e.InNode, Out: e.OutNode, Mtu: e.Mtu, Xlate: e.Xlate,
		ByOverlay: e.OutIfindex == overlay, ByIt: e.OutIfindex == uint32(f.ClientDevice),
	}
	if e.BackendPort != 0 {
		out.Backend = netip.AddrPortFrom(e.Backend.Netip(), bpf.Port16(e.BackendPort)).String()
	}
	return out
}

// TestForwardedClient: the node that a client asks sends the packet on as it is, but for the hop; the two entries say where to, which
// backend, and from where the answers come. With direct return there is no entry for answers.
func TestForwardedClient(t *testing.T) {
	t.Parallel()
	c, n0, n1 := progtest.NewCluster(t, nodetest.ClusterOptions{Direct: true, Device: true})
	var state bpf.NodeState
	must(t, n0.DP.Maps.NodeState.Lookup(uint32(0), &state))
	node1 := uint16(nodetest.NodeIndex(n1.Node))
	serviceID := uint32(0)
	for name, flags := range map[string]uint32{"tunnel": 0, "DSR": bpf.ServiceDSR} {
		t.Run(name, func(t *testing.T) {
			bothFamilies(t, n0, n1, func(t *testing.T, v6 bool) {
				for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
					serviceID++
					backend := at(n1.B.Addr(v6), podPort)
					c.AddService(serviceID, bpf.NewFrontendKey(kind.Proto(v6), of(unspecified, v6), nodePort), flags, backend)
					open := fromClient(kind, at(of(nodetest.NodeAddrs, v6), nodePort))
					redirected(t, n0, kind.String()+" opens", n0.FromNetdev(), open, hop(open))
					redirected(t, n0, kind.String()+" goes on", n0.FromNetdev(), data(open), hop(data(open)))

					kept := bpf.FlowService | bpf.FlowForwarded
					if flags != 0 {
						kept |= bpf.FlowDSR
					}
					want := &entry{Action: bpf.FlowToNode, Flags: kept, Out: node1, Backend: backend.String(), Mtu: 1450, Xlate: key(open), ByOverlay: true}
					if diff := cmp.Diff(want, entryOf(t, n0, state.OverlayIfindex, key(open))); diff != "" {
						t.Errorf("%s: the client's entry (-want +got):\n%s", kind, diff)
					}
					answers := key(open).Reverse()
					want = &entry{
						Action: bpf.FlowToNetdev, Flags: kept | bpf.FlowReply | bpf.FlowInOverlay, In: node1, Backend: backend.String(), Mtu: 1500,
						Xlate: answers, ByIt: true,
					}
					if flags != 0 {
						want = nil
					}
					if diff := cmp.Diff(want, entryOf(t, n0, state.OverlayIfindex, answers)); diff != "" {
						t.Errorf("%s: the answers' entry (-want +got):\n%s", kind, diff)
					}
					// An answer that does not come through the overlay is nobody's.
					back := with(open, open.Dst, open.Src)
					dropped(t, n0, kind.String()+" answered by somebody else", n0.FromNetdev(), back, "source_is_local")
					n0.ClearFlows(t)
				}
			})
		})
	}
}

// TestOverlayNeedsMetadata: a frame on the overlay device without an outer header is believed by nobody.
func TestOverlayNeedsMetadata(t *testing.T) {
	t.Parallel()
	c, n0, n1 := progtest.NewCluster(t, nodetest.ClusterOptions{Device: true})
	overlay := progtest.Hook{Program: bpf.ProgFromOverlay, Ifindex: n0.ClientDevice}
	bothFamilies(t, n0, n1, func(t *testing.T, v6 bool) {
		for _, kind := range kinds {
			p := wire(fromPod(n1.A, kind, at(n0.A.Addr(v6), podPort)))
			dropped(t, n0, kind.String(), overlay, p, "overlay_source")
			// Its node would have sent it through the overlay.
			open := fromPod(n0.A, kind, at(n1.B.Addr(v6), podPort))
			redirected(t, n0, kind.String()+" to another node's pod", progtest.FromPod(n0.A), open, hop(open))
			if e, ok := n0.Flow(t, key(open)); !ok || e.Action != bpf.FlowToNode || e.OutNode != uint16(nodetest.NodeIndex(c.Nodes[1])) {
				t.Errorf("%s: entry = %+v, %v, want one to node 1", kind, e, ok)
			}
			// An address of this node's range that no pod has is nowhere, not outside.
			gone := fromPod(n0.A, kind, at(n0.B.Addr(v6).Next(), podPort))
			dropped(t, n0, kind.String()+" to nobody", progtest.FromPod(n0.A), gone, "no_route")
		}
	})
}
