// SPDX-License-Identifier: Apache-2.0

package node

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestEgress(t *testing.T) {
	addrs := func(s string) (out []netip.Addr) {
		for _, f := range strings.Fields(s) {
			out = append(out, netip.MustParseAddr(f))
		}
		return out
	}
	m := Machine{
		Devices: []Device{
			{Index: 2, Name: "eth0", Usable: addrs("192.0.2.1 192.0.2.9 2001:db8::1")},
			{Index: 3, Name: "eth1", Usable: addrs("198.51.100.1")},
			{Index: 4, Name: "eth2"},
		},
		Addresses: addrs("192.0.2.1 192.0.2.9 2001:db8::1 198.51.100.1 203.0.113.7"),
	}
	tests := []struct {
		name      string
		overrides string
		want      map[int][2]string
		problems  int
	}{
		{
			name: "each device's first, else the node's",
			want: map[int][2]string{0: {"192.0.2.1", "2001:db8::1"}, 2: {"192.0.2.1", "2001:db8::1"}, 3: {"198.51.100.1", "2001:db8::1"}, 4: {"192.0.2.1", "2001:db8::1"}},
		},
		{
			name: "one for all", overrides: "203.0.113.7",
			want: map[int][2]string{0: {"203.0.113.7", "2001:db8::1"}, 2: {"203.0.113.7", "2001:db8::1"}, 3: {"203.0.113.7", "2001:db8::1"}, 4: {"203.0.113.7", "2001:db8::1"}},
		},
		{
			name: "one device's goes before one for all", overrides: "203.0.113.7 eth0=192.0.2.9 eth1=2001:db8::99",
			want:     map[int][2]string{0: {"203.0.113.7", "2001:db8::1"}, 2: {"192.0.2.9", "2001:db8::1"}, 3: {"203.0.113.7", "2001:db8::99"}, 4: {"203.0.113.7", "2001:db8::1"}},
			problems: 1,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var overrides []EgressOverride
			for _, f := range strings.Fields(tt.overrides) {
				o, err := ParseEgressOverride(f)
				if err != nil {
					t.Fatal(err)
				}
				overrides = append(overrides, o)
			}
			c := NewCompiler("n1", VXLAN, nil, overrides)
			r := c.Compile(Input{Snapshot: snapshot(object("n1", "192.0.2.1 2001:db8::1", "")), Machine: m})
			got := map[int][2]string{}
			for i, e := range r.Egress {
				got[i] = [2]string{e.V4.String(), e.V6.String()}
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("egress addresses (-want +got):\n%s", diff)
			}
			if len(r.Problems) != tt.problems {
				t.Errorf("problems = %v, want %d", r.Problems, tt.problems)
			}
		})
	}
}

func TestParseEgressOverride(t *testing.T) {
	for _, s := range []string{"", "eth0", "=192.0.2.1", "eth0=", "0.0.0.0", "fe80::1%eth0", "224.0.0.1", "eth0=127.0.0.1"} {
		if got, err := ParseEgressOverride(s); err == nil {
			t.Errorf("ParseEgressOverride(%q) = %+v, want an error", s, got)
		}
	}
}
