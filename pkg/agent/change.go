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
	c.services = countChanges(before.Services, now.Services, func(*state.Service) {})
	c.slices = countChanges(before.EndpointSlices, now.EndpointSlices, func(s *state.EndpointSlice) {
		if s.Triggered.After(started) {
			c.triggers = append(c.triggers, trigger{s.Triggered, s.IPv6})
		}
	})
	return c
}

// countChanges counts objects that are new, gone or different, and shows the ones that are there. Sources share what did not change, mostly.
func countChanges[T any](before, now map[state.Key]*T, see func(*T)) int {
	n := 0
	for key, object := range now {
		old := before[key]
		if old == object || (old != nil && reflect.DeepEqual(old, object)) {
			continue
		}
		n++
		see(object)
	}
	for key := range before {
		if now[key] == nil {
			n++
		}
	}
	return n
}
