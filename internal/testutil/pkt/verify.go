// SPDX-License-Identifier: Apache-2.0

package pkt

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"strings"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

// VerifyChecksums recomputes every checksum of a frame, from its bytes alone: the internet checksums (RFC 1071), those of the packet that an
// ICMP error quotes, too, as far as the quote has all that they cover, and the CRC32c of SCTP. That of a fragmented datagram is not
// looked at: it covers what the frame does not have.
func VerifyChecksums(frame []byte) error {
	if len(frame) < L3 {
		return errors.New("no Ethernet header")
	}
	switch layers.EthernetType(binary.BigEndian.Uint16(frame[12:])) {
	case layers.EthernetTypeIPv4:
		return verifyIPv4(frame[L3:])
	case layers.EthernetTypeIPv6:
		return verifyIPv6(frame[L3:])
	}
	return nil
}

func verifyIPv4(l3 []byte) error {
	if len(l3) < 20 {
		return errors.New("IPv4: no whole header")
	}
	header, total := int(l3[0]&0xf)*4, int(binary.BigEndian.Uint16(l3[2:]))
	if header < 20 || total < header || len(l3) < total {
		return errors.New("IPv4: header and total length do not fit the frame")
	}
	if sum(0, l3[:header]) != 0xffff {
		return fmt.Errorf("IPv4: header checksum %#04x is wrong", binary.BigEndian.Uint16(l3[10:]))
	}
	if binary.BigEndian.Uint16(l3[6:])&0x3fff != 0 {
		return nil
	}
	return verifyL4(l3[9], l3[12:20], l3[header:total])
}

func verifyIPv6(l3 []byte) error {
	if len(l3) < 40 || len(l3) < 40+int(binary.BigEndian.Uint16(l3[4:])) {
		return errors.New("IPv6: payload length does not fit the frame")
	}
	proto, l4 := l3[6], l3[40:40+int(binary.BigEndian.Uint16(l3[4:]))]
	for proto == 0 || proto == 60 { // hop-by-hop and destination options
		if len(l4) < 8 || len(l4) < int(l4[1])*8+8 {
			return errors.New("IPv6: extension header does not fit the packet")
		}
		proto, l4 = l4[0], l4[int(l4[1])*8+8:]
	}
	return verifyL4(proto, l3[8:40], l4)
}

// verifyQuote verifies what an ICMP error quotes. Of a quote that ends early only the IPv4 header can be verified, of one that is odd
// nothing.
func verifyQuote(v6 bool, quoted []byte) error {
	if v6 {
		if len(quoted) < 40 || quoted[0]>>4 != 6 || len(quoted) < 40+int(binary.BigEndian.Uint16(quoted[4:])) {
			return nil
		}
		return verifyIPv6(quoted)
	}
	if len(quoted) < 20 || quoted[0]>>4 != 4 || quoted[0]&0xf < 5 || len(quoted) < int(quoted[0]&0xf)*4 {
		return nil
	}
	header, total := int(quoted[0]&0xf)*4, int(binary.BigEndian.Uint16(quoted[2:]))
	if fragment := binary.BigEndian.Uint16(quoted[6:])&0x3fff != 0; fragment || total < header || len(quoted) < total {
		if sum(0, quoted[:header]) != 0xffff {
			return fmt.Errorf("IPv4: header checksum %#04x is wrong", binary.BigEndian.Uint16(quoted[10:]))
		}
		return nil
	}
	return verifyIPv4(quoted)
}

// isError tells whether an ICMP or ICMPv6 message quotes a packet.
func isError(proto layers.IPProtocol, typ uint8) bool {
	if proto == layers.IPProtocolICMPv6 {
		return typ >= layers.ICMPv6TypeDestinationUnreachable && typ <= layers.ICMPv6TypeParameterProblem
	}
	return typ == layers.ICMPv4TypeDestinationUnreachable || typ == layers.ICMPv4TypeTimeExceeded || typ == layers.ICMPv4TypeParameterProblem
}

func verifyL4(proto uint8, addrs, l4 []byte) error {
	if len(l4) < 8 {
		return fmt.Errorf("%s: no whole header", layers.IPProtocol(proto))
	}
	pseudo := sum(uint32(proto)+uint32(len(l4)), addrs)
	switch layers.IPProtocol(proto) {
	case layers.IPProtocolUDP:
		if binary.BigEndian.Uint16(l4[6:]) == 0 {
			if len(addrs) == 8 {
				return nil
			}
			return errors.New("UDP: no checksum, which IPv6 does not allow")
		}
	case layers.IPProtocolICMPv4:
		pseudo = 0
	case layers.IPProtocolSCTP:
		return verifySCTP(l4)
	case layers.IPProtocolTCP, layers.IPProtocolICMPv6:
	default:
		return nil
	}
	if sum(uint32(pseudo), l4) != 0xffff {
		return fmt.Errorf("%s: checksum is wrong", layers.IPProtocol(proto))
	}
	icmp := proto == uint8(layers.IPProtocolICMPv4) || proto == uint8(layers.IPProtocolICMPv6)
	if icmp && isError(layers.IPProtocol(proto), l4[0]) {
		if err := verifyQuote(proto == uint8(layers.IPProtocolICMPv6), l4[8:]); err != nil {
			return fmt.Errorf("quoted packet: %w", err)
		}
	}
	return nil
}

// verifySCTP checks the CRC32c of a whole packet, computed with zeros in its place (RFC 9260 §6.8).
func verifySCTP(l4 []byte) error {
	if len(l4) < 12 {
		return errors.New("SCTP: no whole header")
	}
	zeroed := bytes.Clone(l4)
	clear(zeroed[8:12])
	if want, got := crc32.Checksum(zeroed, crc32.MakeTable(crc32.Castagnoli)), binary.LittleEndian.Uint32(l4[8:]); got != want {
		return fmt.Errorf("SCTP: checksum is %#08x, want %#08x", got, want)
	}
	return nil
}

// sum is the folded one's complement sum of 16-bit words; over data with its right checksum it is 0xffff.
func sum(start uint32, b []byte) uint16 {
	s := uint64(start)
	for ; len(b) >= 2; b = b[2:] {
		s += uint64(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		s += uint64(b[0]) << 8
	}
	for s > 0xffff {
		s = s&0xffff + s>>16
	}
	return uint16(s)
}

// Dump prints a frame three ways: as bytes that text2pcap reads, as a line for scapy, and decoded.
func Dump(frame []byte) string {
	var out strings.Builder
	for off := 0; off < len(frame); off += 16 {
		fmt.Fprintf(&out, "%06x % x\n", off, frame[off:min(off+16, len(frame))])
	}
	fmt.Fprintf(&out, "Ether(bytes.fromhex(%q))\n", hex.EncodeToString(frame))
	for _, l := range gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.Default).Layers() {
		fmt.Fprintf(&out, "  %s\n", gopacket.LayerString(l))
	}
	return out.String()
}
