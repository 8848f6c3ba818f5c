// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/pkg/addr"
	"github.com/margay-cni/margay/pkg/bpf"
)

const (
	identityA = bpf.IdentityFirst + iota
	identityB
	identityClient
)

const (
	policyB = bpf.PolicyFirst + iota
	policyA
)

func TestIngressPolicy(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a, b, c := n.AddPod("a"), n.AddPod("b"), n.AddPod("c")
	nodetest.Serve(t, b.NS, "b", 8080)
	nodetest.Serve(t, b.NS, "b2", 9090)
	n.IdentifyPod(a, identityA, bpf.PolicyNone, bpf.PolicyNone)
	n.IdentifyPod(b, identityB, bpf.PolicyNone, policyB)
	for _, proto := range protocols {
		n.AllowPort(policyB, bpf.Ingress, identityA, proto, 8080, 7)
	}
	families(t, func(t *testing.T, v6 bool) {
		for network := range protocols {
			got, err := nodetest.Ask(t, a.NS, network, netip.AddrPortFrom(b.Addr(v6), 8080))
			wantAnswer(t, network+" from the allowed pod", got, err, "b "+a.Addr(v6).String())
			if got, err := nodetest.Ask(t, a.NS, network, netip.AddrPortFrom(b.Addr(v6), 9090)); err == nil {
				t.Errorf("%s to a port that is not allowed = %q, want no answer", network, got)
			}
			if got, err := nodetest.Ask(t, c.NS, network, netip.AddrPortFrom(b.Addr(v6), 8080)); err == nil {
				t.Errorf("%s from a pod that is not allowed = %q, want no answer", network, got)
			}
			// Contract row N10: the node itself, for example kubelet's probes.
			got, err = nodetest.Ask(t, n.NS, network, netip.AddrPortFrom(b.Addr(v6), 9090))
			wantAnswer(t, network+" from the node", got, err, "b2 "+family(nodetest.NodeAddrs, v6).String())
		}
	})
	if n.Drops(6) == 0 {
		t.Error("no drop was counted as policy")
	}
}

func TestEgressPolicy(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a, b, c := n.AddPod("a"), n.AddPod("b"), n.AddPod("c")
	nodetest.Serve(t, b.NS, "b", 8080)
	nodetest.Serve(t, c.NS, "c", 8080)
	nodetest.Serve(t, n.NS, "node", 10250)
	n.IdentifyPod(b, identityB, bpf.PolicyNone, bpf.PolicyNone)
	n.IdentifyPod(a, identityA, policyA, bpf.PolicyNone)
	for _, proto := range protocols {
		n.AllowPort(policyA, bpf.Egress, identityB, proto, 8080, 7)
	}
	addServices(n, b)
	families(t, func(t *testing.T, v6 bool) {
		for network := range protocols {
			got, err := nodetest.Ask(t, a.NS, network, netip.AddrPortFrom(b.Addr(v6), 8080))
			wantAnswer(t, network+" to the allowed pod", got, err, "b "+a.Addr(v6).String())
			// Contract row N6: judged after service translation.
			got, err = nodetest.Ask(t, a.NS, network, netip.AddrPortFrom(family(vips, v6), 80))
			wantAnswer(t, network+" to the allowed pod by its service", got, err, "b "+a.Addr(v6).String())
			if got, err := nodetest.Ask(t, a.NS, network, netip.AddrPortFrom(c.Addr(v6), 8080)); err == nil {
				t.Errorf("%s to a pod that is not allowed = %q, want no answer", network, got)
			}
			got, err = nodetest.Ask(t, a.NS, network, netip.AddrPortFrom(family(nodetest.NodeAddrs, v6), 10250))
			wantAnswer(t, network+" to the node", got, err, "node "+a.Addr(v6).String())
			// Contract row N10: replies of connections that others open are not subject to egress policy.
		}
	})
}

// The client's own address decides, behind a NodePort too.
func TestN14_PolicySeesNodePortClient(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	b := n.AddPod("b")
	nodetest.Serve(t, b.NS, "b", 8080)
	addServices(n, b)
	n.IdentifyPod(b, identityB, bpf.PolicyNone, policyB)
	families(t, func(t *testing.T, v6 bool) {
		client := family(nodetest.ClientAddrs, v6)
		to := netip.AddrPortFrom(family(nodetest.NodeAddrs, v6), 30080)
		for network := range protocols {
			if got, err := nodetest.Ask(t, n.Client, network, to); err == nil {
				t.Errorf("%s from a client that is not allowed = %q, want no answer", network, got)
			}
		}
		n.Identify(addr.HostPrefix(client), identityClient+uint32(client.BitLen()))
		for network, proto := range protocols {
			n.AllowPort(policyB, bpf.Ingress, identityClient+uint32(client.BitLen()), proto, 8080, 9)
			got, err := nodetest.Ask(t, n.Client, network, to)
			wantAnswer(t, network+" from the allowed client", got, err, "b "+client.String())
		}
	})
}

