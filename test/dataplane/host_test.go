// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/pkg/bpf"
)

// clientKinds are the sockets that a process of the node asks by: a TCP connection, a UDP socket that is connected, one that is not.
var clientKinds = map[string]func(*testing.T, *netnstest.NS, netip.AddrPort) (string, error){
	"tcp": func(t *testing.T, ns *netnstest.NS, to netip.AddrPort) (string, error) {
		return nodetest.Ask(t, ns, "tcp", to)
	},
	"udp": func(t *testing.T, ns *netnstest.NS, to netip.AddrPort) (string, error) {
		return nodetest.Ask(t, ns, "udp", to)
	},
	"unconnected udp": func(t *testing.T, ns *netnstest.NS, to netip.AddrPort) (string, error) {
		return newUnconnected(t, ns, to.Addr().Is6()).ask(to)
	},
}

// unconnected is a UDP socket that names the destination with every datagram.
type unconnected struct{ *net.UDPConn }

func newUnconnected(t *testing.T, ns *netnstest.NS, v6 bool) unconnected {
	t.Helper()
	var c *net.UDPConn
	ns.Do(func() {
		var err error
		c, err = net.ListenUDP(map[bool]string{false: "udp4", true: "udp6"}[v6], nil)
		wantNoError(t, "open a UDP socket", err)
	})
	t.Cleanup(func() { c.Close() })
	return unconnected{c}
}

var errOtherSource = errors.New("the answer comes from another address than was asked")

func (u unconnected) ask(to netip.AddrPort) (string, error) {
	if err := u.SetDeadline(time.Now().Add(nodetest.Timeout)); err != nil {
		return "", err
	}
	if _, err := u.WriteToUDPAddrPort([]byte("who am I?"), to); err != nil {
		return "", err
	}
	buf := make([]byte, 256)
	n, from, err := u.ReadFromUDPAddrPort(buf)
	if err == nil && netip.AddrPortFrom(from.Addr().Unmap(), from.Port()) != to {
		err = errOtherSource
	}
	return string(buf[:n]), err
}

// hostService gives a service port a TCP and a UDP frontend in one family, with one backend each.
func hostService(n *nodetest.Node, id uint32, frontend, backend netip.AddrPort) {
	for _, proto := range protocols {
		n.AddService(id+uint32(proto), bpf.NewFrontendKey(proto, frontend.Addr(), frontend.Port()), backend)
	}
}

// nodePort is the address of frontends that are NodePorts.
func nodePort(v6 bool) netip.Addr {
	if v6 {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified()
}

func idOf(v6 bool) uint32 {
	if v6 {
		return 200
	}
	return 100
}

// Contract row V15: the node's own sockets reach a ClusterIP, whose backend is a pod of the node or the node itself.
func TestV15_HostToClusterIP(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	b := n.AddPod("b")
	n.ServeHost()
	nodetest.Serve(t, b.NS, "b", 8080)
	nodetest.Serve(t, n.NS, "host", 8081)
	families(t, func(t *testing.T, v6 bool) {
		node := family(n.Addrs, v6)
		toPod, toHost := netip.AddrPortFrom(family(vips, v6), 80), netip.AddrPortFrom(family(vips, v6), 81)
		hostService(n, idOf(v6), toPod, netip.AddrPortFrom(b.Addr(v6), 8080))
		hostService(n, idOf(v6)+20, toHost, netip.AddrPortFrom(node, 8081))
		for kind, ask := range clientKinds {
			got, err := ask(t, n.NS, toPod)
			wantAnswer(t, kind+" to a pod", got, err, "b "+node.String())
			got, err = ask(t, n.NS, toHost)
			wantAnswer(t, kind+" to the node itself", got, err, "host "+node.String())
		}
	})
}

// Contract rows V15 and V4: the backend is a pod on another node, or that node itself. It sees the asking node's own address.
func TestV15_HostToOtherNode(t *testing.T) {
	t.Parallel()
	for name, opts := range map[string]nodetest.ClusterOptions{"overlay": {}, "overlay over IPv6": {OuterV6: true}, "direct": {Direct: true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := nodetest.NewCluster(t, 2, opts)
			n0, n1 := c.Nodes[0], c.Nodes[1]
			b := n1.AddPod("b")
			n0.ServeHost()
			nodetest.Serve(t, b.NS, "b", 8080)
			nodetest.Serve(t, n1.NS, "host", 8081)
			families(t, func(t *testing.T, v6 bool) {
				node, vip := family(n0.Addrs, v6), family(vips, v6)
				backends := map[string]netip.AddrPort{"b": netip.AddrPortFrom(b.Addr(v6), 8080), "host": netip.AddrPortFrom(family(n1.Addrs, v6), 8081)}
				port := uint16(80)
				for server, backend := range backends {
					id := idOf(v6) + 40*uint32(port-80)
					hostService(n0, id, netip.AddrPortFrom(vip, port), backend)
					hostService(n0, id+20, netip.AddrPortFrom(nodePort(v6), 30000+port), backend)
					for kind, ask := range clientKinds {
						got, err := ask(t, n0.NS, netip.AddrPortFrom(vip, port))
						wantAnswer(t, kind+" to the ClusterIP, backend "+backend.String(), got, err, server+" "+node.String())
						got, err = ask(t, n0.NS, netip.AddrPortFrom(node, 30000+port))
						wantAnswer(t, kind+" to its own NodePort, backend "+backend.String(), got, err, server+" "+node.String())
						got, err = ask(t, n0.NS, netip.AddrPortFrom(localhost(v6), 30000+port))
						wantAnswer(t, kind+" to localhost, backend "+backend.String(), got, err, server+" "+node.String())
					}
					port++
				}
			})
		})
	}
}

