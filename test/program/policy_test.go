// SPDX-License-Identifier: Apache-2.0

package program

import (
	"net/netip"
	"testing"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/bpf/object"
)

const (
	identityA = 100
	identityB = 101
	isolated  = 50 // policy id
	rule      = 7
)

// isolateB lets only what allow adds reach pod B.
func isolateB(f *progtest.Fixture) {
	f.IdentifyPod(f.A, identityA, bpf.PolicyNone, bpf.PolicyNone)
	f.IdentifyPod(f.B, identityB, bpf.PolicyNone, isolated)
}

func TestIngressPolicy(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	isolateB(f)
	f.AllowPort(isolated, bpf.Ingress, identityA, pkt.TCP.Proto(false), podPort, rule)
	families(t, f, func(t *testing.T, v6 bool) {
		open := fromPod(f.A, pkt.TCP, at(f.B.Addr(v6), podPort))
		redirected(t, f, "allowed", progtest.FromPod(f.A), open, atPod(open, f.B))
		if got, _ := f.Flow(t, key(open)); got.RuleId != rule {
			t.Errorf("entry's rule = %d, want %d", got.RuleId, rule)
		}
		other := with(open, open.Src, at(f.B.Addr(v6), podPort+1))
		dropped(t, f, "another port", progtest.FromPod(f.A), other, "policy")
		dropped(t, f, "another protocol", progtest.FromPod(f.A), fromPod(f.A, pkt.UDP, open.Dst), "policy")
		dropped(t, f, "from outside", f.FromNetdev(), fromClient(pkt.TCP, open.Dst), "policy")
		dropped(t, f, "by the stack from outside", progtest.Hook{Program: bpf.ProgToPod, Ifindex: f.B.Ifindex, Ingress: f.ClientDevice},
			fromClient(pkt.TCP, open.Dst), "policy")
		// Contract row N10: the node reaches its pods.
		node := with(fromClient(pkt.TCP, open.Dst), at(of(nodetest.NodeAddrs, v6), sport), open.Dst)
		passed(t, f, "from the node", progtest.ToPod(f.B), node, node)
		// And what is denied leaves nothing behind.
		if got := len(f.AllFlows(t)); got != 4 {
			t.Errorf("%d flow entries, want 4: two allowed flows", got)
		}
	})
}

// The host may speak under an address that node_addrs does not list, such as another runtime's bridge: whoever sends the same tuple from
// outside is judged as who he is, and changes nothing.
func TestHostFlowSpeaksForNobodyOutside(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	isolateB(f)
	families(t, f, func(t *testing.T, v6 bool) {
		unlisted := netip.MustParseAddr(map[bool]string{false: "198.51.100.1", true: "2001:db8:9::1"}[v6])
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
			open := with(fromClient(kind, at(f.B.Addr(v6), podPort)), at(unlisted, sport), at(f.B.Addr(v6), podPort))
			passed(t, f, kind.String()+" from the host", progtest.ToPod(f.B), open, open)
			dropped(t, f, kind.String()+" opens from outside", f.FromNetdev(), open, "policy")
			dropped(t, f, kind.String()+" goes on from outside", f.FromNetdev(), data(open), "policy")
			passed(t, f, kind.String()+" goes on from the host", progtest.ToPod(f.B), data(open), data(open))
			loopback := with(open, at(netip.MustParseAddr(map[bool]string{false: "127.0.0.1", true: "::1"}[v6]), sport), open.Dst)
			dropped(t, f, kind.String()+" under a loopback address", f.FromNetdev(), loopback, "source_is_local")
		}
	})
}

