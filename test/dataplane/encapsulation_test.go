// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/pkg/bpf"
)

// nextOuter returns the next frame for a node's overlay port that the wire sees come in, nil if none comes.
func (w *wire) nextOuter(to netip.Addr) []byte {
	w.t.Helper()
	buf := make([]byte, 4000)
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); {
		n, from, err := unix.Recvfrom(w.fd, buf, 0)
		if ll, ok := from.(*unix.SockaddrLinklayer); err != nil || !ok || ll.Pkttype == unix.PACKET_OUTGOING || n < pkt.L4v4+8 {
			continue
		}
		dst, _ := netip.AddrFromSlice(buf[pkt.L3+16 : pkt.L3+20])
		if dst == to && isOuter(buf[:n]) {
			return buf[:n:n]
		}
	}
	return nil
}

// isOuter tells whether a frame is for an overlay port, over IPv4.
func isOuter(frame []byte) bool {
	return len(frame) > pkt.L4v4+8 && binary.BigEndian.Uint16(frame[pkt.L3-2:]) == unix.ETH_P_IP && frame[pkt.L3+9] == unix.IPPROTO_UDP &&
		binary.BigEndian.Uint16(frame[pkt.L4v4+2:]) == nodetest.OverlayPort
}

// masked is the frame without what every packet has another of: identification, checksum, source port.
func masked(frame []byte) []byte {
	frame = pkt.With(frame, pkt.L3+4, 0, 0)
	frame = pkt.With(frame, pkt.L3+10, 0, 0)
	return pkt.With(frame, pkt.L4v4, 0, 0)
}

// setDevice has a node leave encapsulation for another one to its overlay device, or do it by the programs.
func setDevice(t *testing.T, n, to *nodetest.Node, device bool) {
	t.Helper()
	var entry bpf.Node
	wantNoError(t, "look up the node", n.DP.Maps.Nodes.Lookup(nodetest.NodeIndex(to), &entry))
	if entry.Ifindex = uint32(n.ClientDevice); device {
		entry.Ifindex = 0
	}
	n.Put(n.DP.Maps.Nodes, nodetest.NodeIndex(to), entry)
}

// TestEncapsulatedAsByTheDevice: what the programs put on the wire is, bit for bit, what the kernel's VXLAN device does: nodes of before, and
// whatever looks at the packets on their way, see no difference.
func TestEncapsulatedAsByTheDevice(t *testing.T) {
	t.Parallel()
	c := nodetest.NewCluster(t, 2, nodetest.ClusterOptions{})
	n0, n1 := c.Nodes[0], c.Nodes[1]
	a, b := n0.AddPod("a"), n1.AddPod("b")
	pod, outside := newWire(t, a.NS), newWire(t, c.Client)
	families(t, func(t *testing.T, v6 bool) {
		addNodePort(c, 0, b, v6)
		frames := map[string]func(){}
		for name, tos := range map[string]byte{"plain": 0, "ECT(1)": 1, "ECT(0)": 2, "CE": 3, "class": 0x2e << 2} {
			for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP, pkt.SCTP, pkt.Ping} {
				p := pkt.Packet{
					Kind: kind, TTL: 64, SrcMAC: a.MAC, DstMAC: a.HostMAC, Src: netip.AddrPortFrom(a.Addr(v6), 4000),
					Dst: netip.AddrPortFrom(b.Addr(v6), 8080), Flags: pkt.SYN, Payload: []byte(name),
				}
				frames[fmt.Sprintf("%s from a pod, %s", kind, name)] = func() { pod.send(withTOS(p, tos)) }
				asked := p
				asked.SrcMAC, asked.DstMAC, asked.Src = outside.HardwareAddr, nodeMAC(t, n0), netip.AddrPortFrom(clientOf(v6), 4000)
				asked.Dst = netip.AddrPortFrom(family(n0.Addrs, v6), 30080)
				if kind == pkt.TCP || kind == pkt.UDP {
					frames[fmt.Sprintf("%s to a NodePort, %s", kind, name)] = func() { outside.send(withTOS(asked, tos)) }
				}
			}
		}
		for name, send := range frames {
			var by [2][]byte
			for i, device := range []bool{true, false} {
				setDevice(t, n0, n1, device)
				before := transmitted(t, n0)
				send()
				by[i] = outside.nextOuter(n1.Addrs[0])
				if got := transmitted(t, n0) != before; by[i] == nil || got != device {
					t.Fatalf("%s: %d bytes came by; the overlay device sent them: %v, want %v; drops %v", name, len(by[i]), got, device, n0.AllDrops())
				}
				wantNoError(t, name+": checksums", pkt.VerifyChecksums(by[i]))
			}
			if diff := cmp.Diff(masked(by[0]), masked(by[1])); diff != "" {
				t.Errorf("%s (-by the device, +by the programs):\n%s", name, diff)
			}
		}
	})
}

