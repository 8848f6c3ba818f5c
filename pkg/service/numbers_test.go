// SPDX-License-Identifier: Apache-2.0

package service

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/margay-cni/margay/pkg/state"
)

func TestAssignSlots(t *testing.T) {
	bothFamilies(t, func(t *testing.T, f family) {
		for _, tc := range []struct {
			name                 string
			before, wanted, want []int
		}{
			{"first", nil, []int{3, 1, 2}, []int{1, 2, 3}},
			{"one more goes to the end", []int{3, 2}, []int{1, 2, 3}, []int{3, 2, 1}},
			{"the last moves into the gap", []int{1, 2, 3, 4}, []int{1, 3, 4}, []int{1, 4, 3}},
			{"the last leaves", []int{1, 2, 3}, []int{1, 2}, []int{1, 2}},
			{"first and last leave", []int{1, 2, 3, 4}, []int{2, 3}, []int{3, 2}},
			{"a new one takes the gap", []int{1, 2, 3}, []int{1, 3, 9}, []int{1, 9, 3}},
			{"all leave", []int{1, 2, 3}, nil, nil},
			{"all change", []int{1, 2}, []int{3, 4, 5}, []int{3, 4, 5}},
		} {
			got := assignSlots(f.backends(80, tc.before...), f.backends(80, tc.wanted...))
			if want := f.backends(80, tc.want...); !slices.Equal(got, want) {
				t.Errorf("%s: assignSlots() = %v, want %v", tc.name, got, want)
			}
		}
		same := f.backends(80, 2, 1)
		if got := assignSlots(same, f.backends(80, 1, 2)); &got[0] != &same[0] {
			t.Error("assignSlots() of the same members is a new slice, want the one before")
		}
	})
}

func TestAllocatorReusesTheOldestAfterQuarantine(t *testing.T) {
	a := allocator{next: 1, max: 100_000}
	for want := uint32(1); want <= 3; want++ {
		if n, ok := a.take(); n != want || !ok {
			t.Fatalf("take() = %d, %v, want %d", n, ok, want)
		}
	}
	a.release(2)
	a.release(1)
	for i := range uint32(quarantine - 1) {
		n, _ := a.take()
		if want := 4 + i; n != want {
			t.Fatalf("take() = %d while %d wait, want the new number %d", n, len(a.released), want)
		}
		a.release(n)
	}
	for _, want := range []uint32{2, 4 + quarantine - 1} {
		if n, _ := a.take(); n != want {
			t.Fatalf("take() with %d waiting = %d, want %d", len(a.released), n, want)
		}
	}
}

func TestAllocatorEndsAndTakesWhatWaits(t *testing.T) {
	for _, top := range []uint32{3, 1<<32 - 1} {
		a := allocator{next: top, max: top}
		if n, ok := a.take(); n != top || !ok {
			t.Errorf("take() = %d, %v, want %d", n, ok, top)
		}
		if n, ok := a.take(); ok {
			t.Errorf("take() = %d after the last, want none", n)
		}
		a.release(2)
		if n, ok := a.take(); n != 2 || !ok {
			t.Errorf("take() = %d, %v, want the released 2", n, ok)
		}
	}
}

// TestServiceIDsUsedUp fills every id: what has no id is named, what had one keeps it.
func TestServiceIDsUsedUp(t *testing.T) {
	s := world()
	f := family(false)
	for n := range MaxServiceID/64 + 1 {
		svc := f.service(numberedService(n))
		s.Services[svc.Key] = svc
	}
	r := NewCompiler(thisNode).Compile(s)
	if want := (MaxServiceID/64 + 1) * 64; len(r.Frontends) != MaxServiceID || len(r.Problems) != want-MaxServiceID {
		t.Fatalf("%d frontends and %d problems, want %d and %d", len(r.Frontends), len(r.Problems), MaxServiceID, want-MaxServiceID)
	}
	if p := r.Problems[0].Message; !strings.Contains(p, "all 57343 service ids are in use") {
		t.Errorf("problem = %q, want one about service ids", p)
	}
}

