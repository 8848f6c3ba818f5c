// SPDX-License-Identifier: Apache-2.0

package node

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/pkg/state"
)

// TestUpdateEqualsCompile: on random sequences of changes, to nodes, pods inside and outside their nodes' ranges and the machine, with
// snapshots that nobody sees and some without journals, Update gives what Compile gives, and does not compile when other pods change.
func TestUpdateEqualsCompile(t *testing.T) {
	reused := 0
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(seed, 5))
		var nodes state.Log[string]
		var pods state.Log[state.Key]
		now := snapshot(object("a", "192.0.2.1 2001:db8::1", "10.1.0.0/24 fd00:1::/64"))
		whole, part := NewCompiler("a", Auto, nil, nil), NewCompiler("a", Auto, nil, nil)
		if seed%2 == 0 {
			whole.MaxIndex, part.MaxIndex = 2, 2
		}
		on := machine("192.0.2.1/24", "2001:db8::1/64")
		for step := range 60 {
			s := *now
			s.Nodes, s.Pods = maps.Clone(s.Nodes), maps.Clone(s.Pods)
			for range 1 + r.IntN(2) {
				n := 1 + r.IntN(4)
				name := fmt.Sprint("n", n)
				switch r.IntN(16) {
				case 0:
					delete(s.Nodes, name)
					nodes.Note(name)
				case 1, 2:
					s.Nodes[name] = object(name, fmt.Sprintf("192.0.2.%d 2001:db8::%d", 10+n, 10+n), fmt.Sprintf("10.%d.0.0/24 fd00:%d::/64", 10+n, 10+n))
					nodes.Note(name)
				case 3:
					on = machine("192.0.2.1/24", fmt.Sprintf("2001:db8::%d/64", 1+r.IntN(2)))
				default:
					key := state.Key{Namespace: "default", Name: fmt.Sprint("p", r.IntN(8))}
					pods.Note(key)
					if r.IntN(5) == 0 {
						delete(s.Pods, key)
						break
					}
					network := 10 + n
					if r.IntN(6) == 0 {
						network = 99 // outside
					}
					p := object("", fmt.Sprintf("10.%d.0.%d fd00:%d::%d", network, r.IntN(9), network, r.IntN(9)), "")
					s.Pods[key] = &state.Pod{Key: key, Node: name, IPs: p.Addresses, Terminating: r.IntN(4) == 0}
				}
			}
			now = &s
			if r.IntN(4) == 0 {
				continue
			}
			seen := s
			if r.IntN(8) > 0 {
				seen.Journals = state.Journals{Nodes: nodes.Journal(), Pods: pods.Journal()}
			}
			in := Input{Snapshot: &seen, Machine: on, Hold: r.IntN(20) == 0}
			var last *Result
			if part.last != nil {
				last = part.last.result
			}
			want, got := whole.Compile(in), part.Update(in)
			if got == last {
				reused++
			}
			if diff := cmp.Diff(text(want), text(got)); diff != "" {
				t.Fatalf("seed %d, step %d: Compile() and Update() differ (-want +got):\n%s", seed, step, diff)
			}
			if diff := cmp.Diff(whole.Export(), part.Export()); diff != "" {
				t.Fatalf("seed %d, step %d: numbers differ (-want +got):\n%s", seed, step, diff)
			}
		}
	}
	if reused == 0 {
		t.Error("no result was ever used again")
	}
}
