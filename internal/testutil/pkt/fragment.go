// SPDX-License-Identifier: Apache-2.0

package pkt

import (
	"bytes"
	"encoding/binary"
	"slices"

	"github.com/gopacket/gopacket/layers"
)

const moreFragments = 0x2000

// Fragment cuts the frame's packet into fragments (RFC 791 §3.2, RFC 8200 §4.5), in order. Each carries size bytes, a multiple of 8, of what
// follows the IP header (IPv6: the fragment header), the last one what is left. In IPv6 all extension headers of the frame are
// fragmented with it.
func Fragment(frame []byte, id uint32, size int) (out [][]byte) {
	v6 := binary.BigEndian.Uint16(frame[12:]) == uint16(layers.EthernetTypeIPv6)
	headers := L4v6
	if !v6 {
		headers = L3 + int(frame[L3]&0xf)*4
	}
	payload := frame[headers:]
	for off := 0; off < len(payload); off += size {
		end := min(off+size, len(payload))
		if v6 {
			out = append(out, fragmentV6(frame[:headers], payload[off:end], id, off, end < len(payload)))
		} else {
			out = append(out, fragmentV4(frame[:headers], payload[off:end], id, off, end < len(payload)))
		}
	}
	return out
}

func fragmentV4(headers, part []byte, id uint32, off int, more bool) []byte {
	f := append(bytes.Clone(headers), part...)
	ip := f[L3:]
	flags := uint16(off / 8)
	if more {
		flags |= moreFragments
	}
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	binary.BigEndian.PutUint16(ip[4:], uint16(id))
	binary.BigEndian.PutUint16(ip[6:], flags)
	binary.BigEndian.PutUint16(ip[10:], 0)
	binary.BigEndian.PutUint16(ip[10:], ^sum(0, f[L3:len(headers)]))
	return f
}

func fragmentV6(headers, part []byte, id uint32, off int, more bool) []byte {
	flags := uint16(off)
	if more {
		flags |= 1
	}
	header := binary.BigEndian.AppendUint16([]byte{headers[L3+6], 0}, flags)
	f := slices.Concat(headers, binary.BigEndian.AppendUint32(header, id), part)
	f[L3+6] = uint8(layers.IPProtocolIPv6Fragment)
	binary.BigEndian.PutUint16(f[L3+4:], uint16(len(f)-L4v6))
	return f
}
