// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/margay-cni/margay/pkg/health"
	"github.com/margay-cni/margay/pkg/state"
)

type heardEvents []string

func (h *heardEvents) Node(warning bool, reason, message string) {
	*h = append(*h, fmt.Sprint(warning, " ", reason, " ", message))
}

func (h *heardEvents) expect(t *testing.T, when string, want ...string) {
	t.Helper()
	if got, wanted := strings.Join(*h, "\n"), strings.Join(want, "\n"); got != wanted {
		t.Errorf("events %s:\n%s\nwant:\n%s", when, got, wanted)
	}
	*h = nil
}

func TestEventsOncePerAppearance(t *testing.T) {
	var heard heardEvents
	teller, now := newTeller(&heard), time.Now()
	look := func(texts ...string) {
		now = now.Add(lookEvery)
		s := Status{}
		for _, text := range texts {
			s.Source = append(s.Source, state.Problem{File: "Kubernetes API", Object: "pods", Message: text, Severity: state.Error})
		}
		teller.look(now, problemsOf(&s))
	}
	look("refused")
	look()
	heard.expect(t, "of what comes and goes")
	look("refused")
	look("refused, again")
	look("refused, once more")
	heard.expect(t, "of what stays", "true NetworkProblem Kubernetes API: pods: refused, again")
	look()
	look()
	heard.expect(t, "of its end", "false NetworkProblemOver over: Kubernetes API: pods: refused, again")
	look("refused")
	look("refused")
	heard.expect(t, "of its return", "true NetworkProblem Kubernetes API: pods: refused")
}

func TestEventsAreLimited(t *testing.T) {
	var heard heardEvents
	teller, now := newTeller(&heard), time.Now()
	s := Status{Conditions: []health.Condition{{Subject: "metrics server", Error: "address in use"}}, Pods: []string{"default/a: no program"}}
	s.Last.Faults = []Fault{{Map: "policy", Error: "full"}}
	for i := range 100 {
		s.Last.Problems = append(s.Last.Problems, fmt.Sprintf("Service web/s%d: bad", i))
	}
	problems := problemsOf(&s)
	if len(problems) != 103 {
		t.Errorf("%d problems, want 103", len(problems))
	}
	for range 3 {
		now = now.Add(lookEvery)
		teller.look(now, problems)
	}
	if len(heard) != tellBurst {
		t.Errorf("%d events at once, want %d", len(heard), tellBurst)
	}
	now = now.Add(10 * time.Minute)
	teller.look(now, problems)
	if want := tellBurst + tellBurst; len(heard) != want {
		t.Errorf("%d events ten minutes later, want %d", len(heard), want)
	}
	for range 200 {
		now = now.Add(tellEvery)
		teller.look(now, problems)
	}
	if len(heard) != 103 {
		t.Errorf("%d events in the end, want one for each problem", len(heard))
	}
}
