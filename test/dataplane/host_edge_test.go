// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/pkg/bpf"
)

// Large messages, both ways and in both protocols: what does not fit the overlay is segmented, or the sender is told and fragments.
func TestV15_HostLargeMessages(t *testing.T) {
	t.Parallel()
	c := nodetest.NewCluster(t, 2, nodetest.ClusterOptions{})
	n0, n1 := c.Nodes[0], c.Nodes[1]
	local, remote := n0.AddPod("l"), n1.AddPod("r")
	n0.ServeHost()
	echo(t, local.NS, 8080)
	echo(t, remote.NS, 8080)
	echo(t, n0.NS, 8081)
	families(t, func(t *testing.T, v6 bool) {
		node, vip := family(n0.Addrs, v6), family(vips, v6)
		for i, backend := range []netip.AddrPort{
			netip.AddrPortFrom(local.Addr(v6), 8080), netip.AddrPortFrom(remote.Addr(v6), 8080), netip.AddrPortFrom(node, 8081),
		} {
			port, id := uint16(80+i), idOf(v6)+40*uint32(i)
			hostService(n0, id, netip.AddrPortFrom(vip, port), backend)
			hostService(n0, id+20, netip.AddrPortFrom(nodePort(v6), 30000+port), backend)
			for _, to := range []netip.AddrPort{
				netip.AddrPortFrom(vip, port), netip.AddrPortFrom(node, 30000+port), netip.AddrPortFrom(localhost(v6), 30000+port),
			} {
				wantNoError(t, "1 MiB by tcp to "+to.String(), exchange(t, n0.NS, "tcp", to, 1<<20, 1))
				// The first datagram may be what teaches the sender the path MTU, and its socket is told.
				err := exchange(t, n0.NS, "udp", to, 8000, 6)
				// Linux knows no path MTU towards an IPv4 address of its own: there the sender can only be told.
				if !v6 && to.Addr() == node && backend.Addr() == remote.Addr(v6) {
					if !errors.Is(err, unix.EMSGSIZE) {
						t.Errorf("8000 bytes by udp to %s: %v, want EMSGSIZE", to, err)
					}
					continue
				}
				wantNoError(t, "8000 bytes by udp to "+to.String(), err)
			}
		}
	})
}

// echo sends back what it gets, on TCP and UDP, until the test ends.
func echo(t *testing.T, ns *netnstest.NS, port int) {
	t.Helper()
	var tcp net.Listener
	var udp *net.UDPConn
	ns.Do(func() {
		var err error
		tcp, err = net.ListenTCP("tcp", &net.TCPAddr{Port: port})
		wantNoError(t, "listen", err)
		udp, err = net.ListenUDP("udp", &net.UDPAddr{Port: port})
		wantNoError(t, "open a UDP socket", err)
	})
	t.Cleanup(func() { tcp.Close(); udp.Close() })
	go func() {
		for {
			c, err := tcp.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); _, _ = io.Copy(c, c) }() // its end is the client's to judge
		}
	}()
	go func() {
		buf := make([]byte, 64<<10)
		for {
			n, from, err := udp.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			_, _ = udp.WriteToUDPAddrPort(buf[:n], from) // a lost answer fails the test
		}
	}()
}

// exchange sends size bytes and wants them back, in so many attempts.
func exchange(t *testing.T, ns *netnstest.NS, network string, to netip.AddrPort, size, attempts int) error {
	t.Helper()
	c, err := nodetest.Dial(t, ns, network, to, 0)
	if err != nil {
		return err
	}
	defer c.Close()
	sent, got := bytes.Repeat([]byte("0123456789abcdef"), size/16), make([]byte, size)
	for range attempts {
		deadline := nodetest.Timeout
		if network == "tcp" {
			deadline = 20 * time.Second
		}
		wantNoError(t, "set the deadline", c.SetDeadline(time.Now().Add(deadline)))
		if network == "tcp" {
			go func() { _, _ = c.Write(sent) }() // what is not sent does not come back
			_, err = io.ReadFull(c, got)
		} else if _, err = c.Write(sent); err == nil {
			_, err = c.Read(got)
		}
		if err == nil {
			break
		}
	}
	if err == nil && !bytes.Equal(sent, got) {
		return errors.New("other bytes came back")
	}
	return err
}

