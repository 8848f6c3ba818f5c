// SPDX-License-Identifier: Apache-2.0

package program

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"

	"github.com/gopacket/gopacket/layers"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
	"github.com/margay-cni/margay/pkg/bpf"
)

var routers = []netip.Addr{netip.MustParseAddr("192.0.2.254"), netip.MustParseAddr("2001:db8:1::254")}

// quoting are the forms in which an error quotes a frame, all of which end in a frame.
var quoting = map[string]func(frame []byte) []byte{
	"whole":                   func(frame []byte) []byte { return frame },
	"eight bytes":             func(frame []byte) []byte { return frame[:headers(frame)+8] },
	"up to TCP's checksum":    func(frame []byte) []byte { return frame[:min(len(frame), headers(frame)+18)] },
	"up to before it":         func(frame []byte) []byte { return frame[:min(len(frame), headers(frame)+16)] },
	"with options":            func(frame []byte) []byte { return pkt.WithOptions(frame, 0) },
	"eight bytes and options": func(frame []byte) []byte { return pkt.WithOptions(frame, 60)[:headers(frame)+16] },
	"first fragment":          firstFragment,
}

// headers is the length of a frame's Ethernet and IP header.
func headers(frame []byte) int {
	if frame[pkt.L3]>>4 == 6 {
		return pkt.L4v6
	}
	return pkt.L4v4
}

// firstFragment marks the frame as the first of several: IPv4 behind options, which makes its checksum new.
func firstFragment(frame []byte) []byte {
	if frame[pkt.L3]>>4 == 6 {
		return pkt.With(pkt.WithOptions(frame, 44), pkt.L4v6+2, 0, 1)
	}
	return pkt.WithOptions(pkt.With(frame, pkt.L3+6, 0x20), 0)
}

// an icmpError is an error on its way: who sends it, to whom, and the packet that it quotes.
type icmpError struct {
	src, dst       netip.Addr
	srcMAC, dstMAC net.HardwareAddr
	about          pkt.Packet
}

// frame is the error, here with an MTU, quoting in one of the forms.
func (e icmpError) frame(form string) []byte {
	p := pkt.Packet{SrcMAC: e.srcMAC, DstMAC: e.dstMAC, Src: at(e.src, 0), Dst: at(e.dst, 0), TTL: 64}
	return p.TooBig(1300, quoting[form](e.about.Bytes()))
}

// sent is an error that the receiver of a packet, or another (by), sends back to its source.
func sent(about pkt.Packet, by netip.Addr) icmpError {
	return icmpError{src: by, dst: about.Src.Addr(), srcMAC: about.DstMAC, dstMAC: about.SrcMAC, about: about}
}

// A way is a flow that is translated, in one direction: a packet of it as its receiver, and as its sender knows it.
type way struct {
	name            string
	received, known pkt.Packet
	// At back the receiver's errors enter; they leave to pod, or outside when it is nil.
	back progtest.Hook
	pod  *nodetest.Pod
}

// ways opens a flow of every translated kind and returns both directions of each.
func ways(t *testing.T, f *progtest.Fixture, kind pkt.Kind, v6 bool) (all []way) {
	t.Helper()
	add := func(name string, open pkt.Packet, opener *nodetest.Pod, arrivedSrc netip.AddrPort) {
		hook, reverse := f.FromNetdev(), hop
		if opener != nil {
			hook, reverse = progtest.FromPod(opener), func(p pkt.Packet) pkt.Packet { return atPod(p, opener) }
		}
		arrived := with(atPod(open, f.B), arrivedSrc, at(f.B.Addr(v6), podPort))
		redirected(t, f, name+" opens", hook, open, arrived)
		back := answer(arrived)
		returned := with(reverse(back), open.Dst, open.Src)
		redirected(t, f, name+" is answered", progtest.FromPod(f.B), back, returned)
		if opener == nil {
			returned.SrcMAC, returned.DstMAC = nodeMAC, routerMAC
		}
		all = append(all,
			way{name + ", about the request", arrived, with(arrived, open.Src, open.Dst), progtest.FromPod(f.B), opener},
			way{name + ", about the answer", returned, with(returned, back.Src, back.Dst), hook, f.B})
	}
	service := fromPod(f.A, kind, at(of(vips, v6), vipPort))
	add("service", service, f.A, service.Src)
	nodeport := fromPod(f.A, kind, at(of(nodetest.NodeAddrs, v6), nodePort))
	nodeport.Src = at(f.A.Addr(v6), sport+1)
	add("NodePort from a pod", nodeport, f.A, nodeport.Src)
	hairpin := fromPod(f.B, kind, at(of(vips, v6), vipPort))
	add("hairpin", hairpin, f.B, at(of(vips, v6), sport))
	outside := fromClient(kind, at(of(nodetest.NodeAddrs, v6), nodePort))
	add("NodePort from outside", outside, nil, outside.Src)
	return all
}