// numberedService makes the n-th service of many, with 64 ports.
func numberedService(n int) func(*state.Service) {
	return func(s *state.Service) {
		s.Name = fmt.Sprintf("svc-%05d", n)
		s.ClusterIPs = []netip.Addr{family(false).vip(n)}
		s.Ports = nil
		for p := range uint16(64) {
			s.Ports = append(s.Ports, state.ServicePort{Name: fmt.Sprint(p), Protocol: state.TCP, Port: p + 1})
		}
	}
}

func TestExportImportKeepsNumbersAndSlots(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := NewCompiler(thisNode)
		for range rapid.IntRange(1, 3).Draw(t, "steps") {
			c.Compile(drawWorld(t))
		}
		s := drawWorld(t)
		want := c.Compile(s)
		file, err := json.Marshal(c.Export())
		if err != nil {
			t.Fatal(err)
		}
		var n Numbers
		if err := json.Unmarshal(file, &n); err != nil {
			t.Fatal(err)
		}
		restarted := NewCompiler(thisNode)
		if err := restarted.Import(n); err != nil {
			t.Fatalf("Import(Export()) = %v, want success", err)
		}
		addrs := cmp.Options{ignoreOrder, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })}
		if diff := cmp.Diff(want, restarted.Compile(s), addrs); diff != "" {
			t.Fatalf("after a restart (-want +got):\n%s", diff)
		}
		// The two must go on alike.
		next := drawWorld(t)
		if diff := cmp.Diff(c.Compile(next), restarted.Compile(next), addrs); diff != "" {
			t.Fatalf("after a restart and a change (-want +got):\n%s", diff)
		}
	})
}

func TestImportRefusesContradictions(t *testing.T) {
	f := family(false)
	good := func() Numbers {
		c := NewCompiler(thisNode)
		c.Compile(world(f.service(withSecondPort, internalLocal, withNodePort)))
		c.Compile(world(f.service(internalLocal, withNodePort)))
		return c.Export()
	}
	for _, tc := range []struct {
		name  string
		spoil func(*Numbers)
		want  string
	}{
		{"version", func(n *Numbers) { n.Version = 2 }, "version is 2, want 1"},
		{"id beyond next", func(n *Numbers) { n.Ports[0].ID = 77 }, "service id 77 was never handed out"},
		{"no id", func(n *Numbers) { n.Ports[0].ID = 0 }, "service id 0 was never handed out"},
		{"id released and used", func(n *Numbers) { n.Services.Released = []uint32{n.Ports[0].ID} }, "is there twice"},
		{"list used twice", func(n *Numbers) { n.Ports[0].Local = n.Ports[0].Cluster }, "is there twice"},
		{"port twice", func(n *Numbers) { n.Ports = append(n.Ports, n.Ports[0]) }, `port "http" of web/api is there twice`},
		{"next too large", func(n *Numbers) { n.Services.Next = 70000 }, "next service id is 70000, above 57343"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := good()
			if err := NewCompiler(thisNode).Import(n); err != nil {
				t.Fatalf("Import() of good numbers = %v", err)
			}
			tc.spoil(&n)
			c := NewCompiler(thisNode)
			if err := c.Import(n); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("Import() = %v, want %q", err, tc.want)
			}
			if len(c.ports) != 0 || c.ids.next != 1 {
				t.Error("a refused Import changed the compiler")
			}
		})
	}
}

// BenchmarkCompile compiles 1 000 services with 10 endpoints each, of which one changes each time.
func BenchmarkCompile(b *testing.B) {
	s := world()
	f := family(false)
	for n := range 1000 {
		svc := f.service(func(s *state.Service) { s.Name, s.ClusterIPs = fmt.Sprintf("svc-%04d", n), []netip.Addr{f.vip(n)} })
		slice := f.slice(svc.Name)
		slice.Service = svc.Key
		for e := range 10 {
			slice.Endpoints = append(slice.Endpoints, f.ready(n*10+e, "node-b"))
		}
		s.Services[svc.Key], s.EndpointSlices[slice.Key] = svc, slice
	}
	c := NewCompiler(thisNode)
	c.Compile(s)
	b.ReportAllocs()
	for b.Loop() {
		e := &s.EndpointSlices[state.Key{Namespace: "web", Name: "svc-0500"}].Endpoints[3]
		e.Ready = !e.Ready
		if r := c.Compile(s); len(r.Lists) != 1000 {
			b.Fatalf("%d lists, want 1000", len(r.Lists))
		}
	}
}
