// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/netns"
)

// capture watches one device of the router for packets that a host sends with one source port, TCP or UDP. The overlay's packets are UDP
// with other ports, so what is counted are packets outside of it.
type capture struct {
	fd   int
	port uint16
}

// watch starts a capture of what a node sends.
func (f *fabric) watch(n *node, sourcePort uint16) (*capture, error) {
	c := &capture{port: sourcePort}
	err := netns.Do(f.router, func() (err error) {
		l, err := netlink.LinkByName(n.name)
		if err != nil {
			return err
		}
		all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
		// Without a protocol nothing arrives before bind has named the device. SOCK_DGRAM: packets begin with the IP header.
		if c.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
			return err
		}
		return unix.Bind(c.fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: l.Attrs().Index})
	})
	if err != nil {
		return nil, fmt.Errorf("watch what %s sends: %w", n.name, err)
	}
	return c, nil
}

// count returns how many packets came since the last call. Those whose answers somebody has received are there already.
func (c *capture) count() (packets int, err error) {
	buf := make([]byte, 128)
	for {
		n, from, err := unix.Recvfrom(c.fd, buf, 0)
		if errors.Is(err, unix.EAGAIN) {
			return packets, nil
		}
		if err != nil {
			return packets, err
		}
		ll, ok := from.(*unix.SockaddrLinklayer)
		if port, known := sourcePort(buf[:n]); ok && ll.Pkttype != unix.PACKET_OUTGOING && known && port == c.port {
			packets++
		}
	}
}

func (c *capture) close() error {
	return unix.Close(c.fd)
}

// sourcePort reads the source port of a TCP or UDP packet without IPv6 extension headers.
func sourcePort(p []byte) (port uint16, ok bool) {
	if len(p) < 20 {
		return 0, false
	}
	header, protocol := int(p[0]&0xf)*4, p[9]
	if p[0]>>4 == 6 {
		header, protocol = 40, p[6]
	}
	if len(p) < header+2 || protocol != unix.IPPROTO_TCP && protocol != unix.IPPROTO_UDP {
		return 0, false
	}
	return binary.BigEndian.Uint16(p[header:]), true
}
