// SPDX-License-Identifier: Apache-2.0

package program

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
)

// piece is how many bytes a fragment carries: large UDP packets have three, all of the same length. (The kernel gives up a NIC's sum when
// the packet at hand changes its length, so that TestFragmentWaitsForTheFirst could not be run with one.)
const piece = 48

var datagrams atomic.Uint32

// large gives the packet a payload that has to be fragmented.
func large(p pkt.Packet) pkt.Packet {
	p.Payload = bytes.Repeat([]byte("margay!?"), 17)
	return p
}

// cutAlike cuts two packets into the fragments of one new datagram.
func cutAlike(a, b pkt.Packet) (ofA, ofB [][]byte) {
	id := 0xfffe + datagrams.Add(1) // IPv4 has 16 bits of it
	return pkt.Fragment(a.Bytes(), id, piece), pkt.Fragment(b.Bytes(), id, piece)
}

// fragmented sends the packet's fragments, in order, and wants those of the other packet, whose checksums are right as a whole.
func fragmented(t *testing.T, f *progtest.Fixture, name string, h progtest.Hook, in, want pkt.Packet) {
	t.Helper()
	if err := pkt.VerifyChecksums(want.Bytes()); err != nil {
		t.Fatalf("%s: the wanted packet is wrong: %v", name, err)
	}
	ins, wants := cutAlike(in, want)
	for i := range ins {
		f.Check(t, progtest.Case{Name: name, Hook: h, In: ins[i], WantAction: progtest.Redirect, WantOut: wants[i]})
	}
}

// Every fragment goes the way of its flow, translated where the flow is, both ways.
func TestFragments(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	families(t, f, func(t *testing.T, v6 bool) {
		pod := at(f.B.Addr(v6), podPort)
		for _, kind := range []pkt.Kind{pkt.UDP, pkt.TCP, pkt.Ping} {
			f.ClearFlows(t)
			open := large(fromPod(f.A, kind, pod))
			arrived := atPod(open, f.B)
			fragmented(t, f, kind.String()+" to a pod", progtest.FromPod(f.A), open, arrived)
			back := answer(arrived)
			fragmented(t, f, kind.String()+" back", progtest.FromPod(f.B), back, atPod(back, f.A))
		}
		for _, kind := range []pkt.Kind{pkt.UDP, pkt.TCP} {
			f.ClearFlows(t)
			open := large(fromPod(f.A, kind, at(of(vips, v6), vipPort)))
			arrived := with(atPod(open, f.B), open.Src, pod)
			fragmented(t, f, kind.String()+" to a service", progtest.FromPod(f.A), open, arrived)
			back := answer(arrived)
			fragmented(t, f, kind.String()+" back from it", progtest.FromPod(f.B), back, with(atPod(back, f.A), open.Dst, open.Src))

			open = large(fromClient(kind, at(of(nodetest.NodeAddrs, v6), nodePort)))
			arrived = with(atPod(open, f.B), open.Src, pod)
			fragmented(t, f, kind.String()+" to a NodePort", f.FromNetdev(), open, arrived)
			back = answer(arrived)
			fragmented(t, f, kind.String()+" back from it", progtest.FromPod(f.B), back, with(hop(back), open.Dst, open.Src))
		}
	})
}

// What has to be a whole packet by its fragment header (RFC 6946), or has other extension headers, is a packet like any other.
func TestExtensionHeaders(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	open := fromPod(f.A, pkt.UDP, at(f.B.Addr(true), podPort))
	for _, chain := range [][]uint8{{0}, {43}, {44}, {51}, {60}, {60, 43, 0}, {44, 60}, {60, 51, 44, 0}} {
		in, want := open.Bytes(), atPod(open, f.B).Bytes()
		for _, next := range chain {
			in, want = header(in, next), header(want, next)
		}
		f.Check(t, progtest.Case{Name: "extension headers", Hook: progtest.FromPod(f.A), In: in, WantAction: progtest.Redirect, WantOut: want})
	}
	// Fragments of a datagram that begins with an extension header.
	id := datagrams.Add(1)
	in := pkt.Fragment(pkt.WithOptions(large(open).Bytes(), 60), id, piece)
	want := pkt.Fragment(pkt.WithOptions(atPod(large(open), f.B).Bytes(), 60), id, piece)
	for i := range in {
		f.Check(t, progtest.Case{
			Name: "behind options", Hook: progtest.FromPod(f.A), In: in[i], WantAction: progtest.Redirect, WantOut: want[i],
		})
	}
}

// header puts an extension header before the others: a fragment header says that the packet is whole.
func header(frame []byte, next uint8) []byte {
	frame = pkt.WithOptions(frame, next)
	if next == 44 {
		return pkt.With(frame, pkt.L4v6+2, 0, 0, 1, 2, 3, 4)
	}
	return frame
}

