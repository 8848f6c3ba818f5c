// SPDX-License-Identifier: Apache-2.0

package program

import (
	"bytes"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
)

const (
	narrow = 1300 // MTU of the node's device towards the client
	quoted = 504  // bytes that the answer quotes
)

// narrowed makes a fixture whose way out takes less than a pod may send.
func narrowed(t *testing.T) *progtest.Fixture {
	t.Helper()
	f := progtest.New(t)
	f.NS.Do(func() {
		l, err := netlink.LinkByIndex(f.ClientDevice)
		must(t, err)
		must(t, netlink.LinkSetMTU(l, narrow))
	})
	servicesOn(f, f.B)
	return f
}

// ofLength gives the packet the payload with which it has n bytes from its IP header on.
func ofLength(p pkt.Packet, n int) pkt.Packet {
	p.Payload = make([]byte, 100) // Ethernet pads what is shorter
	if p.Kind == pkt.TCP {
		p.Flags, p.Seq, p.Ack = pkt.ACK, 7000, 1
	}
	p.Payload = make([]byte, n-(len(p.Bytes())-pkt.L3)+100)
	return p
}

// tooBig is the golden answer to a packet that does not fit: from its destination, through the device that it came from.
func tooBig(in pkt.Packet, frame []byte) []byte {
	out := pkt.Packet{SrcMAC: in.DstMAC, DstMAC: in.SrcMAC, Src: at(in.Dst.Addr(), 0), Dst: at(in.Src.Addr(), 0), TTL: 64}
	return out.TooBig(narrow, frame[:pkt.L3+quoted])
}

func answered(t *testing.T, f *progtest.Fixture, name string, h progtest.Hook, in pkt.Packet, frame []byte) {
	t.Helper()
	f.Check(t, progtest.Case{
		Name: name, Hook: h, In: frame, WantAction: progtest.Redirect, WantOut: tooBig(in, frame), WantDrop: "too_big",
	})
}

// Corner case A12: a packet that does not fit the way out is answered with what would fit, a flow's first packet and every later one,
// quoting what the sender has sent. (The sum of a NIC is not kept up: the answer goes back where the packet came from.)
func TestRow12_TooBig(t *testing.T) {
	t.Parallel()
	f := narrowed(t)
	for _, v6 := range []bool{false, true} {
		for _, kind := range kinds {
			f.ClearFlows(t)
			name := kind.String()
			open := fromPod(f.A, kind, at(of(nodetest.ClientAddrs, v6), 443))
			large, fits := ofLength(open, narrow+1), ofLength(open, narrow)
			answered(t, f, name+", first packet", progtest.FromPod(f.A), large, large.Bytes())
			got, ok := f.Flow(t, key(open))
			if !ok || got.Mtu != narrow || got.OutIfindex != uint32(f.ClientDevice) {
				t.Errorf("%s: entry = %+v, %v, want one with MTU %d by device %d", name, got, ok, narrow, f.ClientDevice)
			}
			redirected(t, f, name+" fits", progtest.FromPod(f.A), fits, hop(fits))
			answered(t, f, name+", later packet", progtest.FromPod(f.A), large, large.Bytes())
			answered(t, f, name+" with options", progtest.FromPod(f.A), large, pkt.WithOptions(fits.Bytes(), 0))
			if !v6 {
				answered(t, f, name+" that may be fragmented", progtest.FromPod(f.A), large, fragmentable(large.Bytes()))
			}
			large.TTL = 1
			passed(t, f, name+" with no hop left", progtest.FromPod(f.A), large, large)
		}
	}
}

// fragmentable takes DF off, and puts it on the header's checksum.
func fragmentable(frame []byte) []byte {
	out := pkt.With(frame, pkt.L3+6, 0)
	sum := uint32(out[pkt.L3+10])<<8 + uint32(out[pkt.L3+11]) + 0x4000
	sum += sum >> 16
	return pkt.With(out, pkt.L3+10, byte(sum>>8), byte(sum))
}

// The answer of a NodePort's backend does not fit the way to the client: the pod hears of it under the tuple that it knows.
func TestRow12_TooBigAnswerOfNodePort(t *testing.T) {
	t.Parallel()
	f := narrowed(t)
	for _, v6 := range []bool{false, true} {
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
			f.ClearFlows(t)
			open := fromClient(kind, at(of(nodetest.NodeAddrs, v6), nodePort))
			arrived := with(atPod(open, f.B), open.Src, at(f.B.Addr(v6), podPort))
			redirected(t, f, kind.String()+" opens", f.FromNetdev(), open, arrived)
			large, fits := ofLength(answer(arrived), narrow+1), ofLength(answer(arrived), narrow)
			answered(t, f, kind.String()+" is answered", progtest.FromPod(f.B), large, large.Bytes())
			redirected(t, f, kind.String()+" fits", progtest.FromPod(f.B), fits, with(hop(fits), open.Dst, open.Src))
			// Towards the pod nothing is compared: its device takes what the NIC took.
			in := ofLength(open, 1500)
			redirected(t, f, kind.String()+" to the pod", f.FromNetdev(), in, with(atPod(in, f.B), in.Src, arrived.Dst))
		}
	}
}

