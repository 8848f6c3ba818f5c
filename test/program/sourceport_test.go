// SPDX-License-Identifier: Apache-2.0

package program

import (
	"fmt"
	"net"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
	"github.com/margay-cni/margay/pkg/bpf"
)

// fill writes a flow from pod A for every source port towards one place, as the programs would; tcp is what each has seen.
func fill(t *testing.T, f *progtest.Fixture, like pkt.Packet, tcp uint8) {
	t.Helper()
	state := bpf.Flow{Tcp: tcp, LastSeen: monotonic(t)}
	var keys []bpf.FlowKey
	var values []bpf.Flow
	for port := 1024; port < 65536; port++ {
		like.Src = at(like.Src.Addr(), uint16(port))
		forward, reply := key(like), key(leaves(like, uint16(port))).Reverse()
		there, back := state, state
		there.Xlate, there.Flags = reply.Reverse(), bpf.FlowNAT|bpf.FlowMasquerade|bpf.FlowInPod
		back.Xlate, back.Flags = forward.Reverse(), bpf.FlowNAT|bpf.FlowMasquerade|bpf.FlowReply
		keys, values = append(keys, forward, reply), append(values, there, back)
	}
	if n, err := f.Flows.BatchUpdate(keys, values, nil); err != nil || n != len(keys) {
		t.Fatalf("wrote %d of %d flows: %v", n, len(keys), err)
	}
}

// monotonic is the clock of the flow table.
func monotonic(t *testing.T) uint32 {
	t.Helper()
	var now unix.Timespec
	must(t, unix.ClockGettime(unix.CLOCK_MONOTONIC, &now))
	return uint32(now.Sec)
}

// Every port towards one place has a flow. While they live there is none for another pod, which is counted; what a dead flow has left is
// taken over, both entries of it, so that a late packet of its pod cannot speak in the new flow's name.
func TestMasqueradeWhenEveryPortIsUsed(t *testing.T) {
	t.Parallel()
	f := progtest.NewSized(t, 1<<18)
	f.Masquerade(nodetest.NodeAddrs...)
	for _, v6 := range []bool{false, true} {
		open := fromPod(f.B, pkt.TCP, outside(v6))
		before := open
		before.Src = at(f.A.Addr(v6), sport)

		fill(t, f, before, bpf.FlowTCPEstablished)
		dropped(t, f, "all are alive", progtest.FromPod(f.B), open, "no_source_port")
		fill(t, f, before, bpf.FlowTCPRst)
		port := moved(t, f, progtest.FromPod(f.B), open, progtest.Redirect)
		redirected(t, f, "goes on", progtest.FromPod(f.B), data(open), leaves(data(open), port))
		back := returned(leaves(open, port))
		redirected(t, f, "is answered", f.FromNetdev(), back, restored(back, f.B, open))
		before.Src = at(before.Src.Addr(), port)
		if _, ok := f.Flow(t, key(before)); ok {
			t.Error("the dead flow's pod still sends under the port that has gone to another")
		}
		f.ClearFlows(t)
	}
}

func TestMasqueradeRespectsReservedPorts(t *testing.T) {
	t.Parallel()
	f := masquerading(t)
	families(t, f, func(t *testing.T, v6 bool) {
		defer f.ReservePorts(1, 0)
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
			f.ClearFlows(t)
			f.ReservePorts(0, 32767)
			for i := range 20 {
				open := fromPod(f.A, kind, outside(v6))
				open.Src = at(open.Src.Addr(), uint16(30000+i))
				if port := moved(t, f, progtest.FromPod(f.A), open, progtest.Redirect); port < 32768 {
					t.Errorf("%s: port %d is reserved", kind, port)
				}
			}
			f.ReservePorts(sport+1, 65535)
			open := fromPod(f.A, kind, outside(v6))
			redirected(t, f, "the pod's own port is free", progtest.FromPod(f.A), open, leaves(open, sport))
		}
		f.ReservePorts(0, 65535)
		ping := fromPod(f.A, pkt.Ping, outside(v6))
		redirected(t, f, "an echo identifier is no port", progtest.FromPod(f.A), ping, leaves(ping, sport))
	})
}

// Every port is taken: counted, and no entry is left.
func TestMasqueradeExhaustion(t *testing.T) {
	t.Parallel()
	f := masquerading(t)
	families(t, f, func(t *testing.T, v6 bool) {
		defer f.ReservePorts(1, 0)
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
			f.ClearFlows(t)
			f.ReservePorts(0, sport-1)
			a, b := fromPod(f.A, kind, outside(v6)), fromPod(f.B, kind, outside(v6))
			redirected(t, f, "first", progtest.FromPod(f.A), a, leaves(a, sport))
			f.ReservePorts(0, 65535)
			dropped(t, f, "second", progtest.FromPod(f.B), b, "no_source_port")
			redirected(t, f, "first goes on", progtest.FromPod(f.A), data(a), leaves(data(a), sport))
			if n := len(f.AllFlows(t)); n != 2 {
				t.Errorf("%s: %d entries, want the first flow's two", kind, n)
			}
		}
	})
}

// hostSocket makes a socket in the node's namespace, of either kind, connected or not.
type hostSocket struct {
	name string
	kind pkt.Kind
	open func(t *testing.T, v6 bool) (port uint16)
}

