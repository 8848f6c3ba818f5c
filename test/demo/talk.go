// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/margay-cni/margay/pkg/netns"
)

// patience is how long a client waits for an answer.
const patience = 500 * time.Millisecond

// server is a web server of sorts in a pod: one line in, one line out, on TCP and UDP port 8080. Its log has a line for each request.
type server struct {
	name string
	mu   sync.Mutex
	log  []string
}

// serve starts the server in the pod's namespace. It ends with the demo.
func serve(p *pod) (*server, error) {
	s := &server{name: p.name}
	return s, netns.Do(p.ns, func() error {
		tcp, err := net.Listen("tcp", ":8080")
		if err != nil {
			return err
		}
		udp, err := net.ListenPacket("udp", ":8080")
		if err != nil {
			return err
		}
		go s.acceptTCP(tcp)
		go s.answerUDP(udp)
		return nil
	})
}

// request logs one and returns the answer.
func (s *server) request(network string, from net.Addr) string {
	client, _ := netip.ParseAddrPort(from.String())
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log = append(s.log, fmt.Sprintf("%s request from client %s", network, client.Addr().Unmap()))
	return fmt.Sprintf("%s %s\n", s.name, client.Addr().Unmap())
}

// lastLine returns the newest line of the server's log.
func (s *server) lastLine() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.log) == 0 {
		return ""
	}
	return s.log[len(s.log)-1]
}

func (s *server) acceptTCP(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			for lines := bufio.NewScanner(c); lines.Scan(); {
				if _, err := c.Write([]byte(s.request("TCP", c.RemoteAddr()))); err != nil {
					return
				}
			}
		}()
	}
}

func (s *server) answerUDP(c net.PacketConn) {
	buf := make([]byte, 1500)
	for {
		_, from, err := c.ReadFrom(buf)
		if err != nil {
			return
		}
		if _, err := c.WriteTo([]byte(s.request("UDP", from)), from); err != nil {
			return
		}
	}
}

// answer is what a server said: who it is, and who it thinks asks.
type answer struct {
	server string
	client string
}

// talk is an open connection of a client.
type talk struct {
	conn net.Conn
	in   *bufio.Reader
}

// dial connects from a namespace; network is tcp or udp.
func dial(ctx context.Context, ns, network string, to netip.AddrPort) (*talk, error) {
	t := &talk{}
	err := netns.Do(ns, func() error {
		d := net.Dialer{Timeout: patience}
		var err error
		t.conn, err = d.DialContext(ctx, network, to.String())
		return err
	})
	if err != nil {
		return nil, err
	}
	t.in = bufio.NewReader(t.conn)
	return t, nil
}

// ask sends one line and waits for the answer.
func (t *talk) ask() (answer, error) {
	if err := t.conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return answer{}, err
	}
	if _, err := t.conn.Write([]byte("who am I?\n")); err != nil {
		return answer{}, err
	}
	line, err := t.in.ReadString('\n')
	who, client, _ := strings.Cut(strings.TrimSpace(line), " ")
	return answer{who, client}, err
}

// askOnce connects, asks and closes.
func askOnce(ctx context.Context, ns, network string, to netip.AddrPort) (answer, error) {
	t, err := dial(ctx, ns, network, to)
	if err != nil {
		return answer{}, err
	}
	defer t.conn.Close()
	return t.ask()
}

// eventually repeats f until it says yes, for a bounded time.
func eventually(ctx context.Context, f func() bool) bool {
	for deadline := time.Now().Add(8 * time.Second); time.Now().Before(deadline) && ctx.Err() == nil; {
		if f() {
			return true
		}
		select {
		case <-ctx.Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
	return false
}
