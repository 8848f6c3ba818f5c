// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/pkg/bpf"
)

// TestDecapsulatedAsByTheDevice: what arrives of a known flow is, bit for bit, what arrives when the kernel's VXLAN device has taken the outer
// headers off: in a pod, from another node's pod and from a client by another node, and at that client.
func TestDecapsulatedAsByTheDevice(t *testing.T) {
	t.Parallel()
	c := nodetest.NewCluster(t, 2, nodetest.ClusterOptions{})
	n0, n1 := c.Nodes[0], c.Nodes[1]
	a, b := n0.AddPod("a"), n1.AddPod("b")
	podA, podB, client := newWire(t, a.NS), newWire(t, b.NS), newWire(t, c.Client)
	silent(t, b.NS, 8080)
	silent(t, c.Client, 4002)
	families(t, func(t *testing.T, v6 bool) {
		addNodePort(c, 0, b, v6)
		server := netip.AddrPortFrom(b.Addr(v6), 8080)
		for name, way := range map[string]struct {
			at       *nodetest.Node // decapsulates
			from, to *wire
			request  pkt.Packet
			answers  bool
		}{
			"pod to pod": {at: n1, from: podA, to: podB, request: pkt.Packet{
				SrcMAC: a.MAC, DstMAC: a.HostMAC, Src: netip.AddrPortFrom(a.Addr(v6), 4000), Dst: server,
			}},
			"request to a NodePort": {at: n1, from: client, to: podB, request: pkt.Packet{
				SrcMAC: client.HardwareAddr, DstMAC: nodeMAC(t, n0), Src: netip.AddrPortFrom(clientOf(v6), 4001),
				Dst: netip.AddrPortFrom(family(n0.Addrs, v6), 30080),
			}},
			"answer of a NodePort": {at: n0, from: podB, to: client, answers: true, request: pkt.Packet{
				SrcMAC: b.MAC, DstMAC: b.HostMAC, Src: server, Dst: netip.AddrPortFrom(clientOf(v6), 4002),
			}},
		} {
			for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
				p := way.request
				p.Kind, p.TTL, p.Flags, p.Seq = kind, 64, pkt.SYN, 1000
				if way.answers {
					asked := p
					asked.SrcMAC, asked.DstMAC, asked.Src = client.HardwareAddr, nodeMAC(t, n0), p.Dst
					asked.Dst, asked.Payload = netip.AddrPortFrom(family(n0.Addrs, v6), 30080), []byte("opens it")
					client.send(asked.Bytes())
				} else {
					p.Payload = []byte("opens it")
					way.from.send(p.Bytes())
				}
				if !podB.sees("opens it") {
					t.Fatalf("%s, %s: the first packet did not arrive; drops %v", name, kind, n1.AllDrops())
				}
				p.Flags, p.Seq, p.Ack = pkt.ACK|pkt.PSH, 1001, 1
				for what, tos := range map[string]byte{"plain": 0, "ECT(1)": 1, "ECT(0)": 2, "CE": 3, "class": 0x2e << 2} {
					p.Payload = []byte(name + what)
					frame := withTOS(p, tos)
					var by [2][]byte
					for i, device := range []bool{true, false} {
						setDevice(t, way.at, map[*nodetest.Node]*nodetest.Node{n0: n1, n1: n0}[way.at], device)
						before := received(t, way.at)
						way.from.send(frame)
						by[i] = way.to.next(string(p.Payload))
						if got := received(t, way.at) - before; by[i] == nil || (got != 0) != (device || !nodetest.ProgramsDecapsulate(t, v6, !way.answers)) {
							t.Fatalf("%s, %s, %s: %d bytes came; the device decapsulated %d packets, want some: %v; drops %v", name, kind, what,
								len(by[i]), got, device, way.at.AllDrops())
						}
						wantNoError(t, name+": checksums", pkt.VerifyChecksums(by[i]))
					}
					if diff := cmp.Diff(by[0], by[1]); diff != "" {
						t.Errorf("%s, %s, %s (-by the device, +by the programs):\n%s", name, kind, what, diff)
					}
				}
			}
		}
	})
}