// Corner case A11 for the node itself: the backend is the node, and nobody listens there. The error names the service.
func TestV15_HostBackendIsClosed(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	n.ServeHost()
	families(t, func(t *testing.T, v6 bool) {
		node := family(n.Addrs, v6)
		hostService(n, idOf(v6), netip.AddrPortFrom(family(vips, v6), 80), netip.AddrPortFrom(node, 8081))
		hostService(n, idOf(v6)+20, netip.AddrPortFrom(nodePort(v6), 30080), netip.AddrPortFrom(node, 8081))
		for network := range protocols {
			for _, to := range []netip.AddrPort{
				netip.AddrPortFrom(family(vips, v6), 80), netip.AddrPortFrom(node, 30080), netip.AddrPortFrom(localhost(v6), 30080),
			} {
				if _, err := nodetest.Ask(t, n.NS, network, to); !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("%s to %s: %v, want ECONNREFUSED", network, to, err)
				}
			}
		}
	})
}

// Corner case A10 for the node itself: one source port to one backend, by two service addresses, by NodePort and directly.
func TestV15_HostPortCollision(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	b := n.AddPod("b")
	n.ServeHost()
	nodetest.Serve(t, b.NS, "b", 8080)
	nodetest.Serve(t, n.NS, "host", 8080)
	second := []netip.Addr{netip.MustParseAddr("10.96.0.11"), netip.MustParseAddr("fd00:96::11")}
	families(t, func(t *testing.T, v6 bool) {
		node := family(n.Addrs, v6)
		for i, server := range []string{"b", "host"} {
			backend := netip.AddrPortFrom(map[string]netip.Addr{"b": b.Addr(v6), "host": node}[server], 8080)
			id, port := idOf(v6)+60*uint32(i), uint16(80+i)
			hostService(n, id, netip.AddrPortFrom(family(vips, v6), port), backend)
			hostService(n, id+20, netip.AddrPortFrom(family(second, v6), port), backend)
			hostService(n, id+40, netip.AddrPortFrom(nodePort(v6), 30000+port), backend)
			addresses := []netip.AddrPort{
				netip.AddrPortFrom(family(vips, v6), port), netip.AddrPortFrom(family(second, v6), port), netip.AddrPortFrom(node, 30000+port), backend,
			}
			for turn := range 4 {
				network := []string{"tcp", "udp"}[turn%2]
				if turn == 2 {
					slices.Reverse(addresses) // directly first: then Margay knows nothing of that flow yet
				}
				var conns []*nodetest.Conn
				for _, to := range addresses {
					conn, err := nodetest.Dial(t, n.NS, network, to, 4000+10*turn+i)
					if err != nil {
						t.Fatalf("%s to %s: %v", network, to, err)
					}
					conns = append(conns, conn)
				}
				for range 2 {
					for _, conn := range conns {
						got, err := conn.Ask()
						wantAnswer(t, network+" to "+conn.RemoteAddr().String(), got, err, server+" "+node.String())
					}
				}
			}
		}
	})
}

