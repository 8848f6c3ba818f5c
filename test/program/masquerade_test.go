// SPDX-License-Identifier: Apache-2.0

package program

import (
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
	"github.com/margay-cni/margay/pkg/bpf"
)

const outsidePort = 443

// masquerading is a fixture whose node masquerades.
func masquerading(t *testing.T) *progtest.Fixture {
	f := progtest.New(t)
	f.Masquerade(nodetest.NodeAddrs...)
	return f
}

// outside is a server's address and port on the client's network.
func outside(v6 bool) netip.AddrPort { return at(of(nodetest.ClientAddrs, v6), outsidePort) }

// leaves is the packet as it leaves the node from this port of the node.
func leaves(p pkt.Packet, port uint16) pkt.Packet {
	p = hop(p)
	p.Src = at(of(nodetest.NodeAddrs, p.V6()), port)
	return p
}

// returned is the server's answer to what left, as it comes in.
func returned(left pkt.Packet) pkt.Packet {
	back := answer(left)
	back.SrcMAC, back.DstMAC, back.TTL = routerMAC, nodeMAC, 64
	return back
}

// restored is the answer as it arrives at the pod that opened the flow.
func restored(back pkt.Packet, p *nodetest.Pod, open pkt.Packet) pkt.Packet {
	out := with(atPod(back, p), open.Dst, open.Src)
	if back.Kind == pkt.Pong {
		out.Src = at(out.Src.Addr(), open.Src.Port())
	}
	return out
}

// sourceID is the source port, or the echo identifier, of a frame.
func sourceID(frame []byte, v6 bool, kind pkt.Kind) uint16 {
	off := pkt.L4v4
	if v6 {
		off = pkt.L4v6
	}
	if kind == pkt.Ping || kind == pkt.Pong {
		off += 4
	}
	return uint16(frame[off])<<8 | uint16(frame[off+1])
}

// moved runs a packet that must leave by hook under another port than its own, and returns that port.
func moved(t *testing.T, f *progtest.Fixture, h progtest.Hook, in pkt.Packet, action int) uint16 {
	t.Helper()
	r := f.Run(t, h, in.Bytes())
	if r.Action != action {
		t.Fatalf("%s: action %d, drops %v, want %d", in.Kind, r.Action, r.Drops, action)
	}
	port := sourceID(r.Out, in.V6(), in.Kind)
	if port == in.Src.Port() || port < 1024 {
		t.Fatalf("%s from port %d left from port %d, want another unprivileged one", in.Kind, in.Src.Port(), port)
	}
	return port
}

func TestMasquerade(t *testing.T) {
	t.Parallel()
	f := masquerading(t)
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range kinds {
			f.ClearFlows(t)
			name := kind.String()
			open := fromPod(f.A, kind, outside(v6))
			left := leaves(open, sport)
			redirected(t, f, name+" opens", progtest.FromPod(f.A), open, left)
			seen := bpf.FlowTCPSyn
			if kind != pkt.TCP {
				seen = 0
			}
			flowTable(t, f, map[bpf.FlowKey]bpf.Flow{
				key(open): {
					InIfindex: uint32(f.A.Ifindex), OutIfindex: uint32(f.ClientDevice), InMac: [6]byte(f.A.MAC), Action: bpf.FlowToNetdev, Mtu: 1500,
					Tcp: seen, Flags: bpf.FlowInPod | bpf.FlowNAT | bpf.FlowMasquerade, Xlate: key(left),
					Backend: bpf.NewAddr(outside(v6).Addr()), // the next hop: it is on the link
				},
				key(left).Reverse(): {
					OutIfindex: uint32(f.A.Ifindex), DstMac: [6]byte(f.A.MAC), SrcMac: [6]byte(f.A.HostMAC), Action: bpf.FlowToPod,
					Flags: bpf.FlowNAT | bpf.FlowMasquerade | bpf.FlowReply, Xlate: key(open).Reverse(),
				},
			})
			back := returned(left)
			redirected(t, f, name+" is answered", f.FromNetdev(), back, with(atPod(back, f.A), open.Dst, open.Src))
			redirected(t, f, name+" goes on", progtest.FromPod(f.A), data(open), leaves(data(open), sport))
		}
	})
}