// silent takes datagrams, so that nobody reports the port.
func silent(t *testing.T, ns *netnstest.NS, port int) {
	t.Helper()
	ns.Do(func() {
		conn, err := net.ListenUDP("udp", &net.UDPAddr{Port: port})
		wantNoError(t, "listen", err)
		t.Cleanup(func() { conn.Close() })
	})
}

// outer is a frame of node from to node to as the node that routes between them sends it on: the inner one behind UDP without checksum
// and a VXLAN header (RFC 7348 §5).
func (w *wire) outer(from, to *nodetest.Node, inner []byte) pkt.Packet {
	w.t.Helper()
	header := binary.BigEndian.AppendUint32([]byte{0x08, 0, 0, 0}, (nodetest.OverlayVNI+bpf.VNIPods)<<8)
	return pkt.Packet{
		Kind: pkt.UDP, TTL: 64, SrcMAC: w.HardwareAddr, DstMAC: nodeMAC(w.t, to), Src: netip.AddrPortFrom(from.Addrs[0], 50000),
		Dst: netip.AddrPortFrom(to.Addrs[0], nodetest.OverlayPort), Payload: append(header, inner...), NoChecksum: true,
	}
}

// Offsets in such a frame.
const (
	offVXLAN = pkt.L4v4 + 8
	offInner = offVXLAN + 8
)

// TestLeftToTheOverlayDevice: what is not as our own nodes send it, and what only the stack can judge, the device decapsulates or refuses, as
// if there were no other way. The plain packets around it go by the programs.
func TestLeftToTheOverlayDevice(t *testing.T) {
	t.Parallel()
	c := nodetest.NewCluster(t, 2, nodetest.ClusterOptions{})
	n0, n1 := c.Nodes[0], c.Nodes[1]
	a, b := n0.AddPod("a"), n1.AddPod("b")
	pod, outside := newWire(t, b.NS), newWireOn(t, c.Client, "eth1")
	families(t, func(t *testing.T, v6 bool) {
		inner := pkt.Packet{Kind: pkt.UDP, TTL: 64, SrcMAC: a.HostMAC, DstMAC: a.MAC, Src: netip.AddrPortFrom(a.Addr(v6), 4000),
			Dst: netip.AddrPortFrom(b.Addr(v6), 8080), Payload: []byte("a datagram")}
		of := func(change func(*pkt.Packet)) []byte {
			p := inner
			change(&p)
			return outside.outer(n0, n1, p.Bytes()).Bytes()
		}
		plain := of(func(*pkt.Packet) {})
		checked := outside.outer(n0, n1, inner.Bytes())
		checked.NoChecksum = false
		l4 := offInner + pkt.L4v4
		if v6 {
			l4 = offInner + pkt.L4v6
		}
		// Who takes a packet, and does it arrive?
		try := func(frame []byte) (device, arrives bool) {
			before := received(t, n1)
			outside.send(frame)
			arrives = pod.sees("a datagram")
			return received(t, n1) != before, arrives
		}
		if device, arrives := try(plain); !device || !arrives {
			t.Fatalf("the first packet: by the device %v, arrives %v; drops %v", device, arrives, n1.AllDrops())
		}
		for _, tc := range []struct {
			name            string
			frame           []byte
			device, arrives bool
		}{
			{"an outer checksum", checked.Bytes(), true, true},
			{"a wrong outer checksum", pkt.With(checked.Bytes(), pkt.L4v4+6, 0x12, 0x34), false, false},
			{"outer IP options", pkt.WithOptions(plain, 0), true, true},
			{"a reserved flag of VXLAN", pkt.With(plain, offVXLAN, 0x09), false, false},
			{"another network number", pkt.With(plain, offVXLAN+4, 0, 0, 100), true, false},
			{"another flow", of(func(p *pkt.Packet) { p.Src = netip.AddrPortFrom(a.Addr(v6), 4999) }), true, true},
			{"an address that is no node's", withSource(outside.outer(n0, n1, inner.Bytes()), clientOf(false)), true, false},
			{"SCTP", of(func(p *pkt.Packet) { p.Kind = pkt.SCTP }), true, true},
			{"an echo", of(func(p *pkt.Packet) { p.Kind = pkt.Ping }), true, true},
			{"another protocol inside", pkt.With(plain, offInner+12, 0x12, 0x34), false, false},
			{"too short for ports", pkt.With(plain[:l4+4], pkt.L3+2, 0, byte(l4+4-pkt.L3)), false, false},
		} {
			device, arrives := try(tc.frame)
			if arrives != tc.arrives || (tc.arrives || tc.device) && device != tc.device {
				t.Errorf("%s: by the device %v, arrives %v, want %v, %v; drops %v", tc.name, device, arrives, tc.device, tc.arrives, n1.AllDrops())
			}
			if device, arrives := try(plain); device == nodetest.ProgramsDecapsulate(t, v6, true) || !arrives {
				t.Errorf("a plain packet after %s: by the device %v, arrives %v; drops %v", tc.name, device, arrives, n1.AllDrops())
			}
		}
		// It is of the known flow, so the plain ones behind it follow it for a while.
		if device, arrives := try(of(func(p *pkt.Packet) { p.TTL = 1 })); !device || arrives {
			t.Errorf("a packet without hops left: by the device %v, arrives %v", device, arrives)
		}
	})
}

