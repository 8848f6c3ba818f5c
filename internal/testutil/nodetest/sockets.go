// SPDX-License-Identifier: Apache-2.0

package nodetest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
)

// Timeout bounds every socket operation of the fixture. A packet that policy drops is noticed after it.
const Timeout = 700 * time.Millisecond

// Server answers every connection and every datagram with its own name and the client's address as it sees it: "name 192.0.2.100".
type Server struct {
	Name string
	Port uint16
	tcp  net.Listener
	udp  net.PacketConn
}

// Serve starts a server on TCP and UDP in the namespace, on every address; it ends with the test.
func Serve(t testing.TB, ns *netnstest.NS, name string, port uint16) *Server {
	t.Helper()
	s := &Server{Name: name, Port: port}
	ns.Do(func() {
		var err error
		if s.tcp, err = net.Listen("tcp", fmt.Sprintf(":%d", port)); err != nil {
			t.Fatal(err)
		}
		if s.udp, err = net.ListenPacket("udp", fmt.Sprintf(":%d", port)); err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(func() { s.tcp.Close(); s.udp.Close() })
	go s.serveTCP()
	go s.serveUDP()
	return s
}

func (s *Server) reply(from net.Addr) []byte {
	ap, _ := netip.ParseAddrPort(from.String())
	return fmt.Appendf(nil, "%s %s", s.Name, ap.Addr().Unmap())
}

// serveTCP answers each line-less chunk that a client sends, for as long as it stays.
func (s *Server) serveTCP() {
	for {
		c, err := s.tcp.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			buf := make([]byte, 64<<10)
			for {
				if _, err := c.Read(buf); err != nil {
					return
				}
				if _, err := c.Write(s.reply(c.RemoteAddr())); err != nil {
					return
				}
			}
		}()
	}
}

func (s *Server) serveUDP() {
	buf := make([]byte, 64<<10)
	for {
		_, from, err := s.udp.ReadFrom(buf)
		if err != nil {
			return
		}
		if _, err := s.udp.WriteTo(s.reply(from), from); err != nil && errors.Is(err, net.ErrClosed) {
			return
		}
	}
}

// Conn is a client's socket.
type Conn struct {
	net.Conn
}

// Dial connects from a namespace; network is "tcp" or "udp", sport 0 means any.
func Dial(t testing.TB, ns *netnstest.NS, network string, to netip.AddrPort, sport int) (*Conn, error) {
	t.Helper()
	var c net.Conn
	var err error
	ns.Do(func() {
		d := net.Dialer{Timeout: Timeout, Control: reuse}
		if network == "tcp" {
			d.LocalAddr = &net.TCPAddr{Port: sport}
		} else {
			d.LocalAddr = &net.UDPAddr{Port: sport}
		}
		// The dialer makes the socket on the calling thread only when it needs not resolve or race addresses.
		c, err = d.DialContext(context.Background(), network, to.String())
	})
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { c.Close() })
	return &Conn{c}, nil
}

// reuse lets a test bind one source port for several destinations.
func reuse(_, _ string, c syscall.RawConn) error {
	var err error
	return errors.Join(c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}), err)
}

// Ask sends something and returns the answer.
func (c *Conn) Ask() (string, error) {
	if err := c.SetDeadline(time.Now().Add(Timeout)); err != nil {
		return "", err
	}
	if _, err := c.Write([]byte("who am I?")); err != nil {
		return "", err
	}
	buf := make([]byte, 256)
	n, err := c.Read(buf)
	return string(buf[:n]), err
}

// Ask connects, asks once and closes.
func Ask(t testing.TB, ns *netnstest.NS, network string, to netip.AddrPort) (string, error) {
	t.Helper()
	c, err := Dial(t, ns, network, to, 0)
	if err != nil {
		return "", err
	}
	defer c.Close()
	return c.Ask()
}
