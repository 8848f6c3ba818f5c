// SPDX-License-Identifier: Apache-2.0

package program

import (
	"net/netip"
	"testing"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/pins"
)

const hostPortNumber = 8053

// secondAddrs are addresses of the node on which no NodePorts are served.
var secondAddrs = []netip.Addr{netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("2001:db8:5::1")}

// addHostPort gives the pod the port, for TCP, UDP and SCTP.
func addHostPort(t *testing.T, f *progtest.Fixture, host, to netip.AddrPort) {
	t.Helper()
	for _, k := range []pkt.Kind{pkt.TCP, pkt.UDP, pkt.SCTP} {
		p := pins.HostPort{Frontend: bpf.NewFrontendKey(k.Proto(host.Addr().Is6()), host.Addr(), host.Port()), Backend: to}
		var err error
		p.ID, err = f.DP.FreeHostPortID(p.Frontend)
		must(t, err)
		must(t, f.DP.PutHostPort(p))
	}
}

// A hostPort is served at every address of the node, whether it has NodePorts or not, to clients outside and to pods, who keep their address.
func TestM3_HostPortAtEveryAddress(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	for i, a := range secondAddrs {
		f.Put(f.DP.Maps.NodeAddrs, bpf.NewAddr(a), bpf.NodeAddrLocal)
		addHostPort(t, f, at(unspecified[i], hostPortNumber), at(f.B.Addr(i == 1), podPort))
	}
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP, pkt.SCTP} {
			for _, a := range []netip.Addr{of(nodetest.NodeAddrs, v6), of(secondAddrs, v6)} {
				f.ClearFlows(t)
				name := kind.String() + " to " + a.String()
				open := fromClient(kind, at(a, hostPortNumber))
				arrived := with(atPod(open, f.B), open.Src, at(f.B.Addr(v6), podPort))
				redirected(t, f, name+" opens", f.FromNetdev(), open, arrived)
				back := answer(arrived)
				redirected(t, f, name+" is answered", progtest.FromPod(f.B), back, with(hop(back), open.Dst, open.Src))
				f.ClearFlows(t)
				open = fromPod(f.A, kind, at(a, hostPortNumber))
				redirected(t, f, name+" from a pod", progtest.FromPod(f.A), open, with(atPod(open, f.B), open.Src, at(f.B.Addr(v6), podPort)))
			}
			// A NodePort is not to be had there, nor the hostPort at an address that is not the node's.
			other := fromClient(kind, at(of(secondAddrs, v6), nodePort))
			passed(t, f, "NodePort at an address without", f.FromNetdev(), other, other)
			other = fromClient(kind, at(of(nodetest.ClientAddrs, v6), hostPortNumber))
			passed(t, f, "hostPort at another's address", f.FromNetdev(), other, other)
		}
	})
}

// A hostPort with an address goes before one at every address, and before a NodePort; another protocol is another hostPort.
func TestM3_HostPortAtOneAddress(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	for i, a := range nodetest.NodeAddrs {
		addHostPort(t, f, at(unspecified[i], hostPortNumber), at(f.B.Addr(i == 1), podPort))
		addHostPort(t, f, at(a, hostPortNumber), at(f.A.Addr(i == 1), podPort))
		f.Put(f.DP.Maps.NodeAddrs, bpf.NewAddr(secondAddrs[i]), bpf.NodeAddrLocal)
	}
	families(t, f, func(t *testing.T, v6 bool) {
		open := fromClient(pkt.TCP, at(of(nodetest.NodeAddrs, v6), hostPortNumber))
		redirected(t, f, "at the address", f.FromNetdev(), open, with(atPod(open, f.A), open.Src, at(f.A.Addr(v6), podPort)))
		open = fromClient(pkt.TCP, at(of(secondAddrs, v6), hostPortNumber))
		redirected(t, f, "at another", f.FromNetdev(), open, with(atPod(open, f.B), open.Src, at(f.B.Addr(v6), podPort)))
	})
}

// What is served on 127.0.0.1 or ::1 alone is for the node itself: a machine outside, or a pod, that makes such packets gets no further.
func TestM3_HostPortOnLoopbackIsTheNodesOwn(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	loopback := []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::1")}
	for i, a := range loopback {
		addHostPort(t, f, at(a, hostPortNumber), at(f.B.Addr(i == 1), podPort))
		addHostPort(t, f, at(unspecified[i], hostPortNumber+1), at(f.B.Addr(i == 1), podPort))
	}
	families(t, f, func(t *testing.T, v6 bool) {
		for _, port := range []uint16{hostPortNumber, hostPort + 1} {
			for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
				open := fromClient(kind, at(of(loopback, v6), port))
				passed(t, f, kind.String()+" from outside goes to the stack, which drops it", f.FromNetdev(), open, open)
				f.Run(t, progtest.FromPod(f.A), fromPod(f.A, kind, at(of(loopback, v6), port)).Bytes())
			}
		}
		for k, e := range f.AllFlows(t) {
			if e.Flags&bpf.FlowService != 0 {
				t.Errorf("flow %v = %+v, want none that leads to the pod", k, e)
			}
		}
	})
}

// The port is this node's: a pod that asks another node for it is not served here.
func TestM3_HostPortIsOfOneNode(t *testing.T) {
	t.Parallel()
	_, f, _ := progtest.NewCluster(t, nodetest.ClusterOptions{Device: true})
	for i, all := range unspecified {
		addHostPort(t, f, at(all, hostPortNumber), at(f.B.Addr(i == 1), podPort))
	}
	families(t, f, func(t *testing.T, v6 bool) {
		var asked bool
		var k bpf.Addr
		var flags uint32
		for it := f.DP.Maps.NodeAddrs.Iterate(); it.Next(&k, &flags); {
			a := k.Netip()
			if flags&bpf.NodeAddrRemote == 0 || a.Is6() != v6 {
				continue
			}
			asked = true
			open := fromPod(f.A, pkt.TCP, at(a, hostPortNumber))
			f.Run(t, progtest.FromPod(f.A), open.Bytes())
			if e, ok := f.Flow(t, key(open)); !ok || e.Flags&(bpf.FlowService|bpf.FlowNAT) != 0 {
				t.Errorf("flow to %s = %+v, %v, want one without translation", a, e, ok)
			}
		}
		if !asked {
			t.Fatal("there is no other node")
		}
	})
}
