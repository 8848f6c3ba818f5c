// SPDX-License-Identifier: Apache-2.0

package service

import (
	"fmt"
	"math/big"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/margay-cni/margay/pkg/state"
)

func TestTableSizes(t *testing.T) {
	for i, size := range tableSizes {
		if i > 0 && (!big.NewInt(int64(size)).ProbablyPrime(0) || size <= tableSizes[i-1]) {
			t.Errorf("size %d = %d, want a prime above the one before", i, size)
		}
	}
	for backends, want := range map[int]uint32{
		0: 0, 1: 0, 2: 251, 3: 509, 10: 1021, 100: 16381, 163: 16381, 164: 32749, 10_485: 1048573, 20_000: 1048573, 65_535: 1048573, 65_536: 0,
	} {
		if got := tableSizes[tableSize(backends)]; got != want {
			t.Errorf("size for %d backends = %d, want %d", backends, got, want)
		}
	}
}

// holders returns the backend at every position.
func holders(slots []netip.AddrPort, t Table) []netip.AddrPort {
	out := make([]netip.AddrPort, len(t.Slots))
	for i, slot := range t.Slots {
		out[i] = slots[slot]
	}
	return out
}

func TestTableGivesEqualShares(t *testing.T) {
	bothFamilies(t, func(t *testing.T, f family) {
		for _, n := range []int{2, 3, 10, 100, 1000} {
			var numbers []int
			for i := range n {
				numbers = append(numbers, i+1)
			}
			slots := f.backends(8080, numbers...)
			table := newTable(slots)
			count := map[netip.AddrPort]int{}
			for _, b := range holders(slots, table) {
				count[b]++
			}
			for _, b := range slots {
				if fair := len(table.Slots) / n; count[b] != fair && count[b] != fair+1 {
					t.Errorf("%d backends: %v has %d positions of %d, want %d or one more", n, b, count[b], len(table.Slots), fair)
				}
			}
		}
	})
}

// The order of the slots is each node's own; what stands at a position must not be.
func TestTwoNodesChooseAlike(t *testing.T) {
	bothFamilies(t, func(t *testing.T, f family) {
		slots := f.backends(8080, 5, 3, 9, 1, 200, 17, 4)
		want := holders(slots, newTable(slots))
		r := rand.New(rand.NewPCG(1, 2))
		for range 5 {
			other := slices.Clone(slots)
			r.Shuffle(len(other), func(i, j int) { other[i], other[j] = other[j], other[i] })
			if !slices.Equal(holders(other, newTable(other)), want) {
				t.Fatalf("slots %v and %v lead to different backends", other, slots)
			}
		}
	})
}

// The table is a promise between nodes of different builds: how one begins.
func TestTableStaysAsItIs(t *testing.T) {
	slots := family(false).backends(8080, 1, 2, 3)
	got := ""
	for _, slot := range newTable(slots).Slots[:32] {
		got += fmt.Sprint(slot)
	}
	if want := "02120101020112210222022101210221"; got != want {
		t.Errorf("table begins %s, want %s: nodes of two builds would choose differently", got, want)
	}
}

// Adding or removing one of 100 moves its own share, and little else.
func TestOneOfHundredMovesItsShare(t *testing.T) {
	bothFamilies(t, func(t *testing.T, f family) {
		var numbers []int
		for i := range 100 {
			numbers = append(numbers, i+1)
		}
		all := f.backends(8080, numbers...)
		whole := holders(all, newTable(all))
		worst := 0
		for gone := range all {
			rest := slices.Delete(slices.Clone(all), gone, gone+1)
			moved, needless := 0, 0
			for i, b := range holders(rest, newTable(rest)) {
				if b != whole[i] {
					moved++
					if whole[i] != all[gone] {
						needless++
					}
				}
			}
			if moved-needless < len(whole)/100 {
				t.Fatalf("without %v only %d positions of its %d moved", all[gone], moved-needless, len(whole)/100)
			}
			worst = max(worst, needless)
		}
		share := 100 * float64(worst) / float64(len(whole))
		t.Logf("at worst %.2f %% of the positions moved that need not have", share)
		if share > 3 {
			t.Errorf("%.2f %% of the positions moved that need not have, want at most 3 %%", share)
		}
	})
}

