// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"maps"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/state"
)

func addrs(list ...string) (out []netip.Addr) {
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

// A machine with two addresses of each family on its devices, and one of each that no traffic from outside comes to.
func TestV6_NodePortAddresses(t *testing.T) {
	flags := map[netip.Addr]uint32{}
	for _, a := range addrs("192.0.2.1", "198.51.100.1", "2001:db8::1", "2001:db8:1::1") {
		flags[a] = bpf.NodeAddrLocal | bpf.NodeAddrNodePort
	}
	for _, a := range addrs("10.99.0.1", "fd99::1") {
		flags[a] = bpf.NodeAddrLocal
	}
	ordered := addrs("198.51.100.1", "2001:db8:1::1", "192.0.2.1", "2001:db8::1")
	for _, tt := range []struct {
		name, flag string
		named      []netip.Addr
		want       []netip.Addr
	}{
		{"by default the primary ones", "", addrs("192.0.2.1", "2001:db8::1"), addrs("192.0.2.1", "2001:db8::1")},
		{"primary", "primary", addrs("2001:db8:1::1", "192.0.2.1", "198.51.100.1"), addrs("192.0.2.1", "2001:db8:1::1")},
		{"without a Node object the machine's first ones", "primary", nil, addrs("198.51.100.1", "2001:db8:1::1")},
		{"named ones that the machine lacks", "primary", addrs("203.0.113.1", "2001:db8::1"), addrs("198.51.100.1", "2001:db8::1")},
		{"named ones where no NodePort could be served", "primary", addrs("10.99.0.1", "fd99::1"), addrs("198.51.100.1", "2001:db8:1::1")},
		{"all", "all", addrs("192.0.2.1"), addrs("192.0.2.1", "198.51.100.1", "2001:db8::1", "2001:db8:1::1")},
		{"prefixes of both families", "192.0.2.0/24,2001:db8::/64", nil, addrs("192.0.2.1", "2001:db8::1")},
		{"of the other family all", "192.0.2.0/24", nil, addrs("192.0.2.1", "2001:db8::1", "2001:db8:1::1")},
		{"a prefix and primary", "198.51.100.0/24, primary", addrs("192.0.2.1", "2001:db8::1"), addrs("192.0.2.1", "198.51.100.1", "2001:db8::1")},
		{"a prefix that holds none", "10.0.0.0/8,fd00::/8", nil, nil},
		{"localhost alone", "localhost", nil, nil},
		{"everything of one family", "0.0.0.0/0,2001:db8::/64", nil, addrs("192.0.2.1", "198.51.100.1", "2001:db8::1")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var n NodePortAddresses
			if tt.flag != "" {
				var err error
				if n, err = ParseNodePortAddresses(tt.flag); err != nil {
					t.Fatal(err)
				}
			}
			got := n.restrict(flags, tt.named, ordered)
			want := maps.Clone(flags)
			for a := range want {
				if !slices.Contains(tt.want, a) {
					want[a] = bpf.NodeAddrLocal
				}
			}
			if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
				t.Errorf("addresses (-want +got):\n%s", diff)
			}
		})
	}
	for _, wrong := range []string{"first", "10.0.0.1", "primary,", "all;primary"} {
		if n, err := ParseNodePortAddresses(wrong); err == nil {
			t.Errorf("ParseNodePortAddresses(%q) = %+v, want an error", wrong, n)
		}
	}
}

// Which address is primary, the Node object says; until the source has spoken, what a predecessor wrote holds.
func TestV6_RestartKeepsThePrimaryAddress(t *testing.T) {
	for _, ipv6 := range []bool{false, true} {
		first, second := "192.0.2.1", "192.0.2.2"
		if ipv6 {
			first, second = "2001:db8::1", "2001:db8::2"
		}
		facts := nodeFacts{addrs: map[netip.Addr]uint32{}, ordered: addrs(first, second)}
		for _, a := range facts.ordered {
			facts.addrs[a] = bpf.NodeAddrLocal | bpf.NodeAddrNodePort
		}
		k, run := newKernel(1), runDir(t)
		served := func() (out []string) {
			for a, flags := range k.nodeAddrs.entries {
				if flags&bpf.NodeAddrNodePort != 0 {
					out = append(out, a.Netip().String())
				}
			}
			slices.Sort(out)
			return out
		}
		r := newRig(t, k, run)
		s := state.NewSnapshot()
		s.Nodes["n1"] = &state.Node{Name: "n1", Addresses: addrs(second, first)}
		r.facts = &facts
		r.give(s)
		if got := served(); !slices.Equal(got, []string{second}) {
			t.Errorf("NodePorts are served on %v, want %s, the Node object's first", got, second)
		}
		r = newRig(t, k, run)
		r.facts = &facts
		r.work(false)
		if got := served(); !slices.Equal(got, []string{second}) {
			t.Errorf("NodePorts are served on %v before the first snapshot, want %s as before", got, second)
		}
	}
}

// Which of 127.0.0.1 and ::1 the node itself finds NodePorts on.
func TestV7_LocalhostIsOnlyServedWhenAskedFor(t *testing.T) {
	both := bpf.NodeLocalhostIPv4 | bpf.NodeLocalhostIPv6
	for flag, want := range map[string]uint32{
		"primary": 0, "localhost": both, "primary,localhost": both, "all": both, "127.0.0.0/8": both, "127.0.0.0/8,2001:db8::/64": bpf.NodeLocalhostIPv4,
		"10.0.0.0/8,::1/128": bpf.NodeLocalhostIPv6, "10.0.0.0/8,2001:db8::/64": 0,
	} {
		n, err := ParseNodePortAddresses(flag)
		if err != nil || n.localhost() != want {
			t.Errorf("--nodeport-addresses %s: flags %d, %v, want %d", flag, n.localhost(), err, want)
		}
	}
}
