// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/internal/testutil/clustertest"
	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/pkg/agent"
)

// streamTimeout is for how long a stream may stand still.
const streamTimeout = 5 * time.Second

// byDevice counts the packets that a node's overlay device has encapsulated, and those that it has decapsulated.
func byDevice(t *testing.T, n *clustertest.Node) (sent, received uint64) {
	t.Helper()
	n.NS.Do(func() {
		l, err := netlink.LinkByName(agent.DefaultVXLANDevice)
		if err != nil {
			t.Fatal(err)
		}
		sent, received = l.Attrs().Statistics.TxPackets, l.Attrs().Statistics.RxPackets
	})
	return sent, received
}

// TestProgramsEncapsulateWhereTheyMay: what pods of n1 send goes by the programs to a node on its network and to one behind the router; by the
// overlay device, and so by the node's xfrm policies, from when there is one until there is none; and by the device where the flag says so. So
// do the answers to it come in.
func TestProgramsEncapsulateWhereTheyMay(t *testing.T) {
	r := newRemote(t, clustertest.Options{RoutingMode: "vxlan"})
	n1 := r.Node("n1")
	pod := r.pods[0]
	// ask asks pods on the other nodes, in both families; an error if one did not answer.
	ask := func() error {
		for _, server := range r.pods[1:] {
			for _, v6 := range []bool{false, true} {
				if _, err := pod.Ask("udp", server.AddrPort(v6, podPort)); err != nil {
					return err
				}
			}
		}
		return nil
	}
	expect := func(what string, want bool) {
		t.Helper()
		r.Eventually(fmt.Sprintf("%s: by the device: %v", what, want), func() bool {
			sent, received := byDevice(t, n1)
			err := ask()
			sentNow, receivedNow := byDevice(t, n1)
			return err == nil && (sentNow != sent) == want && (receivedNow != received) == want
		})
	}
	policy := func(words string) { t.Helper(); xfrmPolicy(t, n1, words) }
	expect("at the start", false)
	out, err := n1.Output("ip", "-4", "route", "get", r.Node("n3").Addr(false).String())
	if err != nil || !strings.Contains(out, " via ") {
		t.Fatalf("route from n1 to n3 = %q, %v, want one by a router", out, err)
	}

	block := "src " + n1.Addr(false).String() + " dst " + r.Node("n2").Addr(false).String() + " proto udp dir out"
	policy("add src 192.0.2.77 dst 192.0.2.78 dir out")
	expect("a policy about somebody else", true)
	policy("add " + block + " action block")
	r.Eventually("the policy holds for what pods send", func() bool { return ask() != nil })
	policy("delete " + block)
	policy("delete src 192.0.2.77 dst 192.0.2.78 dir out")
	expect("no policy any more", false)

	r.StopAgent(n1)
	expect("without agent", false)
	r.StartAgent(n1, "--vxlan-encapsulation", "device")
	expect("the flag", true)
	r.StopAgent(n1)
	r.StartAgent(n1)
	expect("without the flag", false)
}

// xfrmPolicy adds or deletes an IPsec policy on a node.
func xfrmPolicy(t *testing.T, n *clustertest.Node, words string) {
	t.Helper()
	if out, err := n.Output("ip", strings.Fields("xfrm policy "+words)...); err != nil {
		t.Fatalf("ip xfrm policy %s: %v\n%s", words, err, out)
	}
}

