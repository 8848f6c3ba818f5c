// SPDX-License-Identifier: Apache-2.0

package program

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
	"github.com/margay-cni/margay/pkg/bpf"
)

// Contract row V14: an SCTP service on another port than its pods', from a pod, from outside and to itself. The packets of every length
// have the checksum that a whole computation gives (hash/crc32), which redirected compares.
func TestV14_SCTPServices(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	random := rand.New(rand.NewPCG(14, 14))
	families(t, f, func(t *testing.T, v6 bool) {
		backend := at(f.B.Addr(v6), podPort)
		for i := range 40 {
			f.ClearFlows(t)
			length := i
			if i >= 20 {
				length = random.IntN(1400)
			}
			payload := make([]byte, length)
			for j := range payload {
				payload[j] = byte(random.Uint32())
			}
			for name, way := range map[string]struct {
				hook progtest.Hook
				open pkt.Packet
				src  netip.AddrPort
			}{
				"pod":     {progtest.FromPod(f.A), fromPod(f.A, pkt.SCTP, at(of(vips, v6), vipPort)), at(f.A.Addr(v6), sport)},
				"outside": {f.FromNetdev(), fromClient(pkt.SCTP, at(of(nodetest.NodeAddrs, v6), nodePort)), at(of(nodetest.ClientAddrs, v6), sport)},
				"itself":  {progtest.FromPod(f.B), fromPod(f.B, pkt.SCTP, at(of(vips, v6), vipPort)), at(of(vips, v6), sport)},
			} {
				name = fmt.Sprintf("%s, %d bytes", name, length)
				way.open.Payload = payload
				arrived := with(atPod(way.open, f.B), way.src, backend)
				redirected(t, f, name, way.hook, way.open, arrived)
				back := answer(arrived)
				want := with(hop(back), way.open.Dst, way.open.Src)
				switch way.hook.Program {
				case bpf.ProgFromPod:
					to := f.A
					if way.hook.Ifindex == f.B.Ifindex {
						to = f.B
					}
					want = with(atPod(back, to), way.open.Dst, way.open.Src)
				}
				redirected(t, f, name+", answer", progtest.FromPod(f.B), back, want)
			}
		}
	})
}

// A frame that is padded to the Ethernet's least size has the checksum of the packet, not of the frame.
func TestV14_PaddedFrame(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	families(t, f, func(t *testing.T, v6 bool) {
		f.Flags = 0 // a NIC's sum does not cover the padding as the kernel's test run wants it
		open := fromPod(f.A, pkt.SCTP, at(of(vips, v6), vipPort))
		arrived := with(atPod(open, f.B), open.Src, at(f.B.Addr(v6), podPort))
		padding := make([]byte, 17)
		f.Check(t, progtest.Case{
			Name: "padded", Hook: progtest.FromPod(f.A), In: append(open.Bytes(), padding...),
			WantAction: progtest.Redirect, WantOut: append(arrived.Bytes(), padding...),
		})
	})
}

// SCTP endpoints keep their ports: an INIT on the tuple of an association whose backend has left opens one with another backend, what
// belongs to the old one goes on (contract row S6).
func TestV14_INITFindsAnotherBackend(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	families(t, f, func(t *testing.T, v6 bool) {
		vip := at(of(vips, v6), vipPort)
		service(f, 4000, vip, at(f.B.Addr(v6), podPort))
		id := id(t, f, bpf.NewFrontendKey(pkt.SCTP.Proto(v6), vip.Addr(), vip.Port()))
		init := fromPod(f.A, pkt.SCTP, vip)
		init.Payload = []byte{1, 0, 0, 4}
		chunk := init
		chunk.Payload = []byte{0, 3, 0, 4}
		old, other := at(f.B.Addr(v6), podPort), at(f.B.Addr(v6), podPort+1)
		arrives := func(name string, p pkt.Packet, backend netip.AddrPort) {
			t.Helper()
			redirected(t, f, name, progtest.FromPod(f.A), p, with(atPod(p, f.B), p.Src, backend))
		}
		arrives("INIT", init, old)
		arrives("data", chunk, old)
		service(f, 4000, vip, other)
		arrives("INIT again, while the backend serves", init, old)
		gone := bpf.NewServiceBackend(id, old)
		must(t, f.DP.Maps.ServiceBackends.Delete(&gone))
		must(t, f.DP.RaiseServiceEpochs(id))
		arrives("data, after the backend has left", chunk, old)
		arrives("INIT, after the backend has left", init, other)
		arrives("data of the new association", chunk, other)
	})
}
