// SPDX-License-Identifier: Apache-2.0

//go:build cluster

package e2e

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

// TestClusterIP asks a service with backends on both nodes from pods and from nodes: it answers, and each backend gets its share.
func TestClusterIP(t *testing.T) {
	s := newSpace(t, nil)
	app := labelled("app", "web")
	pods := s.start(server("web1", 1, app), server("web2", 2, app), server("web3", 2, app), idle("idle1", 1), idle("idle2", 2))
	web := s.service("web", "web")
	eachFamily(t, func(t *testing.T, f family) {
		for _, from := range []place{pods[3].place, pods[4].place, nodePlace(1), nodePlace(2)} {
			for _, network := range networks {
				everyBackend(t, from, network, f.at(web.place, 80), names(pods[:3]))
			}
		}
	})
}

// everyBackend asks a service until each of its backends has answered.
func everyBackend(t *testing.T, from place, network string, at netip.AddrPort, want []string) {
	t.Helper()
	seen := map[string]bool{}
	eventually(t, fmt.Sprintf("%s asks %s over %s: answers of %v", from.name, at, network, want), time.Minute, func() error {
		for range 20 {
			answer, err := from.ask(network, at, "hostname", answerTime)
			if err != nil {
				return err
			}
			if !slices.Contains(want, answer) {
				t.Fatalf("%s asks %s over %s: %q answers, want one of %v", from.name, at, network, answer, want)
			}
			seen[answer] = true
			if len(seen) == len(want) {
				return nil
			}
		}
		return fmt.Errorf("only %v answered", slices.Sorted(maps.Keys(seen)))
	})
}

// TestBackendsComeAndGo follows a service through a backend that comes, one that goes, and the loss of the last one.
func TestBackendsComeAndGo(t *testing.T) {
	s := newSpace(t, nil)
	app := labelled("app", "web")
	from := s.start(server("web1", 1, app), idle("idle", 1))[1]
	web := s.service("web", "web")
	askAll := func(want ...string) {
		t.Helper()
		for _, f := range families() {
			for _, network := range networks {
				everyBackend(t, from.place, network, f.at(web.place, 80), want)
			}
		}
	}
	askAll("web1")
	s.start(server("web2", 2, app))
	askAll("web1", "web2")
	s.delete("web1")
	for _, f := range families() {
		eventually(t, "the deleted backend is asked no more", 20*time.Second, func() error {
			for range 10 {
				if _, err := from.ask("tcp", f.at(web.place, 80), "hostname", answerTime); err != nil {
					return err
				}
			}
			return nil
		})
	}
	askAll("web2")
	s.delete("web2")
	for _, f := range families() {
		refusedAtOnce(t, from.place, f.at(web.place, 80))
	}
}

// refusedAtOnce requires that a service says that it has no endpoints, to TCP and UDP, well before a client would lose patience.
func refusedAtOnce(t *testing.T, from place, at netip.AddrPort) {
	t.Helper()
	for _, network := range networks {
		eventually(t, fmt.Sprintf("%s asks %s over %s and is refused", from.name, at, network), 30*time.Second, func() error {
			start := time.Now()
			answer, err := from.ask(network, at, "hostname", answerTime)
			if !refused(err) && (onMargay() || !errors.Is(err, unix.EPERM)) { // kube-proxy's filter tells a node's own process so
				return fmt.Errorf("want a refusal, got %q: %v", answer, err)
			}
			if took := time.Since(start); took > time.Second && onMargay() { // kube-proxy's refusal of IPv6 is heard the second time
				return fmt.Errorf("refused only after %v", took)
			}
			return nil
		})
	}
}

// TestNoEndpoints asks services that never had a backend: from pods and from nodes they are refused at once.
func TestNoEndpoints(t *testing.T) {
	s := newSpace(t, nil)
	pods := s.start(idle("idle1", 1), idle("idle2", 2))
	empty := s.service("empty", "nobody")
	eachFamily(t, func(t *testing.T, f family) {
		for _, from := range []place{pods[0].place, pods[1].place, nodePlace(1)} {
			refusedAtOnce(t, from, f.at(empty.place, 80))
		}
	})
}

// TestHairpin lets a pod ask a service whose only backend it is.
func TestHairpin(t *testing.T) {
	s := newSpace(t, nil)
	self := s.start(server("self", 1))[0]
	svc := s.service("self", "self", nodePort)
	eachFamily(t, func(t *testing.T, f family) {
		for _, network := range networks {
			for _, at := range []netip.AddrPort{f.at(svc.place, 80), f.at(nodePlace(1), svc.nodePort(network)), f.at(nodePlace(2), svc.nodePort(network))} {
				if got := reach(t, self.place, network, at, "hostname"); got != "self" {
					t.Errorf("%s at %s: %q answers, want self", network, at, got)
				}
			}
		}
	})
}

// TestSessionAffinity keeps a client on the backend that it got first.
func TestSessionAffinity(t *testing.T) {
	s := newSpace(t, nil)
	app := labelled("app", "web")
	pods := s.start(server("web1", 1, app), server("web2", 2, app), server("web3", 1, app), idle("idle1", 1), idle("idle2", 2))
	web := s.service("web", "web", nodePort, func(spec *corev1.ServiceSpec) { spec.SessionAffinity = corev1.ServiceAffinityClientIP })
	free := s.service("free", "web") // shows that the backends are there to be chosen
	eachFamily(t, func(t *testing.T, f family) {
		for _, from := range []place{pods[3].place, pods[4].place, nodePlace(1)} {
			everyBackend(t, from, "tcp", f.at(free.place, 80), names(pods[:3]))
			oneBackend(t, from, f.at(web.place, 80))
		}
		oneBackend(t, clientPlace(), f.at(nodePlace(1), web.nodePort("tcp")))
	})
}

