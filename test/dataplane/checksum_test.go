// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
)

// virtioHeader is the length of struct virtio_net_hdr, linux/virtio_net.h, which a packet socket with PACKET_VNET_HDR puts before a frame.
const virtioHeader = 10

// completed returns how many of the frames that came in until now had a checksum of the pseudo header alone (CHECKSUM_PARTIAL). It computes
// the rest, as a device would, and requires that every frame's checksums are right then. What is encapsulated only passes by.
func (w *wire) completed() (partial int) {
	w.t.Helper()
	buf := make([]byte, 4000)
	for {
		n, from, err := unix.Recvfrom(w.fd, buf, unix.MSG_DONTWAIT)
		if err != nil {
			return partial
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); !ok || ll.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		frame := buf[virtioHeader:n]
		if isOuter(frame) {
			continue
		}
		if buf[0]&unix.VIRTIO_NET_HDR_F_NEEDS_CSUM != 0 {
			partial++
			start, at := binary.NativeEndian.Uint16(buf[6:]), binary.NativeEndian.Uint16(buf[8:])
			binary.BigEndian.PutUint16(frame[start+at:], ^onesComplement(frame[start:]))
		}
		if err := pkt.VerifyChecksums(frame); err != nil {
			w.t.Errorf("%v\n%s", err, pkt.Dump(frame))
		}
	}
}

// onesComplement is the sum of RFC 1071, not inverted.
func onesComplement(b []byte) uint16 {
	sum := uint32(0)
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

// What a pod sends has a checksum that a device is to complete, and it is right after translation,
// in both directions. Between pods nobody would notice: a kernel does not verify what it has not completed.
func TestChecksumsAfterTranslation(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a, b := n.AddPod("a"), n.AddPod("b")
	nodetest.Serve(t, b.NS, "b", 8080)
	addServices(n, b)
	wires := map[string]*wire{"request": newWire(t, b.NS), "answer": newWire(t, a.NS)}
	for _, w := range wires {
		wantNoError(t, "set PACKET_VNET_HDR", unix.SetsockoptInt(w.fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1))
	}
	families(t, func(t *testing.T, v6 bool) {
		for network := range protocols {
			for _, w := range wires {
				w.completed()
			}
			got, err := nodetest.Ask(t, a.NS, network, netip.AddrPortFrom(family(vips, v6), 80))
			wantAnswer(t, network+" to the ClusterIP", got, err, "b "+a.Addr(v6).String())
			time.Sleep(10 * time.Millisecond)
			for what, w := range wires {
				if w.completed() == 0 {
					t.Errorf("%s: no %s came with a checksum to be completed", network, what)
				}
			}
		}
	})
}