// overlayCounters are those of a node's overlay device.
func overlayCounters(t *testing.T, n *nodetest.Node) (counters netlink.LinkStatistics) {
	t.Helper()
	n.NS.Do(func() {
		l, err := netlink.LinkByName(nodetest.OverlayDevice)
		wantNoError(t, "find the overlay device", err)
		counters = *l.Attrs().Statistics
	})
	return counters
}

// transmitted counts the packets that a node's overlay device has encapsulated.
func transmitted(t *testing.T, n *nodetest.Node) uint64 {
	t.Helper()
	return overlayCounters(t, n).TxPackets
}

// received counts the packets that a node's overlay device has decapsulated.
func received(t *testing.T, n *nodetest.Node) uint64 {
	t.Helper()
	return overlayCounters(t, n).RxPackets
}

// TestTheNodesOwnAnswersGoByTheDevice: what the node's stack sends has a route already, which older kernels do not give back when the programs
// send it on by another (overlay_send). A pod's answers beside it go by the programs.
func TestTheNodesOwnAnswersGoByTheDevice(t *testing.T) {
	t.Parallel()
	c := nodetest.NewCluster(t, 2, nodetest.ClusterOptions{})
	n0, n1 := c.Nodes[0], c.Nodes[1]
	pod := n1.AddPod("b")
	nodetest.Serve(t, pod.NS, "pod", 8080)
	nodetest.Serve(t, n1.NS, "node", 8080)
	// The pod first: a TCP server says goodbye after its client has got the answer, and those of the node would be counted with the pod's.
	for i, tc := range []struct {
		name    string
		servers []netip.Addr
		device  bool
	}{{"pod", pod.Addrs, false}, {"node", n1.Addrs, true}} {
		families(t, func(t *testing.T, v6 bool) {
			port, unspecified := 30080+uint16(i), family([]netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}, v6)
			for network, proto := range protocols {
				id := uint32(port) - 30000 + uint32(proto)*4
				if v6 {
					id += 2
				}
				c.AddService(id, bpf.NewFrontendKey(proto, unspecified, port), 0, netip.AddrPortFrom(family(tc.servers, v6), 8080))
				before := transmitted(t, n1)
				got, err := nodetest.Ask(t, c.Client, network, netip.AddrPortFrom(family(n0.Addrs, v6), port))
				wantAnswer(t, network+" to the "+tc.name, got, err, tc.name+" "+clientOf(v6).String())
				if packets := transmitted(t, n1) - before; (packets > 0) != tc.device {
					t.Errorf("%s: the device has encapsulated %d packets of the %s's answers, want some: %v", network, packets, tc.name, tc.device)
				}
			}
		})
	}
}

// withTOS is the packet with this type of service or traffic class.
func withTOS(p pkt.Packet, tos byte) []byte {
	frame := p.Bytes()
	if p.V6() {
		return pkt.With(frame, pkt.L3, 0x60|tos>>4, tos<<4)
	}
	sum := uint32(^binary.BigEndian.Uint16(frame[pkt.L3+10:])) + uint32(tos)
	check := ^uint16(sum&0xffff + sum>>16)
	return pkt.With(pkt.With(frame, pkt.L3+1, tos), pkt.L3+10, byte(check>>8), byte(check))
}

// offload switches an offload of a namespace's eth0, by the number of its ethtool command (linux/ethtool.h).
func offload(t *testing.T, ns *netnstest.NS, command uint32, on bool) {
	t.Helper()
	offloadOn(t, ns, "eth0", command, on)
}

func offloadOn(t *testing.T, ns *netnstest.NS, device string, command uint32, on bool) {
	t.Helper()
	value := struct{ command, data uint32 }{command: command}
	if on {
		value.data = 1
	}
	ns.Do(func() {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		wantNoError(t, "socket", err)
		defer unix.Close(fd)
		request := struct {
			name [unix.IFNAMSIZ]byte
			data unsafe.Pointer
			_    [16]byte
		}{data: unsafe.Pointer(&value)}
		copy(request.name[:], device)
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request))); errno != 0 {
			t.Fatalf("ethtool command %#x: %v", command, errno)
		}
	})
}

