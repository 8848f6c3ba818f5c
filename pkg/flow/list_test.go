// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"net/netip"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/margay-cni/margay/internal/testutil/privileged"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/endpoint"
)

const tcp, udp, icmp = 6, 17, 1

// family is one address family's cast.
type family struct {
	name                               string
	client, web, service, outside, any netip.Addr
}

func families() []family {
	p := netip.MustParseAddr
	return []family{
		{"IPv4", p("10.1.0.5"), p("10.1.0.7"), p("10.96.0.10"), p("192.0.2.9"), p("0.0.0.0")},
		{"IPv6", p("fd00:1::5"), p("fd00:1::7"), p("fd00:96::10"), p("2001:db8::9"), p("::")},
	}
}

func (f family) names() *Names {
	return NewNames([]*endpoint.Record{
		{ContainerID: "c1", Namespace: "default", Name: "client", Addresses: []netip.Addr{f.client}},
		{ContainerID: "c2", Namespace: "default", Name: "web-1", Addresses: []netip.Addr{f.web}},
	}, map[uint32]string{4: "default/web:http"}, map[uint32]string{17: "default/allow-web"})
}

// newMap makes a map of the shipped layout, with room for entries.
func newMap[K, V any](t testing.TB, typ ebpf.MapType, entries uint32, flags uint32) *ebpf.Map {
	t.Helper()
	var (
		k K
		v V
	)
	m, err := ebpf.NewMap(&ebpf.MapSpec{
		Type: typ, KeySize: uint32(unsafe.Sizeof(k)), ValueSize: uint32(unsafe.Sizeof(v)), MaxEntries: entries, Flags: flags,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

func put(t testing.TB, m *ebpf.Map, k, v any) {
	t.Helper()
	if err := m.Put(k, v); err != nil {
		t.Fatal(err)
	}
}

// putFlow writes both directions the way the programs do.
func putFlow(t testing.TB, m *ebpf.Map, opener, xlate bpf.FlowKey, e [2]bpf.Flow) {
	t.Helper()
	e[0].Xlate, e[1].Xlate = xlate, opener.Reverse()
	e[1].Flags |= bpf.FlowReply
	put(t, m, opener, e[0])
	put(t, m, xlate.Reverse(), e[1])
}

// seconds returns the programs' clock.
func seconds(t *testing.T) uint32 {
	t.Helper()
	c, err := Now()
	if err != nil {
		t.Fatal(err)
	}
	return uint32(c.Monotonic.Seconds())
}

func TestList(t *testing.T) {
	privileged.Require(t)
	for _, f := range families() {
		t.Run(f.name, func(t *testing.T) {
			m := newMap[bpf.FlowKey, bpf.Flow](t, ebpf.LRUHash, 4096, 0)
			now := seconds(t)
			ap := netip.AddrPortFrom
			to, backend := ap(f.service, 80), ap(f.web, 8080)
			both := bpf.FlowTCPSyn | bpf.FlowTCPEstablished

			putFlow(t, m, bpf.NewFlowKey(tcp, ap(f.client, 40001), to), bpf.NewFlowKey(tcp, ap(f.client, 40001), backend), [2]bpf.Flow{
				{LastSeen: now - 9, Tcp: both, Flags: bpf.FlowNAT | bpf.FlowService, ServiceId: 4, RuleId: 17, Action: bpf.FlowToPod},
				{LastSeen: now - 7, Tcp: both, Flags: bpf.FlowNAT | bpf.FlowService, ServiceId: 4, RuleId: 17, Action: bpf.FlowToPod},
			})
			direct := bpf.NewFlowKey(udp, ap(f.outside, 5353), ap(f.web, 53))
			putFlow(t, m, direct, direct, [2]bpf.Flow{
				{LastSeen: now - 60, Flags: bpf.FlowDenied, RuleId: 18, Action: bpf.FlowToPod}, {LastSeen: now - 90},
			})
			masq := bpf.NewFlowKey(tcp, ap(f.client, 40002), ap(f.outside, 443))
			putFlow(t, m, masq, bpf.NewFlowKey(tcp, ap(f.service, 50002), ap(f.outside, 443)), [2]bpf.Flow{
				{LastSeen: now - 30, Tcp: bpf.FlowTCPSyn, Action: bpf.FlowToNetdev}, {LastSeen: now - 30},
			})
			// Only the answering direction of this one survived eviction.
			lone := bpf.NewFlowKey(tcp, ap(f.client, 40003), to)
			putFlow(t, m, lone, bpf.NewFlowKey(tcp, ap(f.client, 40003), backend), [2]bpf.Flow{{}, {LastSeen: now - 120, Tcp: both}})
			if err := m.Delete(lone); err != nil {
				t.Fatal(err)
			}

			got, omitted, err := List(m, Query{}, f.names())
			if err != nil || omitted != 0 {
				t.Fatalf("List() omits %d, error %v; want 0, none", omitted, err)
			}
			nat := ap(f.service, 50002)
			want := []Flow{{
				Protocol: "TCP", Source: ap(f.client, 40001), SourcePod: "default/client", Destination: to, Backend: &backend,
				BackendPod: "default/web-1", State: "established", AgeSeconds: 7, RuleID: 17, Rule: "default/allow-web", ServiceID: 4,
				Service: "default/web:http", Action: "to_pod", Paired: true,
			}, {
				Protocol: "TCP", Source: ap(f.client, 40002), SourcePod: "default/client", Destination: ap(f.outside, 443),
				TranslatedSource: &nat, State: "new", AgeSeconds: 30, Action: "to_netdev", Paired: true,
			}, {
				Protocol: "UDP", Source: ap(f.outside, 5353), Destination: ap(f.web, 53), DestinationPod: "default/web-1",
				State: "active", AgeSeconds: 60, Denied: true, RuleID: 18, Action: "to_pod", Paired: true,
			}, {
				Protocol: "TCP", Source: ap(f.client, 40003), SourcePod: "default/client", Destination: to, Backend: &backend,
				BackendPod: "default/web-1", State: "new", AgeSeconds: 120,
			}}
			// A second may pass between the entries' clock and the listing's.
			later := cmp.FilterPath(func(p cmp.Path) bool { return p.String() == "AgeSeconds" },
				cmp.Comparer(func(a, b int64) bool { return a-b <= 2 && b-a <= 2 }))
			if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.AddrPort{}), later); diff != "" {
				t.Errorf("List() (-want +got):\n%s", diff)
			}

			got, _, err = List(m, Query{Addrs: []netip.Addr{f.web}}, nil)
			if err != nil || len(got) != 3 {
				t.Errorf("List() of the backend's address = %d flows, %v; want the 3 that reach it", len(got), err)
			}
			got, omitted, err = List(m, Query{Limit: 1}, nil)
			if err != nil || len(got) != 1 || omitted != 3 || got[0].Source.Port() != 40001 {
				t.Errorf("List() with limit 1 = %v, %d omitted, %v; want the latest flow and 3", got, omitted, err)
			}
		})
	}
}

// TestListLargeTable: more flows than one batch holds, all found once and paired.
func TestListLargeTable(t *testing.T) {
	privileged.Require(t)
	for _, f := range families() {
		t.Run(f.name, func(t *testing.T) {
			m := newMap[bpf.FlowKey, bpf.Flow](t, ebpf.LRUHash, 65536, 0)
			const n = 6000
			for i := range uint16(n) {
				k := bpf.NewFlowKey(tcp, netip.AddrPortFrom(f.client, 1024+i), netip.AddrPortFrom(f.web, 80))
				putFlow(t, m, k, k, [2]bpf.Flow{})
			}
			got, _, err := List(m, Query{}, nil)
			if err != nil || len(got) != n {
				t.Fatalf("List() = %d flows, %v; want %d", len(got), err, n)
			}
			for _, fl := range got {
				if !fl.Paired {
					t.Fatalf("flow %v is unpaired", fl)
				}
			}
		})
	}
}

// BenchmarkList lists the latest 100 flows of a table that is half full.
func BenchmarkList(b *testing.B) {
	privileged.Require(b)
	m := newMap[bpf.FlowKey, bpf.Flow](b, ebpf.LRUHash, 131072, 0)
	f := families()[1]
	for i := range uint16(32768) {
		k := bpf.NewFlowKey(tcp, netip.AddrPortFrom(f.client, 1024+i), netip.AddrPortFrom(f.web, 80))
		putFlow(b, m, k, k, [2]bpf.Flow{})
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := List(m, Query{Limit: 100}, nil); err != nil {
			b.Fatal(err)
		}
	}
}

func TestState(t *testing.T) {
	const syn, est, fin, rst = bpf.FlowTCPSyn, bpf.FlowTCPEstablished, bpf.FlowTCPFin, bpf.FlowTCPRst
	for _, tc := range []struct {
		name                  string
		proto, opener, answer uint8
		want                  string
	}{
		{"first SYN", tcp, syn, 0, "new"},
		{"SYN answered", tcp, syn, syn, "new"},
		{"data one way only", tcp, syn | est, syn, "new"},
		{"data both ways", tcp, syn | est, syn | est, "established"},
		{"one side closed", tcp, syn | est, syn | est | fin, "closing"},
		{"both sides closed", tcp, syn | est | fin, syn | est | fin, "closed"},
		{"reset by the answering side", tcp, syn, rst, "reset"},
		{"reset after FIN", tcp, est | fin | rst, est | fin, "reset"},
		{"UDP", udp, 0, 0, "active"},
		{"ICMP", icmp, 0, 0, "active"},
	} {
		if got := state(tc.proto, tc.opener, tc.answer); got != tc.want {
			t.Errorf("%s: state() = %q, want %q", tc.name, got, tc.want)
		}
	}
}

func TestEntries(t *testing.T) {
	privileged.Require(t)
	m := newMap[bpf.PolicyKey, bpf.PolicyEntry](t, ebpf.LPMTrie, 1024, 1 /* BPF_F_NO_PREALLOC */)
	want := map[uint32]bool{}
	for id := range uint32(300) {
		put(t, m, bpf.PolicyKey{Prefixlen: 80, PolicyId: id, Proto: 6}, bpf.PolicyEntry{RuleId: id})
		want[id] = true
	}
	for name, read := range map[string]func(*ebpf.Map, func(bpf.PolicyKey, bpf.PolicyEntry) bool) error{
		"batched": Entries[bpf.PolicyKey, bpf.PolicyEntry], "one by one": entriesOneByOne[bpf.PolicyKey, bpf.PolicyEntry],
	} {
		t.Run(name, func(t *testing.T) {
			got := map[uint32]bool{}
			if err := read(m, func(k bpf.PolicyKey, e bpf.PolicyEntry) bool {
				got[e.RuleId] = true
				return true
			}); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("entries (-want +got):\n%s", diff)
			}
			seen := 0
			if err := read(m, func(bpf.PolicyKey, bpf.PolicyEntry) bool { seen++; return seen < 5 }); err != nil || seen != 5 {
				t.Errorf("stopped after %d entries, %v; want 5", seen, err)
			}
		})
	}
	for name, count := range map[string]func(*ebpf.Map) (int, error){"batched": Count, "one by one": countOneByOne} {
		if got, err := count(m); err != nil || got != 300 {
			t.Errorf("%s: count = %d, %v; want 300", name, got, err)
		}
	}
}

// TestEntriesGrows: one bucket that holds more entries than a batch needs a larger batch, not an error.
func TestEntriesGrows(t *testing.T) {
	privileged.Require(t)
	m := newMap[uint32, uint64](t, ebpf.Hash, 512, 1 /* BPF_F_NO_PREALLOC */)
	for i := range uint32(512) {
		put(t, m, i, uint64(i))
	}
	seen, allocated := 0, 0
	var keys []uint32
	err := batches(m, func(size int) (any, any) {
		allocated++
		size /= 512 // starts with one entry
		keys = make([]uint32, size)
		return keys, make([]uint64, size)
	}, func(n int) bool { seen += n; return true })
	if err != nil || seen != 512 || allocated < 2 {
		t.Errorf("read %d entries with %d allocations, %v; want 512 and more than one", seen, allocated, err)
	}
}