// withSource is the packet as from another address.
func withSource(p pkt.Packet, from netip.Addr) []byte {
	p.Src = netip.AddrPortFrom(from, p.Src.Port())
	return p.Bytes()
}

// checksumErrors counts the TCP segments and UDP datagrams that a pod's stack has refused for their checksum.
func checksumErrors(t *testing.T, p *nodetest.Pod) (errors int) {
	t.Helper()
	add := func(name, value string) {
		n, err := strconv.Atoi(value)
		wantNoError(t, "counter "+name, err)
		errors += n
	}
	p.NS.Do(func() {
		v4, err := os.ReadFile("/proc/thread-self/net/snmp")
		wantNoError(t, "read the stack's counters", err)
		lines := strings.Split(string(v4), "\n")
		for i := 0; i+1 < len(lines); i += 2 { // a line of names, and one of values
			names, values := strings.Fields(lines[i]), strings.Fields(lines[i+1])
			if at := slices.Index(names, "InCsumErrors"); at > 0 && (names[0] == "Tcp:" || names[0] == "Udp:") {
				add(names[0], values[at])
			}
		}
		v6, err := os.ReadFile("/proc/thread-self/net/snmp6") // TCP is in the other file
		wantNoError(t, "read the stack's counters", err)
		for line := range strings.Lines(string(v6)) {
			if f := strings.Fields(line); f[0] == "Udp6InCsumErrors" {
				add(f[0], f[1])
			}
		}
	})
	return errors
}

