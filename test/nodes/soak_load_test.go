// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/margay-cni/margay/internal/testutil/clustertest"
)

// path is a way that connections take.
type path struct {
	name    string
	network string // tcp or udp
	v6      bool
	from    *clustertest.Host
	// nodes are those that it goes through: what happens to them may happen to it.
	nodes []*clustertest.Node
	// isolated is whether the policy of the change "cut" forbids it.
	isolated bool
	// to is where it leads at the moment, and source the client's address as the server must see it.
	to     func() netip.AddrPort
	source func() netip.Addr
}

// Ports and numbers of the soak's services, and of the server outside.
const (
	soakOutsidePort = 7070
	churnService    = 20 // its pods come and go
	dsrService      = 21 // of the pod on n3
	churnNodePort   = 30100
	dsrNodePort     = 30101
)

// makePaths adds the pods and services that newRemote has not, and lists every path.
func (s *soak) makePaths() {
	s.t.Helper()
	n1, n2, n3 := s.Node("n1"), s.Node("n2"), s.Node("n3")
	a, b, c := s.pods[0], s.pods[1], s.pods[2]
	peer := s.AddPod(n1, "peer", map[string]string{"app": "churn"})
	s.cut = s.AddPod(n2, "cut", map[string]string{"app": "cut"})
	s.AddPod(n1, "bystander", map[string]string{"app": "bystander"})
	peer.Serve(podPort)
	s.cut.Serve(podPort)
	s.Client.Serve(soakOutsidePort)
	dsr := clustertest.NodePortService("dsr", dsrService, map[string]string{"on": "n3"}, 80, podPort, dsrNodePort)
	dsr.Annotations = map[string]string{returnAnnotation: "dsr"}
	s.Apply(dsr, clustertest.NodePortService("churn", churnService, map[string]string{"app": "churn"}, 80, podPort, churnNodePort))
	s.WaitSettled()

	type to func(v6 bool) netip.AddrPort
	at := func(h *clustertest.Host, port uint16) to {
		return func(v6 bool) netip.AddrPort { return h.AddrPort(v6, port) }
	}
	atNode := func(n *clustertest.Node, port uint16) to {
		return func(v6 bool) netip.AddrPort { return netip.AddrPortFrom(s.addr(n, v6), port) }
	}
	service := func(number int) to { return func(v6 bool) netip.AddrPort { return clusterIP(number, v6) } }
	all := func(n ...*clustertest.Node) []*clustertest.Node { return n }
	const cut, outside = "pod to pod, cut by policy for a while", "pod to outside"
	for _, w := range []struct {
		name  string
		from  *clustertest.Host
		to    to
		nodes []*clustertest.Node
	}{
		{"pod to pod, same node", a.Host, at(peer.Host, podPort), all(n1)},
		{"pod to pod, other node", a.Host, at(b.Host, podPort), all(n1, n2)},
		{"pod to pod, node beyond the router", a.Host, at(c.Host, podPort), all(n1, n3)},
		{cut, a.Host, at(s.cut.Host, podPort), all(n1, n2)},
		{"pod to ClusterIP, backends come and go", a.Host, service(churnService), all(n1, n2)},
		{"pod to ClusterIP, backend on another node", b.Host, service(3), all(n2, n3)},
		{"pod to its node", a.Host, atNode(n1, hostPort), all(n1)},
		{"pod to another node", a.Host, atNode(n3, hostPort), all(n1, n3)},
		{"pod to NodePort of its node", a.Host, atNode(n1, nodePorts+3), all(n1, n3)},
		{"pod to NodePort of another node", a.Host, atNode(n2, churnNodePort), all(n1, n2)},
		{outside, a.Host, at(s.Client, soakOutsidePort), all(n1)},
		{outside, b.Host, at(s.Client, soakOutsidePort), all(n2)},
		{"node to its pod", n1.Host, at(peer.Host, podPort), all(n1)},
		{"node to another node's pod", n1.Host, at(c.Host, podPort), all(n1, n3)},
		{"node to another node's pod, same network", n2.Host, at(a.Host, podPort), all(n1, n2)},
		{"client to NodePort, local backend", s.Client, atNode(n1, nodePorts+1), all(n1)},
		{"client to NodePort, remote backend", s.Client, atNode(n1, nodePorts+3), all(n1, n3)},
		{"client to NodePort, remote backend by n2", s.Client, atNode(n2, nodePorts+1), all(n1, n2)},
		{"client to NodePort, remote backend, DSR", s.Client, atNode(n1, dsrNodePort), all(n1, n3)},
		{"client to NodePort, backends come and go", s.Client, atNode(n1, churnNodePort), all(n1, n2)},
	} {
		for _, network := range []string{"tcp", "udp"} {
			for _, v6 := range s.Families() {
				p := &path{
					name: fmt.Sprintf("%s, from %s, %s, %s", w.name, w.from.Name, network, clustertest.FamilyName(v6)), network: network, v6: v6, from: w.from, nodes: w.nodes,
					to: func() netip.AddrPort { return w.to(v6) }, isolated: w.name == cut, source: s.sourceOf(w.from, v6, w.name == outside),
				}
				s.paths = append(s.paths, p)
			}
		}
	}
}

