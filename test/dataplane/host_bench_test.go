// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/nodetest"
)

// BenchmarkHostToService is one question of 16 bytes and its answer by UDP, from a socket of the node, through a service and without one. Both
// ends are on one thread, whose CPU time is the figure cpu-ns/op: the kernel does the packets' work there. What follows from it is in
// docs/design/0006-host-to-service.md.
func BenchmarkHostToService(b *testing.B) {
	n := nodetest.New(b)
	pod := n.AddPod("b")
	n.ServeHost()
	addServices(n, pod)
	loopbackOnly := func(b *testing.B) {
		for _, v6 := range []bool{false, true} {
			b.Run(map[bool]string{false: "IPv4", true: "IPv6"}[v6]+"/loopback", func(b *testing.B) {
				askRepeatedly(b, n.NS, n.NS, 9, netip.AddrPortFrom(localhost(v6), 9))
			})
		}
	}
	for _, v6 := range []bool{false, true} {
		for name, to := range map[string]netip.AddrPort{
			"pod":       netip.AddrPortFrom(pod.Addr(v6), 8080),
			"ClusterIP": netip.AddrPortFrom(family(vips, v6), 80),
			"NodePort":  netip.AddrPortFrom(family(n.Addrs, v6), 30080),
			"localhost": netip.AddrPortFrom(localhost(v6), 30080),
		} {
			b.Run(map[bool]string{false: "IPv4", true: "IPv6"}[v6]+"/"+name, func(b *testing.B) {
				askRepeatedly(b, n.NS, pod.NS, 8080, to)
			})
		}
	}
	loopbackOnly(b)
	n.NS.Do(func() {
		lo, err := netlink.LinkByName("lo")
		mustB(b, err)
		mustB(b, netlink.QdiscDel(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: lo.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
		}}))
	})
	b.Run("without to_loopback", loopbackOnly)
}

// askRepeatedly opens both sockets and does the loop, on a thread of its own.
func askRepeatedly(b *testing.B, client, server *netnstest.NS, port int, to netip.AddrPort) {
	listening := udpSocket(b, server)
	mustB(b, unix.Bind(listening, &unix.SockaddrInet6{Port: port}))
	asking := udpSocket(b, client)
	mustB(b, unix.Connect(asking, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}))
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	buf := make([]byte, 16)
	var began, ended unix.Timespec
	mustB(b, unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &began))
	for b.Loop() {
		_, err := unix.Write(asking, buf)
		mustB(b, err)
		n, from, err := unix.Recvfrom(listening, buf, 0)
		mustB(b, err)
		mustB(b, unix.Sendto(listening, buf[:n], 0, from))
		_, err = unix.Read(asking, buf)
		mustB(b, err)
	}
	mustB(b, unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ended))
	b.ReportMetric(float64(ended.Nano()-began.Nano())/float64(b.N), "cpu-ns/op")
}

func udpSocket(b *testing.B, ns *netnstest.NS) (fd int) {
	ns.Do(func() {
		var err error
		fd, err = unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		mustB(b, err)
	})
	b.Cleanup(func() { unix.Close(fd) })
	mustB(b, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: int64(10 * time.Second / time.Second)}))
	return fd
}

func mustB(b *testing.B, err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}
