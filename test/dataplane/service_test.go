// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/pkg/bpf"
)

var vips = []netip.Addr{netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("fd00:96::10")}

// protocols are those that real sockets of this kernel can carry.
var protocols = map[string]uint8{"tcp": unix.IPPROTO_TCP, "udp": unix.IPPROTO_UDP}

// addServices makes one service on the ClusterIP port 80 and one NodePort 30080, TCP and UDP, both families, with these pods' port 8080
// as backends. Returned are the service ids.
func addServices(n *nodetest.Node, pods ...*nodetest.Pod) (ids []uint32) {
	var backends [][]netip.Addr
	for _, p := range pods {
		backends = append(backends, p.Addrs)
	}
	return addServicesOn(n, 8080, backends...)
}

// addServicesOn is addServices with this port of these backends, each with an IPv4 and an IPv6 address.
func addServicesOn(n *nodetest.Node, port uint16, addrs ...[]netip.Addr) (ids []uint32) {
	unspecified := []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
	id := uint32(0)
	for _, proto := range protocols {
		for i, vip := range vips {
			var backends []netip.AddrPort
			for _, pair := range addrs {
				backends = append(backends, netip.AddrPortFrom(pair[i], port))
			}
			n.AddService(id+1, bpf.NewFrontendKey(proto, vip, 80), backends...)
			n.AddService(id+2, bpf.NewFrontendKey(proto, unspecified[i], 30080), backends...)
			ids = append(ids, id+1, id+2)
			id += 2
		}
	}
	return ids
}

func TestPodToClusterIP(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a, b, c := n.AddPod("a"), n.AddPod("b"), n.AddPod("c")
	nodetest.Serve(t, b.NS, "b", 8080)
	nodetest.Serve(t, c.NS, "c", 8080)
	addServices(n, b, c)
	families(t, func(t *testing.T, v6 bool) {
		for network := range protocols {
			seen := map[string]int{}
			for range 40 {
				got, err := nodetest.Ask(t, a.NS, network, netip.AddrPortFrom(family(vips, v6), 80))
				name, from, _ := strings.Cut(got, " ")
				if err != nil || from != a.Addr(v6).String() {
					t.Fatalf("%s to the ClusterIP = %q, %v, want the client %s", network, got, err, a.Addr(v6))
				}
				seen[name]++
			}
			// Both backends are missed by 40 random choices once in 2^39 runs.
			if seen["b"] == 0 || seen["c"] == 0 || len(seen) != 2 {
				t.Errorf("%s answers came from %v, want both b and c", network, seen)
			}
		}
	})
}

func TestNodePortKeepsClientAddress(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	b := n.AddPod("b")
	nodetest.Serve(t, b.NS, "b", 8080)
	addServices(n, b)
	families(t, func(t *testing.T, v6 bool) {
		for network := range protocols {
			got, err := nodetest.Ask(t, n.Client, network, netip.AddrPortFrom(family(nodetest.NodeAddrs, v6), 30080))
			wantAnswer(t, network+" to the NodePort", got, err, "b "+family(nodetest.ClientAddrs, v6).String())
		}
	})
}

func TestPodToNodePort(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a, b := n.AddPod("a"), n.AddPod("b")
	nodetest.Serve(t, b.NS, "b", 8080)
	addServices(n, b)
	families(t, func(t *testing.T, v6 bool) {
		for network := range protocols {
			got, err := nodetest.Ask(t, a.NS, network, netip.AddrPortFrom(family(nodetest.NodeAddrs, v6), 30080))
			wantAnswer(t, network+" to the NodePort", got, err, "b "+a.Addr(v6).String())
		}
	})
}

// Contract row V12: a pod reaches itself through a service, and sees the service address as its client.
func TestV12_Hairpin(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	b := n.AddPod("b")
	nodetest.Serve(t, b.NS, "b", 8080)
	addServices(n, b)
	families(t, func(t *testing.T, v6 bool) {
		for network := range protocols {
			got, err := nodetest.Ask(t, b.NS, network, netip.AddrPortFrom(family(vips, v6), 80))
			wantAnswer(t, network+" to itself", got, err, "b "+family(vips, v6).String())
			got, err = nodetest.Ask(t, b.NS, network, netip.AddrPortFrom(family(nodetest.NodeAddrs, v6), 30080))
			wantAnswer(t, network+" to itself by NodePort", got, err, "b "+family(nodetest.NodeAddrs, v6).String())
		}
	})
}

