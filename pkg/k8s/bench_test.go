// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/margay-cni/margay/internal/testutil/apitest"
	"github.com/margay-cni/margay/pkg/state"
)

// BenchmarkSnapshot is one changed pod among 50 000, from the event to the snapshot.
func BenchmarkSnapshot(b *testing.B) {
	const pods = 50000
	cfg := inPod(b, apitest.New(b))
	s, err := New(cfg)
	if err != nil {
		b.Fatal(err)
	}
	for _, k := range s.all {
		k.synced = true
	}
	podStore := &store{kind: s.all[0], source: s}
	var changed [2][]any
	var items []any
	for i := range pods {
		for version := range changed {
			p := apiPod(i)
			p.Labels["version"] = fmt.Sprint(version)
			it, err := s.all[0].trim(p, "MODIFIED")
			if err != nil {
				b.Fatal(err)
			}
			changed[version] = append(changed[version], it)
		}
	}
	items = slices.Clone(changed[0])
	if err := podStore.Replace(items, ""); err != nil || s.snapshot() == nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if err := podStore.Update(changed[(i/pods+1)%2][i%pods]); err != nil {
			b.Fatal(err)
		}
		if got := s.snapshot(); got == nil || len(got.Pods) != pods {
			b.Fatal("no snapshot, or one that lacks pods")
		}
	}
}

// TestWatchLatency measures from the server's write to the snapshot, while nothing else happens.
func TestWatchLatency(t *testing.T) {
	const changes = 100
	s := apitest.New(t)
	s.Put(apiNode("n1"))
	for i := range 1000 {
		s.Put(apiPod(i))
	}
	r := run(t, inPod(t, s))
	r.until("a snapshot", anything)
	var took []time.Duration
	for i := range changes {
		time.Sleep(2 * interval)
		p := apiPod(i)
		p.Labels["changed"] = "yes"
		began := time.Now()
		s.Put(p)
		r.until("the change", func(s *state.Snapshot) bool { return s.Pods[key(p.Name)].Labels["changed"] == "yes" })
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	t.Logf("event to snapshot: p50 %v, p99 %v", took[changes/2], took[changes*99/100])
	if p50 := took[changes/2]; p50 > time.Second {
		t.Errorf("p50 = %v, want milliseconds", p50)
	}
}
