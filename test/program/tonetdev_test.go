// SPDX-License-Identifier: Apache-2.0

package program

import (
	"net"
	"net/netip"
	"testing"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
	"github.com/margay-cni/margay/pkg/bpf"
)

const hostPort = 9100 // of a server on the node itself

// fromHost is the packet that a process of the node opens a flow with.
func fromHost(kind pkt.Kind, dst netip.AddrPort) pkt.Packet {
	out := fromPod(&nodetest.Pod{Addrs: nodetest.NodeAddrs}, kind, dst)
	out.SrcMAC, out.DstMAC = nodeMAC, routerMAC
	return out
}

// sentBy is an answer that the node's stack sends by itself.
func sentBy(p pkt.Packet) pkt.Packet {
	p.SrcMAC, p.DstMAC, p.TTL = nodeMAC, routerMAC, 64
	return p
}

// What the host sends is not touched and leaves nothing in the flow table.
func TestHostTrafficIsUntouched(t *testing.T) {
	t.Parallel()
	f := masquerading(t)
	servicesOn(f, f.B)
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP, pkt.SCTP, pkt.Ping, pkt.Pong} {
			p := fromHost(kind, outside(v6))
			passed(t, f, kind.String(), f.ToNetdev(), p, p)
			passed(t, f, kind.String()+" goes on", f.ToNetdev(), data(p), data(p))
			p.Dst = at(of(vips, v6), vipPort)
			passed(t, f, kind.String()+" to a service address", f.ToNetdev(), p, p)
		}
		if flows := f.AllFlows(t); len(flows) != 0 {
			t.Errorf("the host's packets left flows: %v", flows)
		}
	})
}

// The host opens a flow from a port that a pod's masqueraded flow has: the host's port moves, and all four directions find their end.
func TestHostPortMoves(t *testing.T) {
	t.Parallel()
	f := masquerading(t)
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range kinds {
			f.ClearFlows(t)
			name := kind.String()
			pod, host := fromPod(f.A, kind, outside(v6)), fromHost(kind, outside(v6))
			redirected(t, f, name+" of the pod", progtest.FromPod(f.A), pod, leaves(pod, sport))
			port := moved(t, f, f.ToNetdev(), host, progtest.OK)
			sent := func(p pkt.Packet) pkt.Packet { p.Src = at(p.Src.Addr(), port); return p }
			flows := map[bpf.FlowKey]bpf.Flow{}
			for k, flow := range f.AllFlows(t) {
				if flow.Flags&bpf.FlowFromHost != 0 {
					flows[k] = flow
				}
			}
			mark := bpf.FlowNAT | bpf.FlowMasquerade | bpf.FlowFromHost | bpf.FlowViaStack
			if got, _ := f.Flow(t, key(host)); len(flows) != 2 || got.Flags != mark|bpf.FlowInNode || got.Action != bpf.FlowToStack || got.Xlate != key(sent(host)) {
				t.Errorf("%s: the host's entries: %v", name, flows)
			}
			if got, _ := f.Flow(t, key(sent(host)).Reverse()); got.Flags != mark|bpf.FlowReply || got.Action != bpf.FlowToStack {
				t.Errorf("%s: the entry of the answers: %v", name, got)
			}
			for _, epoch := range []string{"", ", after the routes have changed"} {
				passed(t, f, name+" of the host goes on"+epoch, f.ToNetdev(), data(host), sent(data(host)))
				back := returned(sent(host))
				want := back
				want.Dst = host.Src
				if kind == pkt.Ping {
					want = back
					want.Src = at(back.Src.Addr(), sport)
				}
				passed(t, f, name+" of the host is answered"+epoch, f.FromNetdev(), back, want)
				back = returned(leaves(pod, sport))
				redirected(t, f, name+" of the pod is answered"+epoch, f.FromNetdev(), back, restored(back, f.A, pod))
				redirected(t, f, name+" of the pod goes on"+epoch, progtest.FromPod(f.A), data(pod), leaves(data(pod), sport))
				must(t, f.DP.RaiseRouteEpoch())
			}
			// The host's socket ends and another one takes its port.
			passed(t, f, name+" once more", f.ToNetdev(), host, sent(host))
			// Towards another place the host's port is its own.
			other := fromHost(kind, at(of(nodetest.ClientAddrs, v6).Next(), outsidePort))
			passed(t, f, name+" elsewhere", f.ToNetdev(), other, other)
		}
	})
}

// The pod's flow has ended: the host's port is its own, and the remains do not get the answers.
func TestHostTakesThePortOfADeadFlow(t *testing.T) {
	t.Parallel()
	f := masquerading(t)
	families(t, f, func(t *testing.T, v6 bool) {
		pod, host := fromPod(f.A, pkt.TCP, outside(v6)), fromHost(pkt.TCP, outside(v6))
		rst := data(pod)
		rst.Flags = pkt.RST
		redirected(t, f, "pod opens", progtest.FromPod(f.A), pod, leaves(pod, sport))
		redirected(t, f, "pod resets", progtest.FromPod(f.A), rst, leaves(rst, sport))
		passed(t, f, "host opens", f.ToNetdev(), host, host)
		back := returned(host)
		passed(t, f, "host is answered", f.FromNetdev(), back, back)
		if flows := f.AllFlows(t); len(flows) != 0 {
			t.Errorf("the dead flow is still there: %v", flows)
		}
	})
}

