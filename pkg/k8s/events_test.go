// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"context"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/margay-cni/margay/internal/testutil/apitest"
)

func TestEventsReachTheServer(t *testing.T) {
	s := apitest.New(t)
	source, err := New(inPod(t, s))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	events, err := source.Events(ctx)
	if err != nil {
		t.Fatal(err)
	}
	events.Node(true, "NetworkProblem", "the map is full"+strings.Repeat(".", 2000))
	events.Node(false, "NetworkProblemOver", "over")
	events.Warn(key("api"), "FailedToStartServiceHealthcheck", "address in use")
	eventually(t, "three events", func() bool { return len(s.Events()) == 3 })
	names := map[string]bool{}
	for i, want := range []struct{ namespace, kind, about, level string }{
		{"default", "Node", "n1", corev1.EventTypeWarning},
		{"default", "Node", "n1", corev1.EventTypeNormal},
		{"web", "Service", "api", corev1.EventTypeWarning},
	} {
		e := s.Events()[i]
		names[e.Name] = true
		if e.Namespace != want.namespace || e.InvolvedObject.Kind != want.kind || e.InvolvedObject.Name != want.about || e.Type != want.level {
			t.Errorf("event %d = %+v, want %+v", i, e, want)
		}
		if e.Source.Component != "margay-agent" || e.Source.Host != "n1" || e.FirstTimestamp.IsZero() || len(e.Message) > 1024 {
			t.Errorf("event %d = %+v, want to know who wrote it, and when", i, e)
		}
	}
	if len(names) != 3 {
		t.Errorf("names = %v, want three", names)
	}
}
