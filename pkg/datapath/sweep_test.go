// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/bpf"
)

// direction is one entry of a flow: seconds since its last packet, and what TCP has shown.
type direction struct {
	idle uint32
	tcp  uint8
}

func TestSweepFlows(t *testing.T) {
	t.Parallel()
	const syn, fin, rst, est = bpf.FlowTCPSyn, bpf.FlowTCPFin, bpf.FlowTCPRst, bpf.FlowTCPEstablished
	const tcp, udp, icmp, sctp = unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_ICMP, unix.IPPROTO_SCTP
	const hours = 2*60*60 + 10*60
	ns, cfg := place(t)
	d := ensure(t, ns, cfg)
	for _, tt := range []struct {
		name     string
		proto    uint8
		fwd, rev direction
		gone     bool
	}{
		{"UDP within five minutes", udp, direction{idle: 300}, direction{idle: 300}, false},
		{"UDP after five minutes", udp, direction{idle: 301}, direction{idle: 301}, true},
		{"UDP stream without answers", udp, direction{idle: 1}, direction{idle: 100000}, false},
		{"UDP stream of answers", udp, direction{idle: 100000}, direction{idle: 1}, false},
		{"ping within a minute", icmp, direction{idle: 60}, direction{idle: 60}, false},
		{"ping after a minute", icmp, direction{idle: 61}, direction{idle: 61}, true},
		{"SCTP within several heartbeats", sctp, direction{idle: 210}, direction{idle: 210}, false},
		{"SCTP after several heartbeats", sctp, direction{idle: 211}, direction{idle: 211}, true},
		{"half-open TCP within a minute", tcp, direction{60, syn}, direction{60, 0}, false},
		{"half-open TCP after a minute", tcp, direction{61, syn}, direction{61, 0}, true},
		{"TCP, SYN answered, after a minute", tcp, direction{61, syn}, direction{61, syn}, true},
		{"idle TCP within two hours", tcp, direction{hours, syn | est}, direction{hours, syn | est}, false},
		{"idle TCP after more", tcp, direction{hours + 1, syn | est}, direction{hours + 1, syn | est}, true},
		{"TCP, one side established", tcp, direction{hours, syn | est}, direction{hours, syn}, false},
		{"TCP download whose acknowledgements take another way", tcp, direction{100000, syn | est}, direction{0, syn | est}, false},
		{"half-closed TCP", tcp, direction{hours, syn | est | fin}, direction{hours, syn | est}, false},
		{"closed TCP within two minutes", tcp, direction{120, est | fin}, direction{120, est | fin}, false},
		{"closed TCP after two minutes", tcp, direction{121, est | fin}, direction{121, est | fin}, true},
		{"reset TCP within two minutes", tcp, direction{120, est}, direction{120, est | rst}, false},
		{"reset TCP after two minutes", tcp, direction{121, est}, direction{121, est | rst}, true},
		{"a packet since the clock was read", udp, direction{idle: ^uint32(4)}, direction{idle: ^uint32(4)}, false},
	} {
		for _, v6 := range []bool{false, true} {
			want := 0
			if tt.gone {
				want = 2
			}
			check := func(what string, key bpf.FlowKey, visited, deleted int, err error) {
				if err != nil || visited == 0 || deleted != want {
					t.Errorf("%s: %s = %d visited, %d deleted, %v, want %d deleted", tt.name, what, visited, deleted, err, want)
				}
				dropFlow(t, d, key)
			}
			for _, now := range []uint32{200000, 50} { // the second: the clock has gone round since
				key := putFlow(t, d, tt.proto, v6, now, &tt.fwd, &tt.rev)
				visited, deleted, err := d.SweepFlowsAt(now)
				check("SweepFlowsAt()", key, visited, deleted, err)
			}
			for { // the walk in pieces reads the clock itself, and may read the next second
				now := seconds(t)
				key := putFlow(t, d, tt.proto, v6, now, &tt.fwd, &tt.rev)
				visited, deleted, err := d.SweepFlows(context.Background())
				if seconds(t) == now {
					check("SweepFlows()", key, visited, deleted, err)
					break
				}
				dropFlow(t, d, key)
			}
		}
	}
}

