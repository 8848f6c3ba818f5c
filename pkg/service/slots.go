// SPDX-License-Identifier: Apache-2.0

package service

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
)

// assignSlots orders backends so that as few slots as possible differ from before: a new backend takes the slot of one that left, and when
// more leave than come, the last ones move into the gaps. It returns before itself when the members are the same.
func assignSlots(before, backends []netip.AddrPort) []netip.AddrPort {
	wanted := make(map[netip.AddrPort]bool, len(backends))
	for _, b := range backends {
		wanted[b] = true
	}
	var gaps []int
	for i, b := range before {
		if !wanted[b] {
			gaps = append(gaps, i)
			continue
		}
		delete(wanted, b)
	}
	if len(gaps) == 0 && len(wanted) == 0 {
		return before
	}
	// What is left in wanted is new. Sorted, so that equal input gives equal output.
	out := slices.Clone(before)
	for _, b := range slices.SortedFunc(maps.Keys(wanted), netip.AddrPort.Compare) {
		if len(gaps) == 0 {
			out = append(out, b)
			continue
		}
		out[gaps[0]] = b
		gaps = gaps[1:]
	}
	// Close the remaining gaps from the end: the last gap never lies behind the last backend once the tail is cut.
	for len(gaps) > 0 {
		last := len(out) - 1
		if gaps[len(gaps)-1] == last {
			gaps = gaps[:len(gaps)-1]
		} else {
			out[gaps[0]] = out[last]
			gaps = gaps[1:]
		}
		out = out[:last]
	}
	return out
}

// EpochsToRaise returns the ids of service ports that lost a serving endpoint between two results, in order: flows to it are to be
// looked at again. It covers ids whose service port is gone. old may be nil.
func EpochsToRaise(old, new *Result) []uint32 {
	if old == nil {
		return nil
	}
	ids := map[uint32]bool{}
	for m := range old.Serving {
		if _, still := new.Serving[m]; !still {
			ids[m.Service] = true
		}
	}
	return slices.SortedFunc(maps.Keys(ids), cmp.Compare[uint32])
}
