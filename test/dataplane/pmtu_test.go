// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/nodetest"
)

const (
	narrow = 1300 // MTU of a link that takes less than a pod may send

	transferLength = 4 << 20
	transferTime   = 10 * time.Second
)

func sysctl(t *testing.T, name, value string) {
	t.Helper()
	wantNoError(t, "sysctl "+name, os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0))
}

// narrowWayOut makes the network towards the client take less than pods may send. The client advertises the segment size of a wide one, so
// that only path MTU discovery keeps a connection going.
func narrowWayOut(t *testing.T, n *nodetest.Node) {
	t.Helper()
	ip(t, n.NS, "link set eth0 mtu 1300")
	ip(t, n.Client, `link set eth0 mtu 1300
		route replace 192.0.2.0/24 dev eth0 advmss 1460
		route replace 10.0.0.0/8 via 192.0.2.1 advmss 1460
		-6 route replace 2001:db8:1::/64 dev eth0 metric 256 advmss 1440
		-6 route replace fd00::/8 via 2001:db8:1::1 dev eth0 metric 1024 advmss 1440`)
}

// pathMTU is what a connected socket knows of its way.
func pathMTU(t *testing.T, c net.Conn) (mtu int) {
	t.Helper()
	v6 := netip.MustParseAddrPort(c.RemoteAddr().String()).Addr().Unmap().Is6()
	onSocket(t, c, func(fd int) (err error) {
		if v6 {
			mtu, err = unix.GetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_MTU)
		} else {
			mtu, err = unix.GetsockoptInt(fd, unix.SOL_IP, unix.IP_MTU)
		}
		return err
	})
	return mtu
}

func content() []byte { return bytes.Repeat([]byte("0123456789abcde\n"), transferLength/16) }

// send writes the content into a connection and returns the path MTU that its socket has learned.
func send(t *testing.T, c net.Conn) int {
	t.Helper()
	wantNoError(t, "deadline", c.SetDeadline(time.Now().Add(transferTime)))
	_, err := c.Write(content())
	wantNoError(t, "send", err)
	mtu := pathMTU(t, c)
	wantNoError(t, "close", c.(interface{ CloseWrite() error }).CloseWrite())
	return mtu
}

// transfer sends the content from one end of a connection to the other and returns the path MTU that the sender has learned.
func transfer(t *testing.T, from, to net.Conn) int {
	t.Helper()
	wantNoError(t, "deadline", to.SetDeadline(time.Now().Add(transferTime)))
	var got []byte
	var err error
	done := make(chan struct{})
	go func() { defer close(done); got, err = io.ReadAll(to) }()
	mtu := send(t, from)
	<-done
	if err != nil || !bytes.Equal(got, content()) {
		t.Errorf("received %d bytes, %v, want %d", len(got), err, transferLength)
	}
	return mtu
}