func TestEgressPolicy(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	f.IdentifyPod(f.A, identityA, isolated, bpf.PolicyNone)
	f.IdentifyPod(f.B, identityB, bpf.PolicyNone, bpf.PolicyNone)
	f.AllowPort(isolated, bpf.Egress, identityB, pkt.TCP.Proto(false), podPort, rule)
	families(t, f, func(t *testing.T, v6 bool) {
		// Judged after translation: the rule names the pod's port, not the service's.
		open := fromPod(f.A, pkt.TCP, at(of(vips, v6), vipPort))
		redirected(t, f, "to the service", progtest.FromPod(f.A), open, with(atPod(open, f.B), open.Src, at(f.B.Addr(v6), podPort)))
		dropped(t, f, "another protocol", progtest.FromPod(f.A), fromPod(f.A, pkt.UDP, open.Dst), "policy")
		dropped(t, f, "outside", progtest.FromPod(f.A), fromPod(f.A, pkt.TCP, at(of(nodetest.ClientAddrs, v6), 443)), "policy")
		back := fromPod(f.B, pkt.TCP, at(f.A.Addr(v6), 9999))
		redirected(t, f, "what others open is not egress", progtest.FromPod(f.B), back, atPod(back, f.A))
	})
}

// Contract promise: a pod whose policy nobody knows yet talks with its node and nobody else.
func TestPendingPolicy(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	f.IdentifyPod(f.A, bpf.IdentityPodUnknown, bpf.PolicyNodeOnly, bpf.PolicyNodeOnly)
	families(t, f, func(t *testing.T, v6 bool) {
		dropped(t, f, "from it", progtest.FromPod(f.A), fromPod(f.A, pkt.TCP, at(f.B.Addr(v6), podPort)), "policy_pending")
		dropped(t, f, "to it", progtest.FromPod(f.B), fromPod(f.B, pkt.TCP, at(f.A.Addr(v6), podPort)), "policy_pending")
		node := fromPod(f.A, pkt.TCP, at(of(nodetest.NodeAddrs, v6), 443))
		passed(t, f, "to the node", progtest.FromPod(f.A), node, node)
	})
}

// A changed policy reaches an open connection when the pod's epoch is raised; a denied connection keeps its translation and goes on as
// soon as it is allowed again.
func TestPolicyChangeOnOpenFlow(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	isolateB(f)
	for i, v6 := range []bool{false, true} {
		service(f, uint32(1000*i+1000), at(of(vips, v6), vipPort), at(f.B.Addr(v6), podPort))
	}
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
			f.ClearFlows(t)
			proto := kind.Proto(v6)
			allow := f.AllowPort(isolated, bpf.Ingress, identityA, proto, podPort, rule)
			open := fromPod(f.A, kind, at(of(vips, v6), vipPort))
			arrived := with(atPod(open, f.B), open.Src, at(f.B.Addr(v6), podPort))
			redirected(t, f, "opens", progtest.FromPod(f.A), open, arrived)
			back := answer(arrived)
			request, response := data(open), with(atPod(back, f.A), open.Dst, open.Src)
			requested := with(atPod(request, f.B), open.Src, arrived.Dst)
			redirected(t, f, "is answered", progtest.FromPod(f.B), back, response)

			must(t, f.DP.Maps.Policy.Delete(&allow))
			redirected(t, f, "nobody has raised the epoch", progtest.FromPod(f.A), request, requested)
			must(t, f.DP.RaiseEndpointEpochs(f.B.Ifindex))
			dropped(t, f, "denied", progtest.FromPod(f.A), request, "policy")
			dropped(t, f, "denied, answer", progtest.FromPod(f.B), data(back), "policy")
			dropped(t, f, "denied, again", progtest.FromPod(f.A), request, "policy")
			for _, k := range []bpf.FlowKey{key(open), key(back)} {
				const denied = bpf.FlowDenied | bpf.FlowDeniedIngress | bpf.FlowNAT
				if got, _ := f.Flow(t, k); got.Flags&denied != denied {
					t.Errorf("denied flow's flags = %v, want denied by ingress policy, and still translated", object.FlowFlagNames(got.Flags))
				}
			}

			// Whoever would be chosen now, the connection stays with its backend.
			service(f, 5000, at(of(vips, v6), vipPort), at(f.A.Addr(v6), podPort))
			f.AllowPort(isolated, bpf.Ingress, identityA, proto, podPort, rule)
			must(t, f.DP.RaiseEndpointEpochs(f.B.Ifindex))
			redirected(t, f, "allowed again, answer", progtest.FromPod(f.B), data(back), with(atPod(data(back), f.A), open.Dst, open.Src))
			redirected(t, f, "allowed again", progtest.FromPod(f.A), request, requested)
			service(f, map[bool]uint32{false: 1000, true: 2000}[v6], at(of(vips, v6), vipPort), at(f.B.Addr(v6), podPort))
		}
	})
}

