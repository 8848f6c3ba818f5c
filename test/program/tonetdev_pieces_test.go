// SPDX-License-Identifier: Apache-2.0

package program

import (
	"testing"

	"github.com/gopacket/gopacket/layers"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
)

// passedInPieces is passed for the fragments of a large packet.
func passedInPieces(t *testing.T, f *progtest.Fixture, name string, h progtest.Hook, in, want pkt.Packet) {
	t.Helper()
	ins, wants := cutAlike(in, want)
	for i := range ins {
		f.Check(t, progtest.Case{Name: name, Hook: h, In: ins[i], WantAction: progtest.OK, WantOut: wants[i]})
	}
}

// What the node sends in pieces: answers in a service's name, and from a port that has moved, all pieces of them; and everything else as it is,
// also a later piece alone.
func TestHostFragments(t *testing.T) {
	t.Parallel()
	f := masquerading(t)
	onHost(f)
	families(t, f, func(t *testing.T, v6 bool) {
		open := fromClient(pkt.UDP, at(of(nodetest.NodeAddrs, v6), nodePort))
		arrived := with(open, open.Src, at(of(nodetest.NodeAddrs, v6), hostPort))
		passedInPieces(t, f, "service", f.FromNetdev(), large(open), large(arrived))
		back := large(sentBy(answer(arrived)))
		passedInPieces(t, f, "service is answered", f.ToNetdev(), back, with(back, open.Dst, open.Src))

		pod, host := fromPod(f.A, pkt.UDP, outside(v6)), fromHost(pkt.UDP, outside(v6))
		redirected(t, f, "pod", progtest.FromPod(f.A), pod, leaves(pod, sport))
		port := moved(t, f, f.ToNetdev(), host, progtest.OK)
		sent := large(host)
		sent.Src = at(host.Src.Addr(), port)
		passedInPieces(t, f, "moved", f.ToNetdev(), large(host), sent)

		other := large(fromHost(pkt.UDP, at(outside(v6).Addr(), outsidePort+1)))
		passedInPieces(t, f, "untouched", f.ToNetdev(), other, other)
		alone, _ := cutAlike(other, other)
		f.Check(t, progtest.Case{Name: "a later piece alone", Hook: f.ToNetdev(), In: alone[1], WantAction: progtest.OK})
	})
}

// ICMP errors that the node sends about what it got through a service name the service; those about anything else are its own.
func TestHostICMPErrors(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	onHost(f)
	families(t, f, func(t *testing.T, v6 bool) {
		open := fromClient(pkt.UDP, at(of(nodetest.NodeAddrs, v6), nodePort))
		arrived := with(open, open.Src, at(of(nodetest.NodeAddrs, v6), hostPort))
		passed(t, f, "opens", f.FromNetdev(), open, arrived)
		refused := func(p pkt.Packet) []byte {
			from := sentBy(answer(p))
			if v6 {
				return from.Error(layers.ICMPv6TypeDestinationUnreachable, layers.ICMPv6CodePortUnreachable, p.Bytes())
			}
			return from.Error(layers.ICMPv4TypeDestinationUnreachable, layers.ICMPv4CodePort, p.Bytes())
		}
		f.Check(t, progtest.Case{Name: "refused", Hook: f.ToNetdev(), In: refused(arrived), WantAction: progtest.OK, WantOut: refused(open)})
		unknown := fromClient(pkt.UDP, at(of(nodetest.NodeAddrs, v6), 53))
		f.Check(t, progtest.Case{Name: "the host's own", Hook: f.ToNetdev(), In: refused(unknown), WantAction: progtest.OK})
	})
}
