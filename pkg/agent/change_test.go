// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/margay-cni/margay/pkg/state"
)

// With journals the same changes are counted as without.
func TestCompareSnapshotsWithJournals(t *testing.T) {
	started := time.Now()
	r := rand.New(rand.NewPCG(4, 4))
	var services, slices state.Log[state.Key]
	before := state.NewSnapshot()
	before.Journals = state.Journals{Services: services.Journal(), EndpointSlices: slices.Journal()}
	changes := 0
	for step := range 300 {
		now := *before
		now.Services, now.EndpointSlices = maps.Clone(before.Services), maps.Clone(before.EndpointSlices)
		for range r.IntN(4) {
			key := state.Key{Namespace: "default", Name: fmt.Sprint(r.IntN(10))}
			switch r.IntN(6) {
			case 0:
				delete(now.Services, key)
				services.Note(key)
			case 1:
				delete(now.EndpointSlices, key)
				slices.Note(key)
			case 2, 3:
				now.Services[key] = &state.Service{Key: key, AffinitySeconds: uint32(r.IntN(2))}
				services.Note(key)
			default:
				now.EndpointSlices[key] = &state.EndpointSlice{Key: key, IPv6: r.IntN(2) == 0, Triggered: started.Add(time.Duration(r.IntN(3)-1) * time.Second)}
				slices.Note(key)
			}
		}
		now.Journals = state.Journals{}
		want := compareSnapshots(before, &now, started, started)
		now.Journals = state.Journals{Services: services.Journal(), EndpointSlices: slices.Journal()}
		got := compareSnapshots(before, &now, started, started)
		if got.services != want.services || got.slices != want.slices || len(got.triggers) != len(want.triggers) {
			t.Fatalf("step %d: with journals %+v, want %+v", step, got, want)
		}
		changes += got.services + got.slices
		before = &now
	}
	if changes == 0 {
		t.Error("nothing ever changed")
	}
}
