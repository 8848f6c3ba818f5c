// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"pgregory.net/rapid"
)

// model is the allocator over plain Go maps: what the package promises, in the simplest form that can be read as such.
type model struct {
	plan     *plan
	cooldown time.Duration
	strict   bool
	held     map[string][]netip.Addr
	released map[netip.Addr]time.Duration // when; addresses that were never leased are in neither map
}

// choices returns the addresses that may be leased from the set: any that was never leased, else the one released longest ago.
func (m *model) choices(set int, now time.Duration) []netip.Addr {
	inUse := map[netip.Addr]bool{}
	for _, as := range m.held {
		for _, a := range as {
			inUse[a] = true
		}
	}
	var never, again []netip.Addr
	for _, id := range m.plan.sets[set] {
		r := m.plan.ranges[id]
		for a := r.start; a.Compare(r.end) <= 0; a = a.Next() {
			_, was := m.released[a]
			switch {
			case !r.usable(a) || inUse[a]:
			case !was:
				never = append(never, a)
			case !m.strict || now-m.released[a] >= m.cooldown:
				again = append(again, a)
			}
		}
	}
	if len(never) > 0 {
		return never
	}
	slices.SortFunc(again, func(a, b netip.Addr) int { return int(m.released[a] - m.released[b]) })
	return again[:min(1, len(again))]
}

func (m *model) release(id string, now time.Duration) {
	for _, a := range m.held[id] {
		if m.plan.find(a) >= 0 {
			m.released[a] = now
		}
	}
	delete(m.held, id)
}

// The plans between which a simulation moves: the ranges overlap from one to the next, one has two ranges in a set.
func modelPlans() []string {
	return []string{
		`"ranges":[[{"subnet":"10.1.0.0/28"}],[{"subnet":"fd00::/124"}]]`,
		`"ranges":[[{"subnet":"10.1.0.0/28","rangeStart":"10.1.0.4","exclude":["10.1.0.6/31"]}],[{"subnet":"fd00::/125"}]]`,
		`"ranges":[[{"subnet":"10.1.0.0/29"},{"subnet":"10.1.0.8/29"}],[{"subnet":"fd00::/124","rangeEnd":"fd00::9"}]]`,
		`"ranges":[[{"subnet":"fd00::/124"}]]`,
	}
}

func TestModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		dir := tempDir(rt)
		ck := &clock{now: time.Hour}
		members := rapid.SampledFrom(modelPlans()).Draw(rt, "ranges")
		options := rapid.SampledFrom([]string{`,"releaseCooldown":0`, `,"releaseCooldown":20`, `,"releaseCooldown":20,"strictCooldown":true`}).Draw(rt, "options")
		c := conf(t, dir, members+options, ck)
		m := &model{plan: c.plan, cooldown: c.cooldown(), strict: c.section.Strict, held: map[string][]netip.Addr{}, released: map[netip.Addr]time.Duration{}}
		ids := rapid.SampledFrom([]string{"a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p"})
		at := func(id string) Attachment { return Attachment{ContainerID: id, IfName: "eth0"} }
		rt.Repeat(map[string]func(*rapid.T){
			"add": func(rt *rapid.T) { modelAdd(rt, t, m, c, at(ids.Draw(rt, "id")), ck.now) },
			"del": func(rt *rapid.T) {
				id := ids.Draw(rt, "id")
				m.release(id, ck.now)
				if err := Del(t.Context(), c, at(id)); err != nil {
					rt.Fatalf("Del(%s) = %v", id, err)
				}
			},
			"check": func(rt *rapid.T) {
				id := ids.Draw(rt, "id")
				_, held := m.held[id]
				if err := Check(t.Context(), c, at(id), m.held[id]); (err == nil) != held {
					rt.Fatalf("Check(%s) = %v, held: %v", id, err, held)
				}
			},
			"gc": func(rt *rapid.T) {
				valid := []Attachment{at("z")}
				for _, id := range slices.Sorted(maps.Keys(m.held)) {
					if rapid.Bool().Draw(rt, id) {
						valid = append(valid, at(id))
					}
				}
				modelGC(rt, t, m, c, valid, ck)
			},
			"edit": func(rt *rapid.T) {
				c = conf(t, dir, rapid.SampledFrom(modelPlans()).Draw(rt, "ranges")+options, ck)
				m.plan = c.plan
				// The store fits itself to new ranges when it is next asked for an address, and forgets what is outside of them.
				s, err := openStore(t.Context(), c, c.plan)
				if err = errors.Join(err, s.close()); err != nil {
					rt.Fatalf("open with other ranges: %v", err)
				}
				maps.DeleteFunc(m.released, func(a netip.Addr, _ time.Duration) bool { return c.plan.find(a) < 0 })
			},
			"": func(rt *rapid.T) {
				// The store's clock also moves by a nanosecond at each look; steps that do not add up to whole seconds keep these from
				// deciding whether a cool-down of 20 s is over.
				ck.now += time.Duration(rapid.IntRange(1, 15).Draw(rt, "seconds")) * (time.Second + time.Millisecond)
				modelCompare(rt, t, m, c)
			},
		})
	})
}

