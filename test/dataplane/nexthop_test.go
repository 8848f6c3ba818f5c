// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/flow"
)

// neighbour is a permanent neighbour of a node, which nobody is: what is sent to it is seen by its MAC.
type neighbour struct {
	addr netip.Addr
	mac  net.HardwareAddr
}

// addNeighbour gives the node a neighbour behind its device, with this address.
func addNeighbour(t *testing.T, n *nodetest.Node, a netip.Addr) neighbour {
	t.Helper()
	b := a.As16()
	nb := neighbour{a, net.HardwareAddr{2, 0, 0, 0, b[0], b[15]}}
	n.NS.Do(func() {
		wantNoError(t, "add a neighbour", netlink.NeighSet(&netlink.Neigh{
			LinkIndex: n.ClientDevice, State: netlink.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: nb.mac,
		}))
	})
	return nb
}

// routeBy replaces the node's route to the network by one with these gateways; none: on the link.
func routeBy(t *testing.T, n *nodetest.Node, to netip.Prefix, gateways ...neighbour) {
	t.Helper()
	r := netlink.Route{Dst: &net.IPNet{IP: to.Addr().AsSlice(), Mask: net.CIDRMask(to.Bits(), to.Addr().BitLen())}}
	var hops []*netlink.NexthopInfo
	for _, g := range gateways {
		h := &netlink.NexthopInfo{LinkIndex: n.ClientDevice, Gw: g.addr.AsSlice()}
		if g.addr.Is6() && to.Addr().Is4() {
			h.Gw, h.Via = nil, &netlink.Via{AddrFamily: unix.AF_INET6, Addr: g.addr.AsSlice()}
		}
		hops = append(hops, h)
	}
	switch len(hops) {
	case 0:
		r.LinkIndex, r.Scope = n.ClientDevice, netlink.SCOPE_LINK
	case 1:
		r.LinkIndex, r.Gw, r.Via = n.ClientDevice, hops[0].Gw, hops[0].Via
	default:
		r.MultiPath = hops
	}
	n.NS.Do(func() {
		// IPv6 adds to what is there.
		_ = netlink.RouteDel(&netlink.Route{Dst: r.Dst})
		wantNoError(t, "replace the route", netlink.RouteReplace(&r))
	})
}

// receiver returns the MAC to which the frame with these bytes was sent, nil if none comes.
func (w *wire) receiver(what string) net.HardwareAddr {
	buf := make([]byte, 4000)
	for end := time.Now().Add(time.Second); time.Now().Before(end); {
		if n, _, err := unix.Recvfrom(w.fd, buf, 0); err == nil && bytes.Contains(buf[:n], []byte(what)) {
			return net.HardwareAddr(bytes.Clone(buf[:6]))
		}
	}
	return nil
}

// sender is a pod's UDP socket that sends to outside, where nobody answers.
type sender struct {
	t    *testing.T
	n    *nodetest.Node
	wire *wire
	*nodetest.Conn
	to    netip.Addr
	count int
}

func newSender(t *testing.T, n *nodetest.Node, w *wire, pod *nodetest.Pod, to netip.Addr) *sender {
	t.Helper()
	conn, err := nodetest.Dial(t, pod.NS, "udp", netip.AddrPortFrom(to, 7000), 0)
	wantNoError(t, "dial", err)
	return &sender{t: t, n: n, wire: w, Conn: conn, to: to}
}

// next sends a datagram and returns to whom it was sent.
func (s *sender) next() string {
	s.t.Helper()
	s.count++
	text := fmt.Sprintf("datagram %d to %s.", s.count, s.to)
	_, err := s.Write([]byte(text))
	wantNoError(s.t, "send", err)
	return s.wire.receiver(text).String()
}

// entry is the flow's.
func (s *sender) entry() (key bpf.FlowKey, out bpf.Flow) {
	s.t.Helper()
	found := false
	wantNoError(s.t, "read the flows", flow.Entries(s.n.DP.Maps.Flows, func(k bpf.FlowKey, f bpf.Flow) bool {
		if k.Destination().Addr() == s.to {
			key, out, found = k, f, true
		}
		return !found
	}))
	if !found {
		s.t.Fatalf("no flow to %s", s.to)
	}
	return key, out
}

func (s *sender) put(k bpf.FlowKey, f bpf.Flow) {
	s.t.Helper()
	wantNoError(s.t, "change the entry", s.n.DP.Maps.Flows.Put(k, f))
}

// wantSoon requires that the flow's packets go to the neighbour within a few of the programs' ticks, and that its entry knows that.
func (s *sender) wantSoon(what string, to neighbour) {
	s.t.Helper()
	var got string
	for end := time.Now().Add(4 * time.Second); time.Now().Before(end); {
		got = s.next()
		if _, f := s.entry(); got == to.mac.String() && f.Backend == bpf.NewAddr(to.addr) {
			return
		}
	}
	_, f := s.entry()
	s.t.Errorf("%s: sent to %s, next hop of the entry %s, want %s, %s", what, got, f.Backend.Netip(), to.mac, to.addr)
}

