// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"testing"
	"time"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/pkg/bpf"
)

// inbox is a UDP socket of a server.
type inbox struct {
	t *testing.T
	net.PacketConn
}

func newInbox(t *testing.T, ns *netnstest.NS, port uint16) *inbox {
	t.Helper()
	in := &inbox{t: t}
	ns.Do(func() {
		var err error
		in.PacketConn, err = net.ListenPacket("udp", fmt.Sprintf(":%d", port))
		wantNoError(t, "listen", err)
	})
	t.Cleanup(func() { in.Close() })
	return in
}

// next returns the next datagram, or nil when none comes.
func (in *inbox) next() []byte {
	in.t.Helper()
	wantNoError(in.t, "set deadline", in.SetReadDeadline(time.Now().Add(2*nodetest.Timeout)))
	buf := make([]byte, 64<<10)
	n, _, err := in.ReadFrom(buf)
	if err != nil {
		return nil
	}
	return buf[:n]
}

// echo answers every datagram with itself until the test ends.
func (in *inbox) echo() {
	buf := make([]byte, 64<<10)
	for {
		n, from, err := in.ReadFrom(buf)
		if err != nil {
			return
		}
		if _, err := in.WriteTo(buf[:n], from); err != nil {
			return
		}
	}
}

// body is n bytes of which no two 8-byte units are the same, here or in another datagram.
func body(id uint32, n int) []byte {
	var out []byte
	for i := uint32(0); len(out) < n; i++ {
		out = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(out, id), i)
	}
	return out[:n]
}

// noFragmentDrops fails the test where a fragment was dropped.
func noFragmentDrops(t *testing.T, n *nodetest.Node) {
	t.Helper()
	drops := n.AllDrops()
	if drops["fragment"] != 0 || drops["fragment_lost"] != 0 || drops["nat"] != 0 {
		t.Errorf("drops = %v, want none of fragments", drops)
	}
}

// Datagrams of 8 and of 60 kB go between all ends of a node and are answered in full, and so are pings of 8 kB.
func TestLargeDatagrams(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a, b := n.AddPod("a"), n.AddPod("b")
	addServices(n, b)
	go newInbox(t, b.NS, 8080).echo()
	go newInbox(t, n.NS, 5000).echo()
	go newInbox(t, n.Client, 5000).echo()
	families(t, func(t *testing.T, v6 bool) {
		node, client := family(nodetest.NodeAddrs, v6), family(nodetest.ClientAddrs, v6)
		for _, tc := range []struct {
			name string
			ns   *netnstest.NS
			to   netip.AddrPort
		}{
			{"pod to pod", a.NS, netip.AddrPortFrom(b.Addr(v6), 8080)},
			{"pod to service", a.NS, netip.AddrPortFrom(family(vips, v6), 80)},
			{"pod to NodePort", a.NS, netip.AddrPortFrom(node, 30080)},
			{"pod to node", a.NS, netip.AddrPortFrom(node, 5000)},
			{"pod to outside", a.NS, netip.AddrPortFrom(client, 5000)},
			{"node to pod", n.NS, netip.AddrPortFrom(b.Addr(v6), 8080)},
			{"outside to pod", n.Client, netip.AddrPortFrom(b.Addr(v6), 8080)},
			{"outside to NodePort", n.Client, netip.AddrPortFrom(node, 30080)},
			{"outside to node", n.Client, netip.AddrPortFrom(node, 5000)},
		} {
			conn, err := nodetest.Dial(t, tc.ns, "udp", tc.to, 0)
			wantNoError(t, tc.name, err)
			for i, size := range []int{8 << 10, 60000, 8 << 10} {
				wantEcho(t, fmt.Sprintf("%s, %d bytes", tc.name, size), conn, body(uint32(i), size))
			}
			if port := tc.to.Port(); port == 80 || port == 30080 {
				continue
			}
			tc.ns.Do(func() {
				if out, err := exec.Command("ping", "-n", "-c2", "-i0.2", "-W2", "-s8000", tc.to.Addr().String()).CombinedOutput(); err != nil {
					t.Errorf("ping, %s: %v\n%s", tc.name, err, out)
				}
			})
		}
	})
	noFragmentDrops(t, n)
}

