// SPDX-License-Identifier: Apache-2.0

//go:build cluster

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/netns"
	"github.com/margay-cni/margay/test/cluster/lab"
)

const (
	// answerTime is how long a probe waits for its answer, on a machine that has much else to do.
	answerTime = 3 * time.Second
	// silenceTime is how long one waits that expects none. Probes that expect an answer are asked between them.
	silenceTime = 700 * time.Millisecond
)

// place is a network namespace to send from: a pod's, a node's, the client's.
type place struct {
	name  string
	addrs []netip.Addr
	netns func() (string, error) // its path
}

// machinePlace is a machine's own network.
func machinePlace(m *lab.Machine) place {
	return place{name: m.Name, netns: func() (string, error) {
		pid, err := m.PID()
		return fmt.Sprintf("/proc/%d/ns/net", pid), err
	}}
}

// nodePlace is the network of node number i, the first is 1.
func nodePlace(i int) place {
	n := cluster.Nodes()[i-1]
	p := machinePlace(&n.Machine)
	p.addrs = n.Addresses()
	return p
}

// clientPlace is the machine outside of the cluster, one hop away from the nodes.
func clientPlace() place {
	p := machinePlace(cluster.Client())
	p.addrs = cluster.ClientAddresses()
	return p
}

// do runs f on a thread in the place's network.
func (p place) do(f func() error) error {
	path, err := p.netns()
	if err != nil {
		return fmt.Errorf("find the network of %s: %w", p.name, err)
	}
	return netns.Do(path, f)
}

// dial connects to an address, not a name, from the place. The dialer makes its socket on the calling thread, because it has nothing to
// resolve and one address only.
func (p place) dial(ctx context.Context, network, address string) (c net.Conn, err error) {
	err = p.do(func() (err error) {
		c, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// ask asks an agnhost netexec for "hostname", "clientip" or "echo TEXT", over tcp (HTTP) or udp, and waits at most so long.
func (p place) ask(network string, to netip.AddrPort, question string, within time.Duration) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	if network == "udp" {
		return p.askUDP(ctx, to, question)
	}
	return p.askHTTP(ctx, to, question)
}

func (p place) askUDP(ctx context.Context, to netip.AddrPort, question string) (string, error) {
	c, err := p.dial(ctx, "udp", to.String())
	if err != nil {
		return "", err
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	if err := c.SetDeadline(deadline); err != nil {
		return "", err
	}
	if _, err := io.WriteString(c, question); err != nil {
		return "", err
	}
	buf := make([]byte, 64<<10)
	n, err := c.Read(buf)
	return string(buf[:n]), err
}

func (p place) askHTTP(ctx context.Context, to netip.AddrPort, question string) (string, error) {
	transport := &http.Transport{DialContext: p.dial, DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	return get(ctx, transport, to, question)
}

// get asks an agnhost netexec by HTTP.
func get(ctx context.Context, transport *http.Transport, to netip.AddrPort, question string) (string, error) {
	method, path, body := http.MethodGet, question, ""
	if text, ok := strings.CutPrefix(question, "echo "); ok {
		method, path, body = http.MethodPost, "echo", url.Values{"msg": {text}}.Encode()
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://"+to.String()+"/"+path, strings.NewReader(body))
	if err != nil {
		return "", err
	}
	request.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	response, err := transport.RoundTrip(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	b, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s: %s: %s", path, response.Status, b)
	}
	return string(b), err
}

// ping sends one ICMP echo request with size bytes of data and waits for the reply.
func (p place) ping(to netip.Addr, size int, within time.Duration) error {
	network, request, reply := "ip4:icmp", byte(8), byte(0) // RFC 792
	if to.Is6() {
		network, request, reply = "ip6:ipv6-icmp", 128, 129 // RFC 4443
	}
	message := make([]byte, 8+size)
	message[0] = request
	message[4], message[5] = byte(time.Now().UnixNano()>>8), byte(time.Now().UnixNano()>>16) // identifier, any
	for i := range size {
		message[8+i] = byte(i)
	}
	if to.Is4() { // the kernel fills in ICMPv6's checksum, RFC 3542
		sum := checksum(message)
		message[2], message[3] = byte(sum>>8), byte(sum)
	}
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	c, err := p.dial(ctx, network, to.String())
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(within)); err != nil {
		return err
	}
	if _, err := c.Write(message); err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	for {
		n, err := c.Read(buf)
		if err != nil {
			return err
		}
		got := buf[:n]
		if to.Is4() && n >= 20 && got[0]>>4 == 4 { // a connected raw socket keeps the IP header
			got = got[int(got[0]&15)*4:]
		}
		if len(got) >= 8 && got[0] == reply && got[4] == message[4] && got[5] == message[5] {
			if string(got[8:]) != string(message[8:]) {
				return fmt.Errorf("the reply has other data: %d bytes, want %d", len(got)-8, size)
			}
			return nil
		}
	}
}

// checksum is the one's complement sum of RFC 1071 over an even or odd number of bytes.
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(b[i]) << 8
		if i+1 < len(b) {
			sum += uint32(b[i+1])
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// refused reports whether a probe was told at once that nobody serves there: by a TCP reset or an ICMP error.
func refused(err error) bool { return errors.Is(err, unix.ECONNREFUSED) }

// silent reports whether a probe got no answer at all.
func silent(err error) bool {
	var timeout net.Error
	return errors.Is(err, context.DeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout()
}