// waiting returns the frames that wait for a first fragment.
func waiting(t *testing.T, f *progtest.Fixture) (frames [][]byte) {
	t.Helper()
	for slot := range f.Held.MaxEntries() {
		h, err := f.Held.LookupBytes(slot)
		must(t, err)
		if binary.NativeEndian.Uint32(h) != 0 {
			const length, frame = 72, 80
			frames = append(frames, h[frame:frame+int(binary.NativeEndian.Uint16(h[length:]))])
		}
	}
	return frames
}

// A fragment that comes before the first one of its datagram is kept, as it is, until the first has come, which goes its way as if nothing
// had been. (That those which waited come in again, TestRow13_FragmentsInAnyOrder of test/dataplane sees.)
func TestFragmentWaitsForTheFirst(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	families(t, f, func(t *testing.T, v6 bool) {
		for name, c := range map[string]struct {
			hook progtest.Hook
			open pkt.Packet
		}{
			"from a pod":   {progtest.FromPod(f.A), large(fromPod(f.A, pkt.UDP, at(of(vips, v6), vipPort)))},
			"from outside": {f.FromNetdev(), large(fromClient(pkt.UDP, at(f.B.Addr(v6), podPort)))},
		} {
			ins, wants := cutAlike(c.open, with(atPod(c.open, f.B), c.open.Src, at(f.B.Addr(v6), podPort)))
			for _, i := range []int{2, 1} {
				f.Check(t, progtest.Case{Name: name, Hook: c.hook, In: ins[i], WantAction: progtest.Shot})
			}
			if diff := cmp.Diff([][]byte{ins[2], ins[1]}, waiting(t, f)); diff != "" {
				t.Errorf("%s: waiting (-want +got):\n%s", name, diff)
			}
			f.Check(t, progtest.Case{Name: name + ", first", Hook: c.hook, In: ins[0], WantAction: progtest.Redirect, WantOut: wants[0]})
			if got := waiting(t, f); len(got) != 0 {
				t.Errorf("%s: %d fragments wait after the first has come", name, len(got))
			}
			f.Check(t, progtest.Case{Name: name + ", again", Hook: c.hook, In: ins[2], WantAction: progtest.Redirect, WantOut: wants[2]})
		}
	})
}

// What is the node's own passes in any order: its stack does not wait for the programs, and gets nothing twice.
func TestFragmentsForTheNodePass(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	families(t, f, func(t *testing.T, v6 bool) {
		host := large(fromClient(pkt.UDP, at(of(nodetest.NodeAddrs, v6), 53)))
		parts, _ := cutAlike(host, host)
		for _, i := range []int{2, 0, 1} {
			f.Check(t, progtest.Case{Name: "to the node", Hook: f.FromNetdev(), In: parts[i], WantAction: progtest.OK})
		}
		if got := waiting(t, f); len(got) != 0 {
			t.Errorf("%d fragments wait", len(got))
		}
	})
}

// age makes everything that waits, or is remembered, older by some seconds. off is the time's place in the map's value.
func age(t *testing.T, f *progtest.Fixture, seconds uint32) {
	t.Helper()
	older := func(value []byte, off int) []byte {
		binary.NativeEndian.PutUint32(value[off:], binary.NativeEndian.Uint32(value[off:])-seconds)
		return value
	}
	for slot := range f.Held.MaxEntries() {
		h, err := f.Held.LookupBytes(slot)
		must(t, err)
		if binary.NativeEndian.Uint32(h) != 0 {
			must(t, f.Held.Put(slot, older(h, 8)))
		}
	}
	var key, value []byte
	for it := f.Fragments.Iterate(); it.Next(&key, &value); {
		must(t, f.Fragments.Put(key, older(value, 4)))
	}
}

// One that waited too long, or whose place another one took, is counted as lost; one whose first came too long ago waits anew.
func TestHeldFragmentIsLost(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	families(t, f, func(t *testing.T, v6 bool) {
		open := large(fromPod(f.A, pkt.UDP, at(f.B.Addr(v6), podPort)))
		ins, wants := cutAlike(open, atPod(open, f.B))
		hook := progtest.FromPod(f.A)
		hold := progtest.Case{Name: "held", Hook: hook, In: ins[1], WantAction: progtest.Shot}
		first := progtest.Case{Name: "first", Hook: hook, In: ins[0], WantAction: progtest.Redirect, WantOut: wants[0]}

		f.Check(t, hold)
		age(t, f, 31)
		late := first
		late.WantDrop = "fragment_lost"
		f.Check(t, late)
		f.Check(t, progtest.Case{Name: "follows", Hook: hook, In: ins[1], WantAction: progtest.Redirect, WantOut: wants[1]})
		age(t, f, 31)
		f.Check(t, hold)
		f.Check(t, first)

		others, _ := cutAlike(open, open)
		more, wants := cutAlike(open, atPod(open, f.B))
		var cursor uint32
		must(t, f.Cursor.Lookup(uint32(0), &cursor))
		hold.In = others[1]
		f.Check(t, hold)
		must(t, f.Cursor.Put(uint32(0), cursor))
		hold.In, hold.WantDrop = more[1], "fragment_lost"
		f.Check(t, hold)
		f.Check(t, progtest.Case{Name: "first", Hook: hook, In: more[0], WantAction: progtest.Redirect, WantOut: wants[0]})
	})
}