func wantEcho(t *testing.T, what string, conn net.Conn, sent []byte) {
	t.Helper()
	wantNoError(t, what, conn.SetDeadline(time.Now().Add(2*nodetest.Timeout)))
	_, err := conn.Write(sent)
	wantNoError(t, what, err)
	buf := make([]byte, 64<<10)
	if got, err := conn.Read(buf); err != nil || !bytes.Equal(buf[:got], sent) {
		t.Errorf("%s: %d bytes came back, %v", what, got, err)
	}
}

// orders are all orders of a few fragments, and random ones of many.
func orders(rnd *rand.Rand, n int) (out [][]int) {
	if n > 4 {
		for range 12 {
			out = append(out, rnd.Perm(n))
		}
		return out
	}
	var permute func(done, left []int)
	permute = func(done, left []int) {
		if len(left) == 0 {
			out = append(out, done)
		}
		for i := range left {
			permute(append(slices.Clone(done), left[i]), slices.Delete(slices.Clone(left), i, i+1))
		}
	}
	permute(nil, rnd.Perm(n))
	return out
}

// way sends frames to a server whose inbox is in. like is a packet of the flow.
type way struct {
	name string
	send func(frame []byte)
	like pkt.Packet
	in   *inbox
}

// run sends datagrams of this size under ids from this one on: in every order, with every fragment twice, and with one that overlaps
// another. It returns the next id.
func (w way) run(t *testing.T, rnd *rand.Rand, id uint32, size int) uint32 {
	t.Helper()
	const piece = 1400
	count := (size + 8 + piece - 1) / piece
	for _, order := range orders(rnd, count) {
		id++
		whole := w.large(id, size)
		w.fragments(whole, id, piece, order)
		w.arrives(t, fmt.Sprintf("%v", order), whole.Payload, false)

		id++
		whole = w.large(id, size)
		w.fragments(whole, id, piece, slices.Concat(order[:1], order))
		w.arrives(t, fmt.Sprintf("%v, the first of them twice", order), whole.Payload, false)
	}
	// What becomes of overlapping fragments is the receiver's choice; never something that nobody has sent (RFC 5722).
	id++
	whole := w.large(id, size)
	forged := w.large(id+1<<16, size)
	w.send(pkt.Fragment(forged.Bytes(), id, 1024)[1])
	w.fragments(whole, id, piece, rnd.Perm(count))
	w.arrives(t, "overlapping", whole.Payload, true)
	return id
}

func (w way) large(id uint32, size int) pkt.Packet {
	p := w.like
	p.Payload = body(id, size)
	return p
}

func (w way) fragments(p pkt.Packet, id uint32, piece int, order []int) {
	parts := pkt.Fragment(p.Bytes(), id, piece)
	for _, i := range order {
		w.send(parts[i])
	}
}

// arrives wants the payload, once, or if that is an alternative nothing, and then a small datagram sent after it.
func (w way) arrives(t *testing.T, what string, payload []byte, orNothing bool) {
	t.Helper()
	last := w.like
	last.Payload = fmt.Appendf(nil, "after %x", payload[:4])
	if !orNothing {
		if got := w.in.next(); !bytes.Equal(got, payload) {
			t.Fatalf("%s, %s: %d bytes arrived, want those %d that were sent", w.name, what, len(got), len(payload))
		}
	}
	w.send(last.Bytes())
	got := w.in.next()
	if orNothing && bytes.Equal(got, payload) {
		got = w.in.next()
	}
	if !bytes.Equal(got, last.Payload) {
		t.Fatalf("%s, %s: %d bytes arrived, want only the next datagram", w.name, what, len(got))
	}
}

