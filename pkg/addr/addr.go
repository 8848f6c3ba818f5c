// SPDX-License-Identifier: Apache-2.0

// Package addr is the one form of an address that Margay's maps and records know: 16 bytes, network byte order, IPv4 in its
// IPv4-mapped form (RFC 4291 §2.5.5.2). Everything outside the maps uses net/netip; this package converts between the two.
// It imports nothing of Margay's own.
package addr

import (
	"fmt"
	"net/netip"
)

// Bits4 is how many prefix bits an IPv4 address gains in its mapped form: 10.0.0.0/8 is a /104 in an LPM key.
const Bits4 = 96

// As16 returns the 16-byte form of a. Zones are dropped: maps have none.
func As16(a netip.Addr) [16]byte {
	return a.As16()
}

// From16 is the inverse of As16: an IPv4-mapped address comes back as IPv4.
func From16(b [16]byte) netip.Addr {
	return netip.AddrFrom16(b).Unmap()
}

// MapPrefix returns p's masked 16-byte form and its length in it, as LPM keys want them.
func MapPrefix(p netip.Prefix) (b [16]byte, bits int) {
	p = p.Masked()
	bits = p.Bits()
	if p.Addr().Is4() {
		bits += Bits4
	}
	return p.Addr().As16(), bits
}

// UnmapPrefix is the inverse of MapPrefix.
func UnmapPrefix(b [16]byte, bits int) (netip.Prefix, error) {
	if a := From16(b); a.Is4() {
		if bits < Bits4 || bits > 128 {
			return netip.Prefix{}, fmt.Errorf("prefix length %d of IPv4-mapped address %s is outside %d to 128", bits, a, Bits4)
		}
		return netip.PrefixFrom(a, bits-Bits4), nil
	}
	if bits < 0 || bits > 128 {
		return netip.Prefix{}, fmt.Errorf("prefix length %d is outside 0 to 128", bits)
	}
	return netip.PrefixFrom(netip.AddrFrom16(b), bits), nil
}

// HostPrefix returns the prefix that holds a alone: /32 or /128.
func HostPrefix(a netip.Addr) netip.Prefix {
	a = a.Unmap()
	return netip.PrefixFrom(a, a.BitLen())
}
