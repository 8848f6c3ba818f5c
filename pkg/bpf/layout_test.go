// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/bpf/object"
)

// goForms are the Go forms of bpf/types.h's structs, by C name.
var goForms = map[string]any{
	"addr": Addr{}, "flow_key": FlowKey{}, "flow": Flow{}, "endpoint": Endpoint{}, "pending_key": PendingKey{}, "pending": Pending{},
	"ipcache_key": IPCacheKey{}, "ipcache_entry": IPCacheEntry{}, "frontend_key": FrontendKey{}, "service": Service{},
	"backend_key": BackendKey{}, "backend": Backend{}, "service_backend": ServiceBackend{}, "policy_key": PolicyKey{},
	"policy_entry": PolicyEntry{}, "counter": Counter{}, "node_state": NodeState{}, "event": Event{}, "sweep": Sweep{},
	"affinity_key": AffinityKey{}, "affinity": Affinity{}, "maglev_key": MaglevKey{}, "maglev_chunk": MaglevChunk{},
	"source_range_key": SourceRangeKey{}, "service_addr_key": ServiceAddrKey{},
	"node": Node{}, "route_key": RouteKey{}, "route": Route{}, "egress_addrs": EgressAddrs{},
}

// unseen are the structs that only the programs use.
var unseen = map[string]bool{
	"new_flow": true, "event_budget": true, "fragment_key": true, "datagram": true, "held_fragment": true, "fragment_scratch": true,
}

// TestLayout compares the size of every struct, and name, size and offset of every field, with what the C compiler made of them: Go
// memory is handed to the kernel as it is.
func TestLayout(t *testing.T) {
	types, err := object.SchemaTypes()
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range goForms {
		t.Run(name, func(t *testing.T) {
			var c *btf.Struct
			if err := types.TypeByName(name, &c); err != nil {
				t.Fatal(err)
			}
			compare(t, c, reflect.TypeOf(value))
		})
	}
	for typ, err := range types.All() {
		if err != nil {
			t.Fatal(err)
		}
		if s, ok := typ.(*btf.Struct); ok && s.Name != "" && goForms[s.Name] == nil && !unseen[s.Name] {
			t.Errorf("struct %s of bpf/types.h has no Go form in this test", s.Name)
		}
	}
}

func compare(t *testing.T, c *btf.Struct, g reflect.Type) {
	t.Helper()
	if want, got := uintptr(c.Size), g.Size(); want != got {
		t.Errorf("size of %s = %d, want %d", g, got, want)
	}
	if binary.Size(reflect.Zero(g).Interface()) != int(c.Size) {
		t.Errorf("%s has padding that C does not name: its bytes would be whatever was in memory", g)
	}
	fields := map[string]reflect.StructField{}
	for f := range g.Fields() {
		fields[strings.ToLower(f.Name)] = f
	}
	for _, m := range c.Members {
		name, size := m.Name, 0
		if union, ok := m.Type.(*btf.Union); ok && name == "" {
			name = union.Members[0].Name // addr's bytes; its words are for the programs
		}
		f, ok := fields[strings.ToLower(strings.ReplaceAll(name, "_", ""))]
		if !ok {
			t.Errorf("%s has no field for %s", g, name)
			continue
		}
		size, err := btf.Sizeof(m.Type)
		if err != nil {
			t.Fatal(err)
		}
		if f.Offset != uintptr(m.Offset.Bytes()) || f.Type.Size() != uintptr(size) {
			t.Errorf("%s.%s: offset %d, size %d, want offset %d, size %d", g, f.Name, f.Offset, f.Type.Size(), m.Offset.Bytes(), size)
		}
	}
}