func localhost(v6 bool) netip.Addr {
	if v6 {
		return netip.IPv6Loopback()
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1})
}

// Contract row V7: NodePorts on the node's own addresses and on localhost, asked by the node itself. The backend sees the node's address.
func TestV7_HostToNodePort(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	b := n.AddPod("b")
	n.ServeHost()
	nodetest.Serve(t, b.NS, "b", 8080)
	nodetest.Serve(t, n.NS, "host", 8081)
	nodetest.Serve(t, n.NS, "bare", 8082)
	families(t, func(t *testing.T, v6 bool) {
		node := family(n.Addrs, v6)
		hostService(n, idOf(v6), netip.AddrPortFrom(nodePort(v6), 30080), netip.AddrPortFrom(b.Addr(v6), 8080))
		hostService(n, idOf(v6)+20, netip.AddrPortFrom(nodePort(v6), 30081), netip.AddrPortFrom(node, 8081))
		for kind, ask := range clientKinds {
			for what, at := range map[string]netip.Addr{"own address": node, "localhost": localhost(v6)} {
				got, err := ask(t, n.NS, netip.AddrPortFrom(at, 30080))
				wantAnswer(t, kind+" to a pod by "+what, got, err, "b "+node.String())
				got, err = ask(t, n.NS, netip.AddrPortFrom(at, 30081))
				wantAnswer(t, kind+" to the node itself by "+what, got, err, "host "+node.String())
				got, err = ask(t, n.NS, netip.AddrPortFrom(at, 8082))
				wantAnswer(t, kind+" to no service by "+what, got, err, "bare "+at.String())
			}
		}
	})
}

// Contract row V2: addresses from outside the service range, which no device has, and one that a device of the node has.
func TestV2_HostToExternalAddresses(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	b := n.AddPod("b")
	external := []netip.Addr{netip.MustParseAddr("203.0.113.7"), netip.MustParseAddr("2001:db8:7::7")}
	onLink := []netip.Addr{netip.MustParseAddr("192.0.2.77"), netip.MustParseAddr("2001:db8:1::77")}
	n.ServeHost(append(external, onLink...)...)
	nodetest.Serve(t, b.NS, "b", 8080)
	families(t, func(t *testing.T, v6 bool) {
		node := family(n.Addrs, v6)
		for i, a := range []netip.Addr{family(external, v6), family(onLink, v6), node} {
			to := netip.AddrPortFrom(a, 443)
			hostService(n, idOf(v6)+20*uint32(i), to, netip.AddrPortFrom(b.Addr(v6), 8080))
			for kind, ask := range clientKinds {
				got, err := ask(t, n.NS, to)
				wantAnswer(t, kind+" to "+to.String(), got, err, "b "+node.String())
			}
		}
	})
}

