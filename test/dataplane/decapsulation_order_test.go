// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
)

// gate holds packets back on their way out of a device, and lets them go all at once: the other end finds them together, as those that a NIC
// delivers between two interrupts.
type gate struct {
	*wire
	ns *netnstest.NS
}

// A gate lets gateBurst bytes through before it closes, and then gateRate a second: in the little time until it opens none of the packets
// behind the last one that was pushed. It takes packets of that size, too, and the kernel no more than what goes in four seconds.
const (
	gateBurst = 15000
	gateRate  = 4000
)

func newGate(t *testing.T, ns *netnstest.NS, device string) *gate {
	t.Helper()
	return &gate{wire: newWireOn(t, ns, device), ns: ns}
}

// set has the device send that many bytes a second, once burst of them have gone (tc-tbf(8)).
func (g *gate) set(rate uint64, burst int) {
	g.t.Helper()
	g.ns.Do(func() {
		wantNoError(g.t, "set the rate of "+g.Name, netlink.QdiscReplace(&netlink.Tbf{
			QdiscAttrs: netlink.QdiscAttrs{LinkIndex: g.Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
			Rate:       rate, Limit: 1 << 22, Buffer: netlink.Xmittime(rate, uint32(burst)),
		}))
	})
}

// push sends a frame that means nothing to anybody (ethertype 0x88b5, IEEE 802 §9.2.3).
func (g *gate) push() {
	g.t.Helper()
	frame := make([]byte, 1400)
	copy(frame, g.HardwareAddr)
	copy(frame[6:], g.HardwareAddr)
	frame[12], frame[13] = 0x88, 0xb5
	g.send(frame)
}

func (g *gate) close() {
	g.t.Helper()
	g.set(gateRate, gateBurst)
	for range gateBurst/1400 + 1 {
		g.push()
	}
}

// open lets go of what is held with the next packet, before anybody else gets this CPU.
func (g *gate) open() {
	g.t.Helper()
	g.set(1<<30, 1<<20)
	g.push()
}

// TestNothingOvertakesLargePackets: a flow's single packets do not arrive before those that only the device can decapsulate, which were sent
// before them. Large TCP segments and datagrams are as the sender's kernel makes them, and as the receiver's puts them together.
func TestNothingOvertakesLargePackets(t *testing.T) {
	t.Parallel()
	const rounds = 3 * time.Second // some ticks of the programs
	c := nodetest.NewCluster(t, 2, nodetest.ClusterOptions{})
	a, b := c.Nodes[0].AddPod("a"), c.Nodes[1].AddPod("b")
	for _, p := range []*nodetest.Pod{a, b} {
		ip(t, p.NS, "link set eth0 mtu 1450")
	}
	g := newGate(t, c.Client, "eth1")
	families(t, func(t *testing.T, v6 bool) {
		server := netip.AddrPortFrom(b.Addr(v6), 8080)
		t.Run("TCP", func(t *testing.T) {
			up, accepted := connected(t, a.NS, b, server)
			pod := newWire(t, b.NS)
			before, end, holes := received(t, c.Nodes[1]), uint32(0), 0
			for deadline := time.Now().Add(rounds); time.Now().Before(deadline); {
				g.close()
				sent := 0
				for _, size := range []int{5000, 100, 4000, 100} {
					n, err := up.Write(make([]byte, size))
					wantNoError(t, "send", err)
					sent += n
				}
				g.open()
				wantNoError(t, "deadline", accepted.SetDeadline(time.Now().Add(2*time.Second)))
				_, err := io.ReadFull(accepted, make([]byte, sent))
				wantNoError(t, "receive", err)
				_, err = accepted.Write([]byte{1}) // and all of it is acknowledged
				wantNoError(t, "answer", err)
				_, err = io.ReadFull(up, make([]byte, 1))
				wantNoError(t, "receive the answer", err)
				holes += pod.holes(v6, &end)
			}
			if holes != 0 || received(t, c.Nodes[1]) == before {
				t.Errorf("%d segments came before the one in front of them; the device decapsulated %d packets, want some", holes,
					received(t, c.Nodes[1])-before)
			}
		})
		t.Run("UDP", func(t *testing.T) {
			up, conn := datagrams(t, a, b, server)
			before, next := received(t, c.Nodes[1]), uint32(0)
			buf := make([]byte, 2000)
			for deadline := time.Now().Add(rounds); time.Now().Before(deadline); {
				g.close()
				first := next
				for _, segments := range []int{5, 1, 4, 1} {
					_, err := up.Write(numbered(&next, segments))
					wantNoError(t, "send", err)
				}
				g.open()
				for want := first; want < next; want++ {
					wantNoError(t, "deadline", conn.SetDeadline(time.Now().Add(2*time.Second)))
					_, _, err := conn.ReadFrom(buf)
					wantNoError(t, "receive", err)
					if got := binary.BigEndian.Uint32(buf); got != want {
						t.Fatalf("datagram %d came in the place of %d; %d is the first of this round", got, want, first)
					}
				}
			}
			if received(t, c.Nodes[1]) == before {
				t.Error("the device decapsulated nothing")
			}
		})
	})
}

// connected is a TCP connection from a namespace to port 8080 of a pod.
func connected(t *testing.T, from *netnstest.NS, b *nodetest.Pod, server netip.AddrPort) (up, accepted net.Conn) {
	t.Helper()
	l := listen(t, b.NS, "8080")
	defer l.Close()
	conn, err := nodetest.Dial(t, from, "tcp", server, 0)
	wantNoError(t, "dial", err)
	accepted, err = l.Accept()
	wantNoError(t, "accept", err)
	t.Cleanup(func() { accepted.Close() })
	return conn.Conn, accepted
}

// segment is the size of the datagrams that datagrams has the kernel cut.
const segment = 1200

// datagrams is a socket of a whose writes are cut into datagrams, and one of b that gets them.
func datagrams(t *testing.T, a, b *nodetest.Pod, server netip.AddrPort) (up net.Conn, conn net.PacketConn) {
	t.Helper()
	b.NS.Do(func() {
		var err error
		conn, err = net.ListenPacket("udp", server.String())
		wantNoError(t, "listen", err)
	})
	t.Cleanup(func() { conn.Close() })
	dialled, err := nodetest.Dial(t, a.NS, "udp", server, 0)
	wantNoError(t, "dial", err)
	onSocket(t, dialled.Conn, func(fd int) error { return unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_SEGMENT, segment) })
	return dialled.Conn, conn
}

