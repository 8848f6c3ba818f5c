// SPDX-License-Identifier: Apache-2.0

// Package pkt builds Ethernet frames for tests of the BPF programs, verifies the checksums of those that come out, and prints them in a
// form that a person can replay. It knows packets only: no maps, no programs, no devices.
package pkt

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

// Kind is what a packet carries above IP.
type Kind uint8

// The kinds that a Packet can be. Ping and Pong are the echo request and reply of the address family.
const (
	TCP Kind = iota
	UDP
	SCTP
	Ping
	Pong
)

// Proto returns the IP protocol number of the kind in a family.
func (k Kind) Proto(v6 bool) uint8 {
	switch k {
	case TCP:
		return uint8(layers.IPProtocolTCP)
	case UDP:
		return uint8(layers.IPProtocolUDP)
	case SCTP:
		return uint8(layers.IPProtocolSCTP)
	}
	if v6 {
		return uint8(layers.IPProtocolICMPv6)
	}
	return uint8(layers.IPProtocolICMPv4)
}

// String names the kind for sub-tests.
func (k Kind) String() string {
	return [...]string{"TCP", "UDP", "SCTP", "ping", "pong"}[k]
}

// TCP flags of Packet.Flags.
const (
	FIN = 0x01
	SYN = 0x02
	RST = 0x04
	PSH = 0x08
	ACK = 0x10
)

// Offsets in a frame without VLAN tag, for tests that change one field.
const (
	L3   = 14
	L4v4 = L3 + 20
	L4v6 = L3 + 40
)

// Packet describes one frame. The family follows the addresses; lengths and checksums are computed.
type Packet struct {
	SrcMAC, DstMAC net.HardwareAddr
	Kind           Kind
	// Src and Dst are the addresses and ports. Ping and Pong have their identifier in Src's port, Dst's is not used.
	Src, Dst netip.AddrPort
	TTL      uint8
	// Flags, Seq and Ack are TCP's.
	Flags    uint8
	Seq, Ack uint32
	Payload  []byte
	// NoChecksum leaves UDP's checksum zero, which IPv4 allows.
	NoChecksum bool
}

// V6 tells the family.
func (p Packet) V6() bool { return p.Dst.Addr().Is6() }

// Bytes serializes the packet.
func (p Packet) Bytes() []byte {
	eth, ip, network := p.headers(layers.IPProtocol(p.Kind.Proto(p.V6())))
	stack := []gopacket.SerializableLayer{eth, ip}
	switch p.Kind {
	case TCP:
		l := &layers.TCP{
			SrcPort: layers.TCPPort(p.Src.Port()), DstPort: layers.TCPPort(p.Dst.Port()), Seq: p.Seq, Ack: p.Ack, Window: 1024,
			FIN: p.Flags&FIN != 0, SYN: p.Flags&SYN != 0, RST: p.Flags&RST != 0, PSH: p.Flags&PSH != 0, ACK: p.Flags&ACK != 0,
		}
		if l.RST {
			l.Window = 0
		}
		check(l.SetNetworkLayerForChecksum(network))
		stack = append(stack, l)
	case UDP:
		l := &layers.UDP{SrcPort: layers.UDPPort(p.Src.Port()), DstPort: layers.UDPPort(p.Dst.Port())}
		check(l.SetNetworkLayerForChecksum(network))
		stack = append(stack, l)
	case SCTP:
		stack = append(stack, &layers.SCTP{
			SrcPort: layers.SCTPPort(p.Src.Port()), DstPort: layers.SCTPPort(p.Dst.Port()), VerificationTag: 1,
		})
	default:
		stack = append(stack, p.echo(network)...)
	}
	frame := serialize(append(stack, gopacket.Payload(p.Payload))...)
	if p.Kind == UDP && p.NoChecksum {
		at := p.l4() + 6
		frame[at], frame[at+1] = 0, 0
	}
	return frame
}

func (p Packet) l4() int {
	if p.V6() {
		return L4v6
	}
	return L4v4
}

// headers returns the Ethernet and IP layers.
func (p Packet) headers(proto layers.IPProtocol) (*layers.Ethernet, gopacket.SerializableLayer, gopacket.NetworkLayer) {
	eth := &layers.Ethernet{SrcMAC: p.SrcMAC, DstMAC: p.DstMAC, EthernetType: layers.EthernetTypeIPv4}
	if p.V6() {
		eth.EthernetType = layers.EthernetTypeIPv6
		ip := &layers.IPv6{
			Version: 6, NextHeader: proto, HopLimit: p.TTL, SrcIP: p.Src.Addr().AsSlice(), DstIP: p.Dst.Addr().AsSlice(),
		}
		return eth, ip, ip
	}
	ip := &layers.IPv4{
		Version: 4, IHL: 5, TTL: p.TTL, Protocol: proto, Flags: layers.IPv4DontFragment,
		SrcIP: p.Src.Addr().AsSlice(), DstIP: p.Dst.Addr().AsSlice(),
	}
	return eth, ip, ip
}