// A packet that the device, or the kernel for it, cuts into segments is as large as its segments.
func TestRow12_SegmentsCount(t *testing.T) {
	t.Parallel()
	f := narrowed(t)
	for _, v6 := range []bool{false, true} {
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
			f.ClearFlows(t)
			open := fromPod(f.A, kind, at(of(nodetest.ClientAddrs, v6), 443))
			super := ofLength(open, 3000)
			header := len(super.Bytes()) - pkt.L3 - len(super.Payload)
			f.GSOSize = uint32(narrow - header)
			redirected(t, f, kind.String()+" in segments that fit", progtest.FromPod(f.A), super, hop(super))
			f.GSOSize++
			answered(t, f, kind.String()+" in segments that do not", progtest.FromPod(f.A), super, super.Bytes())
			if v6 && kind == pkt.TCP {
				f.GSOSize--
				got := f.Run(t, progtest.FromPod(f.A), jumbo(super))
				if got.Action != progtest.Redirect || !bytes.Equal(got.Out, jumbo(hop(super))) {
					t.Errorf("with a jumbo option, in segments that fit: action %d, drops %v", got.Action, got.Drops)
				}
			}
			f.GSOSize = 0
		}
	}
}

// jumbo is an IPv6 packet as BIG TCP hands it on: with a hop-by-hop header more, whose option has the length (RFC 2675), and none in its own.
func jumbo(p pkt.Packet) []byte {
	frame := pkt.With(pkt.WithOptions(p.Bytes(), 0), pkt.L3+4, 0, 0)
	return pkt.With(frame, pkt.L4v6+2, 0xc2, 4, 0, 0, byte((len(frame)-pkt.L4v6)>>8), byte(len(frame)-pkt.L4v6))
}

// An error is never answered with an error.
func TestErrorTooBigIsNotAnswered(t *testing.T) {
	t.Parallel()
	f := narrowed(t)
	families(t, f, func(t *testing.T, v6 bool) {
		open := fromClient(pkt.UDP, at(of(nodetest.NodeAddrs, v6), nodePort))
		open.Payload = make([]byte, 1400)
		arrived := with(atPod(open, f.B), open.Src, at(f.B.Addr(v6), podPort))
		redirected(t, f, "opens", f.FromNetdev(), open, arrived)
		w := way{"error", arrived, with(arrived, open.Src, open.Dst), progtest.FromPod(f.B), nil}
		checkTranslated(t, f, w, "whole", sent(arrived, f.B.Addr(v6)), open.Dst.Addr())
	})
}

// A flow follows the MTU of its device once the routes' epoch says that something changed.
func TestMTUIsReadAgain(t *testing.T) {
	t.Parallel()
	f := narrowed(t)
	for _, v6 := range []bool{false, true} {
		large := ofLength(fromPod(f.A, pkt.UDP, at(of(nodetest.ClientAddrs, v6), 443)), narrow+1)
		answered(t, f, "narrow", progtest.FromPod(f.A), large, large.Bytes())
		f.NS.Do(func() {
			l, err := netlink.LinkByIndex(f.ClientDevice)
			must(t, err)
			must(t, netlink.LinkSetMTU(l, 1500))
			must(t, f.DP.RaiseRouteEpoch())
			redirected(t, f, "wide", progtest.FromPod(f.A), large, hop(large))
			must(t, netlink.LinkSetMTU(l, narrow))
			must(t, f.DP.RaiseRouteEpoch())
		})
	}
}

// A client outside hears of it from the address that it asked. (No way into a pod has an MTU; that of an entry to another node is set by
// hand here.)
func TestRow12_TooBigFromOutside(t *testing.T) {
	t.Parallel()
	f := narrowed(t)
	for _, v6 := range []bool{false, true} {
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
			open := fromClient(kind, at(of(nodetest.NodeAddrs, v6), nodePort))
			arrived := with(atPod(open, f.B), open.Src, at(f.B.Addr(v6), podPort))
			redirected(t, f, kind.String()+" opens", f.FromNetdev(), open, arrived)
			k := key(open)
			entry, _ := f.Flow(t, k)
			entry.Mtu = narrow
			must(t, f.Flows.Put(&k, &entry))
			large, fits := ofLength(open, narrow+1), ofLength(open, narrow)
			answered(t, f, kind.String(), f.FromNetdev(), large, large.Bytes())
			redirected(t, f, kind.String()+" fits", f.FromNetdev(), fits, with(atPod(fits, f.B), fits.Src, arrived.Dst))
		}
	}
}
