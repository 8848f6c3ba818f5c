// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"bytes"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/pkg/bpf"
)

// wire sends and sees whole frames on a device of a namespace, as a process with CAP_NET_RAW can.
type wire struct {
	t  *testing.T
	fd int
	*net.Interface
}

const allProtocols = 0x0300 // ETH_P_ALL in network byte order

func newWire(t *testing.T, ns *netnstest.NS) *wire {
	t.Helper()
	return newWireOn(t, ns, "eth0")
}

func newWireOn(t *testing.T, ns *netnstest.NS, device string) *wire {
	t.Helper()
	w := &wire{t: t}
	ns.Do(func() {
		var err error
		if w.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, allProtocols); err != nil {
			t.Fatal(err)
		}
		if w.Interface, err = net.InterfaceByName(device); err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(func() { unix.Close(w.fd) })
	wantNoError(t, "bind", unix.Bind(w.fd, &unix.SockaddrLinklayer{Protocol: allProtocols, Ifindex: w.Index}))
	wantNoError(t, "set timeout", unix.SetsockoptTimeval(w.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100000}))
	return w
}

func (w *wire) send(frame []byte) {
	w.t.Helper()
	wantNoError(w.t, "send", unix.Sendto(w.fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: w.Index, Protocol: allProtocols, Halen: 6}))
}

