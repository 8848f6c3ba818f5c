// SPDX-License-Identifier: Apache-2.0

package health

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// clock is a Proxy with a time of its own, and the counted answers.
type clock struct {
	*Proxy
	t       *testing.T
	at      time.Time
	counted map[string]int
}

func newClock(t *testing.T) *clock {
	c := &clock{t: t, at: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), counted: map[string]int{}}
	c.Proxy = NewProxy(func(probe string, code int) { c.counted[probe+map[int]string{200: " 200", 503: " 503"}[code]]++ })
	c.now = func() time.Time { return c.at }
	return c
}

func (c *clock) pass(d time.Duration) { c.at = c.at.Add(d) }

// get asks one probe.
func (c *clock) get(path string) (int, map[string]any) {
	c.t.Helper()
	w := httptest.NewRecorder()
	c.Handler().ServeHTTP(w, httptest.NewRequest("GET", path, nil))
	var body map[string]any
	if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil {
		c.t.Fatalf("%s: %v in %q", path, err, w.Body)
	}
	if got := w.Header().Get("Content-Type"); got != "application/json" {
		c.t.Errorf("%s: Content-Type = %q", path, got)
	}
	return w.Code, body
}

// want compares the status of both probes.
func (c *clock) want(what string, healthz, livez int) {
	c.t.Helper()
	for path, want := range map[string]int{"/healthz": healthz, "/livez": livez} {
		if got, body := c.get(path); got != want {
			c.t.Errorf("%s: %s = %d %v, want %d", what, path, got, body, want)
		}
	}
}

func TestH2_HealthyUnlessAnUpdateWaits(t *testing.T) {
	c := newClock(t)
	c.want("at the start", 200, 200)
	c.pass(time.Hour)
	c.want("long after the start, with nothing to do", 200, 200)

	c.Queued(c.at)
	c.pass(59 * time.Second)
	c.want("an update waits for 59 s", 200, 200)
	c.pass(time.Second)
	c.want("an update waits for 60 s", 503, 503)
	c.Queued(c.at)
	c.want("a second one waits, too", 503, 503)
	c.Applied(c.at)
	c.want("both are applied", 200, 200)
	c.pass(time.Hour)
	c.want("long after", 200, 200)

	// A round applies what was there when it began. What came meanwhile waits since then.
	c.Queued(c.at)
	began := c.at
	c.pass(40 * time.Second)
	c.Queued(c.at)
	c.pass(10 * time.Second)
	c.Applied(began)
	c.pass(49 * time.Second)
	c.want("the later update waits for 59 s", 200, 200)
	c.pass(time.Second)
	c.want("the later update waits for 60 s", 503, 503)
	c.Applied(c.at)
	c.want("it is applied", 200, 200)
}

func TestH2_NodeThatLeaves(t *testing.T) {
	c := newClock(t)
	c.Applied(c.at)
	c.SetLeaving(true)
	c.want("the node leaves", 503, 200)
	if !c.Healthy() {
		t.Error("Healthy() = false, want true: health checks of services do not look at the node")
	}
	c.SetLeaving(false)
	c.want("the node stays after all", 200, 200)
	want := map[string]int{"healthz 200": 1, "healthz 503": 1, "livez 200": 2}
	if diff := cmp.Diff(want, c.counted); diff != "" {
		t.Errorf("counted answers (-want +got):\n%s", diff)
	}
}

func TestH2_Bodies(t *testing.T) {
	const t0, t60 = "2026-01-02T03:04:05Z", "2026-01-02T03:05:05Z"
	families := func(healthy bool) map[string]any {
		one := map[string]any{"lastUpdated": t0, "healthy": healthy}
		return map[string]any{"IPv4": one, "IPv6": one}
	}
	c := newClock(t)
	for _, step := range []struct {
		name string
		do   func()
		path string
		want map[string]any
	}{
		{"before the first update", func() {}, "/healthz",
			map[string]any{"lastUpdated": t0, "currentTime": t0, "nodeEligible": true, "healthy": true}},
		{"healthy: lastUpdated is now", func() {
			c.Applied(c.at)
			c.Queued(c.at)
			c.pass(time.Minute - time.Nanosecond)
			c.at = c.at.Truncate(time.Second)
		}, "/livez",
			map[string]any{"lastUpdated": "2026-01-02T03:05:04Z", "currentTime": "2026-01-02T03:05:04Z", "healthy": true, "status": families(true)}},
		{"unhealthy: lastUpdated is what it says", func() { c.pass(time.Second) }, "/livez",
			map[string]any{"lastUpdated": t0, "currentTime": t60, "healthy": false, "status": families(false)}},
		{"unhealthy, and leaving", func() { c.SetLeaving(true) }, "/healthz",
			map[string]any{"lastUpdated": t0, "currentTime": t60, "nodeEligible": false, "healthy": false, "status": families(false)}},
	} {
		step.do()
		_, got := c.get(step.path)
		if diff := cmp.Diff(step.want, got); diff != "" {
			t.Errorf("%s: %s (-want +got):\n%s", step.name, step.path, diff)
		}
	}
}

// Ready is who has once had everything in the maps, whatever happens then; alive is who has not, too.
func TestReadyz(t *testing.T) {
	p := NewProxy(nil)
	ask := func(path string) int {
		w := httptest.NewRecorder()
		p.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		return w.Code
	}
	if got := [2]int{ask("/readyz"), ask("/livez")}; got != [2]int{503, 200} {
		t.Errorf("/readyz, /livez before the first snapshot = %v, want 503, 200", got)
	}
	p.SetReady()
	p.SetLeaving(true)
	if got := ask("/readyz"); got != 200 {
		t.Errorf("/readyz = %d, want 200", got)
	}
}
