// SPDX-License-Identifier: Apache-2.0

package program

import (
	"net/netip"
	"testing"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
	"github.com/margay-cni/margay/pkg/addr"
	"github.com/margay-cni/margay/pkg/bpf"
)

// denyAll has a policy deny everything: as NetworkPolicy's isolation does, or as a rule of a ClusterNetworkPolicy.
func denyAll(f *progtest.Fixture, direction uint32, byCluster bool) {
	e := bpf.PolicyEntry{Verdict: bpf.VerdictDeny, Rank: 1000, RuleId: rule}
	if byCluster {
		e.Flags = bpf.PolicyEntryCluster
	}
	f.Put(f.DP.Maps.Policy, bpf.PolicyKey{Prefixlen: bpf.PolicyPrefixBase, PolicyId: isolated, Identity: bpf.IdentityAny, Direction: uint8(direction)}, e)
}

// The node may always open connections to its pods, whatever denies, so that kubelet's probes pass; their answers are no egress. What a
// pod opens to its node is left alone by NetworkPolicy, but not by a ClusterNetworkPolicy, whose peers nodes can be.
func TestN10_C4_TrafficWithTheNode(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	f.IdentifyPod(f.A, identityA, isolated, isolated)
	families(t, f, func(t *testing.T, v6 bool) {
		own := of(nodetest.NodeAddrs, v6)
		for _, byCluster := range []bool{false, true} {
			denyAll(f, bpf.Egress, byCluster)
			denyAll(f, bpf.Ingress, byCluster)
			for _, kind := range kinds {
				f.ClearFlows(t)
				probe := with(fromPod(f.A, kind, at(own, podPort)), at(own, sport), at(f.A.Addr(v6), podPort))
				passed(t, f, kind.String()+" from the node", progtest.ToPod(f.A), probe, probe)
				back := answer(atPod(probe, f.A))
				passed(t, f, kind.String()+" answers", progtest.FromPod(f.A), back, back)
				f.ClearFlows(t) // a ping's flow is both ends' by its id
				open := fromPod(f.A, kind, at(own, 10250))
				if byCluster {
					dropped(t, f, kind.String()+" to the node, against a cluster policy", progtest.FromPod(f.A), open, "policy")
				} else {
					passed(t, f, kind.String()+" to the node", progtest.FromPod(f.A), open, open)
				}
			}
		}
		// One node of many: the peers are addresses with identities of their own.
		f.ClearFlows(t)
		f.Identify(addr.HostPrefix(own), identityB)
		f.Put(f.DP.Maps.Policy, bpf.PolicyKey{Prefixlen: bpf.PolicyPrefixBase, PolicyId: isolated, Identity: identityB, Direction: uint8(bpf.Egress)},
			bpf.PolicyEntry{Verdict: bpf.VerdictAllow, Rank: 10, RuleId: rule})
		open := fromPod(f.A, pkt.TCP, at(own, 10250))
		passed(t, f, "to a node that is allowed", progtest.FromPod(f.A), open, open)
		must(t, f.DP.Maps.IPCache.Delete(bpf.NewIPCacheKey(addr.HostPrefix(own))))
	})
}

// A pod that reaches itself through a service is subject to ClusterNetworkPolicies in both directions, and to nothing else; under its own
// address it is subject to nothing.
func TestC7_ItselfThroughAService(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.A)
	for _, tt := range []struct {
		name            string
		egress, ingress bool // a cluster policy denies
		want            bool
	}{{"NetworkPolicies deny", false, false, true}, {"egress", true, false, false}, {"ingress", false, true, false}} {
		families(t, f, func(t *testing.T, v6 bool) {
			f.IdentifyPod(f.A, identityA, isolated, isolated)
			denyAll(f, bpf.Egress, tt.egress)
			denyAll(f, bpf.Ingress, tt.ingress)
			for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
				open := fromPod(f.A, kind, at(of(vips, v6), vipPort))
				if !tt.want {
					dropped(t, f, tt.name+", "+kind.String(), progtest.FromPod(f.A), open, "policy")
				} else if r := f.Run(t, progtest.FromPod(f.A), open.Bytes()); r.Action != progtest.Redirect || len(r.Drops) > 0 {
					t.Errorf("%s, %s to itself: action %d, drops %v, want a redirect", tt.name, kind, r.Action, r.Drops)
				}
				direct := fromPod(f.A, kind, netip.AddrPortFrom(f.A.Addr(v6), podPort))
				if r := f.Run(t, progtest.FromPod(f.A), direct.Bytes()); len(r.Drops) > 0 {
					t.Errorf("%s, %s to its own address: drops %v, want none", tt.name, kind, r.Drops)
				}
			}
		})
	}
}