// An entry whose other half was evicted is judged alone.
func TestSweepOrphan(t *testing.T) {
	t.Parallel()
	ns, cfg := place(t)
	d := ensure(t, ns, cfg)
	const now = 1000
	for _, tt := range []struct {
		name string
		dir  direction
		want int
	}{
		{"within two minutes of its FIN", direction{120, bpf.FlowTCPEstablished | bpf.FlowTCPFin}, 0},
		{"after two minutes of its FIN", direction{121, bpf.FlowTCPEstablished | bpf.FlowTCPFin}, 1},
		{"established", direction{900, bpf.FlowTCPEstablished}, 0},
	} {
		key := putFlow(t, d, unix.IPPROTO_TCP, false, now, &tt.dir, nil)
		if _, deleted, err := d.SweepFlowsAt(now); err != nil || deleted != tt.want {
			t.Errorf("%s: SweepFlowsAt() deleted %d, %v, want %d", tt.name, deleted, err, tt.want)
		}
		dropFlow(t, d, key)
	}
}

// An entry whose answering tuple has become another flow's goes alone: the other flow lives by its own two directions.
func TestSweepLeavesOtherFlow(t *testing.T) {
	t.Parallel()
	ns, cfg := place(t)
	d := ensure(t, ns, cfg)
	const now = 1000
	putFlow(t, d, unix.IPPROTO_UDP, false, now, &direction{idle: 900}, nil)
	direct := bpf.NewFlowKey(unix.IPPROTO_UDP, netip.MustParseAddrPort("10.0.0.1:4000"), netip.MustParseAddrPort("10.0.0.2:8080"))
	for k, seen := range map[bpf.FlowKey]uint32{direct: now, direct.Reverse(): now - 301} {
		must(t, d.Maps.Flows.Put(&k, &bpf.Flow{LastSeen: seen, Xlate: k}))
	}
	if _, deleted, err := d.SweepFlowsAt(now); err != nil || deleted != 1 {
		t.Errorf("SweepFlowsAt() deleted %d, %v, want 1", deleted, err)
	}
	var f bpf.Flow
	for _, k := range []bpf.FlowKey{direct, direct.Reverse()} {
		if err := d.Maps.Flows.Lookup(&k, &f); err != nil {
			t.Errorf("a direction of the live flow is gone: %v", err)
		}
	}
}

