// SPDX-License-Identifier: Apache-2.0

package program

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
	"github.com/margay-cni/margay/pkg/bpf"
)

// outer is what a test says of the headers before an encapsulated packet. The source port and the identification are the sender's to choose.
type outer struct {
	Src, Dst netip.Addr
	TOS      uint8
	Group    uint16 // 0: no group policy
	VNI      uint32
}

// headers builds the 50 bytes between the outer Ethernet header and the inner packet, the inner Ethernet header among them, field by field.
func (o outer) headers(t *testing.T, inner []byte, id, sport uint16) []byte {
	t.Helper()
	length := 20 + 8 + 8 + len(inner)
	h := []byte{0x45, o.TOS}
	h = binary.BigEndian.AppendUint16(h, uint16(length))
	h = binary.BigEndian.AppendUint16(h, id)
	h = append(h, 0, 0, 64, 17, 0, 0) // may be fragmented, TTL, UDP, checksum
	h = append(h, o.Src.AsSlice()...)
	h = append(h, o.Dst.AsSlice()...)
	ipv4Sum(h)
	h = binary.BigEndian.AppendUint16(h, sport)
	h = binary.BigEndian.AppendUint16(h, nodetest.OverlayPort)
	h = binary.BigEndian.AppendUint16(h, uint16(length-20))
	h = append(h, 0, 0) // no checksum
	flags := byte(0x08)
	if o.Group != 0 {
		flags = 0x88
	}
	h = append(h, flags, 0)
	h = binary.BigEndian.AppendUint16(h, o.Group)
	h = binary.BigEndian.AppendUint32(h, (nodetest.OverlayVNI+o.VNI)<<8)
	return append(h, inner[:pkt.L3]...)
}

// ipv4Sum writes the checksum of the IPv4 header that the bytes begin with.
func ipv4Sum(h []byte) {
	binary.BigEndian.PutUint16(h[10:], 0)
	sum := uint32(0)
	for i := 0; i < int(h[0]&0xf)*4; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(h[i:]))
	}
	sum = sum&0xffff + sum>>16
	binary.BigEndian.PutUint16(h[10:], ^uint16(sum&0xffff+sum>>16))
}

// encapsulated runs the program and checks that what comes out is the inner frame behind these headers. It returns identification and source port.
func encapsulated(t *testing.T, f *progtest.Fixture, name string, h progtest.Hook, in, inner []byte, o outer) (id, sport uint16) {
	t.Helper()
	got := f.Run(t, h, in)
	if got.Action != progtest.Redirect || len(got.Out) != len(inner)+50 {
		t.Fatalf("%s: action %d with %d bytes, want a redirect with %d; drops %v", name, got.Action, len(got.Out), len(inner)+50, got.Drops)
	}
	id, sport = binary.BigEndian.Uint16(got.Out[pkt.L3+4:]), binary.BigEndian.Uint16(got.Out[pkt.L4v4:])
	want := append(o.headers(t, inner, id, sport), inner[pkt.L3:]...)
	if diff := cmp.Diff(want, got.Out[pkt.L3:]); diff != "" {
		t.Errorf("%s: from the outer IP header on (-want +got):\n%s", name, diff)
	}
	if sport < 49152 {
		t.Errorf("%s: source port %d, want one of 49152 to 65535", name, sport)
	}
	return id, sport
}

func between(f, other *progtest.Fixture) outer {
	return outer{Src: f.Node.Addrs[0], Dst: other.Node.Addrs[0]}
}

// TestEncapsulation: the programs write what RFC 7348 wants before a pod's packet of either family, and a flow keeps its source port.
func TestEncapsulation(t *testing.T) {
	t.Parallel()
	_, n0, n1 := progtest.NewCluster(t, nodetest.ClusterOptions{})
	o := between(n0, n1)
	bothFamilies(t, n0, n1, func(t *testing.T, v6 bool) {
		for _, kind := range kinds {
			open := fromPod(n0.A, kind, at(n1.B.Addr(v6), podPort))
			id, port := encapsulated(t, n0, kind.String(), progtest.FromPod(n0.A), open.Bytes(), hop(open).Bytes(), o)
			next, again := encapsulated(t, n0, kind.String()+" again", progtest.FromPod(n0.A), data(open).Bytes(), hop(data(open)).Bytes(), o)
			if again != port || next == id {
				t.Errorf("%s: source ports %d and %d, identifications %d and %d: want one port, another identification", kind, port, again, id, next)
			}
		}
	})
}

