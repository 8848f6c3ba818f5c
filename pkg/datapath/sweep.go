// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/bpf"
)

const (
	// sweepShare is how much time passes for the time that a sweep has a CPU: it uses one hundredth of a core, however large the table is.
	sweepShare = 100
	// sweepPiece is how many entries one piece has: a millisecond's work, two where all of them go.
	sweepPiece = 2048
)

// SweepFlows removes the flows that have been idle for longer than their timeout. The walk happens in the kernel, in pieces that free the
// CPU after about a millisecond; user space sees counts. The pauses between the pieces keep it at a hundredth of a core: a table with a
// million flows takes about a minute. Kernel 5.8; without the kernel's BTF the walk is made at once.
func (d *Datapath) SweepFlows(ctx context.Context) (visited, deleted int, err error) {
	if err := ctx.Err(); err != nil {
		return 0, 0, err
	}
	prog := d.progs[bpf.ProgSweepFlow]
	if prog == nil {
		var ts unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
			return 0, 0, fmt.Errorf("read the clock: %w", err)
		}
		return d.SweepFlowsAt(uint32(ts.Sec))
	}
	walk, err := openWalk(prog, d.Maps.Flows)
	if err != nil {
		return 0, 0, fmt.Errorf("begin a walk over the flow table: %w", err)
	}
	defer func() { err = errors.Join(err, walk.Close()) }()
	pause := time.NewTimer(0)
	defer pause.Stop()
	for {
		select {
		case <-ctx.Done():
			return visited, deleted, ctx.Err()
		case <-pause.C:
		}
		v, n, took, err := sweepSome(walk)
		visited, deleted = visited+v, deleted+n
		if errors.Is(err, io.EOF) {
			return visited, deleted, nil
		}
		if err != nil {
			return visited, deleted, fmt.Errorf("run sweep_flow: %w", err)
		}
		if v < sweepPiece {
			took = 0 // the table's end: only that is left to read
		}
		pause.Reset((sweepShare - 1) * took)
	}
}

// openWalk begins a walk of the program over the map's entries. The caller closes it.
func openWalk(prog *ebpf.Program, m *ebpf.Map) (io.ReadCloser, error) {
	it, err := link.AttachIter(link.IterOptions{Program: prog, Map: m})
	if err != nil {
		return nil, err
	}
	walk, err := it.Open()
	return walk, errors.Join(err, it.Close())
}

// sweepSome sweeps one piece and returns what it counted and how long it had a CPU; io.EOF after the last one.
func sweepSome(walk io.Reader) (visited, deleted int, took time.Duration, err error) {
	runtime.LockOSThread() // the CPU time is the thread's
	defer runtime.UnlockOSThread()
	before, err := threadTime()
	if err != nil {
		return 0, 0, 0, err
	}
	var out [sweepPiece]byte
	n, err := walk.Read(out[:])
	for _, b := range out[:n] { // one for each entry: how many went with it
		deleted += int(b)
	}
	after, timeErr := threadTime()
	return n, deleted, after - before, errors.Join(err, timeErr)
}

// threadTime is how long the calling thread has had a CPU.
func threadTime() (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		return 0, fmt.Errorf("read the thread's CPU time: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}

// SweepFlowsAt is SweepFlows at once and as if the clock said now, in seconds of CLOCK_MONOTONIC: with a later time a test sees today which
// flows would be left then. The agent calls SweepFlows.
func (d *Datapath) SweepFlowsAt(now uint32) (visited, deleted int, err error) {
	in, out := bpf.Sweep{Now: now}, bpf.Sweep{}
	_, err = d.progs[bpf.ProgSweepFlows].Run(&ebpf.RunOptions{Context: &in, ContextOut: &out})
	if err != nil {
		return 0, 0, fmt.Errorf("run sweep_flows: %w", err)
	}
	return int(out.Visited), int(out.Deleted), nil
}
