// SPDX-License-Identifier: Apache-2.0

package attach

import (
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
)

// packets is how many packets one run of BenchmarkPacket sends.
const packets = 20_000

// BenchmarkPacket sends small UDP packets from one pod to another, of one established flow, and reads each before it sends the next: one
// packet costs a send, from_pod, the redirect and a receive. One iteration is a run over filters and a run over tcx links, in turns which
// goes first. The metrics are medians of the runs; tcx/filter is the median of the iterations' quotients.
func BenchmarkPacket(b *testing.B) {
	n := nodetest.New(b)
	from, to := n.AddPod("a"), n.AddPod("b")
	kinds := kinds(b, n)
	both := func(do func(ifindex int) error) error {
		var err error
		n.NS.Do(func() {
			if err = do(from.Ifindex); err == nil {
				err = do(to.Ifindex)
			}
		})
		return err
	}
	current := 0 // AddPod attached filters
	use := func(b *testing.B, at int) {
		if at == current {
			return
		}
		check(b, kinds[at], both(kinds[at].attach))
		// A tcx link runs before a filter and ends the packet's way, so the other kind can go after it came.
		if err := both(kinds[current].detach); err != nil {
			b.Fatalf("detach %s: %v", kinds[current].name, err)
		}
		current = at
	}
	for _, family := range []struct {
		name string
		v6   bool
	}{{"IPv4", false}, {"IPv6", true}} {
		b.Run(family.name, func(b *testing.B) {
			out, in := pair(b, from, to, family.v6)
			var took [2][]float64
			var quotients []float64
			for i := range b.N {
				var now [2]float64
				for turn := range 2 {
					at := (i + turn) % 2
					use(b, at)
					exchange(b, out, in, packets/10)
					now[at] = float64(exchange(b, out, in, packets).Nanoseconds()) / packets
				}
				for at := range now {
					took[at] = append(took[at], now[at])
				}
				quotients = append(quotients, now[1]/now[0])
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(median(took[0]), "filter-ns/packet")
			b.ReportMetric(median(took[1]), "tcx-ns/packet")
			b.ReportMetric(median(quotients), "tcx/filter")
		})
	}
}

// pair returns blocking descriptors of two connected sockets: the runtime's poller would be part of the measurement.
func pair(b *testing.B, from, to *nodetest.Pod, v6 bool) (out, in int) {
	b.Helper()
	var receiver, sender *net.UDPConn
	var err error
	to.NS.Do(func() {
		receiver, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(to.Addr(v6), 9000)))
	})
	if err != nil {
		b.Fatal(err)
	}
	from.NS.Do(func() { sender, err = net.DialUDP("udp", nil, receiver.LocalAddr().(*net.UDPAddr)) })
	if err != nil {
		b.Fatal(err)
	}
	descriptor := func(c *net.UDPConn) int {
		f, err := c.File()
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = f.Close(); _ = c.Close() })
		return int(f.Fd())
	}
	out, in = descriptor(sender), descriptor(receiver)
	if err := unix.SetsockoptTimeval(in, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 2}); err != nil {
		b.Fatal(os.NewSyscallError("setsockopt", err))
	}
	return out, in
}

// exchange returns the CPU time that it took. The kernel's part runs on the sender's thread, so all of it is counted, and other load on the
// machine is not.
func exchange(b *testing.B, out, in, count int) time.Duration {
	b.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var buf [64]byte
	began := threadTime(b)
	for i := range count {
		if _, err := unix.Write(out, buf[:16]); err != nil {
			b.Fatalf("send packet %d: %v", i, err)
		}
		if _, err := unix.Read(in, buf[:]); err != nil {
			b.Fatalf("receive packet %d: %v", i, err)
		}
	}
	return threadTime(b) - began
}

// threadTime is the CPU time of the calling thread.
func threadTime(b *testing.B) time.Duration {
	b.Helper()
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		b.Fatal(os.NewSyscallError("clock_gettime", err))
	}
	return time.Duration(ts.Nano())
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}