// Corner case A11: an error about a translated flow names the addresses that its receiver knows, outside and in the quote, with every
// checksum right; it comes from the service's address where the service's backend has sent it, and from the router where a router has.
func TestRow11_ICMPErrorsAreTranslated(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
			f.ClearFlows(t)
			for _, w := range ways(t, f, kind, v6) {
				for form := range quoting {
					checkTranslated(t, f, w, form, sent(w.received, w.received.Dst.Addr()), w.known.Dst.Addr())
					if w.back == f.FromNetdev() {
						checkTranslated(t, f, w, form, sent(w.received, of(routers, v6)), of(routers, v6))
					}
				}
			}
		}
	})
}

func checkTranslated(t *testing.T, f *progtest.Fixture, w way, form string, in icmpError, from netip.Addr) {
	t.Helper()
	name := w.name + ", " + w.received.Kind.String() + ", by " + in.src.String() + ", quoting " + form
	out := icmpError{src: from, dst: w.known.Src.Addr(), srcMAC: in.srcMAC, dstMAC: in.dstMAC, about: w.known}
	want := out.frame(form)
	if w.pod != nil {
		want = oneHop(want, w.pod)
	} else {
		lowerTTL(want)
	}
	f.Check(t, progtest.Case{Name: name, Hook: w.back, In: in.frame(form), WantAction: progtest.Redirect, WantOut: want})
}

// The backend is a process of the node itself: its stack's error comes by to_pod, and the pod's about the answer goes to the stack.
func TestRow11_ICMPErrorsOfTheNodesOwnBackend(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	for i, v6 := range []bool{false, true} {
		service(f, uint32(2000+1000*i), at(of(vips, v6), 443), at(of(nodetest.NodeAddrs, v6), 6443))
	}
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
			open := fromPod(f.A, kind, at(of(vips, v6), 443))
			arrived := with(open, open.Src, at(of(nodetest.NodeAddrs, v6), 6443))
			passed(t, f, "opens", progtest.FromPod(f.A), open, arrived)
			back := answer(arrived)
			returned := with(back, open.Dst, open.Src)
			passed(t, f, "is answered", progtest.ToPod(f.A), back, returned)
			for form := range quoting {
				in, want := sent(arrived, arrived.Dst.Addr()), sent(open, open.Dst.Addr())
				f.Check(t, progtest.Case{
					Name: kind.String() + ", quoting " + form, Hook: progtest.ToPod(f.A), In: in.frame(form), WantAction: progtest.OK, WantOut: want.frame(form),
				})
				in, want = sent(returned, returned.Dst.Addr()), sent(back, back.Dst.Addr())
				in.srcMAC, in.dstMAC = f.A.MAC, f.A.HostMAC
				want.srcMAC, want.dstMAC = in.srcMAC, in.dstMAC
				f.Check(t, progtest.Case{
					Name: kind.String() + ", of the pod, quoting " + form, Hook: progtest.FromPod(f.A), In: in.frame(form), WantAction: progtest.OK, WantOut: want.frame(form),
				})
			}
		}
	})
}

// A quoted UDP packet without checksum gets none.
func TestICMPErrorAboutUDPWithoutChecksum(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	for _, w := range ways(t, f, pkt.UDP, false) {
		w.received.NoChecksum, w.known.NoChecksum = true, true
		for form := range quoting {
			checkTranslated(t, f, w, form, sent(w.received, w.received.Dst.Addr()), w.known.Dst.Addr())
		}
	}
}

