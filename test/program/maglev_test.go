// SPDX-License-Identifier: Apache-2.0

package program

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/bpf/object"
	compiler "github.com/margay-cni/margay/pkg/service"
)

// The programs and the compiler know the same sizes of tables.
func TestMaglevSizes(t *testing.T) {
	specs, err := object.ProgramSpecs()
	must(t, err)
	found := 0
	for _, spec := range specs {
		v, ok := spec.Variables["maglev_sizes"]
		if !ok {
			continue
		}
		found++
		got := make([]uint32, v.Size()/4)
		must(t, v.Get(got))
		want := compiler.TableSizes()
		if !slices.Equal(got[:len(want)], want) || slices.ContainsFunc(got[len(want):], func(n uint32) bool { return n != 0 }) {
			t.Errorf("the programs' sizes are %v, want %v", got, want)
		}
	}
	if found < 3 {
		t.Errorf("%d objects have maglev_sizes, want those of pods, devices and the overlay", found)
	}
}

// slotOf is where a test's table leads from a position: something that no other formula gives.
func slotOf(position, backends uint32) uint16 { return uint16(position * 7 % backends) }

// putTable writes a table of a size for the list.
func putTable(f *progtest.Fixture, list uint32, size uint8, backends uint32) {
	for first := uint32(0); first < compiler.TableSizes()[size]; first += uint32(bpf.MaglevSlots) {
		var chunk bpf.MaglevChunk
		for i := range chunk.Slot {
			chunk.Slot[i] = slotOf(first+uint32(i), backends)
		}
		f.Put(f.DP.Maps.Maglev, bpf.MaglevKey{List: list, Size: size, Chunk: uint16(first / uint32(bpf.MaglevSlots))}, chunk)
	}
}

// A flow's hash chooses, computed in Go as in the programs, whichever frontend the client asks by the same port.
func TestMaglevChoosesByHash(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP, pkt.SCTP} {
			for _, size := range []uint8{1, 4, 7} {
				b := newBalanced(t, f, v6, kind, uint32(size), 10)
				putTable(f, uint32(size), size, 10)
				b.change(func(s *bpf.Service) { s.Maglev = [2]uint8{size, size} })
				for _, affinity := range []uint32{0, 100} {
					b.change(func(s *bpf.Service) { s.Affinity = affinity })
					clearAffinity(t, f)
					f.ClearFlows(t)
					seen := map[netip.AddrPort]bool{}
					for i := range 30 {
						outside, to := i%2 == 0, []netip.AddrPort{b.vip, b.port}[i/2%2]
						hook, p := b.from(outside, to, uint16(20000+i))
						hash := bpf.MaglevHash(key(p), affinity > 0)
						position := uint32(uint64(hash) * uint64(compiler.TableSizes()[size]) >> 32)
						got, want := b.chosen(hook, p), b.backends[slotOf(position, 10)]
						if got != want {
							t.Fatalf("%s, size %d, affinity %d, from %v to %v: %v, want %v", kind, size, affinity, p.Src, to, got, want)
						}
						seen[got] = true
					}
					if affinity == 0 && len(seen) < 5 {
						t.Errorf("%s, size %d: 30 flows to %d backends of 10", kind, size, len(seen))
					}
				}
			}
		}
	})
}

func clearAffinity(t *testing.T, f *progtest.Fixture) {
	t.Helper()
	var k bpf.AffinityKey
	var v bpf.Affinity
	var keys []bpf.AffinityKey
	it := f.Affinity.Iterate()
	for it.Next(&k, &v) {
		keys = append(keys, k)
	}
	must(t, it.Err())
	for _, k := range keys {
		must(t, f.Affinity.Delete(&k))
	}
}

// The hash leaves out the address that was asked, because a NodePort's differs from node to node, and with affinity everything but the client.
func TestMaglevHashIsTheSameOnEveryNode(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		one := key(fromClient(pkt.TCP, at(of(vips, v6), nodePort)))
		other := key(fromClient(pkt.TCP, at(of(otherVIPs, v6), nodePort)))
		if bpf.MaglevHash(one, false) != bpf.MaglevHash(other, false) {
			t.Errorf("%v and %v have two hashes", one, other)
		}
		port := one
		port.Sport++
		if bpf.MaglevHash(one, false) == bpf.MaglevHash(port, false) || bpf.MaglevHash(one, true) != bpf.MaglevHash(port, true) {
			t.Error("another client port: want another hash, and the same by client")
		}
	}
}

// While tables and services are exchanged, the programs may meet a table without some part, or slots that they do not count: any backend of
// the list serves.
func TestMaglevWithAnUnfinishedTable(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	families(t, f, func(t *testing.T, v6 bool) {
		b := newBalanced(t, f, v6, pkt.UDP, 50, 10)
		for name, prepare := range map[string]func(){
			"no table": func() { b.change(func(s *bpf.Service) { s.Maglev = [2]uint8{3, 3} }) },
			"more slots than counted": func() {
				putTable(f, 50, 2, 1000)
				b.change(func(s *bpf.Service) { s.Maglev = [2]uint8{2, 2} })
			},
			"a size that does not exist": func() { b.change(func(s *bpf.Service) { s.Maglev = [2]uint8{15, 255} }) },
		} {
			prepare()
			for backend := range b.spread(true, 20) {
				if !slices.Contains(b.backends, backend) {
					t.Errorf("%s: %v, want one of the backends", name, backend)
				}
			}
			if seen := b.spread(false, 20); len(seen) < 3 {
				t.Errorf("%s: 20 flows to %v, want many backends", name, seen)
			}
		}
	})
}