// setECN writes the two bits, and in IPv4 the checksum.
func setECN(frame []byte, v6 bool, ecn uint8) {
	if v6 {
		frame[pkt.L3+1] |= ecn << 4
		return
	}
	frame[pkt.L3+1] |= ecn
	at := frame[pkt.L3+10:]
	sum := uint32(^binary.BigEndian.Uint16(at)) + uint32(ecn)
	binary.BigEndian.PutUint16(at, ^uint16(sum&0xffff+sum>>16))
}

// TestOuterECN: a packet that knows ECN may be marked on its way; a mark that it has stays inside (RFC 3168 §9.1.1). The class stays inside, too.
func TestOuterECN(t *testing.T) {
	t.Parallel()
	_, n0, n1 := progtest.NewCluster(t, nodetest.ClusterOptions{})
	bothFamilies(t, n0, n1, func(t *testing.T, v6 bool) {
		for ecn, want := range []uint8{0, 1, 2, 2} {
			open := fromPod(n0.A, pkt.UDP, at(n1.B.Addr(v6), podPort))
			in, inner := open.Bytes(), hop(open).Bytes()
			setECN(in, v6, uint8(ecn))
			setECN(inner, v6, uint8(ecn))
			o := between(n0, n1)
			o.TOS = want
			encapsulated(t, n0, "ECN", progtest.FromPod(n0.A), in, inner, o)
		}
	})
}

// TestForwardedIsEncapsulated: what a client asks a node for travels with the hash of the chosen backend, and the NIC's sum of the packet stays
// right with the headers in front.
func TestForwardedIsEncapsulated(t *testing.T) {
	t.Parallel()
	c, n0, n1 := progtest.NewCluster(t, nodetest.ClusterOptions{Direct: true})
	id := uint32(0)
	families(t, n0, func(t *testing.T, v6 bool) {
		for vni, flags := range map[uint32]uint32{bpf.VNIForwarded: 0, bpf.VNIDSR: bpf.ServiceDSR} {
			n0.ClearFlows(t)
			for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
				id++
				backend := at(n1.B.Addr(v6), podPort)
				c.AddService(id, bpf.NewFrontendKey(kind.Proto(v6), of(unspecified, v6), nodePort), flags, backend)
				open := fromClient(kind, at(of(nodetest.NodeAddrs, v6), nodePort))
				o := between(n0, n1)
				o.VNI, o.Group = vni, uint16(bpf.BackendHash(backend))
				encapsulated(t, n0, kind.String(), n0.FromNetdev(), open.Bytes(), hop(open).Bytes(), o)
				encapsulated(t, n0, kind.String()+" goes on", n0.FromNetdev(), data(open).Bytes(), hop(data(open)).Bytes(), o)
			}
		}
	})
}

// TestDeviceEncapsulates: where the programs must not or cannot, the packet goes to the overlay device as it is. What is beside it shows that the
// condition is what matters.
func TestDeviceEncapsulates(t *testing.T) {
	t.Parallel()
	_, n0, n1 := progtest.NewCluster(t, nodetest.ClusterOptions{})
	index := nodetest.NodeIndex(n1.Node)
	var usual bpf.Node
	must(t, n0.DP.Maps.Nodes.Lookup(index, &usual))
	group := []byte{0x33, 0x33, 0, 0, 0, 1}
	for _, tc := range []struct {
		name   string
		change func(n *bpf.Node, frame []byte)
		gso    uint32
	}{
		{name: "the agent has not said how", change: func(n *bpf.Node, _ []byte) { n.Ifindex = 0 }},
		{name: "segments that are neither TCP's nor UDP's", change: func(*bpf.Node, []byte) {}, gso: 1000},
		{name: "a frame to many", change: func(_ *bpf.Node, frame []byte) { copy(frame, group) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bothFamilies(t, n0, n1, func(t *testing.T, v6 bool) {
				open := fromPod(n0.A, pkt.UDP, at(n1.B.Addr(v6), podPort))
				encapsulated(t, n0, "without it", progtest.FromPod(n0.A), open.Bytes(), hop(open).Bytes(), between(n0, n1))
				changed, in, want := usual, open.Bytes(), hop(open).Bytes()
				tc.change(&changed, in)
				tc.change(&changed, want)
				n0.Put(n0.DP.Maps.Nodes, index, changed)
				n0.GSOSize = tc.gso
				defer func() {
					n0.Put(n0.DP.Maps.Nodes, index, usual)
					n0.GSOSize = 0
				}()
				n0.Check(t, progtest.Case{Name: tc.name, Hook: progtest.FromPod(n0.A), In: in, WantAction: progtest.Redirect, WantOut: want})
			})
		})
	}
	t.Run("a pod's own tunnel", func(t *testing.T) { tunnelsOfPods(t, n0, n1) })
	t.Run("answers to the overlay", func(t *testing.T) { answersToTheOverlay(t, n0, n1) })
}

