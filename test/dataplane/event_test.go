// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/flow"
)

// events collects what the programs write while f runs, and until something of it satisfies the test or a second has passed.
func events(t *testing.T, n *nodetest.Node, enough func(flow.Event) bool, f func()) (got []flow.Event) {
	t.Helper()
	r, err := flow.NewReader(n.DP.Maps.Events, n.Config.Run, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	f()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_ = r.Follow(ctx, func(e flow.Event) bool { // the deadline is one of the ends that the test expects
		got = append(got, e)
		return !enough(e)
	})
	return got
}

// A policy drop names the tuple that policy judged, after translation, and the rule; on the first packet as on an open connection.
func TestPolicyDropEventNamesThePod(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	b := n.AddPod("b")
	nodetest.Serve(t, b.NS, "b", 8080)
	addServices(n, b)
	families(t, func(t *testing.T, v6 bool) {
		to := netip.AddrPortFrom(family(nodetest.NodeAddrs, v6), 30080)
		n.IdentifyPod(b, identityB, bpf.PolicyNone, bpf.PolicyNone)
		conn, err := nodetest.Dial(t, n.Client, "udp", to, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = conn.Ask()
		wantNoError(t, "before the policy", err)
		n.IdentifyPod(b, identityB, bpf.PolicyNone, policyB)
		n.Put(n.DP.Maps.Policy, bpf.PolicyKey{
			Prefixlen: bpf.PolicyPrefixBase, PolicyId: policyB, Identity: bpf.IdentityAny, Direction: uint8(bpf.Ingress),
		}, bpf.PolicyEntry{Verdict: bpf.VerdictDeny, Rank: 2000, RuleId: 77})
		for _, when := range []string{"first packet after the change", "further packet", "new flow"} {
			if when == "new flow" {
				if conn, err = nodetest.Dial(t, n.Client, "udp", to, 0); err != nil {
					t.Fatal(err)
				}
			}
			source := conn.LocalAddr().String()
			ours := func(e flow.Event) bool {
				return e.Type == "drop" && e.Reason == "policy" && e.Source.String() == source
			}
			got := events(t, n, ours, func() { _, _ = conn.Ask() })
			i := slices.IndexFunc(got, ours)
			if i < 0 {
				t.Errorf("%s: events = %v, want one of %s", when, got, source)
				continue
			}
			if want := netip.AddrPortFrom(b.Addr(v6), 8080); got[i].Destination != want || got[i].RuleID != 77 || got[i].Direction != "ingress" {
				t.Errorf("%s: event = %+v, want destination %s, rule 77, ingress", when, got[i], want)
			}
		}
	})
}

// A new flow that passes makes an event only while that is asked for.
func TestVerdictEvents(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a, b := n.AddPod("a"), n.AddPod("b")
	nodetest.Serve(t, b.NS, "b", 8080)
	families(t, func(t *testing.T, v6 bool) {
		to := netip.AddrPortFrom(b.Addr(v6), 8080)
		ours := func(e flow.Event) bool {
			return e.Type == "verdict" && e.Destination == to && e.Source.Addr() == a.Addr(v6) && e.Protocol == "TCP"
		}
		for _, on := range []bool{false, true, false} {
			wantNoError(t, "SetVerdictEvents", n.DP.SetVerdictEvents(on))
			got := events(t, n, ours, func() {
				_, err := nodetest.Ask(t, a.NS, "tcp", to)
				wantNoError(t, "ask", err)
			})
			if slices.ContainsFunc(got, ours) != on {
				t.Errorf("verdict events %v: got %v", on, got)
			}
		}
	})
}

func wantNoError(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Errorf("%s: %v", what, err)
	}
}