func oneBackend(t *testing.T, from place, at netip.AddrPort) {
	t.Helper()
	first := reach(t, from, "tcp", at, "hostname")
	for i := range 30 {
		got, err := from.ask("tcp", at, "hostname", answerTime)
		if err != nil || got != first {
			t.Fatalf("%s asks %s for the %dth time: %q answers (%v), the first time it was %s", from.name, at, i+2, got, err, first)
		}
	}
}

// TestNodePort asks NodePorts from the client outside, by the node that has the backend and by the one that has not. The backend sees the
// client's own address, whichever node was asked and whichever the traffic policy is.
func TestNodePort(t *testing.T) {
	s := newSpace(t, nil)
	pods := s.start(server("web", 1), idle("idle1", 1), idle("idle2", 2))
	anywhere := s.service("anywhere", "web", nodePort)
	here := s.service("here", "web", nodePort, local)
	client := clientPlace()
	eachFamily(t, func(t *testing.T, f family) {
		for _, network := range networks {
			for i := 1; i <= 2; i++ {
				at := f.at(nodePlace(i), anywhere.nodePort(network))
				seesClient(t, f, network, at, onMargay()) // kube-proxy hides the client
				for _, from := range []place{pods[1].place, pods[2].place, nodePlace(1), nodePlace(2)} {
					if got := reach(t, from, network, at, "hostname"); got != "web" {
						t.Errorf("%s asks %s over %s: %q answers", from.name, at, network, got)
					}
				}
			}
			seesClient(t, f, network, f.at(nodePlace(1), here.nodePort(network)), true)
			at := f.at(nodePlace(2), here.nodePort(network))
			if got, err := client.ask(network, at, "hostname", silenceTime); err == nil {
				t.Errorf("%s at %s: %q answers although the node has no backend and the policy is Local", network, at, got)
			}
		}
	})
}

// seesClient requires that the backend behind at sees the client outside, by its own address if so required.
func seesClient(t *testing.T, f family, network string, at netip.AddrPort, itself bool) {
	t.Helper()
	got := reach(t, clientPlace(), network, at, "clientip")
	seen, err := netip.ParseAddrPort(got)
	if want := f.of(clientPlace().addrs); itself && (err != nil || seen.Addr().Unmap() != want) {
		t.Errorf("the client asks %s over %s: the backend sees %q, want %s", at, network, got, want)
	}
}

// TestNodePortLarge carries more than one packet through a NodePort, by the node without the backend: the path MTU holds in both directions.
func TestNodePortLarge(t *testing.T) {
	s := newSpace(t, nil)
	s.start(server("web", 1))
	web := s.service("web", "web", nodePort)
	eachFamily(t, func(t *testing.T, f family) {
		for i := 1; i <= 2; i++ {
			for network, size := range map[string]int{"tcp": 300_000, "udp": 2000} {
				at := f.at(nodePlace(i), web.nodePort(network))
				text := make([]byte, size)
				for i := range text {
					text[i] = 'a' + byte(i%26)
				}
				// The first datagram may be lost to the news that the way between the nodes is narrower: the client is told, and asks again.
				if got := reach(t, clientPlace(), network, at, "echo "+string(text)); got != string(text) {
					t.Errorf("%d bytes over %s by %s came back as %d bytes", size, network, at, len(got))
				}
			}
		}
	})
}

// TestHostPort asks a pod's hostPort from outside, from both nodes and from pods; the pod sees the client's own address.
func TestHostPort(t *testing.T) {
	s := newSpace(t, nil)
	p := server("web", 1)
	p.Spec.Containers[0].Ports[0].HostPort = 28180
	p.Spec.Containers[0].Ports[1].HostPort = 28181
	pods := s.start(p, idle("idle1", 1), idle("idle2", 2))
	if onMargay() {
		eventually(t, "hostPorts that the node's own connections do not get", time.Minute, func() error {
			return nodePlace(1).do(func() error {
				reserved, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_reserved_ports")
				if err == nil && !strings.Contains(string(reserved), "28180-28181") {
					err = fmt.Errorf("reserved ports are %q, want 28180-28181 among them", reserved)
				}
				return err
			})
		})
	}
	eachFamily(t, func(t *testing.T, f family) {
		for network, port := range map[string]uint16{"tcp": 28180, "udp": 28181} {
			at := f.at(nodePlace(1), port)
			seesClient(t, f, network, at, true)
			for _, from := range []place{pods[1].place, pods[2].place, nodePlace(1), nodePlace(2)} {
				if got := reach(t, from, network, at, "hostname"); got != "web" {
					t.Errorf("%s asks %s over %s: %q answers", from.name, at, network, got)
				}
			}
		}
	})
	s.delete("web")
	eachFamily(t, func(t *testing.T, f family) {
		if got, err := clientPlace().ask("tcp", f.at(nodePlace(1), 28180), "hostname", silenceTime); err == nil {
			t.Errorf("%q answers at the hostPort of a pod that is gone", got)
		}
	})
}