// Translation stays with a flow when the routes, or the node's address, change under it.
func TestMasqueradeStays(t *testing.T) {
	t.Parallel()
	f := masquerading(t)
	families(t, f, func(t *testing.T, v6 bool) {
		defer f.Masquerade(nodetest.NodeAddrs...)
		for _, kind := range kinds {
			f.ClearFlows(t)
			f.Masquerade(nodetest.NodeAddrs...)
			a, b := fromPod(f.A, kind, outside(v6)), fromPod(f.B, kind, outside(v6))
			redirected(t, f, "first", progtest.FromPod(f.A), a, leaves(a, sport))
			port := moved(t, f, progtest.FromPod(f.B), b, progtest.Redirect)
			f.Masquerade(netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8:1::7")) // raises the route epoch
			redirected(t, f, "first goes on", progtest.FromPod(f.A), data(a), leaves(data(a), sport))
			back := returned(leaves(b, port))
			redirected(t, f, "second is answered", f.FromNetdev(), back, restored(back, f.B, b))
			redirected(t, f, "second goes on", progtest.FromPod(f.B), data(b), leaves(data(b), port))
			for k, flow := range f.AllFlows(t) {
				if flow.Flags&bpf.FlowMasquerade == 0 {
					t.Errorf("%s: %v lost the mark of masquerade", kind, k)
				}
			}
		}
	})
}

// Two pods with one source port to one place: the second gets another port, for ping another identifier, and both are answered.
func TestMasqueradePortTakenByPod(t *testing.T) {
	t.Parallel()
	f := masquerading(t)
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range kinds {
			f.ClearFlows(t)
			a, b := fromPod(f.A, kind, outside(v6)), fromPod(f.B, kind, outside(v6))
			redirected(t, f, "first", progtest.FromPod(f.A), a, leaves(a, sport))
			port := moved(t, f, progtest.FromPod(f.B), b, progtest.Redirect)
			redirected(t, f, "second again", progtest.FromPod(f.B), data(b), leaves(data(b), port))
			back := returned(leaves(b, port))
			redirected(t, f, "second is answered", f.FromNetdev(), back, restored(back, f.B, b))
			back = returned(leaves(a, sport))
			redirected(t, f, "first is answered", f.FromNetdev(), back, with(atPod(back, f.A), a.Dst, a.Src))
			// The same port towards another place is free.
			other := fromPod(f.B, kind, at(of(nodetest.ClientAddrs, v6).Next(), outsidePort))
			redirected(t, f, "elsewhere", progtest.FromPod(f.B), other, leaves(other, sport))
		}
	})
}

func TestMasqueradeWithoutEgressAddress(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	families(t, f, func(t *testing.T, v6 bool) {
		defer f.Masquerade(nodetest.NodeAddrs...)
		for _, kind := range kinds {
			f.Masquerade(of(nodetest.NodeAddrs, !v6)) // of the other family alone
			dropped(t, f, "no address of the family", progtest.FromPod(f.A), fromPod(f.A, kind, outside(v6)), "no_egress_address")
			must(t, f.DP.Maps.EgressAddrs.Delete(uint32(f.ClientDevice)))
			dropped(t, f, "no address at all", progtest.FromPod(f.A), fromPod(f.A, kind, outside(v6)), "no_egress_address")
		}
		if n := len(f.AllFlows(t)); n != 0 {
			t.Errorf("%d entries, want none", n)
		}
	})
}

// A pod must not speak to the overlay's port in its node's name: some node may have the destination, and would believe it.
func TestMasqueradeIsNoTunnel(t *testing.T) {
	t.Parallel()
	f := masquerading(t)
	families(t, f, func(t *testing.T, v6 bool) {
		tunnel := fromPod(f.A, pkt.UDP, at(outside(v6).Addr(), nodetest.OverlayPort))
		state := bpf.NodeState{Flags: bpf.NodeMasquerade, OverlayIfindex: uint32(f.ClientDevice), OverlayPort: bpf.Port16(nodetest.OverlayPort)}
		must(t, f.DP.Maps.NodeState.Put(uint32(0), state))
		dropped(t, f, "to the overlay's port", progtest.FromPod(f.A), tunnel, "overlay_source")
		redirected(t, f, "to another port", progtest.FromPod(f.A), fromPod(f.A, pkt.UDP, outside(v6)), leaves(fromPod(f.A, pkt.UDP, outside(v6)), sport))
		state.OverlayIfindex = 0
		must(t, f.DP.Maps.NodeState.Put(uint32(0), state))
		redirected(t, f, "without an overlay", progtest.FromPod(f.A), tunnel, leaves(tunnel, sport))
	})
}

// A device that is none of the node's ways out, such as another runtime's bridge, has no addresses of its own: those of index 0 serve it.
func TestMasqueradeByAnyDevice(t *testing.T) {
	t.Parallel()
	f := masquerading(t)
	var egress bpf.EgressAddrs
	must(t, f.DP.Maps.EgressAddrs.Lookup(uint32(f.ClientDevice), &egress))
	must(t, f.DP.Maps.EgressAddrs.Delete(uint32(f.ClientDevice)))
	must(t, f.DP.Maps.EgressAddrs.Put(uint32(0), egress))
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range kinds {
			open := fromPod(f.A, kind, outside(v6))
			redirected(t, f, kind.String(), progtest.FromPod(f.A), open, leaves(open, sport))
		}
	})
}