// Corner case C33: sockets of the kernel itself. A VXLAN device sends from one, and never calls connect.
func TestV15_KernelSocketToClusterIP(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	b := n.AddPod("b")
	n.ServeHost()
	families(t, func(t *testing.T, v6 bool) {
		vip := family(vips, v6)
		hostService(n, idOf(v6), netip.AddrPortFrom(vip, 4789), netip.AddrPortFrom(b.Addr(v6), 4790))
		var server *net.UDPConn
		b.NS.Do(func() {
			var err error
			server, err = net.ListenUDP("udp", &net.UDPAddr{Port: 4790})
			wantNoError(t, "open a UDP socket", err)
		})
		defer server.Close()
		var mac net.HardwareAddr
		device := "vx" + map[bool]string{false: "4", true: "6"}[v6]
		n.NS.Do(func() {
			attrs := netlink.NewLinkAttrs()
			attrs.Name = device
			vx := &netlink.Vxlan{LinkAttrs: attrs, VxlanId: 42, Group: vip.AsSlice(), Port: 4789, Learning: true}
			wantNoError(t, "make a VXLAN device", netlink.LinkAdd(vx))
			l, err := netlink.LinkByName(device)
			wantNoError(t, "look it up", err)
			wantNoError(t, "bring it up", netlink.LinkSetUp(l))
			mac = l.Attrs().HardwareAddr
		})
		newWireOn(t, n.NS, device).send(pkt.Packet{Kind: pkt.UDP, TTL: 64, SrcMAC: mac, DstMAC: net.HardwareAddr{2, 0, 0, 0, 0, 9},
			Src: netip.MustParseAddrPort("198.51.100.1:1"), Dst: netip.MustParseAddrPort("198.51.100.2:2"), Payload: []byte("from the kernel")}.Bytes())
		buf := make([]byte, 2048)
		for {
			wantNoError(t, "set the deadline", server.SetDeadline(time.Now().Add(nodetest.Timeout)))
			size, from, err := server.ReadFromUDPAddrPort(buf)
			if err != nil {
				t.Errorf("what the VXLAN device sent did not arrive: %v", err)
				return
			}
			// The device sends discovery messages, too.
			if bytes.Contains(buf[:size], []byte("from the kernel")) {
				if from.Addr().Unmap() != family(n.Addrs, v6) {
					t.Errorf("it came from %s, want %s", from.Addr().Unmap(), family(n.Addrs, v6))
				}
				return
			}
		}
	})
}

// Contract rows V10 and V11 for the node itself: it is a client like any other, by its address.
func TestV11_HostAffinityAndSourceRanges(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	balancers := []netip.Addr{netip.MustParseAddr("203.0.113.10"), netip.MustParseAddr("2001:db8:7::10")}
	n.ServeHost(balancers...)
	var pods []*nodetest.Pod
	for _, name := range []string{"b", "c", "d"} {
		p := n.AddPod(name)
		nodetest.Serve(t, p.NS, name, 8080)
		pods = append(pods, p)
	}
	id := uint32(0)
	families(t, func(t *testing.T, v6 bool) {
		for network, proto := range protocols {
			id++
			var backends []netip.AddrPort
			for _, p := range pods {
				backends = append(backends, netip.AddrPortFrom(p.Addr(v6), 8080))
			}
			node := family(n.Addrs, v6)
			frontends := []bpf.FrontendKey{
				bpf.NewFrontendKey(proto, family(vips, v6), 80), bpf.NewFrontendKey(proto, nodePort(v6), 30080), bpf.NewFrontendKey(proto, family(balancers, v6), 80),
			}
			for _, k := range frontends {
				n.AddService(id, k, backends...)
				change(t, n, k, func(s *bpf.Service) { s.Affinity = 60 })
			}
			change(t, n, frontends[2], func(s *bpf.Service) { s.Flags |= bpf.ServiceSourceRanges })
			balancer := netip.AddrPortFrom(family(balancers, v6), 80)
			if got, err := nodetest.Ask(t, n.NS, network, balancer); err == nil {
				t.Errorf("%s by the load balancer address from outside its source ranges: %q, want no answer", network, got)
			}
			n.Put(n.DP.Maps.SourceRanges, bpf.NewSourceRangeKey(id, netip.PrefixFrom(node, node.BitLen())), uint32(1))
			// By chance one of three would answer twelve times in a row once in 177 147 runs.
			seen := answers(t, n.NS, network, 12, netip.AddrPortFrom(family(vips, v6), 80), netip.AddrPortFrom(node, 30080), balancer)
			if len(seen) != 1 {
				t.Errorf("%s with affinity: answered by %v, want one pod", network, seen)
			}
		}
	})
	if n.AllDrops()["source_range"] < 4 {
		t.Errorf("drops = %v, want at least 4 source_range", n.AllDrops())
	}
}
