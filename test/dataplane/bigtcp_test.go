// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/nodetest"
)

// legacyGSO is the largest packet of several segments without BIG TCP, in bytes.
const legacyGSO = 65536

// enlarge lets the TCP of a namespace's eth0 make packets of 256 KiB, and says whether the kernel does so for a family.
func enlarge(t *testing.T, ns *netnstest.NS) (big func(v6 bool) bool) {
	t.Helper()
	var attrs *netlink.LinkAttrs
	ns.Do(func() {
		eth0, err := netlink.LinkByName("eth0")
		wantNoError(t, "find eth0", err)
		wantNoError(t, "set sizes", errors.Join(netlink.LinkSetGSOMaxSize(eth0, 4*legacyGSO), netlink.LinkSetGSOIPv4MaxSize(eth0, 4*legacyGSO)))
		eth0, err = netlink.LinkByName("eth0")
		wantNoError(t, "find eth0", err)
		attrs = eth0.Attrs()
	})
	if attrs.GSOMaxSize != 4*legacyGSO {
		t.Fatalf("gso_max_size = %d, want %d", attrs.GSOMaxSize, 4*legacyGSO)
	}
	return func(v6 bool) bool { return v6 || attrs.GSOIPv4MaxSize == 4*legacyGSO } // IPv4: kernel 6.3
}

// largest listens to all that a namespace's eth0 receives until it is asked for the length of the largest packet, in bytes.
func largest(t *testing.T, ns *netnstest.NS) (stop func() int) {
	t.Helper()
	var fd int
	ns.Do(func() {
		var err error
		const allProtocols = unix.ETH_P_ALL<<8 | unix.ETH_P_ALL>>8 // network byte order
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, allProtocols)
		wantNoError(t, "packet socket", err)
	})
	wantNoError(t, "set timeout", unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 200000}))
	found, quit := make(chan int, 1), make(chan struct{})
	go func() {
		length, buf := 0, make([]byte, 1)
		for {
			n, _, err := unix.Recvfrom(fd, buf, unix.MSG_TRUNC)
			length = max(length, n)
			select {
			case <-quit:
				if err != nil {
					found <- length
					return
				}
			default:
			}
		}
	}()
	return func() int {
		close(quit)
		defer unix.Close(fd)
		return <-found
	}
}

// Packets beyond 64 KiB go from pod to pod as they are, by address and by service; where the way ahead takes no such packets, the kernel cuts
// them, and the programs, which see them whole, let them pass: their segments fit.
func TestBigTCP(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a, b := n.AddPod("a"), n.AddPod("b")
	addServices(n, b)
	big := enlarge(t, a.NS)
	enlarge(t, b.NS)
	families(t, func(t *testing.T, v6 bool) {
		for name, way := range map[string]struct {
			from, to *netnstest.NS // the content's way
			at       netip.AddrPort
			whole    bool
		}{
			"pod to pod":          {a.NS, b.NS, netip.AddrPortFrom(b.Addr(v6), 8080), big(v6)},
			"pod to ClusterIP":    {a.NS, b.NS, netip.AddrPortFrom(family(vips, v6), 80), big(v6)},
			"pod to outside":      {a.NS, n.Client, netip.AddrPortFrom(family(nodetest.ClientAddrs, v6), 8080), false},
			"outside to NodePort": {n.Client, b.NS, netip.AddrPortFrom(family(nodetest.NodeAddrs, v6), 30080), false},
		} {
			once := func(t *testing.T) int {
				l := listen(t, way.to, "8080")
				defer l.Close()
				up, err := nodetest.Dial(t, way.from, "tcp", way.at, 0)
				wantNoError(t, "connect", err)
				accepted, err := l.Accept()
				wantNoError(t, "accept", err)
				defer accepted.Close()
				there := largest(t, way.to)
				if mtu := transfer(t, up.Conn, accepted); mtu != 1500 {
					t.Errorf("path MTU of the sender = %d, want 1500", mtu)
				}
				return there()
			}
			t.Run(name, func(t *testing.T) {
				got := once(t)
				// How much TCP puts into a packet is its own affair, and on a busy machine it may not come to that much.
				for range 4 {
					if way.whole && got <= legacyGSO {
						got = once(t)
					}
				}
				if (got > legacyGSO) != way.whole {
					t.Errorf("largest packet received = %d bytes, want beyond 64 KiB: %v", got, way.whole)
				}
			})
		}
		// And the answers: the server sends.
		fetch(t, n.Client, netip.AddrPortFrom(family(nodetest.NodeAddrs, v6), 30080), b.NS)
	})
	if got := n.AllDrops()["too_big"]; got != 0 {
		t.Errorf("%d packets were taken for too big", got)
	}
}

// To another node, routed or through the overlay, the kernel cuts them before it encapsulates.
func TestBigTCPToAnotherNode(t *testing.T) {
	t.Parallel()
	ways := append(slices.Clone(outers), struct {
		name string
		opts nodetest.ClusterOptions
		mtu  int
	}{"direct", nodetest.ClusterOptions{Direct: true}, 1500})
	for _, way := range ways {
		t.Run(way.name, func(t *testing.T) {
			t.Parallel()
			c := nodetest.NewCluster(t, 2, way.opts)
			a, b := c.Nodes[0].AddPod("a"), c.Nodes[1].AddPod("b")
			for _, p := range []*nodetest.Pod{a, b} {
				ip(t, p.NS, fmt.Sprintf("link set eth0 mtu %d", way.mtu))
				enlarge(t, p.NS)
			}
			families(t, func(t *testing.T, v6 bool) {
				l := listen(t, b.NS, "8080")
				defer l.Close()
				up, err := nodetest.Dial(t, a.NS, "tcp", netip.AddrPortFrom(b.Addr(v6), 8080), 0)
				wantNoError(t, "connect", err)
				accepted, err := l.Accept()
				wantNoError(t, "accept", err)
				defer accepted.Close()
				there := largest(t, b.NS)
				if mtu := transfer(t, up.Conn, accepted); mtu != way.mtu {
					t.Errorf("path MTU of the sender = %d, want %d", mtu, way.mtu)
				}
				if got := there(); got > legacyGSO {
					t.Errorf("largest packet received = %d bytes, want at most 64 KiB", got)
				}
			})
			for i, n := range c.Nodes {
				if got := n.AllDrops()["too_big"]; got != 0 {
					t.Errorf("node %d took %d packets for too big", i, got)
				}
			}
		})
	}
}