func tcpNet(v6 bool, network string) string {
	return network + map[bool]string{false: "4", true: "6"}[v6]
}

// listenTCP listens on a port of the kernel's choice until the test ends.
func listenTCP(t *testing.T, network, address string) uint16 {
	l, err := net.Listen(network, address)
	must(t, err)
	t.Cleanup(func() { l.Close() })
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

func listenUDP(t *testing.T, network, address string) uint16 {
	c, err := net.ListenPacket(network, address)
	must(t, err)
	t.Cleanup(func() { c.Close() })
	return uint16(c.LocalAddr().(*net.UDPAddr).Port)
}

// A port that the node itself uses is not taken: listeners and bound sockets, on one address or all, of one family or both, and
// connections to the same place.
func TestMasqueradeRespectsHostSockets(t *testing.T) {
	t.Parallel()
	f := masquerading(t)
	server := map[bool]net.Listener{}
	f.Client.Do(func() {
		for _, v6 := range []bool{false, true} {
			l, err := net.Listen("tcp", outside(v6).String())
			must(t, err)
			t.Cleanup(func() { l.Close() })
			server[v6] = l
		}
	})
	sockets := []hostSocket{
		{"listener on all addresses", pkt.TCP, func(t *testing.T, v6 bool) uint16 { return listenTCP(t, "tcp", ":0") }},
		{"listener on the address", pkt.TCP, func(t *testing.T, v6 bool) uint16 {
			return listenTCP(t, "tcp", at(of(nodetest.NodeAddrs, v6), 0).String())
		}},
		{"connection", pkt.TCP, func(t *testing.T, v6 bool) uint16 {
			c, err := net.Dial(tcpNet(v6, "tcp"), outside(v6).String())
			must(t, err)
			t.Cleanup(func() { c.Close() })
			return uint16(c.LocalAddr().(*net.TCPAddr).Port)
		}},
		{"bound to all addresses", pkt.UDP, func(t *testing.T, v6 bool) uint16 { return listenUDP(t, "udp", ":0") }},
		{"bound to the address", pkt.UDP, func(t *testing.T, v6 bool) uint16 {
			return listenUDP(t, "udp", at(of(nodetest.NodeAddrs, v6), 0).String())
		}},
		{"connected", pkt.UDP, func(t *testing.T, v6 bool) uint16 {
			c, err := net.Dial(tcpNet(v6, "udp"), outside(v6).String())
			must(t, err)
			t.Cleanup(func() { c.Close() })
			return uint16(c.LocalAddr().(*net.UDPAddr).Port)
		}},
	}
	for _, s := range sockets {
		t.Run(s.kind.String()+" "+s.name, func(t *testing.T) {
			families(t, f, func(t *testing.T, v6 bool) {
				var port uint16
				f.NS.Do(func() { port = s.open(t, v6) })
				open := fromPod(f.A, s.kind, outside(v6))
				open.Src = at(open.Src.Addr(), port)
				got := moved(t, f, progtest.FromPod(f.A), open, progtest.Redirect)
				redirected(t, f, "goes on", progtest.FromPod(f.A), data(open), leaves(data(open), got))
				// The other protocol's port of the same number is free.
				other := fromPod(f.A, pkt.TCP+pkt.UDP-s.kind, outside(v6))
				other.Src = open.Src
				redirected(t, f, "the other protocol", progtest.FromPod(f.A), other, leaves(other, port))
			})
		})
	}
}

// 50 000 flows to one address and port, from two pods with the same source ports: each gets a tuple of its own.
func TestMasquerade50000FlowsToOnePlace(t *testing.T) {
	t.Parallel()
	const flows = 50000
	f := progtest.NewSized(t, 1<<18)
	f.Masquerade(nodetest.NodeAddrs...)
	prog := f.Program(bpf.ProgFromPod)
	for _, v6 := range []bool{false, true} {
		t.Run(fmt.Sprintf("v6=%v", v6), func(t *testing.T) {
			f.ClearFlows(t)
			off := pkt.L4v4
			if v6 {
				off = pkt.L4v6
			}
			taken := map[uint16]int{}
			out := make([]byte, 256)
			f.NS.Do(func() {
				for i := range flows {
					pod := []*nodetest.Pod{f.A, f.B}[i%2]
					in := fromPod(pod, pkt.UDP, outside(v6)).Bytes()
					own := uint16(2000 + i/2)
					// One port more is one less in the checksum, modulo the end-around carry: the program does not verify it.
					in[off], in[off+1] = byte(own>>8), byte(own)
					action, err := prog.Run(&ebpf.RunOptions{Data: in, DataOut: out, Context: progtest.Context(progtest.FromPod(pod))})
					if err != nil || action != progtest.Redirect {
						t.Fatalf("flow %d: action %d, %v, drops %v", i, action, err, f.Drops(t))
					}
					port := uint16(out[off])<<8 | uint16(out[off+1])
					if earlier, ok := taken[port]; ok {
						t.Fatalf("flows %d and %d both got port %d", earlier, i, port)
					}
					taken[port] = i
				}
			})
			if n := len(f.AllFlows(t)); n != 2*flows {
				t.Errorf("%d entries, want two for each of %d flows", n, flows)
			}
		})
	}
}