// Where pods are known by their own addresses they keep them, and so does everything on a node that does not masquerade.
func TestMasqueradeExceptions(t *testing.T) {
	t.Parallel()
	f := masquerading(t)
	set := func(m *ebpf.Map, key, value any) func() {
		f.Put(m, key, value)
		return func() { must(t, m.Delete(key)) }
	}
	families(t, f, func(t *testing.T, v6 bool) {
		to := of(nodetest.ClientAddrs, v6)
		around, err := to.Prefix(to.BitLen() - 8)
		must(t, err)
		all, err := to.Prefix(0)
		must(t, err)
		tests := []struct {
			name  string
			set   func() func()
			masks bool
		}{
			{"no entry", func() func() { return func() {} }, true},
			{"a prefix of which nothing is known", func() func() { return set(f.DP.Maps.Routes, bpf.NewRouteKey(around), bpf.Route{}) }, true},
			{"no masquerade", func() func() {
				return set(f.DP.Maps.Routes, bpf.NewRouteKey(around), bpf.Route{Flags: bpf.RouteNoMasquerade})
			}, false},
			{"no masquerade but here", func() func() {
				undo := set(f.DP.Maps.Routes, bpf.NewRouteKey(all), bpf.Route{Flags: bpf.RouteNoMasquerade})
				undoInner := set(f.DP.Maps.Routes, bpf.NewRouteKey(around), bpf.Route{})
				return func() { undo(); undoInner() }
			}, true},
			{"another node's pods", func() func() { return set(f.DP.Maps.Routes, bpf.NewRouteKey(around), bpf.Route{Node: 1}) }, false},
			{"another node", func() func() { return set(f.DP.Maps.NodeAddrs, bpf.NewAddr(to), bpf.NodeAddrRemote) }, false},
		}
		for _, tt := range tests {
			undo := tt.set()
			for _, kind := range kinds {
				f.ClearFlows(t)
				open := fromPod(f.A, kind, outside(v6))
				want := hop(open)
				if tt.masks {
					want = leaves(open, sport)
				}
				redirected(t, f, tt.name, progtest.FromPod(f.A), open, want)
			}
			undo()
		}
		f.ClearFlows(t)
		f.Put(f.DP.Maps.NodeState, uint32(0), bpf.NodeState{})
		defer f.Masquerade(nodetest.NodeAddrs...)
		open := fromPod(f.A, pkt.UDP, outside(v6))
		redirected(t, f, "switched off", progtest.FromPod(f.A), open, hop(open))
	})
}

// Policy judges the pod and the real destination; what it denies takes no port.
func TestMasqueradeAfterPolicy(t *testing.T) {
	t.Parallel()
	f := masquerading(t)
	const identity, policy, peer = bpf.IdentityFirst + 1, bpf.PolicyFirst + 1, bpf.IdentityFirst + 2
	f.IdentifyPod(f.A, identity, policy, bpf.PolicyNone)
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
			f.ClearFlows(t)
			to := outside(v6)
			block, err := to.Addr().Prefix(to.Addr().BitLen() - 4)
			must(t, err)
			f.Identify(block, peer)
			k := f.AllowPort(policy, bpf.Egress, peer, kind.Proto(v6), outsidePort, 7)
			open := fromPod(f.A, kind, to)
			redirected(t, f, "inside the block", progtest.FromPod(f.A), open, leaves(open, sport))
			elsewhere := fromPod(f.A, kind, at(to.Addr(), outsidePort+1))
			dropped(t, f, "another port", progtest.FromPod(f.A), elsewhere, "policy")
			if _, ok := f.Flow(t, key(leaves(elsewhere, sport)).Reverse()); ok {
				t.Errorf("%s: a denied flow took a port", kind)
			}
			// Policy turns against the open flow, and back: the translation survives.
			must(t, f.DP.Maps.Policy.Delete(&k))
			must(t, f.DP.RaiseEndpointEpochs(f.A.Ifindex))
			dropped(t, f, "denied", progtest.FromPod(f.A), data(open), "policy")
			back := returned(leaves(open, sport))
			dropped(t, f, "answer denied", f.FromNetdev(), back, "policy")
			f.AllowPort(policy, bpf.Egress, peer, kind.Proto(v6), outsidePort, 7)
			must(t, f.DP.RaiseEndpointEpochs(f.A.Ifindex))
			redirected(t, f, "allowed again", progtest.FromPod(f.A), data(open), leaves(data(open), sport))
			must(t, f.DP.Maps.Policy.Delete(&k))
		}
	})
}

// A service whose backend is outside the cluster: both ends are translated at once.
func TestMasqueradeToServiceOutside(t *testing.T) {
	t.Parallel()
	f := masquerading(t)
	for i, v6 := range []bool{false, true} {
		service(f, uint32(1000*i+1000), at(of(vips, v6), vipPort), outside(v6))
	}
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
			f.ClearFlows(t)
			open := fromPod(f.A, kind, at(of(vips, v6), vipPort))
			left := leaves(open, sport)
			left.Dst = outside(v6)
			redirected(t, f, "opens", progtest.FromPod(f.A), open, left)
			back := returned(left)
			redirected(t, f, "is answered", f.FromNetdev(), back, with(atPod(back, f.A), open.Dst, open.Src))
		}
	})
}
