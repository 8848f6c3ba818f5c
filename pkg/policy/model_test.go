// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"math/bits"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/margay-cni/margay/pkg/addr"
	"github.com/margay-cni/margay/pkg/state"
)

// kernel is a model of the programs' lookups in the ipcache and policy maps, over the keys as the maps hold them.
type kernel struct {
	ipcache map[lpmKey]uint32
	policy  map[Key]Entry
	pods    map[state.Key]Assignment
	rules   map[uint32]Rule
}

type lpmKey struct {
	addr [16]byte
	bits int
}

func load(r *Result) *kernel {
	k := &kernel{ipcache: map[lpmKey]uint32{}, policy: r.Entries, pods: r.Pods, rules: r.Rules}
	for p, id := range r.Identities {
		b, n := addr.MapPrefix(p)
		k.ipcache[lpmKey{b, n}] = id
	}
	return k
}

// identity is the LPM lookup in the ipcache.
func (k *kernel) identity(a netip.Addr) uint32 {
	b := addr.As16(a)
	for n := 128; n >= 0; n-- {
		if id, ok := k.ipcache[lpmKey{b, n}]; ok {
			return id
		}
		if n > 0 {
			b[(n-1)/8] &^= 1 << (7 - (n-1)%8)
		}
	}
	return World
}

// lookup is the LPM lookup for one identity.
func (k *kernel) lookup(policy, identity uint32, d Direction, proto state.Protocol, port uint16) (Entry, bool) {
	for length := uint8(portBits); ; length-- {
		key := Key{Policy: policy, Identity: identity, Direction: d, Bits: length}
		if length >= protocolBits {
			key.Protocol = uint8(proto)
			key.Port = bits.Reverse16(bits.Reverse16(port) & (1<<(length-protocolBits) - 1))
		}
		if e, ok := k.policy[key]; ok && (length == 0 || length >= protocolBits) {
			return e, true
		}
		if length == 0 {
			return Entry{}, false
		}
	}
}

// judge is the verdict and the entry that gave it.
func (k *kernel) judge(policy uint32, d Direction, peer netip.Addr, proto state.Protocol, port uint16) (bool, Entry) {
	if policy == PolicyNone {
		return true, Entry{}
	}
	one, ok1 := k.lookup(policy, k.identity(peer), d, proto, port)
	any, ok2 := k.lookup(policy, AnyIdentity, d, proto, port)
	switch {
	case !ok1 && !ok2:
		return false, Entry{}
	case !ok1, ok2 && (any.Rank < one.Rank || any.Rank == one.Rank && any.Verdict == Deny):
		return any.Verdict == Allow, any
	}
	return one.Verdict == Allow, one
}

// allows judges a packet at a local pod.
func (k *kernel) allows(t testing.TB, pod state.Key, d Direction, peer netip.Addr, proto state.Protocol, port uint16) bool {
	t.Helper()
	a, ok := k.pods[pod]
	if !ok {
		t.Fatalf("no assignment for pod %s", pod)
	}
	allowed, _ := k.judge(a.Policy[d], d, peer, proto, port)
	return allowed
}

func TestRangePrefixes(t *testing.T) {
	p := func(port uint16, bits uint8) portPrefix { return portPrefix{state.TCP, port, bits} }
	for _, tc := range []struct {
		name      string
		low, high uint16
		want      []portPrefix
	}{
		{"one port", 80, 80, []portPrefix{p(80, 24)}},
		{"aligned pair", 80, 81, []portPrefix{p(80, 23)}},
		{"odd pair", 81, 82, []portPrefix{p(81, 24), p(82, 24)}},
		{"all", 0, 65535, []portPrefix{p(0, 8)}},
		{"upper half", 32768, 65535, []portPrefix{p(32768, 9)}},
		{"last", 65535, 65535, []portPrefix{p(65535, 24)}},
		{"ragged", 1, 10, []portPrefix{p(1, 24), p(2, 23), p(4, 22), p(8, 23), p(10, 24)}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := rangePrefixes(state.TCP, tc.low, tc.high)
			if diff := cmp.Diff(tc.want, got, cmp.AllowUnexported(portPrefix{})); diff != "" {
				t.Errorf("rangePrefixes(%d, %d) (-want +got):\n%s", tc.low, tc.high, diff)
			}
		})
	}
	t.Run("exact cover", rapid.MakeCheck(func(t *rapid.T) {
		low := rapid.Uint16().Draw(t, "low")
		high := rapid.Uint16Min(low).Draw(t, "high")
		next := uint32(low)
		for _, p := range rangePrefixes(state.UDP, low, high) {
			if uint32(p.port) != next {
				t.Fatalf("prefix starts at %d, want %d", p.port, next)
			}
			next += 1 << (portBits - p.bits)
		}
		if next != uint32(high)+1 {
			t.Fatalf("range %d to %d ends before %d, want %d", low, high, next, uint32(high)+1)
		}
	}))
}
