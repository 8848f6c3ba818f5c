// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"
)

// Times of a connection to the API server.
const (
	// dialTimeout bounds one attempt at one address, TLS included.
	dialTimeout = 3 * time.Second
	// pingAfter and pingTimeout are HTTP/2's: a silent connection is asked after the one, and given up after the other.
	pingAfter   = 5 * time.Second
	pingTimeout = 5 * time.Second
	// headerTimeout bounds the wait for the beginning of an answer. The API server's own limit for a list is 60 s.
	headerTimeout = 65 * time.Second
)

// address is one place where an API server may be.
type address struct {
	// hostPort is what is dialled.
	hostPort string
	// serverName is the name that the certificate must be valid for.
	serverName string
	// from says who named the address, for people.
	from string
}

func (a address) String() string {
	return a.hostPort + " (" + a.from + ")"
}

// dialer connects to the first of several addresses that answers, beginning with the one that did last.
type dialer struct {
	net net.Dialer
	// tls is nil for servers without TLS.
	tls *tls.Config

	mu        sync.Mutex
	addresses []address
	// current is the hostPort that answered last; it goes first.
	current string
	// conns are the open connections by the address that they lead to.
	conns map[*trackedConn]string
}

func newDialer(addresses []address, config *tls.Config) *dialer {
	return &dialer{
		net: net.Dialer{Timeout: dialTimeout}, tls: config, addresses: addresses, conns: map[*trackedConn]string{},
	}
}

// set makes these the addresses. Open connections stay.
func (d *dialer) set(addresses []address) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.addresses = addresses
}

// order returns the addresses in the order in which to try them.
func (d *dialer) order() []address {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := slices.Clone(d.addresses)
	if i := slices.IndexFunc(out, func(a address) bool { return a.hostPort == d.current }); i > 0 {
		first := out[i]
		out = slices.Insert(slices.Delete(out, i, i+1), 0, first)
	}
	return out
}

// dial returns a connection to the first address that answers; a server with TLS must have proven its name, too. It has the signature of
// http.Transport's dial functions, which name an address of their own: that one does not count.
func (d *dialer) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	var errs []error
	for _, a := range d.order() {
		conn, err := d.dialOne(ctx, a)
		if err == nil {
			d.mu.Lock()
			d.current = a.hostPort
			d.mu.Unlock()
			return conn, nil
		}
		errs = append(errs, fmt.Errorf("%v: %w", a, err))
		if ctx.Err() != nil {
			break
		}
	}
	if len(errs) == 0 {
		return nil, errors.New("no address of an API server is known")
	}
	return nil, errors.Join(errs...)
}

func (d *dialer) dialOne(ctx context.Context, a address) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	raw, err := d.net.DialContext(ctx, "tcp", a.hostPort)
	if err != nil {
		return nil, err
	}
	conn := d.track(raw, a.hostPort)
	if d.tls == nil {
		return conn, nil
	}
	config := d.tls.Clone()
	config.ServerName = a.serverName
	secure := tls.Client(conn, config)
	if err := secure.HandshakeContext(ctx); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return secure, nil
}

// leave gives up the server that answered last: another one goes first next time, and its connections end, which ends what is watched
// through them. It does nothing and returns false while there is no other.
func (d *dialer) leave() bool {
	d.mu.Lock()
	if len(d.addresses) < 2 {
		d.mu.Unlock()
		return false
	}
	i := slices.IndexFunc(d.addresses, func(a address) bool { return a.hostPort == d.current })
	left := d.current
	d.current = d.addresses[(i+1)%len(d.addresses)].hostPort
	var conns []*trackedConn
	for c, hostPort := range d.conns {
		if hostPort == left {
			conns = append(conns, c)
		}
	}
	d.mu.Unlock()
	for _, c := range conns {
		_ = c.Close() // it is given up anyway
	}
	return true
}

func (d *dialer) track(raw net.Conn, hostPort string) *trackedConn {
	c := &trackedConn{Conn: raw, dialer: d}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.conns[c] = hostPort
	return c
}

// trackedConn is known to its dialer while it is open.
type trackedConn struct {
	net.Conn
	dialer *dialer
}

// Close implements net.Conn.
func (c *trackedConn) Close() error {
	c.dialer.mu.Lock()
	delete(c.dialer.conns, c)
	c.dialer.mu.Unlock()
	return c.Conn.Close()
}