func modelAdd(rt *rapid.T, t *testing.T, m *model, c *Config, at Attachment, now time.Duration) {
	o := order{plan: m.plan, wanted: make([]netip.Addr, len(m.plan.sets))}
	old, repeated := m.held[at.ContainerID]
	a, err := Add(t.Context(), c, at)
	if repeated && o.fits(old) {
		if err != nil || !a.Repeated || !slices.Equal(addrsOf(a), old) {
			rt.Fatalf("repeated Add(%s) = %v, %v, want %v", at.ContainerID, a, err, old)
		}
		return
	}
	// An Add that fails changes nothing, so what it would have released is released only if it succeeds.
	before := &model{plan: m.plan, cooldown: m.cooldown, strict: m.strict, held: maps.Clone(m.held), released: maps.Clone(m.released)}
	m.release(at.ContainerID, now)
	var got []netip.Addr
	if err == nil {
		got = addrsOf(a)
	}
	var may [][]netip.Addr
	for set := range m.plan.sets {
		may = append(may, m.choices(set, now))
		if len(may[set]) == 0 {
			if e, ok := errors.AsType[*types.Error](err); !ok || e.Code != types.ErrTryAgainLater {
				rt.Fatalf("Add(%s) = %v, %v, want error 11: set %d is exhausted", at.ContainerID, got, err, set)
			}
			*m = *before
			return
		}
	}
	for set, one := range may {
		if err != nil || !slices.Contains(one, got[set]) {
			rt.Fatalf("Add(%s) = %v, %v, want one of %v", at.ContainerID, got, err, one)
		}
	}
	for _, a := range got {
		delete(m.released, a)
	}
	m.held[at.ContainerID] = got
}

func modelGC(rt *rapid.T, t *testing.T, m *model, c *Config, valid []Attachment, ck *clock) {
	// GC frees in no promised order: the model takes it from the report.
	report, err := GC(t.Context(), c, valid)
	if err != nil {
		rt.Fatalf("GC: %v", err)
	}
	for i, l := range report.Freed {
		if slices.ContainsFunc(valid, func(v Attachment) bool { return v.ContainerID == l.ContainerID }) {
			rt.Fatalf("GC freed %s, which is valid", l.ContainerID)
		}
		m.release(l.ContainerID, ck.now+time.Duration(i))
	}
	for id := range m.held {
		if !slices.ContainsFunc(valid, func(v Attachment) bool { return v.ContainerID == id }) {
			rt.Fatalf("GC left %s, which is not valid", id)
		}
	}
}

func modelCompare(rt *rapid.T, t *testing.T, m *model, c *Config) {
	ls, err := Leases(t.Context(), c)
	if err != nil {
		rt.Fatalf("Leases: %v", err)
	}
	if len(ls) != len(m.held) {
		rt.Fatalf("%d leases, want %d", len(ls), len(m.held))
	}
	for _, l := range ls {
		if !slices.Equal(l.Addresses, m.held[l.ContainerID]) {
			rt.Fatalf("%s holds %v, want %v", l.ContainerID, l.Addresses, m.held[l.ContainerID])
		}
	}
	verify(t, c)
}

func addrsOf(a *Assignment) []netip.Addr {
	var out []netip.Addr
	for _, ip := range a.IPs {
		out = append(out, ip.Address.Addr())
	}
	return out
}

// tempDir gives each run of a property a directory of its own.
func tempDir(rt *rapid.T) string {
	dir, err := mkdirTemp()
	if err != nil {
		rt.Fatal(fmt.Errorf("make directory: %w", err))
	}
	rt.Cleanup(func() { removeAll(dir) })
	return dir
}
