// SPDX-License-Identifier: Apache-2.0

package clustertest

import (
	"fmt"
	"net/netip"
	"os/exec"
	"testing"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/nodetest"
)

// Host is a network namespace of the cluster: a node, a pod, a client, the router.
type Host struct {
	t    testing.TB
	Name string
	NS   *netnstest.NS
	// Addrs are its addresses on its first network, IPv4 before IPv6. The router's are in its Networks.
	Addrs []netip.Addr
}

// Addr returns the address of a family, the zero Addr when there is none.
func (h *Host) Addr(v6 bool) netip.Addr {
	for _, a := range h.Addrs {
		if a.Is6() == v6 {
			return a
		}
	}
	return netip.Addr{}
}

// AddrPort returns the address of a family with a port.
func (h *Host) AddrPort(v6 bool, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(h.Addr(v6), port)
}

// Serve answers on a TCP and UDP port with the host's name and the client's address as the server sees it, "web 192.0.2.100", until the
// test ends.
func (h *Host) Serve(port uint16) *nodetest.Server {
	h.t.Helper()
	return nodetest.Serve(h.t, h.NS, h.Name, port)
}

// Dial connects; network is "tcp" or "udp", sport 0 means any. The connection is closed when the test ends.
func (h *Host) Dial(network string, to netip.AddrPort, sport int) (*nodetest.Conn, error) {
	h.t.Helper()
	return nodetest.Dial(h.t, h.NS, network, to, sport)
}

// Ask connects, asks once and closes. It tries once: a packet lost on the way is an error after nodetest.Timeout.
func (h *Host) Ask(network string, to netip.AddrPort) (string, error) {
	h.t.Helper()
	return nodetest.Ask(h.t, h.NS, network, to)
}

// Ping sends one echo request, or what the flags of ping(8) say, and returns an error with what ping printed unless all were answered.
func (h *Host) Ping(to netip.Addr, flags ...string) error {
	out, err := h.Output("ping", append(append([]string{"-n", "-c1", "-W1"}, flags...), to.String())...)
	if err != nil {
		return fmt.Errorf("ping %s from %s: %w\n%s", to, h.Name, err, out)
	}
	return nil
}

// Output runs a program in the namespace and returns what it printed on both outputs.
func (h *Host) Output(program string, args ...string) (string, error) {
	var (
		out []byte
		err error
	)
	h.NS.Do(func() { out, err = exec.Command(program, args...).CombinedOutput() })
	return string(out), err
}

// newHost makes a namespace whose devices' IPv6 addresses are usable at once.
func (c *Cluster) newHost(name string) *Host {
	c.t.Helper()
	h := &Host{t: c.t, Name: name, NS: netnstest.New(c.t)}
	h.NS.Do(func() {
		c.sysctl("net/ipv6/conf/default/accept_dad", "0")
		c.sysctl("net/ipv4/conf/default/rp_filter", "0")
		c.sysctl("net/ipv4/conf/all/rp_filter", "0")
	})
	return h
}