// seeded returns a source of random orders, and says how to have the same again.
func seeded(t *testing.T) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// TestRow13_FragmentsInAnyOrder: fragments arrive in any order, twice, and overlapping, at pods, services and the node itself: each datagram
// once.
func TestRow13_FragmentsInAnyOrder(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a, b := n.AddPod("a"), n.AddPod("b")
	addServices(n, b)
	rnd := seeded(t)
	outside, pod := newWire(t, n.Client), newWire(t, a.NS)
	atPod, atNode := newInbox(t, b.NS, 8080), newInbox(t, n.NS, 5000)
	families(t, func(t *testing.T, v6 bool) {
		node := family(nodetest.NodeAddrs, v6)
		fromOutside := pkt.Packet{Kind: pkt.UDP, TTL: 64, SrcMAC: outside.HardwareAddr, DstMAC: nodeMAC(t, n),
			Src: netip.AddrPortFrom(family(nodetest.ClientAddrs, v6), 4000)}
		fromPod := pkt.Packet{Kind: pkt.UDP, TTL: 64, SrcMAC: a.MAC, DstMAC: a.HostMAC, Src: netip.AddrPortFrom(a.Addr(v6), 4000)}
		to := func(p pkt.Packet, a netip.Addr, port uint16) pkt.Packet {
			p.Dst = netip.AddrPortFrom(a, port)
			return p
		}
		id := uint32(100)
		for _, w := range []way{
			{"outside to pod", outside.send, to(fromOutside, b.Addr(v6), 8080), atPod},
			{"outside to NodePort", outside.send, to(fromOutside, node, 30080), atPod},
			{"outside to node", outside.send, to(fromOutside, node, 5000), atNode},
			{"pod to pod", pod.send, to(fromPod, b.Addr(v6), 8080), atPod},
			{"pod to service", pod.send, to(fromPod, family(vips, v6), 80), atPod},
			{"pod to node", pod.send, to(fromPod, node, 5000), atNode},
		} {
			id = w.run(t, rnd, id, 4000) // three fragments
			id = w.run(t, rnd, id, 8<<10)
		}
	})
	noFragmentDrops(t, n)
}

// TestRow13_FragmentsInAnyOrderBetweenNodes: a fragment that had to wait has lost the outer header that says who sent it.
func TestRow13_FragmentsInAnyOrderBetweenNodes(t *testing.T) {
	t.Parallel()
	c := nodetest.NewCluster(t, 2, nodetest.ClusterOptions{})
	n0, n1 := c.Nodes[0], c.Nodes[1]
	a, b := n0.AddPod("a"), n1.AddPod("b")
	rnd := seeded(t)
	outside := newWire(t, c.Client)
	in := newInbox(t, a.NS, 8080)
	families(t, func(t *testing.T, v6 bool) {
		server := netip.AddrPortFrom(a.Addr(v6), 8080)
		vip := bpf.NewFrontendKey(pkt.UDP.Proto(v6), family(n1.Addrs, v6), 30080)
		c.AddService(map[bool]uint32{false: 5, true: 6}[v6], vip, 0, server)
		fromPod := pkt.Packet{Kind: pkt.UDP, TTL: 64, SrcMAC: b.HostMAC, DstMAC: b.MAC, Src: netip.AddrPortFrom(b.Addr(v6), 4000), Dst: server}
		fromClient := pkt.Packet{Kind: pkt.UDP, TTL: 64, SrcMAC: outside.HardwareAddr, DstMAC: nodeMAC(t, n1),
			Src: netip.AddrPortFrom(family(nodetest.ClientAddrs, v6), 4000), Dst: netip.AddrPortFrom(family(n1.Addrs, v6), 30080)}
		id := uint32(100)
		for _, w := range []way{
			{"encapsulated, to a pod", func(frame []byte) {
				encapsulate(t, n1.NS, n1.Addrs[0], n0.Addrs[0], nodetest.OverlayVNI+bpf.VNIPods, frame)
			}, fromPod, in},
			{"encapsulated, to a service", func(frame []byte) {
				encapsulate(t, n1.NS, n1.Addrs[0], n0.Addrs[0], nodetest.OverlayVNI+bpf.VNIForwarded, frame)
			}, fromClient, in},
		} {
			id = w.run(t, rnd, id, 4000)
		}
		if got := n0.AllDrops()["fragment_lost"]; got != 0 {
			t.Errorf("%d fragments were lost", got)
		}
	})
}