// Everything that an established packet needs is in its flow entry: with every other map emptied it still passes, until an epoch says
// that something has changed.
func TestEstablishedFlowNeedsOneLookup(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	for _, tt := range []struct {
		name  string
		raise func(t *testing.T, service uint32)
		want  string // drop reason
	}{
		{"endpoint epoch of the sender", func(t *testing.T, _ uint32) { must(t, f.DP.RaiseEndpointEpochs(f.A.Ifindex)) }, "spoofed_address"},
		{"endpoint epoch of the receiver", func(t *testing.T, _ uint32) { must(t, f.DP.RaiseEndpointEpochs(f.B.Ifindex)) }, "spoofed_address"},
		{"route epoch", func(t *testing.T, _ uint32) { must(t, f.DP.RaiseRouteEpoch()) }, "spoofed_address"},
		{"service epoch", func(t *testing.T, id uint32) { must(t, f.DP.RaiseServiceEpochs(id)) }, "spoofed_address"},
	} {
		families(t, f, func(t *testing.T, v6 bool) {
			isolateB(f)
			allow := f.AllowPort(isolated, bpf.Ingress, identityA, pkt.TCP.Proto(v6), podPort, rule)
			service(f, 1000, at(of(vips, v6), vipPort), at(f.B.Addr(v6), podPort))
			frontend := bpf.NewFrontendKey(pkt.TCP.Proto(v6), of(vips, v6), vipPort)
			service := id(t, f, frontend)
			open := fromPod(f.A, pkt.TCP, at(of(vips, v6), vipPort))
			backend := at(f.B.Addr(v6), podPort)
			redirected(t, f, tt.name, progtest.FromPod(f.A), open, with(atPod(open, f.B), open.Src, backend))

			must(t, f.DP.Maps.Policy.Delete(&allow))
			must(t, f.DP.Maps.Services.Delete(&frontend))
			gone := bpf.NewServiceBackend(service, backend)
			must(t, f.DP.Maps.ServiceBackends.Delete(&gone))
			must(t, f.DP.Maps.Backends.Delete(&bpf.BackendKey{List: service}))
			for _, p := range []*nodetest.Pod{f.A, f.B} {
				a := bpf.NewAddr(p.Addr(v6))
				must(t, f.DP.Maps.Endpoints.Delete(&a))
				prefix := bpf.NewIPCacheKey(netip.PrefixFrom(p.Addr(v6), p.Addr(v6).BitLen()))
				must(t, f.DP.Maps.IPCache.Delete(&prefix))
			}
			request := data(open)
			redirected(t, f, tt.name+" not raised", progtest.FromPod(f.A), request, with(atPod(request, f.B), open.Src, backend))
			tt.raise(t, service)
			dropped(t, f, tt.name+" raised", progtest.FromPod(f.A), request, tt.want)
		})
	}
}

// Nobody else may use a flow: neither another pod, nor another MAC, nor somebody outside.
func TestFlowBelongsToItsSender(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	families(t, f, func(t *testing.T, v6 bool) {
		open := fromPod(f.A, pkt.UDP, at(f.B.Addr(v6), podPort))
		redirected(t, f, "opens", progtest.FromPod(f.A), open, atPod(open, f.B))
		forged := open
		forged.SrcMAC = f.B.MAC
		dropped(t, f, "another MAC", progtest.FromPod(f.A), forged, "spoofed_mac")
		dropped(t, f, "another pod", progtest.FromPod(f.B), open, "spoofed_address")
		dropped(t, f, "from outside", f.FromNetdev(), open, "source_is_local")
		redirected(t, f, "goes on", progtest.FromPod(f.A), open, atPod(open, f.B))
	})
}
