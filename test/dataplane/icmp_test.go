// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/nodetest"
)

// onSocket runs f on a connection's descriptor.
func onSocket(t *testing.T, c net.Conn, f func(fd int) error) {
	t.Helper()
	if wrapped, ok := c.(*nodetest.Conn); ok {
		c = wrapped.Conn
	}
	raw, err := c.(syscall.Conn).SyscallConn()
	wantNoError(t, "socket", err)
	var inner error
	wantNoError(t, "socket", errors.Join(raw.Control(func(fd uintptr) { inner = f(int(fd)) }), inner))
}

// option sets an integer option of IPv4 or its counterpart of IPv6.
func option(t *testing.T, c net.Conn, v6 bool, v4Name, v6Name, value int) {
	t.Helper()
	onSocket(t, c, func(fd int) error {
		if v6 {
			return unix.SetsockoptInt(fd, unix.SOL_IPV6, v6Name, value)
		}
		return unix.SetsockoptInt(fd, unix.SOL_IP, v4Name, value)
	})
}

// offender reads the first error that waits on a socket with IP_RECVERR, and who sent it.
func offender(t *testing.T, c net.Conn) (errno unix.Errno, from netip.Addr) {
	t.Helper()
	onSocket(t, c, func(fd int) error {
		oob := make([]byte, 512)
		_, n, _, _, err := unix.Recvmsg(fd, nil, oob, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
		if err != nil {
			return err
		}
		messages, err := unix.ParseSocketControlMessage(oob[:n])
		if err != nil {
			return err
		}
		for _, m := range messages {
			if len(m.Data) < unix.SizeofSockaddrInet4+int(unsafe.Sizeof(unix.SockExtendedErr{})) {
				continue
			}
			errno = unix.Errno((*unix.SockExtendedErr)(unsafe.Pointer(&m.Data[0])).Errno)
			addr := m.Data[unsafe.Sizeof(unix.SockExtendedErr{}):]
			if m.Header.Level == unix.SOL_IP {
				from, _ = netip.AddrFromSlice(addr[4:8])
			} else {
				from, _ = netip.AddrFromSlice(addr[8:24])
			}
		}
		return nil
	})
	return errno, from
}

// Corner case A11: a UDP client of a port that no process of the backend serves hears so at once, from the address that it asked.
func TestRow11_ClosedPortBehindService(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a, b := n.AddPod("a"), n.AddPod("b")
	addServices(n, b)
	families(t, func(t *testing.T, v6 bool) {
		vip := netip.AddrPortFrom(family(vips, v6), 80)
		nodePort := netip.AddrPortFrom(family(nodetest.NodeAddrs, v6), 30080)
		for _, c := range []struct {
			name string
			from *netnstest.NS
			to   netip.AddrPort
		}{
			{"ClusterIP from a pod", a.NS, vip},
			{"ClusterIP from the backend itself", b.NS, vip},
			{"NodePort from a pod", a.NS, nodePort},
			{"NodePort from the backend itself", b.NS, nodePort},
			{"NodePort from outside", n.Client, nodePort},
		} {
			conn, err := nodetest.Dial(t, c.from, "udp", c.to, 0)
			if err != nil {
				t.Fatal(err)
			}
			option(t, conn, v6, unix.IP_RECVERR, unix.IPV6_RECVERR, 1)
			start := time.Now()
			if _, err := conn.Ask(); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("%s: %v after %v, want ECONNREFUSED", c.name, err, time.Since(start))
				continue
			}
			if errno, from := offender(t, conn); errno != unix.ECONNREFUSED || from != c.to.Addr() {
				t.Errorf("%s: %v from %s, want ECONNREFUSED from %s", c.name, errno, from, c.to.Addr())
			}
		}
	})
	if drops := n.AllDrops(); drops["nat"] != 0 {
		t.Errorf("drops = %v, want none as nat", drops)
	}
}

// ip runs ip(8) in a namespace, once for every line.
func ip(t *testing.T, ns *netnstest.NS, lines string) {
	t.Helper()
	ns.Do(func() {
		for l := range strings.Lines(strings.TrimSpace(lines)) {
			if out, err := exec.Command("ip", strings.Fields(l)...).CombinedOutput(); err != nil {
				t.Fatalf("ip %s: %v: %s", strings.TrimSpace(l), err, out)
			}
		}
	})
}

// Corner case A11: a router behind the client takes less than the node's device. Its error about the answers of a NodePort names the
// NodePort; translated, it reaches the pod, which sends smaller packets.
func TestRow11_PathMTUBehindNodePort(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	b := n.AddPod("b")
	addServices(n, b)
	far := farBehind(t, n)
	families(t, func(t *testing.T, v6 bool) {
		got := fetch(t, far, netip.AddrPortFrom(family(nodetest.NodeAddrs, v6), 30080), b.NS)
		if got != narrow {
			t.Errorf("path MTU of the pod's socket = %d, want %d", got, narrow)
		}
	})
	if drops := n.AllDrops(); drops["too_big"] != 0 || drops["nat"] != 0 {
		t.Errorf("drops = %v, want none as too_big or nat", drops)
	}
}

// farBehind makes the client a router, and a host behind it that is reached by a narrow link but advertises the segment size of a wide one.
func farBehind(t *testing.T, n *nodetest.Node) *netnstest.NS {
	t.Helper()
	far := netnstest.New(t)
	far.Do(func() { sysctl(t, "net/ipv6/conf/default/accept_dad", "0") })
	n.Client.Do(func() {
		sysctl(t, "net/ipv4/ip_forward", "1")
		sysctl(t, "net/ipv6/conf/all/forwarding", "1")
	})
	ip(t, n.Client, "link add far0 mtu 1300 type veth peer name eth0 mtu 1300 netns "+far.Path())
	ip(t, n.Client, `link set far0 up
		addr add 198.51.100.1/24 dev far0
		addr add 2001:db8:7::1/64 dev far0 nodad`)
	ip(t, far, `link set eth0 up
		addr add 198.51.100.2/24 dev eth0
		addr add 2001:db8:7::2/64 dev eth0 nodad
		route add default via 198.51.100.1 advmss 1460
		-6 route add default via 2001:db8:7::1 advmss 1440`)
	ip(t, n.NS, `route add 198.51.100.0/24 via 192.0.2.100
		-6 route add 2001:db8:7::/64 via 2001:db8:1::100`)
	return far
}