// A moved port is not moved for ever: when the pod's flow and the host's have ended, a new connection keeps its own.
func TestHostPortMovesBack(t *testing.T) {
	t.Parallel()
	f := masquerading(t)
	families(t, f, func(t *testing.T, v6 bool) {
		pod, host := fromPod(f.A, pkt.TCP, outside(v6)), fromHost(pkt.TCP, outside(v6))
		redirected(t, f, "pod opens", progtest.FromPod(f.A), pod, leaves(pod, sport))
		port := moved(t, f, f.ToNetdev(), host, progtest.OK)
		// The host's flow is over and another pod has got its port; the first pod's flow is over, too.
		taken := key(leaves(pod, port)).Reverse()
		f.Put(f.Flows, taken, bpf.Flow{Xlate: key(fromPod(f.B, pkt.TCP, outside(v6))).Reverse(), Flags: bpf.FlowReply | bpf.FlowNAT})
		podAnswers := key(leaves(pod, sport)).Reverse()
		must(t, f.Flows.Delete(&podAnswers))
		passed(t, f, "host opens again", f.ToNetdev(), host, host)
		passed(t, f, "host goes on", f.ToNetdev(), data(host), data(host))
	})
}

// What was forwarded, and our own encapsulated packets, pass at the first test, whatever their tuple.
func TestToNetdevLetsForwardedPass(t *testing.T) {
	t.Parallel()
	f := masquerading(t)
	families(t, f, func(t *testing.T, v6 bool) {
		pod, same := fromPod(f.A, pkt.UDP, outside(v6)), fromHost(pkt.UDP, outside(v6))
		redirected(t, f, "pod opens", progtest.FromPod(f.A), pod, leaves(pod, sport))
		forwarded := f.ToNetdev()
		forwarded.Ingress = f.A.Ifindex
		passed(t, f, "the pod's own, redirected", forwarded, same, same)
		f.Put(f.DP.Maps.NodeState, uint32(0), bpf.NodeState{
			Flags: bpf.NodeMasquerade, OverlayIfindex: 1, OverlayPort: bpf.Port16(outsidePort),
		})
		passed(t, f, "the overlay's outer header", f.ToNetdev(), same, same)
		f.Put(f.DP.Maps.NodeState, uint32(0), bpf.NodeState{Flags: bpf.NodeMasquerade})
		moved(t, f, f.ToNetdev(), same, progtest.OK)
	})
}

// onHost adds the ClusterIP and the NodePort of both families with the node's own server as their only backend.
func onHost(f *progtest.Fixture) {
	for i, v6 := range []bool{false, true} {
		backend := at(of(nodetest.NodeAddrs, v6), hostPort)
		service(f, uint32(1000*i+1000), at(of(vips, v6), vipPort), backend)
		service(f, uint32(1000*i+1600), at(of(unspecified, v6), nodePort), backend)
	}
}

// A NodePort whose backend is the node itself: the server sees the client's address, and answers in the service's name by the device that
// the client came in on.
func TestV15_NodePortToHostBackend(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	onHost(f)
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
			f.ClearFlows(t)
			name := kind.String()
			open := fromClient(kind, at(of(nodetest.NodeAddrs, v6), nodePort))
			arrived := with(open, open.Src, at(of(nodetest.NodeAddrs, v6), hostPort))
			passed(t, f, name+" opens", f.FromNetdev(), open, arrived)
			back := sentBy(answer(arrived))
			for _, epoch := range []string{"", ", after the routes have changed"} {
				passed(t, f, name+" is answered"+epoch, f.ToNetdev(), back, with(back, open.Dst, open.Src))
				passed(t, f, name+" goes on"+epoch, f.FromNetdev(), data(open), with(data(open), open.Src, arrived.Dst))
				must(t, f.DP.RaiseRouteEpoch())
			}
			// The routes lead the answer out of another device: it takes the client's.
			elsewhere := f.ToNetdev()
			elsewhere.Ifindex = 1
			redirected(t, f, name+" is answered by another device", elsewhere, back, with(back, open.Dst, open.Src))
			// Nobody outside speaks for the node.
			forged := back
			forged.SrcMAC, forged.DstMAC = routerMAC, nodeMAC
			dropped(t, f, name+" is forged", f.FromNetdev(), forged, "source_is_local")
		}
	})
}

