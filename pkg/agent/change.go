// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"reflect"
	"time"

	"github.com/margay-cni/margay/pkg/state"
)

// change is what a snapshot has that the one before had not, as far as services go.
type change struct {
	at               time.Time
	services, slices int
	triggers         []trigger
}

// trigger is when what a slice was written for happened.
type trigger struct {
	at   time.Time
	ipv6 bool
}

// compareSnapshots counts what differs; before is nil for the first snapshot. What happened before this agent was there is not its delay.
func compareSnapshots(before, now *state.Snapshot, at, started time.Time) change {
	if before == nil {
		before = state.NewSnapshot()
	}
	c := change{at: at}
	keys, known := now.Journals.Services.Since(before.Journals.Services)
	c.services = countChanges(before.Services, now.Services, keys, known, func(*state.Service) {})
	keys, known = now.Journals.EndpointSlices.Since(before.Journals.EndpointSlices)
	c.slices = countChanges(before.EndpointSlices, now.EndpointSlices, keys, known, func(s *state.EndpointSlice) {
		if s.Triggered.After(started) {
			c.triggers = append(c.triggers, trigger{s.Triggered, s.IPv6})
		}
	})
	return c
}

// countChanges counts objects that are new, gone or different, and shows the ones that are there. Where it is known, keys has those of all
// that can be, some more than once. Sources share what did not change, mostly.
func countChanges[T any](before, now map[state.Key]*T, keys []state.Key, known bool, see func(*T)) int {
	n := 0
	look := func(key state.Key) {
		old, object := before[key], now[key]
		if old == object || (old != nil && object != nil && reflect.DeepEqual(old, object)) {
			return
		}
		n++
		if object != nil {
			see(object)
		}
	}
	if known {
		looked := make(map[state.Key]struct{}, len(keys))
		for _, key := range keys {
			if _, twice := looked[key]; !twice {
				looked[key] = struct{}{}
				look(key)
			}
		}
		return n
	}
	for key := range now {
		look(key)
	}
	for key := range before {
		if now[key] == nil {
			look(key)
		}
	}
	return n
}
