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

// serverPort is where every server listens.
const serverPort = 8080

// server is a web server of sorts: one line in, one line of the same length or longer out, on TCP and UDP. Its log has a line for each
// request.
type server struct {
	name string
	mu   sync.Mutex
	log  []string
}

// serve starts the server in a namespace. It ends with the demo.
func serve(name, ns string) (*server, error) {
	s := &server{name: name}
	return s, netns.Do(ns, func() error {
		port := fmt.Sprintf(":%d", serverPort)
		tcp, err := net.Listen("tcp", port)
		if err != nil {
			return err
		}
		udp, err := net.ListenPacket("udp", port)
		if err != nil {
			return err
		}
		go s.acceptTCP(tcp)
		go s.answerUDP(udp)
		return nil
	})
}

// request logs one and returns the answer, which spaces make as long as the request.
func (s *server) request(network string, length int, from net.Addr) []byte {
	client, _ := netip.ParseAddrPort(from.String())
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log = append(s.log, fmt.Sprintf("%s request from client %s", network, client.Addr().Unmap()))
	return fmt.Appendf(nil, "%-*s\n", length-1, fmt.Sprintf("%s %s", s.name, client.Addr().Unmap()))
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
				if _, err := c.Write(s.request("TCP", len(lines.Bytes())+1, c.RemoteAddr())); err != nil {
					return
				}
			}
		}()
	}
}

func (s *server) answerUDP(c net.PacketConn) {
	buf := make([]byte, 1<<16)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return
		}
		if _, err := c.WriteTo(s.request("UDP", n, from), from); err != nil {
			return
		}
	}
}

// answer is what a server said: who it is, and who it thinks asks.
type answer struct {
	server string
	client string
	bytes  int
}

// talk is an open connection of a client.
type talk struct {
	conn net.Conn
	in   *bufio.Reader
}

// dial connects from a namespace; network is tcp or udp. from is the client's own address, or the zero Addr for the kernel's choice.
func dial(ctx context.Context, ns, network string, from netip.Addr, to netip.AddrPort) (*talk, error) {
	t := &talk{}
	err := netns.Do(ns, func() error {
		d := net.Dialer{Timeout: patience}
		switch {
		case !from.IsValid():
		case network == "tcp":
			d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
		default:
			d.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
		}
		var err error
		t.conn, err = d.DialContext(ctx, network, to.String())
		return err
	})
	if err != nil {
		return nil, err
	}
	t.in = bufio.NewReaderSize(t.conn, 1<<16)
	return t, nil
}

// ask sends one line and waits for the answer.
func (t *talk) ask() (answer, error) {
	return t.askWith(len("who am I?\n"))
}

// askWith asks with a line of that many bytes.
func (t *talk) askWith(length int) (answer, error) {
	if err := t.conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return answer{}, err
	}
	if _, err := fmt.Fprintf(t.conn, "%-*s\n", length-1, "who am I?"); err != nil {
		return answer{}, err
	}
	line, err := t.in.ReadString('\n')
	who, client, _ := strings.Cut(strings.TrimSpace(line), " ")
	return answer{who, client, len(line)}, err
}

// askOnce connects, asks and closes.
func askOnce(ctx context.Context, ns, network string, to netip.AddrPort) (answer, error) {
	return askFrom(ctx, ns, network, netip.Addr{}, to)
}

// askFrom is askOnce from one of the client's addresses.
func askFrom(ctx context.Context, ns, network string, from netip.Addr, to netip.AddrPort) (answer, error) {
	t, err := dial(ctx, ns, network, from, to)
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