func TestLoadBalancingMode(t *testing.T) {
	bothFamilies(t, func(t *testing.T, f family) {
		for _, tc := range []struct {
			byDefault, annotation state.LoadBalancing
			backends              int
			size                  uint8
			problem               string
		}{
			{"", "", 3, 0, ""},
			{state.BalanceRandom, "", 3, 0, ""},
			{state.BalanceMaglev, "", 3, 2, ""},
			{state.BalanceRandom, state.BalanceMaglev, 3, 2, ""},
			{state.BalanceRandom, state.BalanceMaglev, 11, 4, ""},
			{state.BalanceRandom, state.BalanceMaglev, 1, 0, ""},
			{state.BalanceRandom, state.BalanceMaglev, 0, 0, ""},
			{state.BalanceMaglev, state.BalanceRandom, 3, 0, ""},
			{state.BalanceMaglev, "least", 3, 2, `margay.io/load-balancing is "least", want "random" or "maglev"`},
		} {
			t.Run(fmt.Sprintf("default %s annotation %s, %d backends", tc.byDefault, tc.annotation, tc.backends), func(t *testing.T) {
				c := NewCompiler(thisNode)
				c.DefaultBalancing = tc.byDefault
				var endpoints []state.Endpoint
				for i := range tc.backends {
					endpoints = append(endpoints, f.ready(i+1, "node-b"))
				}
				s := world(f.service(withNodePort, externalLocal, func(s *state.Service) { s.Balancing = tc.annotation }), f.slice("a", endpoints...))
				r := c.Compile(s)
				for _, frontend := range []Frontend{f.clusterFrontend(), f.nodeFrontend()} {
					svc := r.Frontends[frontend]
					if svc.Tables[Internal] != tc.size {
						t.Errorf("%v: table of size %d for insiders, want %d", frontend, svc.Tables[Internal], tc.size)
					}
					if table := r.Tables[svc.Lists[Internal]]; table.Size != tc.size || len(table.Slots) != int(tableSizes[tc.size]) {
						t.Errorf("%v: table of size %d with %d positions, want %d", frontend, table.Size, len(table.Slots), tableSizes[tc.size])
					}
				}
				if got := r.Frontends[f.nodeFrontend()].Tables[External]; got != 0 {
					t.Errorf("table of size %d for a list without backends", got)
				}
				if (tc.problem == "") != (len(r.Problems) == 0) || tc.problem != "" && !strings.Contains(r.Problems[0].Message, tc.problem) {
					t.Errorf("problems = %v, want %q", r.Problems, tc.problem)
				}
				// What has not changed is not computed again.
				list := r.Frontends[f.clusterFrontend()].Lists[Internal]
				again := c.Compile(s)
				if tc.size != 0 && &again.Tables[list].Slots[0] != &r.Tables[list].Slots[0] {
					t.Error("the table of an unchanged list is a new one")
				}
			})
		}
	})
}

// A service whose mode is switched gets its table, and gives it back.
func TestSwitchToMaglevAndBack(t *testing.T) {
	f := family(true)
	c := NewCompiler(thisNode)
	for i, mode := range []state.LoadBalancing{"", state.BalanceMaglev, state.BalanceRandom, state.BalanceMaglev} {
		r := c.Compile(world(f.service(func(s *state.Service) { s.Balancing = mode }), f.slice("a", f.ready(1, thisNode), f.ready(2, thisNode))))
		if got, want := len(r.Tables), map[bool]int{true: 1}[mode == state.BalanceMaglev]; got != want {
			t.Errorf("step %d, %q: %d tables, want %d", i, mode, got, want)
		}
	}
}

func BenchmarkNewTable(b *testing.B) {
	for _, n := range []int{10, 100, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			slots := make([]netip.AddrPort, n)
			for i := range slots {
				slots[i] = netip.AddrPortFrom(family(false).pod(i), 8080)
			}
			for b.Loop() {
				newTable(slots)
			}
		})
	}
}
