// SPDX-License-Identifier: Apache-2.0

package program

import (
	"net/netip"
	"testing"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
	"github.com/margay-cni/margay/pkg/bpf"
)

// Contract row S6: each backend of the list gets its share of the new connections, and a connection that is there stays where it is when
// backends come.
func TestS6_ChoiceIsUniformAndStays(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	const clients, most = 300, 6
	for _, v6 := range []bool{false, true} {
		frontend := at(of(vips, v6), vipPort)
		// Backends are told apart by their ports.
		var backends []netip.AddrPort
		for i := range uint16(most) {
			backends = append(backends, at(f.B.Addr(v6), podPort+i))
		}
		for i, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
			serviceID := uint32(1 + i)
			f.AddService(serviceID, bpf.NewFrontendKey(kind.Proto(v6), frontend.Addr(), frontend.Port()), backends[:most/2]...)
			open := func(client int) pkt.Packet {
				p := fromPod(f.A, kind, frontend)
				p.Src = at(p.Src.Addr(), uint16(10000+client))
				return p
			}
			backendOf := func(p pkt.Packet) netip.AddrPort {
				e, ok := f.Flow(t, key(p))
				if !ok {
					t.Fatalf("%s from port %d left no flow", kind, p.Src.Port())
				}
				return at(e.Xlate.Dst.Netip(), bpf.Port16(e.Xlate.Dport))
			}
			chosen, shares := make([]netip.AddrPort, clients), map[netip.AddrPort]int{}
			for c := range clients {
				f.Run(t, progtest.FromPod(f.A), open(c).Bytes())
				chosen[c] = backendOf(open(c))
				shares[chosen[c]]++
			}
			// 100 each, with a standard deviation of 8.2: a distance of six of these is met once in some 10⁸ runs.
			for _, b := range backends[:most/2] {
				if n := shares[b]; n < 50 || n > 150 {
					t.Errorf("%s: %v has %d of %d clients, want about a third; all: %v", kind, b, n, clients, shares)
				}
			}
			f.AddService(serviceID, bpf.NewFrontendKey(kind.Proto(v6), frontend.Addr(), frontend.Port()), backends...)
			must(t, f.DP.RaiseServiceEpochs(serviceID))
			for c := range clients {
				f.Run(t, progtest.FromPod(f.A), data(open(c)).Bytes())
				if now := backendOf(open(c)); now != chosen[c] {
					t.Fatalf("%s: client %d moved from %v to %v when backends came", kind, c, chosen[c], now)
				}
			}
			f.ClearFlows(t)
		}
	}
}

// Contract row U2: a UDP client of a service that has lost all its backends is refused, by NodePort as well, and moves to the next backend
// from the same port; TCP is left alone.
func TestU2_LastBackendLeaves(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	for _, v6 := range []bool{false, true} {
		old, next := at(f.B.Addr(v6), podPort), at(f.B.Addr(v6), podPort+1)
		for i, tt := range []struct {
			hook     progtest.Hook
			frontend netip.AddrPort
			open     func(pkt.Kind, netip.AddrPort) pkt.Packet
			asked    netip.Addr
		}{
			{progtest.FromPod(f.A), at(of(vips, v6), vipPort), func(k pkt.Kind, to netip.AddrPort) pkt.Packet { return fromPod(f.A, k, to) }, of(vips, v6)},
			{f.FromNetdev(), at(of(unspecified, v6), nodePort), fromClient, of(nodetest.NodeAddrs, v6)},
		} {
			for _, kind := range []pkt.Kind{pkt.UDP, pkt.TCP} {
				serviceID := uint32(1 + i)
				frontend := bpf.NewFrontendKey(kind.Proto(v6), tt.frontend.Addr(), tt.frontend.Port())
				f.AddService(serviceID, frontend, old)
				open := tt.open(kind, at(tt.asked, tt.frontend.Port()))
				to := func(p pkt.Packet, b netip.AddrPort) pkt.Packet { return with(atPod(p, f.B), p.Src, b) }
				redirected(t, f, kind.String()+" opens", tt.hook, open, to(open, old))

				f.AddService(serviceID, frontend)
				must(t, f.DP.Maps.ServiceBackends.Delete(bpf.NewServiceBackend(serviceID, old)))
				must(t, f.DP.RaiseServiceEpochs(serviceID))
				if kind == pkt.TCP {
					redirected(t, f, "TCP goes on", tt.hook, data(open), to(data(open), old))
				} else {
					for range 2 {
						f.Check(t, progtest.Case{
							Name: "UDP without backend", Hook: tt.hook, In: data(open).Bytes(),
							WantAction: progtest.Redirect, WantOut: refusal(data(open)), WantDrop: "service_no_backend",
						})
					}
					f.AddService(serviceID, frontend, next)
					redirected(t, f, "UDP finds the next", tt.hook, data(open), to(data(open), next))
					must(t, f.DP.Maps.ServiceBackends.Delete(bpf.NewServiceBackend(serviceID, next)))
				}
				f.ClearFlows(t)
			}
		}
	}
}