// A pod reaches the node's own server through a service; the answers come through to_pod.
func TestV15_PodToHostBackend(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	onHost(f)
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
			for _, frontend := range []netip.AddrPort{at(of(vips, v6), vipPort), at(of(nodetest.NodeAddrs, v6), nodePort)} {
				f.ClearFlows(t)
				open := fromPod(f.A, kind, frontend)
				arrived := with(open, open.Src, at(of(nodetest.NodeAddrs, v6), hostPort))
				passed(t, f, kind.String()+" opens", progtest.FromPod(f.A), open, arrived)
				back := answer(arrived)
				for range 2 {
					passed(t, f, kind.String()+" is answered", progtest.ToPod(f.A), back, with(back, open.Dst, open.Src))
					passed(t, f, kind.String()+" goes on", progtest.FromPod(f.A), data(open), with(data(open), open.Src, arrived.Dst))
					must(t, f.DP.RaiseRouteEpoch())
				}
			}
		}
	})
}

// Corner case A10: a client binds one port and reaches one backend by two node addresses and directly, all at a time. The second and third
// get another port, not another address, and each is answered by whom it asked.
func TestRow10_TwoNodeAddressesAndThePodItself(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	second := []netip.Addr{netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("2001:db8:1::2")}
	for _, a := range second {
		f.Put(f.DP.Maps.NodeAddrs, bpf.NewAddr(a), bpf.NodeAddrLocal|bpf.NodeAddrNodePort)
	}
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
			f.ClearFlows(t)
			backend := at(f.B.Addr(v6), podPort)
			ports := map[uint16]netip.AddrPort{}
			for _, to := range []netip.AddrPort{at(of(nodetest.NodeAddrs, v6), nodePort), at(of(second, v6), nodePort), backend} {
				open := fromClient(kind, to)
				r := f.Run(t, f.FromNetdev(), open.Bytes())
				port := sourcePort(r.Out)
				if other, taken := ports[port]; taken || r.Action != progtest.Redirect {
					t.Fatalf("%s to %s: action %d from port %d, which is the flow's to %v", kind, to, r.Action, port, other)
				}
				ports[port] = to
			}
			if ports[sport] != at(of(nodetest.NodeAddrs, v6), nodePort) {
				t.Errorf("%s: the first flow did not keep its port: %v", kind, ports)
			}
			for port, to := range ports {
				open := fromClient(kind, to)
				arrived := with(atPod(data(open), f.B), at(open.Src.Addr(), port), backend)
				redirected(t, f, kind.String()+" goes on", f.FromNetdev(), data(open), arrived)
				back := answer(arrived)
				redirected(t, f, kind.String()+" is answered", progtest.FromPod(f.B), back, with(hop(back), to, open.Src))
			}
		}
	})
}

// Corner case A10: one client port to the node's own server, through a service and directly.
func TestRow10_HostDirectlyAfterService(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	onHost(f)
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
			f.ClearFlows(t)
			server := at(of(nodetest.NodeAddrs, v6), hostPort)
			service, direct := fromClient(kind, at(of(nodetest.NodeAddrs, v6), nodePort)), fromClient(kind, server)
			passed(t, f, "service", f.FromNetdev(), service, with(service, service.Src, server))
			port := moved(t, f, f.FromNetdev(), direct, progtest.OK)
			apart := at(direct.Src.Addr(), port)
			for range 2 {
				passed(t, f, "direct goes on", f.FromNetdev(), data(direct), with(data(direct), apart, server))
				back := sentBy(answer(with(direct, apart, server)))
				passed(t, f, "direct is answered", f.ToNetdev(), back, with(back, server, direct.Src))
				back = sentBy(answer(with(service, service.Src, server)))
				passed(t, f, "service is answered", f.ToNetdev(), back, with(back, service.Dst, service.Src))
				must(t, f.DP.RaiseRouteEpoch())
			}
		}
	})
}

func TestRow10_ServiceAfterHostDirectly(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	onHost(f)
	families(t, f, func(t *testing.T, v6 bool) {
		f.ClearFlows(t)
		server := at(of(nodetest.NodeAddrs, v6), hostPort)
		var listener net.Listener
		var conn net.Conn
		var err error
		f.NS.Do(func() { listener, err = net.Listen("tcp", server.String()) })
		must(t, err)
		defer listener.Close()
		open := fromClient(pkt.TCP, at(of(nodetest.NodeAddrs, v6), nodePort))
		// The fixture's own programs see none of this: the client's connection is known to the node's stack alone.
		f.Client.Do(func() {
			conn, err = (&net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(open.Src)}).Dial("tcp", server.String())
		})
		must(t, err)
		accepted, err := listener.Accept()
		must(t, err)
		port := moved(t, f, f.FromNetdev(), open, progtest.OK)
		passed(t, f, "goes on", f.FromNetdev(), data(open), with(data(open), at(open.Src.Addr(), port), server))
		other := open
		other.Src = at(open.Src.Addr(), sport+1)
		passed(t, f, "another port of the client", f.FromNetdev(), other, with(other, other.Src, server))
		// Reset, so that the next run may use the port at once.
		must(t, conn.(*net.TCPConn).SetLinger(0))
		must(t, conn.Close())
		must(t, accepted.Close())
	})
}