// TestGoldenBytes holds the constructors to the bytes that the programs compare with: ports and addresses in network byte order, the
// rest in the machine's (little-endian, as the objects are).
func TestGoldenBytes(t *testing.T) {
	v4, v6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	const mapped4, plain6 = "00000000000000000000ffffc0000201", "20010db8000000000000000000000001"
	const other4 = "00000000000000000000ffff0a000203"
	to4 := netip.MustParseAddrPort("10.0.2.3:443")
	for _, tc := range []struct {
		name string
		got  any
		want string
	}{
		{"IPv4 address", NewAddr(v4), mapped4},
		{"IPv6 address", NewAddr(v6), plain6},
		{"flow key, IPv4", NewFlowKey(unix.IPPROTO_TCP, netip.AddrPortFrom(v4, 0x1234), to4), mapped4 + other4 + "1234" + "01bb" + "06" + "000000"},
		{
			"flow key, IPv6", NewFlowKey(unix.IPPROTO_UDP, netip.AddrPortFrom(v6, 53), netip.AddrPortFrom(v6, 0xff00)),
			plain6 + plain6 + "0035" + "ff00" + "11" + "000000",
		},
		{"reversed flow key", NewFlowKey(unix.IPPROTO_TCP, netip.AddrPortFrom(v4, 0x1234), to4).Reverse(), other4 + mapped4 + "01bb" + "1234" + "06" + "000000"},
		{"frontend", NewFrontendKey(unix.IPPROTO_TCP, v4, 80), mapped4 + "0050" + "06" + "00"},
		{"NodePort frontend, IPv4", NewFrontendKey(unix.IPPROTO_UDP, netip.IPv4Unspecified(), 30080), "00000000000000000000ffff00000000" + "7580" + "11" + "00"},
		{"NodePort frontend, IPv6", NewFrontendKey(unix.IPPROTO_UDP, netip.IPv6Unspecified(), 30080), strings.Repeat("00", 16) + "7580" + "11" + "00"},
		{"backend", NewBackend(to4), other4 + "01bb" + "0000"},
		{"serving backend", NewServiceBackend(0x01020304, to4), "04030201" + other4 + "01bb" + "0000"},
		{"prefix, IPv4", NewIPCacheKey(netip.MustParsePrefix("192.0.2.0/24")), "78000000" + "00000000000000000000ffffc0000200"},
		{"prefix, IPv6", NewIPCacheKey(netip.MustParsePrefix("2001:db8::/32")), "20000000" + "20010db8000000000000000000000000"},
		{"all of IPv4", NewIPCacheKey(netip.MustParsePrefix("0.0.0.0/0")), "60000000" + "00000000000000000000ffff00000000"},
		{"all of IPv6", NewIPCacheKey(netip.MustParsePrefix("::/0")), "00000000" + strings.Repeat("00", 16)},
		{"port", PolicyKey{Prefixlen: PolicyPrefixPort, PolicyId: 16, Identity: IdentityAny, Direction: 1, Proto: 6, Port: Port16(8080)}, "60000000" + "10000000" + "ffffffff" + "01" + "06" + "1f90"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var raw bytes.Buffer
			if err := binary.Write(&raw, binary.LittleEndian, tc.got); err != nil {
				t.Fatal(err)
			}
			if got := hex.EncodeToString(raw.Bytes()); got != tc.want {
				t.Errorf("bytes = %s, want %s", got, tc.want)
			}
		})
	}
}

// TestBack holds the readers to give back what the constructors got.
func TestBack(t *testing.T) {
	src, dst := netip.MustParseAddrPort("192.0.2.1:4000"), netip.MustParseAddrPort("10.0.2.3:443")
	k := NewFlowKey(unix.IPPROTO_TCP, src, dst)
	if k.Source() != src || k.Destination() != dst {
		t.Errorf("flow key from %s to %s, want from %s to %s", k.Source(), k.Destination(), src, dst)
	}
	if k.Reverse().Reverse() != k {
		t.Errorf("a key reversed twice = %v, want %v", k.Reverse().Reverse(), k)
	}
	if got := NewBackend(dst).AddrPort(); got != dst {
		t.Errorf("backend = %s, want %s", got, dst)
	}
	for _, s := range []string{"192.0.2.0/24", "0.0.0.0/0", "2001:db8::/32", "::/0", "2001:db8::1/128"} {
		want := netip.MustParsePrefix(s)
		if got, err := NewIPCacheKey(want).Prefix(); err != nil || got != want {
			t.Errorf("prefix = %s, %v, want %s", got, err, want)
		}
	}
}