// TestInnerChecksumIsVerified: nobody has verified more of a packet than the kernel believes. One with a wrong inner checksum is refused by the
// pod's stack, whoever took the outer headers off, also where the node has looked at the checksums when it tried to put segments together.
func TestInnerChecksumIsVerified(t *testing.T) {
	t.Parallel()
	for name, aggregates := range map[string]bool{"as it comes": false, "the node aggregates": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := nodetest.NewCluster(t, 2, nodetest.ClusterOptions{})
			n0, n1 := c.Nodes[0], c.Nodes[1]
			a, b := n0.AddPod("a"), n1.AddPod("b")
			pod, outside := newWire(t, b.NS), newWireOn(t, c.Client, "eth1")
			// A veth device puts together what its peer would have segmented.
			offloadOn(t, c.Client, "eth1", unix.ETHTOOL_STSO, !aggregates)
			offload(t, n1.NS, unix.ETHTOOL_SGRO, aggregates)
			families(t, func(t *testing.T, v6 bool) {
				for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
					inner := pkt.Packet{Kind: kind, TTL: 64, SrcMAC: a.HostMAC, DstMAC: a.MAC, Src: netip.AddrPortFrom(a.Addr(v6), 4000),
						Dst: netip.AddrPortFrom(b.Addr(v6), 8080), Flags: pkt.SYN, Payload: []byte("opens it")}
					send := func() { outside.send(outside.outer(n0, n1, inner.Bytes()).Bytes()) }
					if send(); !pod.sees("opens it") {
						t.Fatalf("%s: the first packet did not arrive; drops %v", kind, n1.AllDrops())
					}
					inner.Flags, inner.Ack = pkt.ACK, 1
					for _, device := range []bool{true, false} {
						setDevice(t, n1, n0, device)
						for _, wrong := range []bool{true, false} {
							what := fmt.Sprintf("%s, by the device %v, wrong %v", kind, device, wrong)
							inner.Payload = []byte(what)
							frame := inner.Bytes()
							if wrong {
								frame[len(frame)-1]++
							}
							errors, packets := checksumErrors(t, b), received(t, n1)
							outside.send(outside.outer(n0, n1, frame).Bytes())
							if !pod.sees(what[:len(what)-1]) {
								t.Errorf("%s: it did not arrive; drops %v", what, n1.AllDrops())
							}
							if got := received(t, n1) != packets; got != (device || !nodetest.ProgramsDecapsulate(t, v6, true)) {
								t.Errorf("%s: the device decapsulated it: %v", what, got)
							}
							if got := checksumErrors(t, b) != errors; got != wrong {
								t.Errorf("%s: the pod's stack refused it: %v", what, got)
							}
						}
					}
				}
			})
		})
	}
}

// TestUnfinishedAnswersGoByTheDevice: an answer of a NodePort whose checksum is still to be computed is encapsulated in the kernel's eyes,
// too, which a program cannot change: the device decapsulates it. One that the pod has summed goes by the programs. Both arrive right.
func TestUnfinishedAnswersGoByTheDevice(t *testing.T) {
	t.Parallel()
	c := nodetest.NewCluster(t, 2, nodetest.ClusterOptions{})
	n0 := c.Nodes[0]
	b := c.Nodes[1].AddPod("b")
	nodetest.Serve(t, b.NS, "b", 8080)
	outside := newWire(t, c.Client)
	wantNoError(t, "set PACKET_VNET_HDR", unix.SetsockoptInt(outside.fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1))
	families(t, func(t *testing.T, v6 bool) {
		addNodePort(c, 0, b, v6)
		for _, sums := range []bool{false, true} {
			offload(t, b.NS, unix.ETHTOOL_STXCSUM, !sums)
			for network := range protocols {
				outside.completed()
				conn, err := nodetest.Dial(t, c.Client, network, netip.AddrPortFrom(family(n0.Addrs, v6), 30080), 0)
				wantNoError(t, network+": dial", err)
				for range 3 {
					before := received(t, n0)
					got, err := conn.Ask()
					wantAnswer(t, network+" to the NodePort", got, err, "b "+clientOf(v6).String())
					if got := received(t, n0) - before; (got == 0) != (sums && nodetest.ProgramsDecapsulate(t, v6, false)) {
						t.Errorf("%s, the pod sums %v: the device decapsulated %d packets", network, sums, got)
					}
				}
				if got := outside.completed(); (got > 0) == sums {
					t.Errorf("%s, the pod sums %v: %d packets came to the client with a checksum to be completed", network, sums, got)
				}
			}
		}
	})
}