// Contract rows U2 and U3: an answer that is under way while the backend leaves the service, or while an address becomes a service's, passes, and
// says nothing about the opener's next packet: that one goes where the service is now.
func TestU2_U3_AnswersHoldNobodyBack(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	families(t, f, func(t *testing.T, v6 bool) {
		old, next := at(f.B.Addr(v6), podPort), at(f.B.Addr(v6), podPort+1)
		for i, tt := range []struct {
			hook     progtest.Hook
			frontend netip.AddrPort
			open     pkt.Packet
		}{
			{progtest.FromPod(f.A), at(of(vips, v6), vipPort), fromPod(f.A, pkt.UDP, at(of(vips, v6), vipPort))},
			{f.FromNetdev(), at(of(unspecified, v6), nodePort), fromClient(pkt.UDP, at(of(nodetest.NodeAddrs, v6), nodePort))},
		} {
			f.ClearFlows(t)
			serviceID := uint32(1 + i)
			frontend := bpf.NewFrontendKey(pkt.UDP.Proto(v6), tt.frontend.Addr(), tt.frontend.Port())
			f.AddService(serviceID, frontend, old)
			arrived := with(atPod(tt.open, f.B), tt.open.Src, old)
			redirected(t, f, "opens", tt.hook, tt.open, arrived)

			f.AddService(serviceID, frontend, next)
			must(t, f.DP.Maps.ServiceBackends.Delete(bpf.NewServiceBackend(serviceID, old)))
			must(t, f.DP.RaiseServiceEpochs(serviceID))
			home := with(hop(answer(arrived)), tt.open.Dst, tt.open.Src)
			if tt.hook.Program == bpf.ProgFromPod {
				home = with(atPod(answer(arrived), f.A), tt.open.Dst, tt.open.Src)
			}
			redirected(t, f, "the old one's answer", progtest.FromPod(f.B), answer(arrived), home)
			redirected(t, f, "goes on", tt.hook, data(tt.open), with(atPod(data(tt.open), f.B), tt.open.Src, next))
		}

		outside := at(of(nodetest.ClientAddrs, v6), 53)
		open := fromPod(f.A, pkt.UDP, outside)
		redirected(t, f, "to outside", progtest.FromPod(f.A), open, hop(open))
		frontend := bpf.NewFrontendKey(pkt.UDP.Proto(v6), outside.Addr(), outside.Port())
		f.AddService(3, frontend, next)
		must(t, f.DP.RaiseEndpointEpochs(int(bpf.EpochSlotOutside)))
		reply := answer(open)
		redirected(t, f, "an answer from outside", f.FromNetdev(), reply, atPod(reply, f.A))
		redirected(t, f, "to what is a service now", progtest.FromPod(f.A), data(open), with(atPod(data(open), f.B), open.Src, next))
		must(t, f.DP.Maps.Services.Delete(&frontend))
	})
}

// Contract row V16: a segment outside the window is translated like any other, so the client's stack answers it on its own connection; without a
// flow it does not pass as the service's.
func TestV16_OutOfWindowSegmentsAreTranslated(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	families(t, f, func(t *testing.T, v6 bool) {
		for _, tt := range []struct {
			hook progtest.Hook
			open pkt.Packet
		}{
			{progtest.FromPod(f.A), fromPod(f.A, pkt.TCP, at(of(vips, v6), vipPort))},
			{f.FromNetdev(), fromClient(pkt.TCP, at(of(nodetest.NodeAddrs, v6), nodePort))},
		} {
			f.ClearFlows(t)
			arrived := with(atPod(tt.open, f.B), tt.open.Src, at(f.B.Addr(v6), podPort))
			redirected(t, f, "opens", tt.hook, tt.open, arrived)
			synAck := answer(arrived)
			home := func(p pkt.Packet) pkt.Packet {
				if tt.hook.Program == bpf.ProgFromPod {
					return with(atPod(p, f.A), tt.open.Dst, tt.open.Src)
				}
				return with(hop(p), tt.open.Dst, tt.open.Src)
			}
			redirected(t, f, "is answered", progtest.FromPod(f.B), synAck, home(synAck))
			for _, stray := range []struct {
				name     string
				flags    uint8
				seq, ack uint32
			}{
				{"ACK far below the window", pkt.ACK, synAck.Seq - 1<<30, 7},
				{"data far above it", pkt.ACK | pkt.PSH, synAck.Seq + 1<<30, synAck.Ack + 1<<30},
				{"reset at a wrong place", pkt.RST, synAck.Seq + 1<<31, 0},
			} {
				p := synAck
				p.Flags, p.Seq, p.Ack = stray.flags, stray.seq, stray.ack
				redirected(t, f, stray.name, progtest.FromPod(f.B), p, home(p))
			}
		}
	})
}

// Contract row V17: nothing that travels is translated from a loopback address, although a NodePort of that number exists. What is sent there
// from outside is for the kernel, and kubelet's rules, to judge; a pod's packet leads nowhere.
func TestV17_LoopbackIsNotTranslated(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	loopback := []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
			to := at(of(loopback, v6), nodePort)
			fromOutside, pod := fromClient(kind, to), fromPod(f.A, kind, to)
			passed(t, f, kind.String()+" from outside", f.FromNetdev(), fromOutside, fromOutside)
			dropped(t, f, kind.String()+" from a pod", progtest.FromPod(f.A), pod, "no_route")
		}
	})
}
