// SPDX-License-Identifier: Apache-2.0

package addr

import (
	"net/netip"
	"testing"
)

func TestRoundTrip(t *testing.T) {
	for _, s := range []string{"10.1.2.3", "0.0.0.0", "255.255.255.255", "fd00::1", "::", "::1", "fe80::1"} {
		a := netip.MustParseAddr(s)
		if got := From16(As16(a)); got != a {
			t.Errorf("From16(As16(%s)) = %s, want the same", a, got)
		}
	}
	if got, want := As16(netip.MustParseAddr("10.1.2.3")), ([16]byte{10: 0xff, 11: 0xff, 12: 10, 13: 1, 14: 2, 15: 3}); got != want {
		t.Errorf("As16(10.1.2.3) = %x, want %x", got, want)
	}
}

func TestPrefixRoundTrip(t *testing.T) {
	for _, tc := range []struct {
		prefix string
		bits   int
	}{{"10.0.0.0/8", 104}, {"0.0.0.0/0", 96}, {"10.1.2.3/32", 128}, {"fd00::/8", 8}, {"fd00::1/128", 128}} {
		p := netip.MustParsePrefix(tc.prefix)
		b, bits := MapPrefix(p)
		if bits != tc.bits {
			t.Errorf("MapPrefix(%s) has %d bits, want %d", p, bits, tc.bits)
		}
		got, err := UnmapPrefix(b, bits)
		if err != nil || got != p {
			t.Errorf("UnmapPrefix(MapPrefix(%s)) = %v, %v, want the same", p, got, err)
		}
	}
	if b, _ := MapPrefix(netip.MustParsePrefix("10.1.2.3/8")); From16(b) != netip.MustParseAddr("10.0.0.0") {
		t.Errorf("MapPrefix does not mask host bits: %x", b)
	}
	if _, err := UnmapPrefix(As16(netip.MustParseAddr("10.0.0.0")), 8); err == nil {
		t.Error("UnmapPrefix accepts an IPv4 address with fewer than 96 bits")
	}
}

func TestHostPrefix(t *testing.T) {
	for in, want := range map[string]string{"10.0.0.1": "10.0.0.1/32", "::ffff:10.0.0.1": "10.0.0.1/32", "fd00::1": "fd00::1/128"} {
		if got := HostPrefix(netip.MustParseAddr(in)).String(); got != want {
			t.Errorf("HostPrefix(%s) = %s, want %s", in, got, want)
		}
	}
}
