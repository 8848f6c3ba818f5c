// SPDX-License-Identifier: Apache-2.0

package program

import (
	"testing"

	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
	"github.com/margay-cni/margay/pkg/bpf"
)

// conversation is an open connection from A to B's service and what both sides send in it.
type conversation struct {
	t                *testing.T
	f                *progtest.Fixture
	request, arrived pkt.Packet // A's side
	answer, returned pkt.Packet // B's side
}

// converse opens a connection; service: by the ClusterIP.
func converse(t *testing.T, f *progtest.Fixture, v6 bool) *conversation {
	t.Helper()
	open := fromPod(f.A, pkt.TCP, at(of(vips, v6), vipPort))
	arrived := with(atPod(open, f.B), open.Src, at(f.B.Addr(v6), podPort))
	redirected(t, f, "SYN", progtest.FromPod(f.A), open, arrived)
	back := answer(arrived)
	redirected(t, f, "SYN and ACK", progtest.FromPod(f.B), back, with(atPod(back, f.A), open.Dst, open.Src))
	c := &conversation{t: t, f: f, request: data(open), answer: data(back)}
	c.arrived = with(atPod(c.request, f.B), open.Src, arrived.Dst)
	c.returned = with(atPod(c.answer, f.A), open.Dst, open.Src)
	return c
}

// say sends a segment with these flags, from A or from B, which must arrive.
func (c *conversation) say(fromA bool, flags uint8) {
	c.t.Helper()
	in, out, hook := c.request, c.arrived, progtest.FromPod(c.f.A)
	if !fromA {
		in, out, hook = c.answer, c.returned, progtest.FromPod(c.f.B)
	}
	in.Flags, out.Flags = flags, flags
	redirected(c.t, c.f, "segment", hook, in, out)
}

// wantSeen compares what the flow's two entries know of the connection.
func (c *conversation) wantSeen(when string, fromA, fromB uint8) {
	c.t.Helper()
	a, _ := c.f.Flow(c.t, key(c.request))
	b, _ := c.f.Flow(c.t, key(c.answer))
	if a.Tcp != fromA || b.Tcp != fromB {
		c.t.Errorf("%s: seen %#x and %#x, want %#x and %#x", when, a.Tcp, b.Tcp, fromA, fromB)
	}
}

func TestTCPStates(t *testing.T) {
	t.Parallel()
	const syn, fin, rst, est = bpf.FlowTCPSyn, bpf.FlowTCPFin, bpf.FlowTCPRst, bpf.FlowTCPEstablished
	f := progtest.New(t)
	servicesOn(f, f.B)
	families(t, f, func(t *testing.T, v6 bool) {
		c := converse(t, f, v6)
		c.wantSeen("half open", syn, syn)
		c.say(true, pkt.ACK)
		c.wantSeen("established", syn|est, syn)
		c.say(false, pkt.ACK|pkt.PSH)
		c.wantSeen("answered", syn|est, syn|est)
		c.say(true, pkt.RST|pkt.ACK)
		c.wantSeen("reset", syn|est|rst, syn|est)
		c.say(true, pkt.ACK)
		c.wantSeen("the reset was not believed", syn|est, syn|est)
		c.say(false, pkt.FIN|pkt.ACK)
		c.wantSeen("half closed", syn|est, syn|est|fin)
		c.say(true, pkt.FIN|pkt.ACK)
		c.say(false, pkt.ACK)
		c.wantSeen("closed", syn|est|fin, syn|est|fin)
	})
}

// What a packet says of its connection counts also when it is the first one after an epoch was raised.
func TestTCPStateOfReJudgedPacket(t *testing.T) {
	t.Parallel()
	const syn, fin, rst = bpf.FlowTCPSyn, bpf.FlowTCPFin, bpf.FlowTCPRst
	f := progtest.New(t)
	servicesOn(f, f.B)
	families(t, f, func(t *testing.T, v6 bool) {
		c := converse(t, f, v6)
		must(t, f.DP.RaiseRouteEpoch())
		c.say(true, pkt.FIN|pkt.ACK)
		c.wantSeen("FIN from the opener", syn|fin, syn)
		must(t, f.DP.RaiseRouteEpoch())
		c.say(false, pkt.RST|pkt.ACK)
		c.wantSeen("reset from the other end", syn|fin, syn|rst)
	})
}

// A SYN on the remains of a connection opens a new one: a backend is chosen, and nothing of the old one counts.
func TestSYNStartsAfreshOnClosedFlow(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	families(t, f, func(t *testing.T, v6 bool) {
		for name, end := range map[string]func(c *conversation){
			"FIN from both": func(c *conversation) { c.say(true, pkt.FIN|pkt.ACK); c.say(false, pkt.FIN|pkt.ACK) },
			"reset":         func(c *conversation) { c.say(false, pkt.RST) },
		} {
			f.ClearFlows(t)
			service(f, 1000, at(of(vips, v6), vipPort), at(f.B.Addr(v6), podPort))
			c := converse(t, f, v6)
			service(f, 1000, at(of(vips, v6), vipPort), at(f.B.Addr(v6), podPort+1))

			again := c.request
			again.Flags, again.Payload = pkt.SYN, nil
			redirected(t, f, name+": a SYN repeated while the connection lives", progtest.FromPod(f.A), again, with(atPod(again, f.B), again.Src, c.arrived.Dst))
			end(c)
			redirected(t, f, name+": a SYN on the closed one", progtest.FromPod(f.A), again, with(atPod(again, f.B), again.Src, at(f.B.Addr(v6), podPort+1)))
			if got, _ := f.Flow(t, key(again)); got.Tcp != bpf.FlowTCPSyn {
				t.Errorf("%s: the new connection has seen %#x, want only its SYN", name, got.Tcp)
			}
		}
	})
}

// A SYN from a port whose old connection never said goodbye, because its pod was killed: it must not be sent after the dead pod.
func TestSYNLeavesBackendThatIsGone(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	families(t, f, func(t *testing.T, v6 bool) {
		service(f, 1000, at(of(vips, v6), vipPort), at(f.B.Addr(v6), podPort))
		c := converse(t, f, v6)
		service(f, 1000, at(of(vips, v6), vipPort), at(f.B.Addr(v6), podPort+1))
		serviceID := id(t, f, bpf.NewFrontendKey(pkt.TCP.Proto(v6), of(vips, v6), vipPort))
		gone := bpf.NewServiceBackend(serviceID, c.arrived.Dst)
		must(t, f.DP.Maps.ServiceBackends.Delete(&gone))
		must(t, f.DP.RaiseServiceEpochs(serviceID))
		c.say(true, pkt.ACK) // a connection that lives stays with its backend, which may be on its way out
		again := c.request
		again.Flags, again.Payload = pkt.SYN, nil
		redirected(t, f, "SYN", progtest.FromPod(f.A), again, with(atPod(again, f.B), again.Src, at(f.B.Addr(v6), podPort+1)))
	})
}
