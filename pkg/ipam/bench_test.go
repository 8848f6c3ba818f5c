// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// The largest of what the tests and benchmarks fill: every address of an IPv4 /16 but three, and as many of an IPv6 /64.
var full = []struct {
	name, subnet string
	leases       int
}{
	{"full IPv4 16", "10.1.0.0/16", 1<<16 - 3},
	{"IPv6 64", "fd00::/64", 1<<16 - 3},
}

// fill makes a state in which pods 0 to n-1 hold the first n addresses, without the cost of n Adds.
func fill(t testing.TB, c *Config, n int) {
	t.Helper()
	r := &records{}
	rng := c.plan.ranges[0]
	a, ok := rng.next(rng.start)
	for i := range n {
		at := pod(i)
		r.leases = append(r.leases, Lease{
			ContainerID: at.ContainerID, IfName: at.IfName, Netns: at.Netns, Time: time.Unix(int64(i), 0), Addresses: []netip.Addr{a},
		})
		if i < n-1 && !ok {
			t.Fatalf("range %s ends after %d addresses", rng, i)
		}
		a, ok = rng.next(a.Next())
	}
	s, err := openStore(t.Context(), c, c.plan)
	if err == nil {
		err = errors.Join(s.replace(c.plan, r), s.close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// addTo is Add in a store that is open already; it returns how many device operations it took.
func addTo(c *Config, s *store, at Attachment) (ops int, err error) {
	o, _, err := c.order(at)
	if err != nil {
		return 0, err
	}
	if err := s.grow(o.plan); err != nil {
		return 0, err
	}
	before := s.reads + s.writes
	err = s.run(o.plan, func(t *tx) error {
		o.now = c.sys.boottime()
		_, _, err := t.fulfil(o)
		return err
	})
	return s.reads + s.writes - before, err
}

// TestCostDoesNotGrow counts reads and writes of the state: with 65 000 leases an Add or Del may take no more of them than in an
// almost empty range. The bounds are generous to the length of hash chains, which varies, and to nothing else.
func TestCostDoesNotGrow(t *testing.T) {
	if testing.Short() {
		t.Skip("fills two ranges of 65 000 addresses")
	}
	const most = 100
	for _, tc := range full {
		t.Run(tc.name, func(t *testing.T) {
			c := conf(t, t.TempDir(), subnet(tc.subnet)+`,"releaseCooldown":0`, nil)
			fill(t, c, tc.leases)
			s, err := openStore(t.Context(), c, c.plan)
			if err != nil {
				t.Fatal(err)
			}
			defer s.close()
			worst := map[string]int{}
			for i := range 2000 {
				victim := pod(i * 31 % tc.leases)
				before := s.reads + s.writes
				if found, err := s.drop(victim); err != nil || !found {
					t.Fatalf("Del(%s) = %v, %v, want true", victim.ContainerID, found, err)
				}
				worst["Del"] = max(worst["Del"], s.reads+s.writes-before)
				ops, err := addTo(c, s, victim)
				if err != nil {
					t.Fatal(err)
				}
				worst["Add"] = max(worst["Add"], ops)
			}
			t.Logf("with %d leases: device operations of the worst of 2000 calls: %v", tc.leases, worst)
			for call, ops := range worst {
				if ops > most {
					t.Errorf("%s took %d device operations, want at most %d", call, ops, most)
				}
			}
			if tc.subnet == "10.1.0.0/16" {
				before := s.reads + s.writes
				_, err := addTo(c, s, pod(1<<20))
				wantCode(t, err, 11, "65533 leases held of 65533 addresses")
				if ops := s.reads + s.writes - before; ops > most {
					t.Errorf("finding the range exhausted took %d device operations, want at most %d", ops, most)
				}
			}
		})
	}
}

// BenchmarkAddDel is one Del and one Add, opening and locking included, as a plugin process does them after its start.
func BenchmarkAddDel(b *testing.B) {
	cases := append(full[:len(full):len(full)], struct {
		name, subnet string
		leases       int
	}{"IPv4 24 with 100 leases", "10.1.0.0/24", 100})
	for _, bc := range cases {
		b.Run(bc.name, func(b *testing.B) {
			c := conf(b, b.TempDir(), subnet(bc.subnet)+`,"releaseCooldown":0`, nil)
			fill(b, c, bc.leases)
			i := 0
			for b.Loop() {
				at := pod(i % bc.leases)
				del(b, c, at)
				add(b, c, at)
				i++
			}
		})
	}
}

// BenchmarkAddOnly leases in an IPv6 /64 without releasing, growth included.
func BenchmarkAddOnly(b *testing.B) {
	c := conf(b, b.TempDir(), subnet("fd00::/64"), nil)
	i := 0
	for b.Loop() {
		add(b, c, pod(i))
		i++
	}
}

func TestFingerprintSeesWhatQueuesDependOn(t *testing.T) {
	prints := map[uint64]string{}
	for _, s := range append(modelPlans(), subnet("10.1.0.0/24"), `"subnet":"10.1.0.0/24","exclude":["10.1.0.9"]`, `"subnet":"10.1.0.0/24","gateway":"10.1.0.9"`) {
		p := conf(t, t.TempDir(), s, nil).plan.fingerprint()
		if other, ok := prints[p]; ok {
			t.Errorf("%s and %s have the same fingerprint", s, other)
		}
		prints[p] = s
	}
	a, b := conf(t, t.TempDir(), subnet("10.1.0.0/24"), nil), conf(t, t.TempDir(), subnet("10.1.0.0/24"), nil)
	if diff := cmp.Diff(fmt.Sprint(a.plan.fingerprint()), fmt.Sprint(b.plan.fingerprint())); diff != "" {
		t.Errorf("equal ranges differ (-a +b):\n%s", diff)
	}
}
