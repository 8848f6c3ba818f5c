// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"fmt"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/bpf"
)

// SweepFlows removes the flows that have been idle for longer than their timeout. The whole walk happens in the kernel; user space sees
// two numbers. Kernel 5.14.
func (d *Datapath) SweepFlows(ctx context.Context) (visited, deleted int, err error) {
	if err := ctx.Err(); err != nil {
		return 0, 0, err
	}
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0, 0, fmt.Errorf("read the clock: %w", err)
	}
	return d.SweepFlowsAt(uint32(ts.Sec))
}

// SweepFlowsAt is SweepFlows as if the clock said now, in seconds of CLOCK_MONOTONIC: with a later time a test sees today which flows
// would be left then. The agent calls SweepFlows.
func (d *Datapath) SweepFlowsAt(now uint32) (visited, deleted int, err error) {
	in, out := bpf.Sweep{Now: now}, bpf.Sweep{}
	_, err = d.progs[bpf.ProgSweepFlows].Run(&ebpf.RunOptions{Context: &in, ContextOut: &out})
	if err != nil {
		return 0, 0, fmt.Errorf("run sweep_flows: %w", err)
	}
	return int(out.Visited), int(out.Deleted), nil
}
