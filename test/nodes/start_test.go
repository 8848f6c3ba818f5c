// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	policyv1alpha2 "sigs.k8s.io/network-policy-api/apis/v1alpha2"

	"github.com/margay-cni/margay/internal/testutil/clustertest"
)

// sink counts the datagrams that reach a target.
type sink struct{ got atomic.Int64 }

const sinkPort, openPort = 9, 8080

func newSink(t *testing.T, h *clustertest.Host) *sink {
	t.Helper()
	s := &sink{}
	for _, conn := range sockets(t, h, sinkPort) {
		go func() {
			buf := make([]byte, 100)
			for {
				if _, _, err := conn.ReadFromUDPAddrPort(buf); err != nil {
					return // closed
				}
				s.got.Add(1)
			}
		}()
	}
	return s
}

// sockets are UDP sockets of a namespace, IPv4 before IPv6. They need no interface.
func sockets(t *testing.T, h *clustertest.Host, port int) (out [2]*net.UDPConn) {
	t.Helper()
	for i, network := range []string{"udp4", "udp6"} {
		var err error
		h.NS.Do(func() { out[i], err = net.ListenUDP(network, &net.UDPAddr{Port: port}) })
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { out[i].Close() })
	}
	return out
}

// sender sends from a pod's namespace as fast as it sensibly can from before the pod has an interface: no container's first instruction is
// earlier.
type sender struct {
	stop chan struct{}
	done sync.WaitGroup
	sent atomic.Int64
}

func startSender(t *testing.T, from *clustertest.Host, to *clustertest.Pod) *sender {
	t.Helper()
	s := &sender{stop: make(chan struct{})}
	conns := sockets(t, from, 0)
	s.done.Go(func() {
		for {
			for i, conn := range conns {
				if _, err := conn.WriteToUDPAddrPort([]byte("early"), to.AddrPort(i == 1, sinkPort)); err == nil {
					s.sent.Add(1) // before there is a route it fails
				}
			}
			select {
			case <-s.stop:
				return
			case <-time.After(200 * time.Microsecond):
			}
		}
	})
	return s
}

func (s *sender) end() int64 {
	close(s.stop)
	s.done.Wait()
	return s.sent.Load()
}

// untilAnswered asks an echo server until it has answered in both families, and returns how long that took; false after the limit.
func untilAnswered(t *testing.T, from *clustertest.Host, to *clustertest.Pod, limit time.Duration) (time.Duration, bool) {
	t.Helper()
	start := time.Now()
	for i, conn := range sockets(t, from, 0) {
		buf := make([]byte, 200)
		for answered := false; !answered; {
			if time.Since(start) > limit {
				return limit, false
			}
			_, _ = conn.WriteToUDPAddrPort([]byte("hello\n"), to.AddrPort(i == 1, openPort))
			if err := conn.SetReadDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			_, _, err := conn.ReadFromUDPAddrPort(buf)
			answered = err == nil
		}
	}
	return time.Since(start), true
}

// startPolicies let pods with app=sender (by NetworkPolicy) and app=cluster-sender (by ClusterNetworkPolicy) speak to app=open alone.
func startPolicies() []runtime.Object {
	label := func(app string) *metav1.LabelSelector {
		return &metav1.LabelSelector{MatchLabels: map[string]string{"app": app}}
	}
	np := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: "senders"}}
	np.Spec = networkingv1.NetworkPolicySpec{
		PodSelector: *label("sender"), PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeEgress},
		Egress: []networkingv1.NetworkPolicyEgressRule{{To: []networkingv1.NetworkPolicyPeer{{PodSelector: label("open")}}}},
	}
	cnp := &policyv1alpha2.ClusterNetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: "senders"}}
	cnp.Spec = policyv1alpha2.ClusterNetworkPolicySpec{
		Tier: policyv1alpha2.AdminTier, Subject: policyv1alpha2.ClusterNetworkPolicySubject{Pods: &policyv1alpha2.NamespacedPod{PodSelector: *label("cluster-sender")}},
		Egress: []policyv1alpha2.ClusterNetworkPolicyEgressRule{
			{Action: "Accept", To: []policyv1alpha2.ClusterNetworkPolicyEgressPeer{{Pods: &policyv1alpha2.NamespacedPod{PodSelector: *label("open")}}}},
			{Action: "Deny", To: []policyv1alpha2.ClusterNetworkPolicyEgressPeer{{Networks: []policyv1alpha2.CIDR{"0.0.0.0/0", "::/0"}}}},
		},
	}
	return []runtime.Object{np, cnp}
}

