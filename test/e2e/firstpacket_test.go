// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
)

const scheduled = `
apiVersion: v1
kind: Pod
metadata: {name: sender, namespace: shop, labels: {app: sender}}
spec: {nodeName: node}
---
apiVersion: v1
kind: Pod
metadata: {name: target, namespace: shop, labels: {app: target}}
spec: {nodeName: node}
`

const denyEgress = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: no-egress, namespace: shop}
spec: {podSelector: {matchLabels: {app: sender}}, policyTypes: [Egress]}
`

const denyIngress = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: no-ingress, namespace: shop}
spec: {podSelector: {matchLabels: {app: target}}, policyTypes: [Ingress]}
`

// Addresses that the target asks for, so that the sender can aim at it before it exists.
var targetAddrs = []netip.Addr{netip.MustParseAddr("10.244.0.200"), netip.MustParseAddr("fd00:244::200")}

const targetPort = 9000

// arrivals counts datagrams in a namespace, from before it has an interface.
func arrivals(t *testing.T, ns *netnstest.NS) *atomic.Int64 {
	t.Helper()
	var n atomic.Int64
	ns.Do(func() {
		c, err := net.ListenUDP("udp", &net.UDPAddr{Port: targetPort})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		go func() {
			buf := make([]byte, 64)
			for {
				if _, _, err := c.ReadFrom(buf); err != nil {
					return
				}
				n.Add(1)
			}
		}()
	})
	return &n
}

// flood sends datagrams to the target from a namespace, from before it has an interface, until the test ends. It returns how many the
// kernel took.
func flood(t *testing.T, ns *netnstest.NS) *atomic.Int64 {
	t.Helper()
	var sent atomic.Int64
	stop := make(chan struct{})
	done := make(chan struct{})
	var sockets []int
	ns.Do(func() {
		for _, domain := range []int{unix.AF_INET, unix.AF_INET6} {
			fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			sockets = append(sockets, fd)
		}
	})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
			}
			to4 := &unix.SockaddrInet4{Port: targetPort, Addr: targetAddrs[0].As4()}
			to6 := &unix.SockaddrInet6{Port: targetPort, Addr: targetAddrs[1].As16()}
			if unix.Sendto(sockets[0], []byte("first"), 0, to4) == nil {
				sent.Add(1)
			}
			if unix.Sendto(sockets[1], []byte("first"), 0, to6) == nil {
				sent.Add(1)
			}
			time.Sleep(50 * time.Microsecond) // leave a core to the others
		}
	}()
	t.Cleanup(func() {
		close(stop)
		<-done
		for _, fd := range sockets {
			_ = unix.Close(fd)
		}
	})
	return &sent
}

// waitSent returns when so many more datagrams were sent.
func (m *machine) waitSent(sent *atomic.Int64, more int64) {
	m.t.Helper()
	want := sent.Load() + more
	m.eventually("the sender has sent", func() bool { return sent.Load() >= want })
}

// addTarget connects the pod with the addresses that the sender aims at.
func (m *machine) addTarget(p *pod) {
	m.t.Helper()
	a := m.attachment(p)
	a.CapabilityArgs = map[string]any{"ips": []string{targetAddrs[0].String() + "/24", targetAddrs[1].String() + "/64"}}
	m.node.Do(func() {
		_, err := m.cni.AddNetworkList(m.t.Context(), m.network, a)
		m.must(err)
	})
}

// TestDeniedPodGetsNotOnePacketOut is promise 2: the policy of a pod is in force before its first packet. The pod sends from before it has
// an interface; without the policy the same packets arrive.
func TestDeniedPodGetsNotOnePacketOut(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name, policy string
		arrive       bool
	}{{"egress denied", denyEgress, false}, {"ingress denied", denyIngress, false}, {"no policy", "", true}} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t)
			m.apply("pods.yaml", scheduled)
			if tc.policy != "" {
				m.apply("policy.yaml", tc.policy)
			}
			m.startAgent()
			target, sender := m.newPod("target"), m.newPod("sender")
			got := arrivals(t, target.ns)
			sent := flood(t, sender.ns)
			m.addTarget(target)
			m.add(sender)
			m.waitSent(sent, 2000)
			if n := got.Load(); (n > 0) != tc.arrive {
				t.Errorf("%d of %d datagrams arrived, want some: %v", n, sent.Load(), tc.arrive)
			}
		})
	}
}

// TestDeniedTargetGetsNotOnePacketIn is the same seen from a pod that is flooded before it exists.
func TestDeniedTargetGetsNotOnePacketIn(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name, policy string
		arrive       bool
	}{{"ingress denied", denyIngress, false}, {"no policy", "", true}} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t)
			m.apply("pods.yaml", scheduled)
			if tc.policy != "" {
				m.apply("policy.yaml", tc.policy)
			}
			m.startAgent()
			target, sender := m.newPod("target"), m.newPod("sender")
			got := arrivals(t, target.ns)
			sent := flood(t, sender.ns)
			m.add(sender)
			m.waitSent(sent, 100)
			m.addTarget(target)
			m.waitSent(sent, 2000)
			if n := got.Load(); (n > 0) != tc.arrive {
				t.Errorf("%d of %d datagrams arrived, want some: %v", n, sent.Load(), tc.arrive)
			}
		})
	}
}