// TestNothingIsLostWhenTheDeviceTakesOver: connections that are open while the overlay device takes over, and the programs again, lose no
// byte and no answer, in both directions, and datagrams go on.
func TestNothingIsLostWhenTheDeviceTakesOver(t *testing.T) {
	r := newRemote(t, clustertest.Options{Nodes: 2, RoutingMode: "vxlan"})
	n1 := r.Node("n1")
	stop, done := make(chan struct{}), sync.WaitGroup{}
	var lost atomic.Int32 // datagrams, or their answers
	for _, v6 := range []bool{false, true} {
		for i, from := range r.pods {
			to := r.pods[1-i]
			for _, network := range []string{"tcp", "udp"} {
				conn, err := from.Dial(network, to.AddrPort(v6, podPort), 0)
				if err != nil {
					t.Fatal(err)
				}
				done.Go(func() {
					askUntil(t, stop, fmt.Sprintf("%s from %s to %s", network, from.Name, conn.RemoteAddr()), conn, &lost)
				})
			}
			up, down := connected(t, from, to, v6)
			done.Go(func() { writeUntil(t, stop, up) })
			done.Go(func() { readWritten(t, down) })
		}
	}
	// Large segments come in by the device in any case.
	expect := func(what string, want bool) {
		t.Helper()
		sent, received := byDevice(t, n1)
		r.Eventually(fmt.Sprintf("%s: by the device: %v", what, want), func() bool {
			sentNow, receivedNow := byDevice(t, n1)
			took := sentNow != sent && (!want || receivedNow != received)
			sent, received = sentNow, receivedNow
			return took == want
		})
	}
	for range 3 {
		xfrmPolicy(t, n1, "add src 192.0.2.77 dst 192.0.2.78 dir out")
		expect("a policy", true)
		xfrmPolicy(t, n1, "delete src 192.0.2.77 dst 192.0.2.78 dir out")
		expect("no policy", false)
	}
	close(stop)
	done.Wait()
	// One may be late on a busy machine (seen once in 36 runs, with and without decapsulation by the programs); a hole in a change would take more.
	if n := lost.Load(); n > 2 {
		t.Errorf("%d datagrams were not answered", n)
	}
}

// askUntil asks over an open connection until stop is closed; every question must be answered, but for datagrams, which are counted.
func askUntil(t *testing.T, stop <-chan struct{}, what string, conn *nodetest.Conn, lost *atomic.Int32) {
	for n := 0; ; n++ {
		select {
		case <-stop:
			if n < 10 {
				t.Errorf("%s: only %d questions", what, n)
			}
			return
		default:
		}
		_, err := conn.Ask()
		if _, datagrams := conn.Conn.(*net.UDPConn); err != nil && datagrams {
			lost.Add(1)
		} else if err != nil {
			t.Errorf("%s: question %d: %v", what, n, err)
			return
		}
	}
}

// connected is a TCP connection between two pods.
func connected(t *testing.T, from, to *clustertest.Pod, v6 bool) (up, down net.Conn) {
	t.Helper()
	var l net.Listener
	to.NS.Do(func() {
		var err error
		if l, err = net.Listen("tcp", netip.AddrPortFrom(to.Addr(v6), 0).String()); err != nil {
			t.Fatal(err)
		}
	})
	defer l.Close()
	conn, err := from.Dial("tcp", netip.MustParseAddrPort(l.Addr().String()), 0)
	if err != nil {
		t.Fatal(err)
	}
	down, err = l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { down.Close() })
	return conn.Conn, down
}

// writeUntil writes numbers in a row until stop is closed, and closes the connection. It leaves the machine room for others: as fast as it
// can be it would fill the devices' queues, and datagrams would be lost there.
func writeUntil(t *testing.T, stop <-chan struct{}, up net.Conn) {
	defer up.Close()
	pace := time.NewTicker(time.Millisecond)
	defer pace.Stop()
	block := make([]byte, 1<<15)
	for n := uint64(0); ; {
		select {
		case <-stop:
			return
		case <-pace.C:
		}
		for i := 0; i < len(block); i += 8 {
			binary.BigEndian.PutUint64(block[i:], n)
			n++
		}
		if err := up.SetDeadline(time.Now().Add(streamTimeout)); err != nil {
			t.Error(err)
		}
		if _, err := up.Write(block); err != nil {
			t.Errorf("write number %d: %v", n, err)
			return
		}
	}
}

// readWritten reads what writeUntil has written, to its end.
func readWritten(t *testing.T, down net.Conn) {
	block := make([]byte, 1<<15)
	for n := uint64(0); ; {
		if err := down.SetDeadline(time.Now().Add(streamTimeout)); err != nil {
			t.Error(err)
		}
		if _, err := io.ReadFull(down, block); err != nil {
			if err != io.EOF || n == 0 {
				t.Errorf("read number %d: %v", n, err)
			}
			return
		}
		for i := 0; i < len(block); i, n = i+8, n+1 {
			if got := binary.BigEndian.Uint64(block[i:]); got != n {
				t.Errorf("number %d came in the place of %d", got, n)
				return
			}
		}
	}
}