// The identifier of a quoted echo is translated like a port. No service translates echo: the entries are made by hand, as those of a
// pod that goes out under the node's address.
func TestICMPErrorAboutTranslatedEcho(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	families(t, f, func(t *testing.T, v6 bool) {
		open := fromPod(f.A, pkt.Ping, at(of(nodetest.ClientAddrs, v6), 0))
		redirected(t, f, "opens", progtest.FromPod(f.A), open, hop(open))
		seen := hop(open)
		seen.Src = at(of(nodetest.NodeAddrs, v6), 60000)
		seen.SrcMAC, seen.DstMAC = nodeMAC, routerMAC
		translateEntries(t, f, key(open), key(seen))
		w := way{"echo", seen, hop(open), f.FromNetdev(), f.A}
		for form := range quoting {
			checkTranslated(t, f, w, form, sent(seen, of(routers, v6)), of(routers, v6))
			checkTranslated(t, f, w, form, sent(seen, seen.Dst.Addr()), seen.Dst.Addr())
		}
	})
}

// translateEntries gives a flow's two entries a translation of what the opener sends.
func translateEntries(t *testing.T, f *progtest.Fixture, opened, translated bpf.FlowKey) {
	t.Helper()
	for from, to := range map[bpf.FlowKey]bpf.FlowKey{opened: translated, translated.Reverse(): opened.Reverse()} {
		old := opened
		if from != opened {
			old = opened.Reverse()
		}
		entry, ok := f.Flow(t, old)
		if !ok {
			t.Fatalf("no entry of %v", old)
		}
		if from != old {
			must(t, f.Flows.Delete(&old))
		}
		entry.Flags |= bpf.FlowNAT
		entry.Xlate = to
		sum := uint64(0) // one's complement: minus is the complement
		for i := range 4 {
			for _, w := range [][2][16]byte{{from.Src.B, to.Src.B}, {from.Dst.B, to.Dst.B}} {
				sum += uint64(^binary.NativeEndian.Uint32(w[0][4*i:])) + uint64(binary.NativeEndian.Uint32(w[1][4*i:]))
			}
		}
		for sum > 0xffffffff {
			sum = sum&0xffffffff + sum>>32
		}
		entry.CsumDiff = uint32(sum)
		must(t, f.Flows.Put(&from, &entry))
	}
}

// What is wrong with an error, one field at a time; the flow, and the form that is right, are those of a service.
func TestICMPErrorsThatAreNotTranslated(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	families(t, f, func(t *testing.T, v6 bool) {
		open := fromPod(f.A, pkt.UDP, at(of(vips, v6), vipPort))
		arrived := with(atPod(open, f.B), open.Src, at(f.B.Addr(v6), podPort))
		redirected(t, f, "opens", progtest.FromPod(f.A), open, arrived)
		valid := sent(arrived, f.B.Addr(v6)).frame("whole")
		h := headers(valid)
		quoted := h + 8
		forged := f.A.Addr(v6).AsSlice()
		cases := []struct {
			name, reason string
			frame        []byte
		}{
			{"quote cut within the ports", "truncated", valid[:quoted+h-pkt.L3+7]},
			{"quote cut within the IP header", "truncated", valid[:quoted+h-pkt.L3-1]},
			{"no quote", "truncated", valid[:quoted]},
			{"quoted ports behind the packet's end", "truncated", lengthen(valid, quoted+h-pkt.L3+7)},
			{"unknown protocol quoted", "unknown_protocol", pkt.With(valid, map[bool]int{false: quoted + 9, true: quoted + 6}[v6], 47)},
		}
		if v6 {
			nested := arrived.Bytes()
			for range 5 {
				nested = pkt.WithOptions(nested, 60)
			}
			e := pkt.Packet{SrcMAC: f.B.MAC, DstMAC: f.B.HostMAC, Src: at(f.B.Addr(v6), 0), Dst: at(f.A.Addr(v6), 0), TTL: 64}
			cases = append(cases, []struct {
				name, reason string
				frame        []byte
			}{
				{"later fragment quoted", "fragment", e.TooBig(1300, pkt.With(pkt.WithOptions(arrived.Bytes(), 44), pkt.L4v6+2, 5, 0))},
				{"five extension headers quoted", "extension_header", e.TooBig(1300, nested)},
				{"extension header quoted beyond the end", "truncated", e.TooBig(1300, pkt.With(pkt.WithOptions(arrived.Bytes(), 60), pkt.L4v6+1, 200))},
				{"from another pod's address", "spoofed_address", pkt.With(valid, pkt.L3+8, forged...)},
				{"to somebody else than the quoted sender", "no_flow", pkt.With(valid, pkt.L3+24, of(routers, v6).AsSlice()...)},
				{"about another port", "no_flow", pkt.With(valid, quoted+40, 1)},
			}...)
		} else {
			cases = append(cases, []struct {
				name, reason string
				frame        []byte
			}{
				{"later fragment quoted", "fragment", pkt.With(valid, quoted+7, 1)},
				{"header of four words quoted", "truncated", pkt.With(valid, quoted, 0x44)},
				{"options quoted beyond the end", "truncated", pkt.With(valid, quoted, 0x4f)},
				{"from another pod's address", "spoofed_address", pkt.With(valid, pkt.L3+12, forged...)},
				{"to somebody else than the quoted sender", "no_flow", pkt.With(valid, pkt.L3+16, of(routers, v6).AsSlice()...)},
				{"about another port", "no_flow", pkt.With(valid, quoted+20, 1)},
			}...)
		}
		f.Flags = 0 // what is not as long as it says has no sum
		for _, c := range cases {
			f.Check(t, progtest.Case{Name: c.name, Hook: progtest.FromPod(f.B), In: c.frame, WantAction: progtest.Shot, WantDrop: c.reason})
		}
	})
}

