// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/bpf/object"
)

// Drops is how much was dropped for one reason in one direction since the maps were created.
type Drops struct {
	// Reason is the name of the drop reason, Direction the pod's policy direction.
	Reason    string `json:"reason"`
	Direction string `json:"direction"`
	Packets   uint64 `json:"packets"`
	// Bytes count from the Ethernet header.
	Bytes uint64 `json:"bytes"`
}

// DropTotals sums the drop counters over all CPUs: one element for each reason and direction, in the order of the reasons' numbers,
// zeros included.
func DropTotals(counters *ebpf.Map) ([]Drops, error) {
	reasons, err := object.DropReasons()
	if err != nil {
		return nil, fmt.Errorf("list drop reasons: %w", err)
	}
	var totals []Drops
	for _, reason := range reasons {
		for _, direction := range []uint32{bpf.Egress, bpf.Ingress} {
			var perCPU []bpf.Counter
			if err := counters.Lookup(uint32(reason)*2+direction, &perCPU); err != nil {
				return nil, fmt.Errorf("read counter of drop reason %s: %w", object.DropReasonName(reason), err)
			}
			d := Drops{Reason: object.DropReasonName(reason), Direction: object.DirectionName(uint8(direction))}
			for _, c := range perCPU {
				d.Packets += c.Packets
				d.Bytes += c.Bytes
			}
			totals = append(totals, d)
		}
	}
	return totals, nil
}