// SweepFlows uses the clock that the programs write with: a flow of this second stays.
func TestSweepKeepsWhatIsNew(t *testing.T) {
	t.Parallel()
	ns, cfg := place(t)
	d := ensure(t, ns, cfg)
	putFlow(t, d, unix.IPPROTO_ICMP, true, seconds(t), &direction{}, &direction{})
	if visited, deleted, err := d.SweepFlows(context.Background()); err != nil || visited != 2 || deleted != 0 {
		t.Errorf("SweepFlows() = %d, %d, %v, want 2, 0, nil", visited, deleted, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, _, err := d.SweepFlows(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("SweepFlows() with a cancelled context = %v, want context.Canceled", err)
	}
}

// The walk in pieces meets every entry once, however many pieces it takes, and counts them.
func TestSweepInPieces(t *testing.T) {
	t.Parallel()
	ns, cfg := place(t)
	d := ensure(t, ns, cfg)
	if d.progs[bpf.ProgSweepFlow] == nil {
		t.Fatal("sweep_flow is not loaded: the kernel has no BTF")
	}
	const flows, alive = 3 * sweepPiece, 777
	now := seconds(t)
	var keys []bpf.FlowKey
	var values []bpf.Flow
	for i := range flows {
		k := bpf.NewFlowKey(unix.IPPROTO_UDP, netip.AddrPortFrom(netip.MustParseAddr("fd00::1"), uint16(i+1)), netip.MustParseAddrPort("[fd00::2]:53"))
		f := bpf.Flow{LastSeen: now, Xlate: k}
		if i >= alive {
			f.LastSeen = now - 1000
		}
		keys = append(keys, k, k.Reverse())
		values = append(values, f, f)
		values[len(values)-1].Xlate = k.Reverse()
	}
	if _, err := d.Maps.Flows.BatchUpdate(keys, values, nil); err != nil {
		t.Fatal(err)
	}
	visited, deleted, err := d.SweepFlows(context.Background())
	if want := flows + alive; err != nil || deleted != 2*(flows-alive) || visited < want || visited > 2*flows {
		t.Errorf("SweepFlows() = %d visited, %d deleted, %v, want at least %d and %d", visited, deleted, err, want, 2*(flows-alive))
	}
	if visited, deleted, err = d.SweepFlows(context.Background()); err != nil || visited != 2*alive || deleted != 0 {
		t.Errorf("the next SweepFlows() = %d, %d, %v, want %d, 0, nil", visited, deleted, err, 2*alive)
	}
}

// A kernel without BTF does not load the walk in pieces; the table is swept nevertheless.
func TestSweepWithoutBTF(t *testing.T) {
	t.Parallel()
	ns, cfg := place(t)
	ensure(t, ns, cfg)
	must(t, os.Remove(filepath.Join(cfg.ProgramDir(), bpf.ProgSweepFlow)))
	d := ensure(t, ns, cfg)
	now := seconds(t)
	putFlow(t, d, unix.IPPROTO_UDP, false, now, &direction{idle: 1000}, &direction{idle: 1000})
	if visited, deleted, err := d.SweepFlows(context.Background()); err != nil || visited == 0 || deleted != 2 {
		t.Errorf("SweepFlows() = %d, %d, %v, want 2 deleted", visited, deleted, err)
	}
}

// seconds is the clock that the programs write with.
func seconds(t *testing.T) uint32 {
	t.Helper()
	var ts unix.Timespec
	must(t, unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts))
	return uint32(ts.Sec)
}

// putFlow writes a translated flow: only xlate leads from one entry to the other.
func putFlow(t *testing.T, d *Datapath, proto uint8, v6 bool, now uint32, fwd, rev *direction) bpf.FlowKey {
	t.Helper()
	client, vip, backend := "10.0.0.1:4000", "10.96.0.1:80", "10.0.0.2:8080"
	if v6 {
		client, vip, backend = "[fd00::1]:4000", "[fd00:96::1]:80", "[fd00::2]:8080"
	}
	key := bpf.NewFlowKey(proto, netip.MustParseAddrPort(client), netip.MustParseAddrPort(vip))
	xlate := bpf.NewFlowKey(proto, netip.MustParseAddrPort(client), netip.MustParseAddrPort(backend))
	put := func(k, x bpf.FlowKey, dir *direction, flags uint16) {
		if dir == nil {
			return
		}
		f := bpf.Flow{LastSeen: now - dir.idle, Tcp: dir.tcp, Flags: bpf.FlowNAT | flags, Xlate: x}
		must(t, d.Maps.Flows.Put(&k, &f))
	}
	put(key, xlate, fwd, 0)
	put(xlate.Reverse(), key.Reverse(), rev, bpf.FlowReply)
	return key
}

func dropFlow(t *testing.T, d *Datapath, key bpf.FlowKey) {
	t.Helper()
	var f bpf.Flow
	if err := d.Maps.Flows.Lookup(&key, &f); err != nil {
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return
		}
		t.Fatal(err)
	}
	other := f.Xlate.Reverse()
	for _, k := range []bpf.FlowKey{key, other} {
		if err := d.Maps.Flows.Delete(&k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			t.Fatal(err)
		}
	}
}