// lengthen makes the IP header say that the packet ends at a frame's offset, before the frame does.
func lengthen(frame []byte, end int) []byte {
	if frame[pkt.L3]>>4 == 6 {
		return pkt.With(frame, pkt.L3+4, binary.BigEndian.AppendUint16(nil, uint16(end-pkt.L4v6))...)
	}
	return pkt.With(frame, pkt.L3+2, binary.BigEndian.AppendUint16(nil, uint16(end-pkt.L3))...)
}

// An error is no packet of the flow: it neither lengthens the flow's life nor counts as its answer, and about a denied flow it is denied.
func TestICMPErrorLeavesFlowAlone(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	families(t, f, func(t *testing.T, v6 bool) {
		open := fromPod(f.A, pkt.TCP, at(of(vips, v6), vipPort))
		arrived := with(atPod(open, f.B), open.Src, at(f.B.Addr(v6), podPort))
		redirected(t, f, "opens", progtest.FromPod(f.A), open, arrived)
		for k, entry := range f.AllFlows(t) {
			entry.LastSeen, entry.Tick = 1, 0
			must(t, f.Flows.Put(&k, &entry))
		}
		before := f.AllFlows(t)
		in := sent(arrived, f.B.Addr(v6)).frame("whole")
		if r := f.Run(t, progtest.FromPod(f.B), in); r.Action != progtest.Redirect {
			t.Fatalf("action = %d, want redirect; drops %v", r.Action, r.Drops)
		}
		for k, entry := range f.AllFlows(t) {
			if entry != before[k] {
				t.Errorf("entry = %+v, want it as before: %+v", entry, before[k])
			}
			entry.Flags |= bpf.FlowDenied
			must(t, f.Flows.Put(&k, &entry))
		}
		f.Check(t, progtest.Case{Name: "denied", Hook: progtest.FromPod(f.B), In: in, WantAction: progtest.Shot, WantDrop: "policy"})
	})
}

// A packet to a service whose hops are used up goes to the stack as it is: the stack's "time exceeded" quotes what the pod has sent, and
// must reach it. Nobody else may send such a thing.
func TestTimeExceededBeforeTranslation(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	families(t, f, func(t *testing.T, v6 bool) {
		open := fromPod(f.A, pkt.UDP, at(of(vips, v6), vipPort))
		open.TTL = 1
		passed(t, f, "no hop left", progtest.FromPod(f.A), open, open)
		e := pkt.Packet{SrcMAC: f.A.HostMAC, DstMAC: f.A.MAC, Src: at(of(nodetest.NodeAddrs, v6), 0), Dst: at(f.A.Addr(v6), 0), TTL: 64}
		in := e.Error(layers.ICMPv4TypeTimeExceeded, 0, open.Bytes())
		if v6 {
			in = e.Error(layers.ICMPv6TypeTimeExceeded, 0, open.Bytes())
		}
		f.Check(t, progtest.Case{Name: "by the stack", Hook: progtest.ToPod(f.A), In: in, WantAction: progtest.OK})
		f.Check(t, progtest.Case{Name: "to another pod", Hook: progtest.ToPod(f.B), In: in, WantAction: progtest.Shot, WantDrop: "no_flow"})
		routed := progtest.ToPod(f.A)
		routed.Ingress = f.ClientDevice
		f.Check(t, progtest.Case{Name: "from outside", Hook: routed, In: in, WantAction: progtest.Shot, WantDrop: "no_flow"})
	})
}