// TestN13_PolicyBeforeTheFirstPacket (promise 2): 100 pods send to a denied target from before they have an interface, and nothing arrives;
// an allowed target answers within their first second. Then the agent is away: pods that it has published start the same way,
// others stay closed until it is back, DEL works, and what was in force stays.
func TestN13_PolicyBeforeTheFirstPacket(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{})
	n := c.Node("n1")
	denied, open := c.AddPod(c.Node("n2"), "denied", nil), c.AddPod(n, "open", map[string]string{"app": "open"})
	near := c.AddPod(n, "near", nil) // a denied target that no other node could protect
	open.Serve(openPort)
	c.Apply(startPolicies()...)
	c.WaitSettled()
	far, beside := newSink(t, denied.Host), newSink(t, near.Host)
	leaks := func() int64 { return far.got.Load() + beside.got.Load() }
	labels := func(i int) map[string]string {
		return map[string]string{"app": []string{"sender", "cluster-sender"}[i%2]}
	}
	schedule := func(name string, l map[string]string) *clustertest.Pod { return c.SchedulePod(n, name, l) }
	// begin connects a pod that sends meanwhile, and returns how long after ADD the allowed target answered.
	begin := func(p *clustertest.Pod, limit time.Duration) (time.Duration, bool) {
		senders := []*sender{startSender(t, p.Host, denied), startSender(t, p.Host, near)}
		c.ConnectPod(p)
		took, answered := untilAnswered(t, p.Host, open, limit)
		time.Sleep(20 * time.Millisecond) // an idle machine answers before the senders have got going
		for _, s := range senders {
			if s.end() == 0 {
				t.Errorf("%s sent nothing: the test shows nothing", p.Name)
			}
		}
		return took, answered
	}

	// Without a policy the same packets arrive: what follows can fail.
	free := schedule("free", map[string]string{"app": "free"})
	_, answered := begin(free, 10*time.Second)
	time.Sleep(100 * time.Millisecond) // what is on its way
	if !answered || far.got.Load() == 0 || beside.got.Load() == 0 {
		t.Fatalf("a pod without policies: allowed target answered %v, the others got %d and %d", answered, far.got.Load(), beside.got.Load())
	}
	before := leaks()

	var pods []*clustertest.Pod
	var times []time.Duration
	for i := range 100 {
		p := schedule(fmt.Sprintf("s%d", i), labels(i))
		took, answered := begin(p, 10*time.Second)
		if !answered {
			t.Errorf("%s: the allowed target did not answer within %v", p.Name, took)
		}
		pods, times = append(pods, p), append(times, took)
	}
	time.Sleep(100 * time.Millisecond)
	slices.Sort(times)
	t.Logf("100 pods: %d packets leaked; first answer of the allowed target after ADD: median %v, p90 %v, longest %v", leaks()-before, times[50], times[90], times[99])
	if got := leaks() - before; got != 0 {
		t.Errorf("%d packets reached the denied targets, want none", got)
	}
	if times[50] > time.Second {
		t.Errorf("the median pod waited %v for the allowed target, want at most a second", times[50])
	}

	published := []*clustertest.Pod{schedule("p0", labels(0)), schedule("p1", labels(1)), schedule("p2", labels(0)), schedule("p3", labels(1))}
	c.WaitSettled()
	c.KillAgent(n)
	for _, p := range published {
		if took, answered := begin(p, 10*time.Second); !answered {
			t.Errorf("agent away: published pod %s: no answer of the allowed target within %v", p.Name, took)
		}
	}
	unknown := []*clustertest.Pod{schedule("u0", labels(0)), schedule("u1", labels(1))}
	for _, p := range unknown {
		if _, answered := begin(p, 300*time.Millisecond); answered {
			t.Errorf("agent away: pod %s, whose policy nobody knows, reaches other pods", p.Name)
		}
	}
	for _, p := range pods[:6] {
		s := startSender(t, p.Host, denied)
		if _, answered := untilAnswered(t, p.Host, open, 10*time.Second); !answered {
			t.Errorf("agent away: %s does not reach the allowed target any more", p.Name)
		}
		s.end()
	}
	for _, p := range pods[6:12] {
		c.DeletePod(p)
	}
	c.StartAgent(n)
	for _, p := range unknown {
		if took, answered := untilAnswered(t, p.Host, open, 20*time.Second); !answered {
			t.Errorf("agent back: pod %s does not reach the allowed target within %v", p.Name, took)
		}
	}
	c.WaitSettled()
	if got := leaks() - before; got != 0 {
		t.Errorf("%d packets reached the denied targets in all, want none", got)
	}
}
