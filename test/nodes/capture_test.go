// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"errors"
	"net"
	"net/netip"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/clustertest"
)

// capture sees every frame that passes a device, after the programs at its egress and before those at its ingress.
type capture struct {
	t  *testing.T
	fd int
}

// newCapture listens on a host's device from now on.
func newCapture(t *testing.T, h *clustertest.Host, device string) *capture {
	t.Helper()
	c := &capture{t: t}
	h.NS.Do(func() {
		i, err := net.InterfaceByName(device)
		if err != nil {
			t.Fatal(err)
		}
		const all = unix.ETH_P_ALL>>8 | unix.ETH_P_ALL&0xff<<8 // network byte order
		if c.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(c.fd) })
		if err := unix.Bind(c.fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: i.Index}); err != nil {
			t.Fatal(err)
		}
	})
	return c
}

// sent counts the packets with this source and destination address that have left by the device since the last call.
func (c *capture) sent(from, to netip.Addr) (packets int) {
	c.t.Helper()
	buf := make([]byte, 64<<10)
	for {
		n, sender, err := unix.Recvfrom(c.fd, buf, 0)
		if errors.Is(err, unix.EAGAIN) {
			return packets
		}
		if err != nil {
			c.t.Fatal(err)
		}
		if ll, ok := sender.(*unix.SockaddrLinklayer); !ok || ll.Pkttype != unix.PACKET_OUTGOING {
			continue
		}
		frame := gopacket.NewPacket(buf[:n], layers.LayerTypeEthernet, gopacket.NoCopy)
		if l := frame.NetworkLayer(); l != nil && l.NetworkFlow().Src().String() == from.String() && l.NetworkFlow().Dst().String() == to.String() {
			packets++
		}
	}
}
