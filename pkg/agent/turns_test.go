// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"maps"
	"testing"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/state"
)

// What comes in during a whole round is in the maps before that ends, and the whole round repairs what somebody else has changed all the
// same, also when there is never a moment without something new.
func TestWholeRoundsGiveWay(t *testing.T) {
	for _, endless := range []bool{false, true} {
		s := manyServices(200) // lists and sets of more entries than are read at a time
		k := newKernel(1)
		r := newRig(t, k, runDir(t))
		r.give(s)
		r.settle()
		r.work(true)
		var lost bpf.BackendKey
		for lost = range k.backends.entries {
			break
		}
		key := state.Key{Namespace: "default", Name: "svc7"}
		entries := len(k.members.entries)
		fewer := func(endpoints int) *state.Snapshot {
			next, slice := *s, *s.EndpointSlices[key]
			slice.Endpoints = slice.Endpoints[:endpoints]
			next.EndpointSlices = maps.Clone(s.EndpointSlices)
			next.EndpointSlices[key] = &slice
			return &next
		}

		delete(k.backends.entries, lost)
		r.wholeDue = true
		r.snapshots.put(snapshotFrom{fewer(9), r.clock})
		if d := r.turn(); d != soonAgain || !r.wholeDue {
			t.Fatalf("a whole round with something in the mailbox returned %v, due %v; want it to give way", d, r.wholeDue)
		}
		turns := 0
		for ; r.wholeDue && turns < 3*maxGiveWay; turns++ {
			r.drain()
			if endless {
				r.snapshots.put(snapshotFrom{fewer(8 - turns%2), r.clock})
			}
			r.turn()
			if !endless && turns == 0 && len(k.members.entries) != entries-1 {
				t.Errorf("%d members after what came in, want %d", len(k.members.entries), entries-1)
			}
		}
		if _, repaired := k.backends.entries[lost]; r.wholeDue || !repaired {
			t.Errorf("endless %v: after %d turns whole round due %v, lost entry there %v; want it done", endless, turns, r.wholeDue, repaired)
		}
	}
}
