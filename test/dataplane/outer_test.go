// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"encoding/binary"
	"hash/crc32"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/pkg/bpf"
)

// addNodePort serves UDP and TCP port 30080 of every node by one pod's port 8080.
func addNodePort(c *nodetest.Cluster, flags uint32, pod *nodetest.Pod, v6 bool) {
	unspecified := family([]netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}, v6)
	id := uint32(40)
	for _, proto := range protocols {
		id++
		if v6 {
			id += 10
		}
		c.AddService(id, bpf.NewFrontendKey(proto, unspecified, 30080), flags, netip.AddrPortFrom(pod.Addr(v6), 8080))
	}
}

// TestRow14_SegmentedDatagrams: datagrams that a client's kernel keeps in one large buffer (UDP segmentation offload, as QUIC uses it)
// come out of the overlay and the translation one by one, every byte right.
func TestRow14_SegmentedDatagrams(t *testing.T) {
	t.Parallel()
	const segment, perSend, sends = 1200, 10, 40
	for name, tc := range map[string]struct {
		flags uint32
		opts  nodetest.ClusterOptions
	}{
		"tunnel": {}, "dsr": {flags: bpf.ServiceDSR}, "by the device": {opts: nodetest.ClusterOptions{Device: true}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := nodetest.NewCluster(t, 2, tc.opts)
			b := c.Nodes[1].AddPod("b")
			families(t, func(t *testing.T, v6 bool) {
				addNodePort(c, tc.flags, b, v6)
				var server net.PacketConn
				b.NS.Do(func() {
					var err error
					server, err = net.ListenPacket("udp", net.JoinHostPort(b.Addr(v6).String(), "8080"))
					wantNoError(t, "listen", err)
				})
				defer server.Close()
				conn, err := nodetest.Dial(t, c.Client, "udp", netip.AddrPortFrom(family(c.Nodes[0].Addrs, v6), 30080), 0)
				wantNoError(t, "dial", err)
				raw, err := conn.Conn.(*net.UDPConn).SyscallConn()
				wantNoError(t, "socket", err)
				wantNoError(t, "control", raw.Control(func(fd uintptr) {
					wantNoError(t, "set UDP_SEGMENT", unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, segment))
				}))
				rng := rand.NewChaCha8([32]byte{1})
				sum := func(b []byte) uint32 { return crc32.ChecksumIEEE(b) }
				buf := make([]byte, segment*perSend)
				seen := map[uint32]bool{}
				for range sends {
					_, _ = rng.Read(buf) // never fails
					for i := 0; i < len(buf); i += segment {
						binary.BigEndian.PutUint32(buf[i:], sum(buf[i+4:i+segment]))
					}
					_, err := conn.Write(buf)
					wantNoError(t, "send", err)
					for range perSend {
						wantNoError(t, "deadline", server.SetReadDeadline(time.Now().Add(2*time.Second)))
						got := make([]byte, 65536)
						n, _, err := server.ReadFrom(got)
						wantNoError(t, "receive", err)
						if n != segment || binary.BigEndian.Uint32(got) != sum(got[4:n]) {
							t.Fatalf("a datagram of %d bytes has other content than the one that was sent", n)
						}
						seen[binary.BigEndian.Uint32(got)] = true
					}
				}
				if len(seen) != sends*perSend {
					t.Errorf("%d different datagrams arrived, want %d", len(seen), sends*perSend)
				}
			})
		})
	}
}

// TestRow21_OuterSource: the outer source is the address that the other nodes know, whatever the kernel's routes would choose.
func TestRow21_OuterSource(t *testing.T) {
	t.Parallel()
	for name, opts := range map[string]nodetest.ClusterOptions{"IPv4": {}, "IPv6": {OuterV6: true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := nodetest.NewCluster(t, 2, opts)
			n0, n1 := c.Nodes[0], c.Nodes[1]
			a, b := n0.AddPod("a"), n1.AddPod("b")
			nodetest.Serve(t, b.NS, "b", 8080)
			preferSource(t, n0, []string{"192.0.2.50", "2001:db8:1::50"})
			outside := newWire(t, c.Client)
			for _, v6 := range []bool{false, true} {
				got, err := nodetest.Ask(t, a.NS, "udp", netip.AddrPortFrom(b.Addr(v6), 8080))
				wantAnswer(t, "pod to pod", got, err, "b "+a.Addr(v6).String())
			}
			seen := map[netip.Addr]int{}
			for _, src := range outside.overlaySources(family(n1.Addrs, opts.OuterV6)) {
				seen[src]++
			}
			if len(seen) != 1 || seen[family(n0.Addrs, opts.OuterV6)] == 0 {
				t.Errorf("outer sources towards node 1 = %v, want only %s", seen, family(n0.Addrs, opts.OuterV6))
			}
		})
	}
}

// preferSource gives the node second addresses, which its default routes prefer as the source.
func preferSource(t *testing.T, n *nodetest.Node, addrs []string) {
	t.Helper()
	n.NS.Do(func() {
		l, err := netlink.LinkByName("eth0")
		wantNoError(t, "find eth0", err)
		for i, text := range addrs {
			ip, bits := net.ParseIP(text), []int{24, 64}[i]
			size := []int{32, 128}[i]
			wantNoError(t, "add "+text, netlink.AddrAdd(l, &netlink.Addr{
				IPNet: &net.IPNet{IP: ip, Mask: net.CIDRMask(bits, size)}, Flags: unix.IFA_F_NODAD,
			}))
			routes, err := netlink.RouteListFiltered([]int{netlink.FAMILY_V4, netlink.FAMILY_V6}[i], &netlink.Route{Dst: nil}, netlink.RT_FILTER_DST)
			if err != nil || len(routes) == 0 {
				t.Fatalf("default routes: %v, %v", routes, err)
			}
			r := routes[0]
			r.Src = ip
			wantNoError(t, "replace the default route", netlink.RouteReplace(&r))
		}
	})
}

// overlaySources returns the outer sources of the encapsulated packets to a node that are waiting in the socket.
func (w *wire) overlaySources(to netip.Addr) (out []netip.Addr) {
	buf := make([]byte, 4000)
	for {
		n, _, err := unix.Recvfrom(w.fd, buf, unix.MSG_DONTWAIT)
		if err != nil {
			return out
		}
		l4, src, dst := 34, 26, 30
		size := 4
		if to.Is6() {
			l4, src, dst, size = 54, 22, 38, 16
		}
		if n < l4+8 || binary.BigEndian.Uint16(buf[l4+2:]) != nodetest.OverlayPort {
			continue
		}
		from, _ := netip.AddrFromSlice(buf[src : src+size])
		if d, _ := netip.AddrFromSlice(buf[dst : dst+size]); d == to {
			out = append(out, from)
		}
	}
}