func (p Packet) echo(network gopacket.NetworkLayer) []gopacket.SerializableLayer {
	if p.V6() {
		typ := uint8(layers.ICMPv6TypeEchoRequest)
		if p.Kind == Pong {
			typ = layers.ICMPv6TypeEchoReply
		}
		l := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(typ, 0)}
		check(l.SetNetworkLayerForChecksum(network))
		return []gopacket.SerializableLayer{l, &layers.ICMPv6Echo{Identifier: p.Src.Port(), SeqNumber: 1}}
	}
	typ := uint8(layers.ICMPv4TypeEchoRequest)
	if p.Kind == Pong {
		typ = layers.ICMPv4TypeEchoReply
	}
	return []gopacket.SerializableLayer{&layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(typ, 0), Id: p.Src.Port(), Seq: 1}}
}

// Reply returns the packet that answers p at its destination's own device: addresses, ports and MACs exchanged, Ping becomes Pong, a SYN
// becomes SYN and ACK, other segments acknowledge what they answer.
func (p Packet) Reply() Packet {
	r := p
	r.SrcMAC, r.DstMAC, r.Src, r.Dst = p.DstMAC, p.SrcMAC, p.Dst, p.Src
	r.TTL = 64
	switch p.Kind {
	case Ping:
		r.Kind = Pong
		r.Src, r.Dst = netip.AddrPortFrom(p.Dst.Addr(), p.Src.Port()), netip.AddrPortFrom(p.Src.Addr(), 0)
	case TCP:
		r.Flags = ACK | p.Flags&SYN
		r.Seq, r.Ack = p.Ack, p.Seq+uint32(len(p.Payload))
		if p.Flags&(SYN|FIN) != 0 {
			r.Ack++
		}
	}
	return r
}

// Error returns an ICMP or ICMPv6 error about the packet in quoted, which is quoted from its IP header on. p gives MACs, addresses and TTL.
func (p Packet) Error(typ, code uint8, quoted []byte) []byte {
	return p.errorWithMTU(typ, code, 0, quoted)
}

// TooBig returns the error "fragmentation needed" or "packet too big", with the largest length that fits, from the IP header.
func (p Packet) TooBig(mtu uint16, quoted []byte) []byte {
	if p.V6() {
		return p.errorWithMTU(layers.ICMPv6TypePacketTooBig, 0, mtu, quoted)
	}
	return p.errorWithMTU(layers.ICMPv4TypeDestinationUnreachable, layers.ICMPv4CodeFragmentationNeeded, mtu, quoted)
}

func (p Packet) errorWithMTU(typ, code uint8, mtu uint16, quoted []byte) []byte {
	if p.V6() {
		eth, ip, network := p.headers(layers.IPProtocolICMPv6)
		l := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(typ, code)}
		check(l.SetNetworkLayerForChecksum(network))
		return serialize(eth, ip, l, gopacket.Payload(append(binary.BigEndian.AppendUint32(nil, uint32(mtu)), quoted[L3:]...)))
	}
	eth, ip, _ := p.headers(layers.IPProtocolICMPv4)
	return serialize(eth, ip, &layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(typ, code), Seq: mtu}, gopacket.Payload(quoted[L3:]))
}

// WithOptions returns the frame with one header more between IP and what it carries: IPv4 options, or an IPv6 extension header of type
// next (0: hop-by-hop).
func WithOptions(frame []byte, next uint8) []byte {
	out := bytes.Clone(frame)
	if binary.BigEndian.Uint16(frame[12:]) == uint16(layers.EthernetTypeIPv6) {
		binary.BigEndian.PutUint16(out[L3+4:], binary.BigEndian.Uint16(out[L3+4:])+8)
		out[L3+6] = next
		return slices.Insert(out, L4v6, frame[L3+6], 0, 1, 4, 0, 0, 0, 0)
	}
	out[L3]++
	binary.BigEndian.PutUint16(out[L3+2:], binary.BigEndian.Uint16(out[L3+2:])+4)
	out = slices.Insert(out, L4v4, 1, 1, 1, 0)
	out[L3+10], out[L3+11] = 0, 0
	binary.BigEndian.PutUint16(out[L3+10:], ^sum(0, out[L3:L4v4+4]))
	return out
}

// With returns a copy of the frame with the bytes at off replaced: the one changed field of a test case. Checksums stay as they are.
func With(frame []byte, off int, value ...byte) []byte {
	out := bytes.Clone(frame)
	copy(out[off:], value)
	return out
}

func serialize(stack ...gopacket.SerializableLayer) []byte {
	buf := gopacket.NewSerializeBuffer()
	check(gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, stack...))
	return bytes.Clone(buf.Bytes())
}

// check panics: what a test asks for is wrong, not what it tests.
func check(err error) {
	if err != nil {
		panic(fmt.Sprintf("build packet: %v", err))
	}
}