// numbered is the content of that many datagrams, which begin with the numbers from next on.
func numbered(next *uint32, segments int) []byte {
	b := make([]byte, segments*segment)
	for i := range segments {
		binary.BigEndian.PutUint32(b[i*segment:], *next)
		*next++
	}
	return b
}

// holes counts, of the TCP segments that have come in, those that do not begin where the ones before them end, or earlier.
func (w *wire) holes(v6 bool, end *uint32) (holes int) {
	w.t.Helper()
	buf := make([]byte, 1<<16)
	for {
		n, from, err := unix.Recvfrom(w.fd, buf, unix.MSG_DONTWAIT)
		if err != nil {
			return holes
		}
		l4, proto, size := pkt.L4v4, buf[pkt.L3+9], int(binary.BigEndian.Uint16(buf[pkt.L3+2:]))-20
		if v6 {
			l4, proto, size = pkt.L4v6, buf[pkt.L3+6], int(binary.BigEndian.Uint16(buf[pkt.L3+4:]))
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); !ok || ll.Pkttype == unix.PACKET_OUTGOING || n < l4+20 || proto != unix.IPPROTO_TCP {
			continue
		}
		if size -= int(buf[l4+12]>>4) * 4; size == 0 {
			continue
		}
		seq := binary.BigEndian.Uint32(buf[l4+4:])
		if *end != 0 && int32(seq-*end) > 0 {
			holes++
		}
		if next := seq + uint32(size); *end == 0 || int32(next-*end) > 0 {
			*end = next
		}
	}
}

// TestCongestionMarkIsCarriedOver: a router's mark on the outer packet reaches the pod on the inner one (RFC 6040 §4.2), and the flow's packets
// without a mark do not arrive before it.
func TestCongestionMarkIsCarriedOver(t *testing.T) {
	t.Parallel()
	c := nodetest.NewCluster(t, 2, nodetest.ClusterOptions{})
	n0, n1 := c.Nodes[0], c.Nodes[1]
	a, b := n0.AddPod("a"), n1.AddPod("b")
	silent(t, b.NS, 8080)
	g, pod := newGate(t, c.Client, "eth1"), newWire(t, b.NS)
	families(t, func(t *testing.T, v6 bool) {
		inner := pkt.Packet{Kind: pkt.UDP, TTL: 64, SrcMAC: a.HostMAC, DstMAC: a.MAC, Src: netip.AddrPortFrom(a.Addr(v6), 4000),
			Dst: netip.AddrPortFrom(b.Addr(v6), 8080)}
		send := func(number byte, outer byte) {
			inner.Payload = append([]byte("a packet with the number "), number) // and without padding
			g.send(withTOS(g.outer(n0, n1, withTOS(inner, 2)), outer))
		}
		g.set(1<<30, 1<<20)
		send(0, 2)
		if !pod.sees("the number") {
			t.Fatalf("the first packet did not arrive; drops %v", n1.AllDrops())
		}
		before := received(t, n1)
		if send(0, 2); !pod.sees("the number") || (received(t, n1) == before) != nodetest.ProgramsDecapsulate(t, v6, true) {
			t.Fatalf("one without a mark did not arrive by the programs; drops %v", n1.AllDrops())
		}
		g.close()
		for number := range byte(6) {
			send(number, map[bool]byte{true: 3, false: 2}[number%3 == 0])
		}
		g.open()
		for number := range byte(6) {
			frame := pod.next("the number")
			if frame == nil {
				t.Fatalf("packet %d did not arrive; drops %v", number, n1.AllDrops())
			}
			ecn := frame[pkt.L3+1] & 3
			if v6 {
				ecn = frame[pkt.L3+1] >> 4 & 3
			}
			if got := frame[len(frame)-1]; got != number || (ecn == 3) != (number%3 == 0) {
				t.Errorf("packet %d came in the place of %d, with ECN %d", got, number, ecn)
			}
		}
	})
}

