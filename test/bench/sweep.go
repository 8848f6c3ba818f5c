// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/datapath"
)

const sweepSection = "Sweeps of the flow table"

// Issue: what sweeping a million flows may take of a core, in per cent.
const sweepTarget = 2

// atOnce is how often the whole table would be swept if that were done at once: as often as the agent sweeps one of the default size.
const atOnce = 10 * time.Second

// benchSweep measures what sweeping takes of a core with a million flows in the table: the sweep in pieces, beside the same walk at once.
func benchSweep(ctx context.Context, b *bench) (err error) {
	cfg := datapath.Config{
		BPFFS: filepath.Join(b.node.dir, "sweep-bpf"), Run: filepath.Join(b.node.dir, "sweep-run"),
		Sizes: map[string]uint32{"flows": 1 << 21},
	}
	dp, err := datapath.Ensure(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dp.Close()) }()
	flows := b.choose(1_000_000, 1_000_000, 10_000)
	now, err := monotonic()
	if err != nil {
		return err
	}
	for _, tc := range []struct {
		id, name string
		idle     uint32
	}{
		{"live", "1 000 000 live flows", 600}, {"expired", "1 000 000 expired flows", 3 * 60 * 60},
	} {
		if err := fillFlows(dp, flows, now-tc.idle); err != nil {
			return err
		}
		m := &measurement{ID: "sweep." + tc.id, Section: sweepSection, Name: tc.name, Unit: "% of a core", Target: sweepTarget, Absolute: true}
		if tc.id == "live" {
			m.Reference = "at once, every 10 s"
		}
		for range b.rounds(10, 1) {
			share, err := inPieces(ctx, dp, time.Duration(b.rounds(1000, 50))*time.Millisecond)
			if err != nil {
				return err
			}
			if m.Reference == "" { // at once they would all be gone
				m.addAlone(share)
				continue
			}
			before, err := processTime()
			if err != nil {
				return err
			}
			if _, _, err := dp.SweepFlowsAt(now); err != nil {
				return err
			}
			after, err := processTime()
			if err != nil {
				return err
			}
			m.add(share, 100*float64(after-before)/float64(atOnce))
		}
		b.report.add(m)
	}
	return nil
}

// inPieces sweeps for so long, or to the end, and returns what that took of a core in per cent.
func inPieces(ctx context.Context, dp *datapath.Datapath, length time.Duration) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, length)
	defer cancel()
	before, err := processTime()
	if err != nil {
		return 0, err
	}
	start := time.Now()
	if _, _, err := dp.SweepFlows(ctx); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		return 0, err
	}
	after, err := processTime()
	return 100 * float64(after-before) / float64(time.Since(start)), err
}

// fillFlows writes so many TCP connections, both directions of each, whose last packet was seen then.
func fillFlows(dp *datapath.Datapath, flows int, seen uint32) error {
	const batch = 10_000
	to := netip.MustParseAddrPort("10.0.0.2:80")
	for first := 0; first < flows; first += batch {
		var keys []bpf.FlowKey
		var values []bpf.Flow
		for i := first; i < min(first+batch, flows); i++ {
			from := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 16), byte(i >> 8)}), uint16(1024+i&255))
			k := bpf.NewFlowKey(unix.IPPROTO_TCP, from, to)
			keys = append(keys, k, k.Reverse())
			values = append(values, bpf.Flow{LastSeen: seen, Tcp: bpf.FlowTCPEstablished, Xlate: k},
				bpf.Flow{LastSeen: seen, Tcp: bpf.FlowTCPEstablished, Flags: bpf.FlowReply, Xlate: k.Reverse()})
		}
		if _, err := dp.Maps.Flows.BatchUpdate(keys, values, nil); err != nil {
			return fmt.Errorf("fill the flow table: %w", err)
		}
	}
	return nil
}

// monotonic is the clock of the flow table, in seconds.
func monotonic() (uint32, error) {
	var ts unix.Timespec
	err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return uint32(ts.Sec), err
}

// processTime is how long this process has had a CPU.
func processTime() (time.Duration, error) {
	var ts unix.Timespec
	err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts)
	return time.Duration(ts.Nano()), err
}
