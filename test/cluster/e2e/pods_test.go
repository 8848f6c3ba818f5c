// SPDX-License-Identifier: Apache-2.0

//go:build cluster

package e2e

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// TestPodsReachPods sends between pods of one node and of two: TCP, UDP and ICMP, with packets of every size.
func TestPodsReachPods(t *testing.T) {
	s := newSpace(t, nil)
	pods := s.start(server("server", 1), idle("same", 1), idle("other", 2))
	to := pods[0]
	eachFamily(t, func(t *testing.T, f family) {
		for _, from := range pods[1:] {
			t.Run("from "+from.name+" node", func(t *testing.T) { askPod(t, f, from, to) })
		}
	})
}

// askPod proves that a pod reaches another one, which sees its address.
func askPod(t *testing.T, f family, from, to pod) {
	for _, network := range networks {
		at := f.at(to.place, portOf(network))
		if got := reach(t, from.place, network, at, "hostname"); got != to.name {
			t.Errorf("%s at %s says that its name is %q, want %q", network, at, got, to.name)
		}
		got, err := from.ask(network, at, "clientip", answerTime)
		if seen, _ := netip.ParseAddrPort(got); err != nil || seen.Addr().Unmap() != f.of(from.addrs) {
			t.Errorf("%s at %s sees the client %q (%v), want %s", network, at, got, err, f.of(from.addrs))
		}
	}
	// Many segments, in both directions; a datagram in fragments, in both directions (netexec reads 2048 bytes).
	for network, size := range map[string]int{"tcp": 300_000, "udp": 2000} {
		text := strings.Repeat("0123456789abcdef", size/16)
		got, err := from.ask(network, f.at(to.place, portOf(network)), "echo "+text, 3*answerTime)
		if err != nil || got != text {
			t.Errorf("%d bytes over %s came back as %d bytes: %v", len(text), network, len(got), err)
		}
	}
	for _, size := range []int{56, 1300, 1472, 4000} {
		if err := from.ping(f.of(to.addrs), size, answerTime); err != nil {
			t.Errorf("ping with %d bytes: %v", size, err)
		}
	}
}

// TestNodesAndPods sends from nodes to pods, from pods to nodes and to pods in the nodes' own network.
func TestNodesAndPods(t *testing.T) {
	s := newSpace(t, nil)
	pods := s.start(server("server", 1), idle("idle1", 1), idle("idle2", 2),
		hostServer("host1", 1), hostServer("host2", 2))
	srv, idles, hosts := pods[0], pods[1:3], pods[3:]
	eachFamily(t, func(t *testing.T, f family) {
		for i := range 2 {
			node := nodePlace(i + 1)
			for _, network := range networks {
				reach(t, node, network, f.at(srv.place, portOf(network)), "hostname")
			}
			if err := node.ping(f.of(srv.addrs), 1300, answerTime); err != nil {
				t.Errorf("ping from %s to a pod on node1: %v", node.name, err)
			}
			for _, from := range idles {
				for _, network := range networks {
					got := reach(t, from.place, network, f.at(node, hostPortOf(network)), "clientip")
					if seen, _ := netip.ParseAddrPort(got); seen.Addr().Unmap() != f.of(from.addrs) {
						t.Errorf("a hostNetwork pod on %s sees %s of node%d as %q, want its address %s", node.name, from.name, from.node, got, f.of(from.addrs))
					}
				}
				if err := from.ping(f.of(node.addrs), 1300, answerTime); err != nil {
					t.Errorf("ping from %s to %s: %v", from.name, node.name, err)
				}
			}
			other := hosts[1-i]
			reach(t, hosts[i].place, "tcp", f.at(other.place, hostPortOf("tcp")), "hostname")
		}
	})
}

// Ports of servers in a node's own network.
const hostHTTP, hostUDP = 28080, 28081

func hostPortOf(network string) uint16 {
	if network == "udp" {
		return hostUDP
	}
	return hostHTTP
}