// TestStreamsAreDecapsulated: streams between pods of two nodes, and from a client by another node, arrive whole in both directions, wherever
// their segments are cut, summed and put together. What arrives as it was on the wire goes by the programs.
func TestStreamsAreDecapsulated(t *testing.T) {
	t.Parallel()
	// The router between the nodes is where frames are as on a wire.
	router := func(t *testing.T, c *nodetest.Cluster, command uint32) {
		for _, device := range []string{"eth0", "eth1"} {
			offloadOn(t, c.Client, device, command, false)
		}
	}
	aggregate := func(t *testing.T, namespaces ...*netnstest.NS) {
		for _, ns := range namespaces {
			offload(t, ns, unix.ETHTOOL_SGRO, true)
		}
	}
	for name, tc := range map[string]struct {
		way func(t *testing.T, c *nodetest.Cluster, a, b *nodetest.Pod)
		// single: nothing is larger than a segment where it arrives.
		single bool
	}{
		"as devices are": {way: func(*testing.T, *nodetest.Cluster, *nodetest.Pod, *nodetest.Pod) {}},
		"the pods cut and sum": {single: true, way: func(t *testing.T, c *nodetest.Cluster, a, b *nodetest.Pod) {
			for _, ns := range []*netnstest.NS{a.NS, b.NS} {
				offload(t, ns, unix.ETHTOOL_STXCSUM, false)
			}
			router(t, c, unix.ETHTOOL_STSO)
		}},
		"cut on the wire": {single: true, way: func(t *testing.T, c *nodetest.Cluster, _, _ *nodetest.Pod) {
			router(t, c, unix.ETHTOOL_STSO)
		}},
		"cut and summed on the wire": {single: true, way: func(t *testing.T, c *nodetest.Cluster, _, _ *nodetest.Pod) {
			router(t, c, unix.ETHTOOL_STXCSUM)
		}},
		"cut on the wire, the nodes aggregate": {way: func(t *testing.T, c *nodetest.Cluster, _, _ *nodetest.Pod) {
			router(t, c, unix.ETHTOOL_STSO)
			aggregate(t, c.Nodes[0].NS, c.Nodes[1].NS)
		}},
		"cut and summed on the wire, the nodes aggregate": {way: func(t *testing.T, c *nodetest.Cluster, _, _ *nodetest.Pod) {
			router(t, c, unix.ETHTOOL_STXCSUM)
			aggregate(t, c.Nodes[0].NS, c.Nodes[1].NS)
		}},
		"cut and summed on the wire, nodes and pods aggregate": {way: func(t *testing.T, c *nodetest.Cluster, a, b *nodetest.Pod) {
			router(t, c, unix.ETHTOOL_STXCSUM)
			aggregate(t, c.Nodes[0].NS, c.Nodes[1].NS, a.NS, b.NS)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := nodetest.NewCluster(t, 2, nodetest.ClusterOptions{})
			n0, n1 := c.Nodes[0], c.Nodes[1]
			a, b := n0.AddPod("a"), n1.AddPod("b")
			for _, p := range []*nodetest.Pod{a, b} {
				ip(t, p.NS, "link set eth0 mtu 1450")
			}
			tc.way(t, c, a, b)
			families(t, func(t *testing.T, v6 bool) {
				addNodePort(c, 0, b, v6)
				for way, from := range map[string]struct {
					ns *netnstest.NS
					to netip.AddrPort
				}{
					"pod to pod":         {a.NS, netip.AddrPortFrom(b.Addr(v6), 8080)},
					"client to NodePort": {c.Client, netip.AddrPortFrom(family(n0.Addrs, v6), 30080)},
				} {
					up, accepted := connected(t, from.ns, b, from.to)
					before := received(t, n1)
					transfer(t, up, accepted)
					if got := received(t, n1) - before; (got == 0) != (tc.single && nodetest.ProgramsDecapsulate(t, v6, true)) {
						t.Errorf("%s: the device decapsulated %d packets; all are single: %v", way, got, tc.single)
					}
					transfer(t, accepted, up)
					up.Close()
					accepted.Close()
				}
			})
		})
	}
}