// Contract row V8: no endpoints means refused, at once, from a pod and from outside.
func TestV8_NoEndpointsRejects(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a := n.AddPod("a")
	addServices(n)
	families(t, func(t *testing.T, v6 bool) {
		for network := range protocols {
			_, err := nodetest.Ask(t, a.NS, network, netip.AddrPortFrom(family(vips, v6), 80))
			if !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("%s to the ClusterIP from a pod: %v, want ECONNREFUSED", network, err)
			}
			_, err = nodetest.Ask(t, n.Client, network, netip.AddrPortFrom(family(nodetest.NodeAddrs, v6), 30080))
			if !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("%s to the NodePort from outside: %v, want ECONNREFUSED", network, err)
			}
		}
	})
	if got := n.AllDrops()["service_no_backend"]; got < 8 {
		t.Errorf("service_no_backend counted %d times, want at least 8", got)
	}
}

// Contract row U1: a UDP client whose backend left moves on with its next datagram; one whose backend stays is left alone.
func TestU1_UDPClientFollowsBackends(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a, b, c := n.AddPod("a"), n.AddPod("b"), n.AddPod("c")
	nodetest.Serve(t, b.NS, "b", 8080)
	nodetest.Serve(t, c.NS, "c", 8080)
	families(t, func(t *testing.T, v6 bool) {
		i, frontend := uint32(1), bpf.NewFrontendKey(unix.IPPROTO_UDP, family(vips, v6), 53)
		if v6 {
			i = 2
		}
		onB, onC := netip.AddrPortFrom(b.Addr(v6), 8080), netip.AddrPortFrom(c.Addr(v6), 8080)
		n.AddService(i, frontend, onB)
		conn, err := nodetest.Dial(t, a.NS, "udp", netip.AddrPortFrom(family(vips, v6), 53), 5353)
		if err != nil {
			t.Fatal(err)
		}
		got, err := conn.Ask()
		wantAnswer(t, "first", got, err, "b "+a.Addr(v6).String())

		// c joins in b's place, b still serves: the flow stays.
		n.AddService(i, frontend, onC)
		if err := n.DP.RaiseServiceEpochs(i); err != nil {
			t.Fatal(err)
		}
		got, err = conn.Ask()
		wantAnswer(t, "while b still serves", got, err, "b "+a.Addr(v6).String())

		gone := bpf.NewServiceBackend(i, onB)
		if err := n.DP.Maps.ServiceBackends.Delete(&gone); err != nil {
			t.Fatal(err)
		}
		if err := n.DP.RaiseServiceEpochs(i); err != nil {
			t.Fatal(err)
		}
		got, err = conn.Ask()
		wantAnswer(t, "after b has left", got, err, "c "+a.Addr(v6).String())
	})
}

// Corner case A10: one client port to one backend, by two service addresses and directly. The second gets another port, not another
// address.
func TestPortCollisionChangesPortOnly(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	b := n.AddPod("b")
	nodetest.Serve(t, b.NS, "b", 8080)
	addServices(n, b)
	second := []netip.Addr{netip.MustParseAddr("10.96.0.11"), netip.MustParseAddr("fd00:96::11")}
	families(t, func(t *testing.T, v6 bool) {
		id := uint32(100)
		if v6 {
			id = 200
		}
		for network, proto := range protocols {
			n.AddService(id+uint32(proto), bpf.NewFrontendKey(proto, family(second, v6), 80), netip.AddrPortFrom(b.Addr(v6), 8080))
			a := n.AddPod("a" + network + map[bool]string{false: "4", true: "6"}[v6])
			var conns []*nodetest.Conn
			for _, to := range []netip.AddrPort{
				netip.AddrPortFrom(family(vips, v6), 80), netip.AddrPortFrom(family(second, v6), 80), netip.AddrPortFrom(b.Addr(v6), 8080),
			} {
				conn, err := nodetest.Dial(t, a.NS, network, to, 4000)
				if err != nil {
					t.Fatalf("%s to %s: %v", network, to, err)
				}
				conns = append(conns, conn)
			}
			for range 2 {
				for _, conn := range conns {
					got, err := conn.Ask()
					wantAnswer(t, network+" to "+conn.RemoteAddr().String(), got, err, "b "+a.Addr(v6).String())
				}
			}
		}
	})
}