// Promise 4: an open connection obeys a changed policy at once, and goes on when the policy goes away.
func TestN12_OpenConnectionObeysPolicy(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	b := n.AddPod("b")
	nodetest.Serve(t, b.NS, "b", 8080)
	addServices(n, b)
	families(t, func(t *testing.T, v6 bool) {
		for network := range protocols {
			n.IdentifyPod(b, identityB, bpf.PolicyNone, bpf.PolicyNone)
			conn, err := nodetest.Dial(t, n.Client, network, netip.AddrPortFrom(family(nodetest.NodeAddrs, v6), 30080), 0)
			if err != nil {
				t.Fatal(err)
			}
			want := "b " + family(nodetest.ClientAddrs, v6).String()
			got, err := conn.Ask()
			wantAnswer(t, network+" without policy", got, err, want)

			before := n.Drops(6)
			n.IdentifyPod(b, identityB, bpf.PolicyNone, policyB)
			if got, err := conn.Ask(); err == nil {
				t.Errorf("%s under a deny policy = %q, want no answer", network, got)
			}
			if n.Drops(6) == before {
				t.Errorf("%s: the drop was not counted", network)
			}

			n.IdentifyPod(b, identityB, bpf.PolicyNone, bpf.PolicyNone)
			// TCP has repeated the question that policy swallowed: its answer may come along.
			got, err = conn.Ask()
			if err != nil || !strings.HasPrefix(got, want) {
				t.Errorf("%s after the policy went away = %q, %v, want %q", network, got, err, want)
			}
		}
	})
}

// Corner case A1: a connection from a reused source port is judged anew.
func TestReusedPortIsJudgedAnew(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a, b := n.AddPod("a"), n.AddPod("b")
	nodetest.Serve(t, b.NS, "b", 8080)
	families(t, func(t *testing.T, v6 bool) {
		n.IdentifyPod(b, identityB, bpf.PolicyNone, bpf.PolicyNone)
		to := netip.AddrPortFrom(b.Addr(v6), 8080)
		conn, err := nodetest.Dial(t, a.NS, "tcp", to, 4001)
		if err != nil {
			t.Fatal(err)
		}
		got, err := conn.Ask()
		wantAnswer(t, "first connection", got, err, "b "+a.Addr(v6).String())
		conn.Close()
		n.IdentifyPod(b, identityB, bpf.PolicyNone, policyB)
		if _, err := nodetest.Dial(t, a.NS, "tcp", to, 4001); err == nil {
			t.Error("a new connection from the same port was allowed")
		}
	})
}

// Until the agent has classified a pod, it speaks with its node alone, and the drop says why.
func TestPendingPolicyAllowsNodeOnly(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a, b := n.AddPod("a"), n.AddPod("b")
	nodetest.Serve(t, b.NS, "b", 8080)
	n.Register(b, bpf.Endpoint{
		Identity: bpf.IdentityPodUnknown, PolicyId: [2]uint32{bpf.PolicyNodeOnly, bpf.PolicyNodeOnly}, Flags: bpf.EndpointPending,
	})
	families(t, func(t *testing.T, v6 bool) {
		if got, err := nodetest.Ask(t, a.NS, "tcp", netip.AddrPortFrom(b.Addr(v6), 8080)); err == nil {
			t.Errorf("from a pod = %q, want no answer", got)
		}
		got, err := nodetest.Ask(t, n.NS, "tcp", netip.AddrPortFrom(b.Addr(v6), 8080))
		wantAnswer(t, "from the node", got, err, "b "+family(nodetest.NodeAddrs, v6).String())
	})
	if n.Drops(7) == 0 {
		t.Error("no drop was counted as policy_pending")
	}
}

func TestPing(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a, b := n.AddPod("a"), n.AddPod("b")
	families(t, func(t *testing.T, v6 bool) {
		for _, tc := range []struct {
			name string
			ns   interface{ Do(func()) }
			to   netip.Addr
		}{
			{"pod to pod", a.NS, b.Addr(v6)},
			{"pod to node", a.NS, family(nodetest.NodeAddrs, v6)},
			{"node to pod", n.NS, b.Addr(v6)},
			{"pod to outside", a.NS, family(nodetest.ClientAddrs, v6)},
			{"outside to pod", n.Client, b.Addr(v6)},
		} {
			tc.ns.Do(func() {
				if out, err := exec.Command("ping", "-n", "-c1", "-W1", tc.to.String()).CombinedOutput(); err != nil {
					t.Errorf("%s: %v\n%s", tc.name, err, out)
				}
			})
		}
	})
}

// A pod that sends from another pod's address, or from another MAC, is stopped at its own device.
func TestSpoofedSourceIsDropped(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a, b := n.AddPod("a"), n.AddPod("b")
	families(t, func(t *testing.T, v6 bool) {
		ip := []string{"-4", "addr", "add", "10.244.0.99/32", "dev", "eth0"}
		spoofed := "10.244.0.99"
		if v6 {
			ip = []string{"-6", "addr", "add", "fd00:244::99/128", "dev", "eth0", "nodad"}
			spoofed = "fd00:244::99"
		}
		before := n.Drops(4)
		a.NS.Do(func() {
			if out, err := exec.Command("ip", ip...).CombinedOutput(); err != nil {
				t.Fatalf("add address: %v\n%s", err, out)
			}
			if err := exec.Command("ping", "-n", "-c1", "-W1", "-I", spoofed, b.Addr(v6).String()).Run(); err == nil {
				t.Error("a ping from an address that is not the pod's was answered")
			}
		})
		if n.Drops(4) == before {
			t.Error("no drop was counted as spoofed_address")
		}
	})
}
