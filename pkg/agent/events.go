// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// NodeEvents tells who looks after the cluster about this node. It must not block.
type NodeEvents interface {
	Node(warning bool, reason, message string)
}

// PolicyStatus takes the condition of every ClusterNetworkPolicy, by name, whenever policies are compiled (policy.Result.Conditions). It must
// not block, and must not change the map.
type PolicyStatus interface {
	ClusterPolicies(conditions map[string]metav1.Condition)
}

// Reasons of the events.
const (
	reasonProblem = "NetworkProblem"
	reasonOver    = "NetworkProblemOver"
)

const (
	// lookEvery is how often the status is looked at; a problem has to be there twice to be told.
	lookEvery = 5 * time.Second
	// tellBurst is how many events there may be at once, tellEvery when there may be one more.
	tellBurst = 10
	tellEvery = 30 * time.Second
)

// teller turns problems of the status into events: one when a problem is there to stay, one when it is over.
type teller struct {
	events NodeEvents
	// problems are how many looks in a row each has been there, told those with an event.
	problems map[string]int
	told     map[string]string
	tokens   int
	refilled time.Time
}

func newTeller(events NodeEvents) *teller {
	return &teller{events: events, problems: map[string]int{}, told: map[string]string{}, tokens: tellBurst, refilled: time.Now()}
}

// run looks at the status until ctx ends.
func (t *teller) run(ctx context.Context, status func() Status) error {
	if t.events == nil {
		return nil
	}
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			s := status()
			t.look(now, problemsOf(&s))
		}
	}
}

// problemsOf are the problems of a status by what they are about: of a text that changes, what stays the same.
func problemsOf(s *Status) map[string]string {
	out := map[string]string{}
	for _, c := range s.Conditions {
		out[c.Subject] = c.Subject + ": " + c.Error
	}
	for _, f := range s.Last.Faults {
		out["map "+f.Map] = "map " + f.Map + ": " + f.Error
	}
	for _, p := range s.Last.Problems {
		out[p] = p
	}
	for _, p := range s.Pods {
		out[p] = p
	}
	for _, p := range s.Source {
		out[fmt.Sprintf("%s:%d: %s", p.File, p.Line, p.Object)] = p.String()
	}
	return out
}

// look tells what is new and what is over, as far as the rate allows; the rest waits.
func (t *teller) look(now time.Time, problems map[string]string) {
	for now.Sub(t.refilled) >= tellEvery && t.tokens < tellBurst {
		t.refilled = t.refilled.Add(tellEvery)
		t.tokens++
	}
	if t.tokens == tellBurst {
		t.refilled = now
	}
	for key, text := range t.told {
		if _, still := problems[key]; !still && t.take() {
			t.events.Node(false, reasonOver, "over: "+text)
			delete(t.told, key)
		}
	}
	for key := range t.problems {
		if _, still := problems[key]; !still {
			delete(t.problems, key)
		}
	}
	for key, text := range problems {
		t.problems[key]++
		if _, known := t.told[key]; !known && t.problems[key] > 1 && t.take() {
			t.events.Node(true, reasonProblem, text)
			t.told[key] = text
		}
	}
}

func (t *teller) take() bool {
	if t.tokens == 0 {
		return false
	}
	t.tokens--
	return true
}
