// SPDX-License-Identifier: Apache-2.0

package pkt

import (
	"net"
	"net/netip"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

var (
	broadcast = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	unknown   = net.HardwareAddr{0, 0, 0, 0, 0, 0}
)

// ARPRequest asks who has target.
func ARPRequest(mac net.HardwareAddr, sender, target netip.Addr) []byte {
	return arp(layers.ARPRequest, mac, broadcast, mac, sender, unknown, target)
}

// ARPReply tells to that sender is at mac.
func ARPReply(mac net.HardwareAddr, sender netip.Addr, to net.HardwareAddr, target netip.Addr) []byte {
	return arp(layers.ARPReply, mac, to, mac, sender, to, target)
}

func arp(op uint16, src, dst, sha net.HardwareAddr, spa netip.Addr, tha net.HardwareAddr, tpa netip.Addr) []byte {
	return serialize(
		&layers.Ethernet{SrcMAC: src, DstMAC: dst, EthernetType: layers.EthernetTypeARP},
		&layers.ARP{
			AddrType: layers.LinkTypeEthernet, Protocol: layers.EthernetTypeIPv4, Operation: op,
			SourceHwAddress: sha, SourceProtAddress: spa.AsSlice(), DstHwAddress: tha, DstProtAddress: tpa.AsSlice(),
		})
}

// Solicitation asks for target's MAC, at its solicited-node address; withOption adds the sender's own.
func Solicitation(mac net.HardwareAddr, sender, target netip.Addr, withOption bool) []byte {
	t := target.As16()
	group := netip.AddrFrom16([16]byte{0xff, 2, 11: 1, 12: 0xff, 13: t[13], 14: t[14], 15: t[15]})
	p := Packet{
		SrcMAC: mac, DstMAC: net.HardwareAddr{0x33, 0x33, 0xff, t[13], t[14], t[15]}, TTL: 255,
		Src: netip.AddrPortFrom(sender, 0), Dst: netip.AddrPortFrom(group, 0),
	}
	ns := &layers.ICMPv6NeighborSolicitation{TargetAddress: target.AsSlice()}
	if withOption {
		ns.Options = layers.ICMPv6Options{{Type: layers.ICMPv6OptSourceAddress, Data: mac}}
	}
	return p.discovery(layers.ICMPv6TypeNeighborSolicitation, ns)
}

// Advertisement answers a solicitation of to: target is at mac, which is a router's.
func Advertisement(mac net.HardwareAddr, target netip.Addr, to net.HardwareAddr, asked netip.Addr) []byte {
	p := Packet{SrcMAC: mac, DstMAC: to, TTL: 255, Src: netip.AddrPortFrom(target, 0), Dst: netip.AddrPortFrom(asked, 0)}
	return p.discovery(layers.ICMPv6TypeNeighborAdvertisement, &layers.ICMPv6NeighborAdvertisement{
		Flags: 0xe0, TargetAddress: target.AsSlice(),
		Options: layers.ICMPv6Options{{Type: layers.ICMPv6OptTargetAddress, Data: mac}},
	})
}

// RouterSolicitation is what a stack sends when it comes up.
func RouterSolicitation(mac net.HardwareAddr, sender netip.Addr) []byte {
	p := Packet{
		SrcMAC: mac, DstMAC: net.HardwareAddr{0x33, 0x33, 0, 0, 0, 2}, TTL: 255,
		Src: netip.AddrPortFrom(sender, 0), Dst: netip.AddrPortFrom(netip.IPv6LinkLocalAllRouters(), 0),
	}
	return p.discovery(layers.ICMPv6TypeRouterSolicitation, &layers.ICMPv6RouterSolicitation{})
}

func (p Packet) discovery(typ uint8, body gopacket.SerializableLayer) []byte {
	eth, ip, network := p.headers(layers.IPProtocolICMPv6)
	l := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(typ, 0)}
	check(l.SetNetworkLayerForChecksum(network))
	return serialize(eth, ip, l, body)
}