// listen opens a server in a namespace that serves one connection.
func listen(t *testing.T, ns *netnstest.NS, port string) *net.TCPListener {
	t.Helper()
	var l net.Listener
	ns.Do(func() {
		var err error
		l, err = net.Listen("tcp", ":"+port)
		wantNoError(t, "listen", err)
	})
	wantNoError(t, "deadline", l.(*net.TCPListener).SetDeadline(time.Now().Add(transferTime)))
	t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

// fetch has a client connect to an address, and the server behind it, at port 8080 of another namespace, send the content. Returned is the
// path MTU that the server has learned.
func fetch(t *testing.T, from *netnstest.NS, to netip.AddrPort, server *netnstest.NS) int {
	t.Helper()
	l := listen(t, server, "8080")
	defer l.Close()
	conn, err := nodetest.Dial(t, from, "tcp", to, 0)
	wantNoError(t, "connect", err)
	accepted, err := l.Accept()
	wantNoError(t, "accept", err)
	defer accepted.Close()
	return transfer(t, accepted, conn.Conn)
}

// Corner case A12: streams whose segments do not fit the node's way out, from a pod to outside and as the answer to a client of a
// NodePort. Segmentation is offloaded (GSO), so that a packet is many times the MTU and fits all the same once its segments do.
func TestRow12_StreamThroughNarrowWayOut(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	b := n.AddPod("b")
	addServices(n, b)
	narrowWayOut(t, n)
	families(t, func(t *testing.T, v6 bool) {
		before := n.AllDrops()["too_big"]
		l := listen(t, n.Client, "9000")
		up, err := nodetest.Dial(t, b.NS, "tcp", netip.AddrPortFrom(family(nodetest.ClientAddrs, v6), 9000), 0)
		wantNoError(t, "connect", err)
		accepted, err := l.Accept()
		wantNoError(t, "accept", err)
		defer accepted.Close()
		if got := transfer(t, up.Conn, accepted); got != narrow {
			t.Errorf("pod to outside: path MTU of its socket = %d, want %d", got, narrow)
		}
		outside := n.AllDrops()["too_big"]
		if outside == before {
			t.Error("pod to outside: nothing was too big")
		}
		// The pod knows the path MTU to the client by now; forgotten, the NodePort's stream has to find it.
		ip(t, b.NS, "route flush cache\n-6 route flush cache")
		got := fetch(t, n.Client, netip.AddrPortFrom(family(nodetest.NodeAddrs, v6), 30080), b.NS)
		if got != narrow {
			t.Errorf("answer of the NodePort: path MTU of the pod's socket = %d, want %d", got, narrow)
		}
		if n.AllDrops()["too_big"] == outside {
			t.Error("answer of the NodePort: nothing was too big")
		}
	})
}

// Corner case A12: a datagram that does not fit is answered when it is the flow's first packet, and when it is not.
func TestRow12_DatagramTooBig(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a := n.AddPod("a")
	nodetest.Serve(t, n.Client, "outside", 53)
	narrowWayOut(t, n)
	families(t, func(t *testing.T, v6 bool) {
		conn, err := nodetest.Dial(t, a.NS, "udp", netip.AddrPortFrom(family(nodetest.ClientAddrs, v6), 53), 0)
		wantNoError(t, "socket", err)
		option(t, conn, v6, unix.IP_MTU_DISCOVER, unix.IPV6_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
		for _, which := range []string{"first packet", "later packet"} {
			wantNoError(t, "deadline", conn.SetDeadline(time.Now().Add(nodetest.Timeout)))
			_, err := conn.Write(make([]byte, 1400))
			wantNoError(t, which, err)
			if n, err := conn.Read(make([]byte, 2000)); !errors.Is(err, unix.EMSGSIZE) {
				t.Fatalf("%s: read %d bytes, %v, want EMSGSIZE", which, n, err)
			}
			if got := pathMTU(t, conn); got != narrow {
				t.Errorf("%s: path MTU = %d, want %d", which, got, narrow)
			}
			if _, err := conn.Write(make([]byte, 1400)); !errors.Is(err, unix.EMSGSIZE) {
				t.Errorf("%s: sent again: %v, want EMSGSIZE", which, err)
			}
			got, err := conn.Ask()
			wantAnswer(t, "one that fits", got, err, "outside "+a.Addr(v6).String())
			ip(t, a.NS, "route flush cache\n-6 route flush cache")
		}
	})
}

// A sender that lets its packets be fragmented hears of the MTU, too, and lowers its own (toobig.h says why it has to).
func TestDatagramWithoutDFLowersPathMTU(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a := n.AddPod("a")
	nodetest.Serve(t, n.Client, "outside", 53)
	narrowWayOut(t, n)
	conn, err := nodetest.Dial(t, a.NS, "udp", netip.AddrPortFrom(nodetest.ClientAddrs[0], 53), 0)
	wantNoError(t, "socket", err)
	option(t, conn, false, unix.IP_MTU_DISCOVER, 0, unix.IP_PMTUDISC_DONT)
	for end := time.Now().Add(nodetest.Timeout); pathMTU(t, conn) != narrow; {
		if time.Now().After(end) {
			t.Fatalf("path MTU = %d, want %d", pathMTU(t, conn), narrow)
		}
		_, err := conn.Write(make([]byte, 1400))
		wantNoError(t, "send", err)
	}
}