// Contract rows V8 and V9: no endpoints, and a port that the service does not have, are refused, never EPERM and never silence.
func TestV8_HostIsRefused(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	n.ServeHost()
	addServices(n)
	families(t, func(t *testing.T, v6 bool) {
		for network := range protocols {
			for what, to := range map[string]netip.AddrPort{
				"the ClusterIP":                   netip.AddrPortFrom(family(vips, v6), 80),
				"a port that the service has not": netip.AddrPortFrom(family(vips, v6), 4711),
				"the NodePort":                    netip.AddrPortFrom(family(n.Addrs, v6), 30080),
				"the NodePort on localhost":       netip.AddrPortFrom(localhost(v6), 30080),
			} {
				if _, err := nodetest.Ask(t, n.NS, network, to); !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("%s to %s: %v, want ECONNREFUSED", network, what, err)
				}
			}
		}
	})
	drops := n.AllDrops()
	if drops["service_no_backend"] < 12 || drops["service_unknown_port"] < 4 {
		t.Errorf("drops = %v, want at least 12 service_no_backend and 4 service_unknown_port", drops)
	}
}

// removeBackend takes a backend out of a service, as the agent does.
func removeBackend(t *testing.T, n *nodetest.Node, id uint32, backend netip.AddrPort) {
	t.Helper()
	gone := bpf.NewServiceBackend(id, backend)
	wantNoError(t, "remove the backend", n.DP.Maps.ServiceBackends.Delete(&gone))
	wantNoError(t, "raise the service's epoch", n.DP.RaiseServiceEpochs(id))
}

// Contract rows U1 to U3, asked by the node itself with one socket all the time: it follows the backend that is replaced, connected or not, by
// whatever address, and is left alone while its backend serves.
func TestU3_HostUDPClientFollowsBackends(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	b, c := n.AddPod("b"), n.AddPod("c")
	n.ServeHost()
	nodetest.Serve(t, b.NS, "b", 8080)
	nodetest.Serve(t, c.NS, "c", 8080)
	families(t, func(t *testing.T, v6 bool) {
		node := family(n.Addrs, v6)
		onB, onC := netip.AddrPortFrom(b.Addr(v6), 8080), netip.AddrPortFrom(c.Addr(v6), 8080)
		for i, at := range []struct {
			frontend, to netip.AddrPort
		}{
			{netip.AddrPortFrom(family(vips, v6), 53), netip.AddrPortFrom(family(vips, v6), 53)},
			{netip.AddrPortFrom(nodePort(v6), 30053), netip.AddrPortFrom(node, 30053)},
			{netip.AddrPortFrom(nodePort(v6), 30054), netip.AddrPortFrom(localhost(v6), 30054)},
		} {
			id := idOf(v6) + uint32(i)
			frontend := bpf.NewFrontendKey(unix.IPPROTO_UDP, at.frontend.Addr(), at.frontend.Port())
			n.AddService(id, frontend, onB)
			conn, err := nodetest.Dial(t, n.NS, "udp", at.to, 0)
			wantNoError(t, "connect", err)
			free := newUnconnected(t, n.NS, v6)
			want := func(when, server string) {
				t.Helper()
				got, err := conn.Ask()
				wantAnswer(t, "connected, to "+at.to.String()+", "+when, got, err, server+" "+node.String())
				got, err = free.ask(at.to)
				wantAnswer(t, "unconnected, to "+at.to.String()+", "+when, got, err, server+" "+node.String())
			}
			want("first", "b")
			// c joins in b's place, b still serves: the flow stays.
			n.AddService(id, frontend, onC)
			wantNoError(t, "raise the service's epoch", n.DP.RaiseServiceEpochs(id))
			want("while b still serves", "b")
			removeBackend(t, n, id, onB)
			want("after b has left", "c")
			// Nobody serves: refused, and the socket lives on.
			n.AddService(id, frontend)
			removeBackend(t, n, id, onC)
			if _, err := conn.Ask(); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("to %s, without backends: %v, want ECONNREFUSED", at.to, err)
			}
			n.AddService(id, frontend, onB)
			want("when b is back", "b")
		}
	})
}