// TestStreamsAreEncapsulated: streams between pods of two nodes arrive whole, wherever on the way their segments are cut, summed and put together.
func TestStreamsAreEncapsulated(t *testing.T) {
	t.Parallel()
	for name, way := range map[string]func(t *testing.T, c *nodetest.Cluster, a, b *nodetest.Pod){
		"as devices are": func(*testing.T, *nodetest.Cluster, *nodetest.Pod, *nodetest.Pod) {},
		"the pod cuts": func(t *testing.T, _ *nodetest.Cluster, a, _ *nodetest.Pod) {
			offload(t, a.NS, unix.ETHTOOL_STSO, false)
			offload(t, a.NS, unix.ETHTOOL_SGSO, false)
		},
		"the pod cuts and sums": func(t *testing.T, _ *nodetest.Cluster, a, _ *nodetest.Pod) {
			offload(t, a.NS, unix.ETHTOOL_STXCSUM, false)
		},
		"the node cuts": func(t *testing.T, c *nodetest.Cluster, _, _ *nodetest.Pod) {
			offload(t, c.Nodes[0].NS, unix.ETHTOOL_STSO, false)
		},
		"the node cuts and sums": func(t *testing.T, c *nodetest.Cluster, _, _ *nodetest.Pod) {
			offload(t, c.Nodes[0].NS, unix.ETHTOOL_STXCSUM, false)
		},
		"the node cuts, the other one aggregates": func(t *testing.T, c *nodetest.Cluster, _, _ *nodetest.Pod) {
			offload(t, c.Nodes[0].NS, unix.ETHTOOL_STSO, false)
			offload(t, c.Nodes[1].NS, unix.ETHTOOL_SGRO, true)
		},
		"the pod cuts, the node aggregates": func(t *testing.T, c *nodetest.Cluster, a, b *nodetest.Pod) {
			offload(t, a.NS, unix.ETHTOOL_STSO, false)
			offload(t, c.Nodes[0].NS, unix.ETHTOOL_SGRO, true)
			offload(t, c.Nodes[1].NS, unix.ETHTOOL_SGRO, true)
			offload(t, b.NS, unix.ETHTOOL_SGRO, true)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := nodetest.NewCluster(t, 2, nodetest.ClusterOptions{})
			a, b := c.Nodes[0].AddPod("a"), c.Nodes[1].AddPod("b")
			for _, p := range []*nodetest.Pod{a, b} {
				ip(t, p.NS, "link set eth0 mtu 1450")
			}
			way(t, c, a, b)
			families(t, func(t *testing.T, v6 bool) {
				addNodePort(c, 0, b, v6)
				before := transmitted(t, c.Nodes[0])
				for way, dial := range map[string]func() (*nodetest.Conn, error){
					"pod to pod": func() (*nodetest.Conn, error) {
						return nodetest.Dial(t, a.NS, "tcp", netip.AddrPortFrom(b.Addr(v6), 8080), 0)
					},
					"client to NodePort": func() (*nodetest.Conn, error) {
						return nodetest.Dial(t, c.Client, "tcp", netip.AddrPortFrom(family(c.Nodes[0].Addrs, v6), 30080), 0)
					},
				} {
					l := listen(t, b.NS, "8080")
					up, err := dial()
					wantNoError(t, way, err)
					accepted, err := l.Accept()
					wantNoError(t, "accept", err)
					if got := netip.MustParseAddrPort(accepted.RemoteAddr().String()).Addr(); got != up.LocalAddr().(*net.TCPAddr).AddrPort().Addr() {
						t.Errorf("%s: the server sees %s, want the client's own %s", way, got, up.LocalAddr())
					}
					transfer(t, up.Conn, accepted)
					transfer(t, accepted, up.Conn)
					accepted.Close()
					l.Close()
				}
				if got := transmitted(t, c.Nodes[0]) - before; got != 0 {
					t.Errorf("the overlay device of node 0 sent %d packets, want none", got)
				}
			})
			for i, n := range c.Nodes {
				if got := n.AllDrops()["too_big"]; got != 0 && i == 1 {
					t.Errorf("node %d took %d packets for too big", i, got)
				}
			}
		})
	}
}
