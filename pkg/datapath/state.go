// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/margay-cni/margay/pkg/bpf"
)

// SetVerdictEvents makes the programs write an event for every new flow that policy lets pass, or no longer. Where an agent runs, it
// writes the whole entry, and this with it.
func (d *Datapath) SetVerdictEvents(on bool) error {
	var zero uint32
	var state bpf.NodeState
	if err := d.Maps.NodeState.Lookup(&zero, &state); err != nil {
		return fmt.Errorf("read what is switched on: %w", err)
	}
	state.Flags &^= bpf.NodeVerdictEvents
	if on {
		state.Flags |= bpf.NodeVerdictEvents
	}
	if err := d.Maps.NodeState.Update(&zero, &state, ebpf.UpdateAny); err != nil {
		return fmt.Errorf("switch verdict events: %w", err)
	}
	return nil
}
