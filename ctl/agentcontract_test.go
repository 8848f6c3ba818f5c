// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/pkg/agent"
	"github.com/margay-cni/margay/pkg/health"
	"github.com/margay-cni/margay/pkg/manifest"
)

// TestAgentStatusContract: what the agent's own type says arrives in the text, so a renamed field cannot go unnoticed.
func TestAgentStatusContract(t *testing.T) {
	now := time.Now()
	s := agent.Status{
		Version: "v0.1.0", PID: 4711, Started: now.Add(-time.Hour),
		Last: agent.Round{
			Problems: []string{"a problem"},
			Faults:   []agent.Fault{{Map: "services", Error: "no space", Cure: "raise its size"}},
			Devices:  []agent.DeviceStatus{{Name: "eth1", Error: "no such device"}},
			Overlay:  &agent.DeviceStatus{Name: "margay.vxlan", Error: "address in use"},
			Counts:   agent.Counts{Pods: 3, Services: 2, Policies: 1},
		},
		Conditions: []health.Condition{{Subject: "metrics server", Error: "address already in use"}},
		GC: agent.GarbageCollection{
			Last: now.Add(-12 * time.Second), Suspects: 1, Removed: map[string]int{"lease": 2, "record": 1}, Error: "disk full",
		},
		Source: []manifest.Problem{{File: "svc.yaml", Line: 12, Object: "Service web/api", Message: "bad port"}},
	}
	raw, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	info := agentInfo{Running: true, Status: raw}
	if got, want := info.text(now), "running, version v0.1.0, pid 4711, for 1h; pods 3, services 2, policies 1"; got != want {
		t.Errorf("text = %q, want %q", got, want)
	}
	if got, want := info.garbage(now), "looked 12s ago; removed since the agent started: lease 2, record 1; looks dead: 1"; got != want {
		t.Errorf("garbage = %q, want %q", got, want)
	}
	if got := (agentInfo{Running: true, Status: []byte("{}")}).garbage(now); got != "" {
		t.Errorf("garbage of an agent that has not looked = %q, want nothing", got)
	}
	want := []string{
		"svc.yaml:12: Service web/api: bad port", "map services: no space; raise its size",
		"metrics server: address already in use", "what pods have left cannot be removed entirely: disk full", "device eth1: no such device", "device margay.vxlan: address in use", "a problem",
	}
	got := info.problems()
	if len(got) == 0 || !strings.Contains(got[0], "has not read its source yet") {
		t.Fatalf("problems = %q, want first that the source is not read", got)
	}
	if diff := cmp.Diff(want, got[1:]); diff != "" {
		t.Errorf("problems (-want +got):\n%s", diff)
	}
}
