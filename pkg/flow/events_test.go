// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/margay-cni/margay/internal/testutil/eventtest"
	"github.com/margay-cni/margay/internal/testutil/privileged"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/bpf/object"
)

func newRing(t *testing.T) *ebpf.Map {
	t.Helper()
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.RingBuf, MaxEntries: 1 << 16})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// drop returns a policy drop as from_pod writes it, that old.
func drop(t *testing.T, f family, old time.Duration) bpf.Event {
	t.Helper()
	c, err := Now()
	if err != nil {
		t.Fatal(err)
	}
	return bpf.Event{
		Time: uint64(c.Monotonic - old), Type: bpf.EventDrop, Hook: 1, Direction: 0, Reason: 6, Ifindex: 7, RuleId: 17, Length: 74,
		Tuple: bpf.NewFlowKey(tcp, netip.AddrPortFrom(f.client, 40001), netip.AddrPortFrom(f.web, 8080)),
	}
}

func newReader(t *testing.T, m *ebpf.Map, run string, history time.Duration) *Reader {
	t.Helper()
	r, err := NewReader(m, run, history)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// follow reads n events.
func follow(t *testing.T, r *Reader, n int) []Event {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var got []Event
	if err := r.Follow(ctx, func(e Event) bool { got = append(got, e); return len(got) < n }); err != nil {
		t.Fatalf("Follow() = %v after %d events, want %d", err, len(got), n)
	}
	return got
}

func TestReader(t *testing.T) {
	privileged.Require(t)
	for _, f := range families() {
		t.Run(f.name, func(t *testing.T) {
			ring := newRing(t)
			r := newReader(t, ring, t.TempDir(), 10*time.Second)
			old, fresh := drop(t, f, 20*time.Second), drop(t, f, 3*time.Second)
			eventtest.Emit(t, ring, old, fresh)
			got := follow(t, r, 1)
			for i := range got {
				got[i].Name(f.names())
			}
			want := []Event{{
				Type: "drop", Reason: "policy", Direction: "egress", Hook: "from_pod", Ifindex: 7, Protocol: "TCP", Length: 74,
				Source: netip.AddrPortFrom(f.client, 40001), SourcePod: "default/client",
				Destination: netip.AddrPortFrom(f.web, 8080), DestinationPod: "default/web-1", RuleID: 17, Rule: "default/allow-web",
			}}
			if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.AddrPort{}), cmpopts.IgnoreFields(Event{}, "Time")); diff != "" {
				t.Errorf("events (-want +got):\n%s", diff)
			}
			if age := time.Since(got[0].Time); age < 3*time.Second || age > 10*time.Second {
				t.Errorf("event is %s old, want 3 s: time conversion is wrong, or the old event was not skipped", age)
			}
		})
	}
}

// TestReaderLive: an event that comes while the reader waits arrives, and the order is the programs'.
func TestReaderLive(t *testing.T) {
	privileged.Require(t)
	ring := newRing(t)
	r := newReader(t, ring, t.TempDir(), 0)
	first := drop(t, families()[0], -time.Second)
	eventtest.Emit(t, ring, first)
	got := 0
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	err := r.Follow(ctx, func(e Event) bool {
		got++
		if want := uint32(73 + got); e.Length != want {
			t.Errorf("event %d has length %d, want %d", got, e.Length, want)
		}
		if got < 3 {
			next := first
			next.Length += uint32(got)
			eventtest.Emit(t, ring, next)
		}
		return got < 3
	})
	if err != nil || got != 3 {
		t.Errorf("Follow() = %v after %d events, want none after 3", err, got)
	}
}

func TestReaderEndsWithContext(t *testing.T) {
	privileged.Require(t)
	r := newReader(t, newRing(t), t.TempDir(), 0)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := r.Follow(ctx, func(Event) bool { return true }); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Follow() = %v, want the context's error", err)
	}
}

func TestOneReaderAtATime(t *testing.T) {
	privileged.Require(t)
	ring, run := newRing(t), t.TempDir()
	first := newReader(t, ring, run, 0)
	if _, err := NewReader(ring, run, 0); !errors.Is(err, ErrEventsBusy) {
		t.Fatalf("second NewReader() = %v, want ErrEventsBusy", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	newReader(t, ring, run, 0)
}

func TestReaderRefusesForeignEvents(t *testing.T) {
	privileged.Require(t)
	ring := newRing(t)
	r := newReader(t, ring, t.TempDir(), 0)
	eventtest.EmitBytes(t, ring, make([]byte, 16))
	err := r.Follow(t.Context(), func(Event) bool { return true })
	if err == nil || !strings.Contains(err.Error(), "16 bytes") {
		t.Errorf("Follow() = %v, want an error that names the size", err)
	}
}

func TestDropTotals(t *testing.T) {
	privileged.Require(t)
	m := newMap[uint32, bpf.Counter](t, ebpf.PerCPUArray, 128, 0)
	cpus := ebpf.MustPossibleCPU()
	perCPU := make([]bpf.Counter, cpus)
	for i := range perCPU {
		perCPU[i] = bpf.Counter{Packets: 2, Bytes: 100}
	}
	put(t, m, uint32(6*2+1), perCPU)
	got, err := DropTotals(m)
	if err != nil {
		t.Fatal(err)
	}
	reasons, err := object.DropReasons()
	if err != nil {
		t.Fatal(err)
	}
	if want := 2 * len(reasons); len(got) != want {
		t.Errorf("DropTotals() has %d elements, want %d: two directions of each reason", len(got), want)
	}
	for _, d := range got {
		want := Drops{Reason: d.Reason, Direction: d.Direction}
		if d.Reason == "policy" && d.Direction == "ingress" {
			want.Packets, want.Bytes = uint64(2*cpus), uint64(100*cpus)
		}
		if d != want {
			t.Errorf("DropTotals() has %+v, want %+v", d, want)
		}
	}
}

func TestClock(t *testing.T) {
	c := Clock{Wall: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), Monotonic: 100*time.Second + 700*time.Millisecond}
	if got, want := c.Time(90_700_000_000), c.Wall.Add(-10*time.Second); !got.Equal(want) {
		t.Errorf("Time() = %v, want %v", got, want)
	}
	for lastSeen, want := range map[uint32]time.Duration{97: 3 * time.Second, 100: 0, 101: 0} {
		if got := c.Age(lastSeen); got != want {
			t.Errorf("Age(%d) = %v, want %v", lastSeen, got, want)
		}
	}
}