// What nobody could judge, or what is forged, is dropped by name, and no later fragment follows it.
func TestFragmentDrops(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	isolateB(f)
	families(t, f, func(t *testing.T, v6 bool) {
		service(f, map[bool]uint32{false: 1900, true: 2900}[v6], at(of(vips, v6), 1))
		open := large(fromPod(f.A, pkt.UDP, at(f.B.Addr(v6), podPort)))
		hook := progtest.FromPod(f.A)
		all := func(name string, p pkt.Packet, reasons ...string) {
			t.Helper()
			parts, _ := cutAlike(p, p)
			for i, reason := range reasons {
				f.Check(t, progtest.Case{Name: name, Hook: hook, In: parts[i], WantAction: progtest.Shot, WantDrop: reason})
			}
		}
		all("denied", open, "policy", "policy", "policy")
		forged := with(open, at(f.B.Addr(v6), sport), at(f.A.Addr(v6), podPort))
		all("another pod's address", forged, "spoofed_address", "spoofed_address", "spoofed_address")
		reset := large(fromPod(f.A, pkt.TCP, at(of(vips, v6), 1)))
		reset.Flags = pkt.RST
		all("a service without endpoints", reset, "service_no_backend", "service_no_backend")
		all("a spoofed MAC", pkt.Packet{
			Kind: pkt.UDP, TTL: 64, SrcMAC: routerMAC, DstMAC: open.DstMAC, Src: open.Src, Dst: open.Dst, Payload: open.Payload,
		}, "spoofed_mac")

		outside := large(fromClient(pkt.UDP, at(f.B.Addr(v6), podPort)))
		for name, src := range map[string]netip.Addr{"a pod": f.A.Addr(v6), "the node": of(nodetest.NodeAddrs, v6)} {
			p := with(outside, at(src, sport), outside.Dst)
			parts, _ := cutAlike(p, p)
			f.Check(t, progtest.Case{
				Name: "from " + name + ", it says", Hook: f.FromNetdev(), In: parts[1], WantAction: progtest.Shot, WantDrop: "source_is_local",
			})
		}
		// The stack sends in order, and nothing could be put back there.
		parts, _ := cutAlike(outside, outside)
		f.Check(t, progtest.Case{Name: "to_pod", Hook: progtest.ToPod(f.B), In: parts[1], WantAction: progtest.Shot, WantDrop: "fragment"})

		// RFC 1858: the fragment after the first one must not replace the TCP flags.
		tcp := fromPod(f.A, pkt.TCP, at(f.A.Addr(v6), podPort))
		tcp.Payload = open.Payload
		id := datagrams.Add(1)
		first, overlap := pkt.Fragment(tcp.Bytes(), id, piece)[0], pkt.Fragment(tcp.Bytes(), id, 16)[1]
		f.Check(t, progtest.Case{
			Name: "first", Hook: hook, In: first, WantAction: progtest.Redirect, WantOut: pkt.Fragment(atPod(tcp, f.A).Bytes(), id, piece)[0],
		})
		f.Check(t, progtest.Case{Name: "overlaps the header", Hook: hook, In: overlap, WantAction: progtest.Shot, WantDrop: "fragment"})

		long := open
		long.Payload = make([]byte, 4000)
		f.Check(t, progtest.Case{
			Name: "too long to wait", Hook: hook, In: pkt.Fragment(long.Bytes(), datagrams.Add(1), 1600)[1], WantAction: progtest.Shot,
			WantDrop: "fragment",
		})
		icmp := pkt.Fragment(quotePort(open, f.B.Addr(v6), open.SrcMAC, open.DstMAC), datagrams.Add(1), 64)
		f.Check(t, progtest.Case{Name: "ICMP error", Hook: hook, In: icmp[0], WantAction: progtest.Shot, WantDrop: "fragment"})
		if got := waiting(t, f); len(got) != 0 {
			t.Errorf("%d fragments wait", len(got))
		}
	})
}