// next returns the next frame with these bytes that comes in within half a second, nil if none does.
func (w *wire) next(what string) []byte {
	buf := make([]byte, 4000)
	for end := time.Now().Add(500 * time.Millisecond); time.Now().Before(end); {
		n, from, err := unix.Recvfrom(w.fd, buf, 0)
		if err != nil {
			continue
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype != unix.PACKET_OUTGOING && bytes.Contains(buf[:n], []byte(what)) {
			return buf[:n]
		}
	}
	return nil
}

// sees tells whether a frame with these bytes comes in within half a second.
func (w *wire) sees(what string) bool { return w.next(what) != nil }

func nodeMAC(t *testing.T, n *nodetest.Node) (mac net.HardwareAddr) {
	n.NS.Do(func() {
		i, err := net.InterfaceByName("eth0")
		wantNoError(t, "node device", err)
		mac = i.HardwareAddr
	})
	return mac
}

// Neighbour discovery is never filtered (contract row N14), but what is routed somewhere else is no neighbour discovery.
func TestN14_DiscoveryIsNoWayPastPolicy(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a := n.AddPod("a")
	n.IdentifyPod(a, identityA, policyA, policyA) // nothing is allowed
	pod, outside := newWire(t, a.NS), newWire(t, n.Client)
	carry := func(frame []byte, payload string) []byte {
		frame = append(frame, payload...)
		frame[19] += byte(len(payload))
		return frame
	}
	pod.send(carry(pkt.Advertisement(a.MAC, a.Addr(true), a.HostMAC, nodetest.ClientAddrs[1]), "carried out"))
	if outside.sees("carried out") {
		t.Error("an isolated pod's advertisement left the node")
	}
	outside.send(carry(pkt.Advertisement(outside.HardwareAddr, nodetest.ClientAddrs[1], nodeMAC(t, n), a.Addr(true)), "carried in"))
	if pod.sees("carried in") {
		t.Error("an advertisement from outside reached an isolated pod")
	}
	if n.AllDrops()["invalid_nd"] < 2 {
		t.Errorf("drops = %v, want at least 2 of invalid_nd", n.AllDrops())
	}
}

// A VLAN tag is not looked through: a pod cannot send into another network, and a tagged packet is the VLAN device's business.
func TestTaggedFramesStayOut(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a := n.AddPod("a")
	pod, outside := newWire(t, a.NS), newWire(t, n.Client)
	tag := func(frame []byte) []byte { return slices.Insert(frame, 12, 0x81, 0x00, 0x00, 0x64) }
	families(t, func(t *testing.T, v6 bool) {
		out := pkt.Packet{Kind: pkt.UDP, TTL: 64, SrcMAC: a.MAC, DstMAC: a.HostMAC, Src: netip.AddrPortFrom(a.Addr(v6), 4000),
			Dst: netip.AddrPortFrom(family(nodetest.ClientAddrs, v6), 5000), Payload: []byte("from the pod")}
		in := pkt.Packet{Kind: pkt.UDP, TTL: 64, SrcMAC: outside.HardwareAddr, DstMAC: nodeMAC(t, n), Src: out.Dst, Dst: out.Src,
			Payload: []byte("from outside")}
		pod.send(tag(out.Bytes()))
		if outside.sees("from the pod") {
			t.Error("a pod's tagged frame left the node")
		}
		outside.send(tag(in.Bytes()))
		if pod.sees("from outside") {
			t.Error("a tagged frame reached the pod")
		}
		pod.send(out.Bytes())
		if !outside.sees("from the pod") {
			t.Error("the same frame without a tag did not arrive")
		}
	})
	if n.AllDrops()["unknown_ethertype"] < 2 {
		t.Errorf("drops = %v, want at least 2 of unknown_ethertype", n.AllDrops())
	}
}

// Nobody outside can answer in the node's name, not even on a flow that a pod has opened to the node.
func TestNodeCannotBeSpoofedOnAKnownFlow(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a := n.AddPod("a")
	pod, outside := newWire(t, a.NS), newWire(t, n.Client)
	families(t, func(t *testing.T, v6 bool) {
		ask := pkt.Packet{Kind: pkt.UDP, TTL: 64, SrcMAC: a.MAC, DstMAC: a.HostMAC, Src: netip.AddrPortFrom(a.Addr(v6), 4000),
			Dst: netip.AddrPortFrom(family(nodetest.NodeAddrs, v6), 53), Payload: []byte("question")}
		pod.send(ask.Bytes())
		before := n.AllDrops()["source_is_local"]
		outside.send(pkt.Packet{Kind: pkt.UDP, TTL: 64, SrcMAC: outside.HardwareAddr, DstMAC: nodeMAC(t, n), Src: ask.Dst, Dst: ask.Src,
			Payload: []byte("forged answer")}.Bytes())
		if pod.sees("forged answer") {
			t.Error("a forged answer reached the pod")
		}
		if n.AllDrops()["source_is_local"] == before {
			t.Error("no drop was counted as source_is_local")
		}
	})
}

// An address whose pod vanished without DEL goes to another pod: flows that are under way follow, they do not end at a dead device.
func TestFlowFollowsAnAddressThatMoved(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a, b, c := n.AddPod("a"), n.AddPod("b"), n.AddPod("c")
	from, to := newWire(t, a.NS), newWire(t, c.NS)
	families(t, func(t *testing.T, v6 bool) {
		p := pkt.Packet{Kind: pkt.UDP, TTL: 64, SrcMAC: a.MAC, DstMAC: a.HostMAC, Src: netip.AddrPortFrom(a.Addr(v6), 4000),
			Dst: netip.AddrPortFrom(b.Addr(v6), 5000), Payload: []byte("goes on")}
		from.send(p.Bytes())
		if !v6 {
			n.NS.Do(func() { wantNoError(t, "remove device", exec.Command("ip", "link", "del", "mgyb").Run()) })
		}
		wantNoError(t, "move the address", n.DP.PutEndpoint(b.Addr(v6), bpf.Endpoint{
			Identity: bpf.IdentityPodUnknown, Ifindex: uint32(c.Ifindex), Mac: [6]byte(c.MAC), HostMac: [6]byte(c.HostMAC),
		}))
		from.send(p.Bytes())
		if !to.sees("goes on") {
			t.Error("the flow did not follow")
		}
	})
}

// A SYN against the direction of an established flow opens a connection of its own: its sender's egress policy decides, not what allowed
// the flow.
func TestSYNAgainstTheDirectionIsJudgedAnew(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a, b := n.AddPod("a"), n.AddPod("b")
	nodetest.Serve(t, b.NS, "b", 8080)
	n.IdentifyPod(b, identityB, policyB, bpf.PolicyNone) // b may answer, but open nothing
	from, to := newWire(t, b.NS), newWire(t, a.NS)
	families(t, func(t *testing.T, v6 bool) {
		conn, err := nodetest.Dial(t, a.NS, "tcp", netip.AddrPortFrom(b.Addr(v6), 8080), 4000)
		if err != nil {
			t.Fatal(err)
		}
		got, err := conn.Ask()
		wantAnswer(t, "the established connection", got, err, "b "+a.Addr(v6).String())
		before := n.AllDrops()["policy"]
		from.send(pkt.Packet{Kind: pkt.TCP, TTL: 64, Flags: pkt.SYN, SrcMAC: b.MAC, DstMAC: b.HostMAC,
			Src: netip.AddrPortFrom(b.Addr(v6), 8080), Dst: netip.AddrPortFrom(a.Addr(v6), 4000), Payload: []byte("opens the other way")}.Bytes())
		if to.sees("opens the other way") {
			t.Error("the SYN reached the pod")
		}
		if n.AllDrops()["policy"] == before {
			t.Error("no drop was counted as policy")
		}
		got, err = conn.Ask()
		wantAnswer(t, "the established connection afterwards", got, err, "b "+a.Addr(v6).String())
	})
}