// sourceOf is the address that servers see of a host: its own, or, masqueraded, that of its node.
func (s *soak) sourceOf(h *clustertest.Host, v6, masqueraded bool) func() netip.Addr {
	for _, n := range s.Nodes() {
		if n.Host == h {
			return func() netip.Addr { return s.addr(n, v6) }
		}
	}
	for _, p := range s.pods {
		if p.Host == h && masqueraded {
			return func() netip.Addr { return s.addr(p.Node, v6) }
		}
	}
	return func() netip.Addr { return h.Addr(v6) }
}

// work makes one connection after the other until the soak is over. Every path is taken before one is taken again.
func (s *soak) work(rnd *rand.Rand) {
	for {
		for _, i := range rnd.Perm(len(s.paths)) {
			if !s.connection(s.paths[i], rnd) {
				return
			}
		}
	}
}

// connection makes one, and false says that the soak is over.
func (s *soak) connection(p *path, rnd *rand.Rand) bool {
	s.mu.Lock()
	over, number := s.over, s.opened
	if !over {
		s.opened++
		s.active[number] = time.Now()
	}
	s.mu.Unlock()
	if over {
		return false
	}
	c := connection{path: p, start: time.Now(), remote: p.to()}
	c.err = s.talk(&c, rnd)
	c.end = time.Now()
	s.mu.Lock()
	delete(s.active, number)
	s.ended = append(s.ended, c)
	s.mu.Unlock()
	return true
}

// How long a connection waits for an answer: TCP for one that may have to be sent again, which takes 1, 3 and 7 seconds for a SYN; UDP for
// one that is lost otherwise, and that is an error.
const (
	tcpPatience = 8 * time.Second
	udpPatience = 3 * time.Second
)

// talk asks a few questions by one connection: at once, or with pauses, so that changes meet connections of every age.
func (s *soak) talk(c *connection, rnd *rand.Rand) error {
	questions, pause := 1+rnd.IntN(3), time.Duration(0)
	if rnd.IntN(8) == 0 {
		questions, pause = 10+rnd.IntN(10), 100*time.Millisecond
	}
	source := c.path.source()
	patience := map[string]time.Duration{"tcp": tcpPatience, "udp": udpPatience}[c.path.network]
	var (
		conn net.Conn
		err  error
	)
	c.path.from.NS.Do(func() { conn, err = (&net.Dialer{Timeout: patience}).Dial(c.path.network, c.remote.String()) })
	if err != nil {
		return err
	}
	defer conn.Close()
	c.local, _ = netip.ParseAddrPort(conn.LocalAddr().String())
	buf := make([]byte, 256)
	var lost error
	for range questions {
		if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		if _, err := conn.Write([]byte("who am I?")); err != nil {
			return err
		}
		n, err := conn.Read(buf)
		if c.path.network == "udp" && errors.Is(err, os.ErrDeadlineExceeded) && lost == nil {
			lost = err // the next datagram shows whether the flow is stuck
			continue
		}
		if err != nil {
			return err
		}
		if _, seen, _ := strings.Cut(string(buf[:n]), " "); seen != source.String() {
			return fmt.Errorf("answer %q, want one to %s", buf[:n], source)
		}
		if pause > 0 {
			time.Sleep(pause) // the load's own pace: nothing is waited for
		}
	}
	return lost
}
