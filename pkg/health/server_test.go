// SPDX-License-Identifier: Apache-2.0

package health

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// run serves until the test ends.
func (n *node) run(s *Server) {
	n.t.Helper()
	s.listen, s.retry = n.listen, 10*time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	n.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			n.t.Errorf("Run() = %v, want nil", err)
		}
	})
}

// An address that is taken does not end the agent: it is reported, and served once it is free.
func TestH2_AddressThatIsTaken(t *testing.T) {
	for _, address := range []string{"0.0.0.0:10256", ":10256", "[::]:10256"} {
		t.Run(address, func(t *testing.T) {
			n := newNode(t)
			other := n.occupy("tcp", ":10256")
			s := NewServer("health server", address, NewProxy(nil).Handler(), quiet())
			n.run(s)
			eventually(t, "a condition", func() bool { return len(s.Conditions()) == 1 })
			if c := s.Conditions()[0]; c.Subject != "health server" || !strings.Contains(c.Error, "in use") {
				t.Errorf("condition = %+v, want the health server and the error", c)
			}
			if err := other.Close(); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the condition to end", func() bool { return len(s.Conditions()) == 0 })
			// A server on all addresses is reached in both families, whichever the address is written in.
			for _, host := range []string{"127.0.0.1", "[::1]", "localhost"} {
				if got := n.ask("http://" + host + ":10256/healthz").code; got != 200 {
					t.Errorf("%s: status %d, want 200", host, got)
				}
			}
		})
	}
}

// Namespaces of one machine do not meet.
func TestH2_TwoNamespacesOneAddress(t *testing.T) {
	for range 2 {
		n := newNode(t)
		s := NewServer("health server", "0.0.0.0:10256", NewProxy(nil).Handler(), quiet())
		n.run(s)
		eventually(t, "the server", func() bool { return n.ask("http://127.0.0.1:10256/livez").code == 200 })
	}
}

func TestH3_Introspection(t *testing.T) {
	n := newNode(t)
	metrics := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("some_metric 1\n")) })
	config := map[string]any{"margay-agent": map[string]any{"node": "n1"}}
	for i, profiling := range []bool{false, true} {
		host := []string{"127.0.0.1:10249", "[::1]:10249"}[i]
		s := NewServer("metrics server", host, NewIntrospection(Introspection{Metrics: metrics, Config: config, Profiling: profiling}), quiet())
		n.run(s)
		eventually(t, "the server", func() bool { return n.ask("http://"+host+"/healthz").code == 200 })
		for path, want := range map[string]string{"/healthz": "ok", "/proxyMode": "ebpf", "/metrics": "some_metric 1\n"} {
			got := n.ask("http://" + host + path)
			if got.code != 200 || got.body != want || !strings.HasPrefix(got.header.Get("Content-Type"), "text/plain") {
				t.Errorf("%s = %d %q (%s), want %q as plain text", path, got.code, got.body, got.header.Get("Content-Type"), want)
			}
		}
		var shown map[string]any
		if err := json.Unmarshal([]byte(n.ask("http://"+host+"/configz").body), &shown); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(config, shown); diff != "" {
			t.Errorf("/configz (-want +got):\n%s", diff)
		}
		want := map[bool]int{false: 404, true: 200}[profiling]
		for _, path := range []string{"/debug/pprof/", "/debug/pprof/goroutine", "/debug/pprof/cmdline"} {
			if got := n.ask("http://" + host + path).code; got != want {
				t.Errorf("%s with profiling %v: status %d, want %d", path, profiling, got, want)
			}
		}
	}
}