// TestErrorsThatDoNotFitAreTheDevices: no MTU is compared with an ICMP error, and the device can fragment it.
func TestErrorsThatDoNotFitAreTheDevices(t *testing.T) {
	t.Parallel()
	_, n0, n1 := progtest.NewCluster(t, nodetest.ClusterOptions{})
	bothFamilies(t, n0, n1, func(t *testing.T, v6 bool) {
		open := fromPod(n0.A, pkt.UDP, at(n1.B.Addr(v6), podPort))
		encapsulated(t, n0, "a flow", progtest.FromPod(n0.A), open.Bytes(), hop(open).Bytes(), between(n0, n1))
		asked := with(open, open.Dst, open.Src)
		for _, quoted := range []int{600, 1500} {
			asked.Payload = bytes.Repeat([]byte{7}, quoted)
			in := quotePort(asked, n0.A.Addr(v6), n0.A.MAC, n0.A.HostMAC)
			got := n0.Run(t, progtest.FromPod(n0.A), in)
			want := len(in)
			if want-pkt.L3 <= 1450 {
				want += 50
			}
			if got.Action != progtest.Redirect || len(got.Out) != want {
				t.Errorf("error of %d bytes: action %d with %d bytes, want a redirect with %d; drops %v", len(in), got.Action, len(got.Out), want, got.Drops)
			}
		}
	})
}

// tunnelsOfPods: the kernel notes one place of inner headers, so what a pod has encapsulated is the device's.
func tunnelsOfPods(t *testing.T, n0, n1 *progtest.Fixture) {
	bothFamilies(t, n0, n1, func(t *testing.T, v6 bool) {
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
			carried := fromPod(n0.A, kind, at(n1.B.Addr(v6), podPort)).Bytes()
			in := fromPod(n0.A, pkt.UDP, at(n1.B.Addr(v6), 6081))
			in.Payload = carried[pkt.L3:]
			frame := in.Bytes()
			encapsulated(t, n0, "the same, not noted", progtest.FromPod(n0.A), frame, hop(in).Bytes(), between(n0, n1))
			noted := n0.Before(t, progtest.FromPod(n0.A), progtest.Encapsulate(frame[pkt.L3:len(frame)-len(in.Payload)])...)
			n0.Check(t, progtest.Case{Name: kind.String(), Hook: noted, In: carried, WantAction: progtest.Redirect, WantOut: hop(in).Bytes()})
		}
	})
}

// answersToTheOverlay: what from_overlay sends back has its outer header in the place of a route.
func answersToTheOverlay(t *testing.T, n0, n1 *progtest.Fixture) {
	overlay := n1.FromOverlay(t, n0.Addrs[0], bpf.VNIPods, 0)
	bothFamilies(t, n0, n1, func(t *testing.T, v6 bool) {
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
			open := fromPod(n0.A, kind, at(n1.B.Addr(v6), podPort))
			redirected(t, n1, kind.String(), overlay, open, atPod(open, n1.B))
			narrowed, _ := n1.Flow(t, key(open))
			narrowed.Mtu = narrow
			n1.Put(n1.Flows, key(open), narrowed)
			large := ofLength(open, narrow+1)
			answered(t, n1, kind.String()+" that is too big", overlay, large, large.Bytes())
			// The same node's pod is answered by the programs.
			reply := answer(atPod(open, n1.B))
			encapsulated(t, n1, kind.String()+" to the same node", progtest.FromPod(n1.B), reply.Bytes(), hop(reply).Bytes(), between(n1, n0))
		}
	})
}