// TestNextHop: a flow's packets go to the next hop that its entry remembers, and to another one soon after the routes have changed, with
// nobody there to say so.
func TestNextHop(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	pod, w := n.AddPod("a"), newWire(t, n.Client)
	families(t, func(t *testing.T, v6 bool) {
		outside := netip.MustParsePrefix(map[bool]string{false: "203.0.113.0/24", true: "2001:db8:99::/64"}[v6])
		a := outside.Addr().Next()
		node := family(nodetest.NodeAddrs, v6)
		third := node.Next()
		for range 5 {
			third = third.Next()
		}
		one, other := addNeighbour(t, n, third), addNeighbour(t, n, third.Next())
		ways := map[string]struct {
			before []neighbour // gateways; none: on the link
			first  neighbour
		}{
			"by a gateway": {[]neighbour{one}, one},
			"on the link":  {nil, addNeighbour(t, n, a)},
		}
		if !v6 {
			of6 := addNeighbour(t, n, netip.MustParseAddr("2001:db8:1::77"))
			ways["by a gateway of the other family"] = struct {
				before []neighbour
				first  neighbour
			}{[]neighbour{of6}, of6}
		}
		for name, tt := range ways {
			routeBy(t, n, outside, tt.before...)
			s := newSender(t, n, w, pod, a)
			if got := s.next(); got != tt.first.mac.String() {
				t.Errorf("%s: first packet to %s, want %s", name, got, tt.first.mac)
			}
			s.wantSoon(name, tt.first)
			// What is remembered is what is used. Between reading and sending a tick may pass: then it is looked up again.
			used := false
			for range 10 {
				k, f := s.entry()
				f.Backend = bpf.NewAddr(other.addr)
				s.put(k, f)
				if used = s.next() == other.mac.String(); used {
					break
				}
			}
			if !used {
				t.Errorf("%s: the entry's next hop is not used", name)
			}
			s.wantSoon(name+", wrong next hop", tt.first)
			// An entry that has been idle is believed nothing.
			k, f := s.entry()
			f.Backend, f.Tick = bpf.NewAddr(other.addr), f.Tick-100
			s.put(k, f)
			if got := s.next(); got != tt.first.mac.String() {
				t.Errorf("%s: first packet after a pause to %s, want %s", name, got, tt.first.mac)
			}
			// As the programs before next hops have written it.
			f.Backend = bpf.Addr{}
			s.put(k, f)
			if got := s.next(); got != tt.first.mac.String() {
				t.Errorf("%s: without a next hop to %s, want %s", name, got, tt.first.mac)
			}
			s.wantSoon(name+", without next hop", tt.first)
			// No xfrm policy is asked about a flow whose next hop is known: docs/design/0001-flow-table.md.
			if name == "by a gateway" {
				block := "xfrm policy %s dir out src " + pod.Addr(v6).String() + " dst " + a.String()
				ip(t, n.NS, fmt.Sprintf(block+" action block", "add"))
				s.wantSoon(name+", blocked by xfrm", tt.first)
				ip(t, n.NS, fmt.Sprintf(block, "delete"))
			}
			routeBy(t, n, outside, other)
			s.wantSoon(name+", another gateway", other)
			s.Close()
			wantNoError(t, "forget the flow", n.DP.Maps.Flows.Delete(k))
		}
		// Two gateways: every flow stays with one of them.
		routeBy(t, n, outside, one, other)
		used := map[string]int{}
		for range 32 {
			a = a.Next()
			s := newSender(t, n, w, pod, a)
			first := s.next()
			used[first]++
			if again := s.next(); again != first {
				t.Errorf("two gateways: a flow's second packet to %s, the first to %s", again, first)
			}
			s.Close()
		}
		if len(used) != 2 {
			t.Errorf("two gateways: packets of 32 flows to %v, want both of them", used)
		}
	})
}

// TestAnswersThroughTheOverlayHaveANextHop: what the entry node sends on to a client goes to a next hop by name. Without one, older kernels do not
// give the packet's outer header back (overlay_redirect). Which way it went shows by an xfrm policy: the kernel's own lookup would obey it.
func TestAnswersThroughTheOverlayHaveANextHop(t *testing.T) {
	t.Parallel()
	forwarded(t, 0, func(t *testing.T, c *nodetest.Cluster, b *nodetest.Pod, at netip.AddrPort, _ int) {
		nodetest.Serve(t, b.NS, "b", 8080)
		client := clientOf(at.Addr().Is6())
		// The neighbour is resolved: an unresolved one has no next hop in any entry.
		got, err := nodetest.Ask(t, c.Client, "udp", at)
		wantAnswer(t, "without a policy", got, err, "b "+client.String())
		block := fmt.Sprintf("xfrm policy %%s dir out src %s dst %s", at.Addr(), client)
		ip(t, c.Nodes[0].NS, fmt.Sprintf(block+" action block", "add"))
		defer ip(t, c.Nodes[0].NS, fmt.Sprintf(block, "delete"))
		for _, network := range []string{"udp", "tcp"} {
			got, err := nodetest.Ask(t, c.Client, network, at)
			wantAnswer(t, network+" with a policy that blocks", got, err, "b "+client.String())
		}
	})
}