// hostServer describes a server in its node's own network.
func hostServer(name string, node int) *corev1.Pod {
	p := server(name, node, onHostNetwork)
	c := &p.Spec.Containers[0]
	var addrs []string // not the wildcard: the server would answer datagrams from whichever address is next to the asker
	for _, a := range nodePlace(node).addrs {
		addrs = append(addrs, a.String())
	}
	c.Args = []string{"netexec", fmt.Sprintf("--http-port=%d", hostHTTP), fmt.Sprintf("--udp-port=%d", hostUDP),
		"--udp-listen-addresses=" + strings.Join(addrs, ",")}
	c.Ports = nil
	return p
}

// TestAPIServer reaches the API server by its service, from pods and from nodes. It is the service whose one backend is outside of the
// cluster's nodes.
func TestAPIServer(t *testing.T) {
	s := newSpace(t, nil)
	pods := s.start(idle("idle1", 1), idle("idle2", 2))
	var kubernetes corev1.Service
	s.must(api.get(s.ctx, "Service", "default", "kubernetes", &kubernetes))
	for _, ip := range kubernetes.Spec.ClusterIPs { // one family: the API server's
		for _, from := range []place{pods[0].place, pods[1].place, nodePlace(1), nodePlace(2)} {
			eventually(t, from.name+" asks "+ip, 20*time.Second, func() error {
				client := http.Client{Timeout: answerTime, Transport: &http.Transport{DialContext: from.dial, DisableKeepAlives: true,
					TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}} // who answers is seen from the answer
				response, err := client.Get("https://" + net.JoinHostPort(ip, "443") + "/version")
				if err != nil {
					return err
				}
				defer response.Body.Close()
				if response.Header.Get("Audit-Id") == "" { // what every answer of kube-apiserver has, also a refusal
					return fmt.Errorf("%s, and not from kube-apiserver", response.Status)
				}
				return nil
			})
		}
	}
}

// TestOutside sends from pods to the world outside: answers come back, and Margay's pods appear there under the address of their node.
func TestOutside(t *testing.T) {
	s := newSpace(t, nil)
	pods := s.start(idle("idle1", 1), idle("idle2", 2))
	eachFamily(t, func(t *testing.T, f family) {
		at := netip.AddrPortFrom(f.of(clientPlace().addrs), 9000)
		serveOutside(t, at)
		for _, from := range pods {
			want := f.of(from.addrs)
			if onMargay() {
				want = f.of(nodePlace(from.node).addrs)
			}
			for _, network := range networks {
				got := askLine(t, from.place, network, at)
				if seen, _ := netip.ParseAddrPort(got); seen.Addr().Unmap() != want {
					t.Errorf("%s outside sees %s of node%d as %q, want %s", network, from.name, from.node, got, want)
				}
			}
			if err := from.ping(at.Addr(), 1300, answerTime); err != nil {
				t.Errorf("ping from %s to the client outside: %v", from.name, err)
			}
		}
	})
}

// serveOutside answers whoever sends a line to the client with the address that it sees, over TCP and UDP, until the test ends.
func serveOutside(t *testing.T, at netip.AddrPort) {
	t.Helper()
	var l net.Listener
	var u net.PacketConn
	err := clientPlace().do(func() (err error) {
		if l, err = net.Listen("tcp", at.String()); err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		if u, err = net.ListenPacket("udp", at.String()); err == nil {
			t.Cleanup(func() { u.Close() })
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = bufio.NewReader(c).ReadString('\n')
			_, _ = fmt.Fprintln(c, c.RemoteAddr())
			_ = c.Close()
		}
	}()
	go func() {
		buf := make([]byte, 100)
		for {
			_, from, err := u.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = u.WriteTo([]byte(from.String()+"\n"), from)
		}
	}()
}

// askLine sends a line and returns the line that it gets.
func askLine(t *testing.T, from place, network string, at netip.AddrPort) string {
	t.Helper()
	var line string
	eventually(t, from.name+" asks "+at.String(), 20*time.Second, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), answerTime)
		defer cancel()
		c, err := from.dial(ctx, network, at.String())
		if err != nil {
			return err
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(answerTime)); err != nil {
			return err
		}
		if _, err := io.WriteString(c, "who am I?\n"); err != nil {
			return err
		}
		line, err = bufio.NewReader(c).ReadString('\n')
		return err
	})
	return strings.TrimSpace(line)
}

// names returns the sorted names of pods.
func names(pods []pod) []string {
	var all []string
	for _, p := range pods {
		all = append(all, p.name)
	}
	slices.Sort(all)
	return all
}
