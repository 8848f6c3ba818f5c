// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/margay-cni/margay/pkg/state"
)

// Whatever is put, removed and replaced: the journal names every object that is another one than in an earlier snapshot, whose map nobody
// has written to since.
func TestTableJournal(t *testing.T) {
	type snapshot struct {
		pods, copied map[string]*state.Pod
		journal      state.Journal[string]
	}
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 3))
		var all table[string, state.Pod]
		var seen []snapshot
		known := 0
		pod := func() (string, *state.Pod) {
			name := fmt.Sprint("pod", r.IntN(20))
			return name, &state.Pod{Key: state.Key{Name: name}, UID: fmt.Sprint(r.IntN(3))}
		}
		for range 400 {
			name, p := pod()
			switch r.IntN(40) {
			case 0:
				objects := map[string]*state.Pod{}
				for range r.IntN(20) {
					name, p := pod()
					objects[name] = p
				}
				all.replace(objects)
			case 1, 2, 3, 4, 5, 6, 7, 8:
				all.put(name, nil)
			default:
				all.put(name, p)
			}
			if r.IntN(5) > 0 {
				continue
			}
			now := snapshot{pods: all.share(), journal: all.log.Journal(), copied: map[string]*state.Pod{}}
			for name, p := range now.pods {
				now.copied[name] = p
			}
			for _, before := range seen {
				changed, ok := now.journal.Since(before.journal)
				if !ok {
					continue
				}
				known++
				for i := range 20 {
					name := fmt.Sprint("pod", i)
					if before.pods[name] != before.copied[name] {
						t.Fatalf("seed %d: a snapshot was written to", seed)
					}
					if now.pods[name] != before.pods[name] && !slices.Contains(changed, name) {
						t.Fatalf("seed %d: %s changed from %+v to %+v without a word", seed, name, before.pods[name], now.pods[name])
					}
				}
			}
			seen = append(seen, now)
		}
		if known == 0 {
			t.Errorf("seed %d: no journal ever knew anything", seed)
		}
	}
}
