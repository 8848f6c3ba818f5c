// SPDX-License-Identifier: Apache-2.0

package health

import (
	"fmt"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/pkg/state"
)

// events keeps the warnings.
type events []string

func (e *events) Warn(service state.Key, reason, message string) {
	*e = append(*e, fmt.Sprintf("%s %s: %s", service, reason, message))
}

// servers makes health check servers in a namespace of their own.
func servers(t *testing.T) (*node, *Services, *atomic.Bool, *events) {
	t.Helper()
	n, healthy, told := newNode(t), &atomic.Bool{}, &events{}
	healthy.Store(true)
	s := NewServices("node-a", healthy.Load, told, quiet())
	s.listen = n.listen
	t.Cleanup(s.Close)
	return n, s, healthy, told
}

var (
	web = state.Key{Namespace: "default", Name: "web"}
	api = state.Key{Namespace: "default", Name: "api"}
	// loopbacks are where each family is asked.
	loopbacks = map[bool]string{false: "127.0.0.1", true: "[::1]"}
)

func check(key state.Key, ipv6 bool, port uint16, endpoints int) state.HealthCheck {
	return state.HealthCheck{Service: key, IPv6: ipv6, Port: port, LocalEndpoints: endpoints}
}

func bothFamilies(t *testing.T, run func(t *testing.T, ipv6 bool)) {
	for name, ipv6 := range map[string]bool{"IPv4": false, "IPv6": true} {
		t.Run(name, func(t *testing.T) { run(t, ipv6) })
	}
}

func TestH1_AnswerIsKubeProxys(t *testing.T) {
	bothFamilies(t, func(t *testing.T, ipv6 bool) {
		n, s, healthy, _ := servers(t)
		for _, tc := range []struct {
			name      string
			endpoints int
			healthy   bool
			path      string
			code      int
		}{
			{"two endpoints", 2, true, "/", 200},
			{"any path", 1, true, "/some/where?x=y", 200},
			{"no endpoint", 0, true, "/healthz", 503},
			{"maps do not keep up", 2, false, "/", 503},
		} {
			healthy.Store(tc.healthy)
			s.Sync([]state.HealthCheck{check(web, ipv6, 30999, tc.endpoints)}, nil)
			got := n.ask("http://" + loopbacks[ipv6] + ":30999" + tc.path)
			want := "{\n\t\"service\": {\n\t\t\"namespace\": \"default\",\n\t\t\"name\": \"web\"\n\t},\n" +
				fmt.Sprintf("\t\"localEndpoints\": %d,\n\t\"serviceProxyHealthy\": %v\n}", tc.endpoints, tc.healthy)
			if got.code != tc.code {
				t.Errorf("%s: status %d, want %d", tc.name, got.code, tc.code)
			}
			if diff := cmp.Diff(want, got.body); diff != "" {
				t.Errorf("%s: body (-want +got):\n%s", tc.name, diff)
			}
			for name, value := range map[string]string{
				"X-Load-Balancing-Endpoint-Weight": fmt.Sprint(tc.endpoints),
				"Content-Type":                     "application/json",
				"X-Content-Type-Options":           "nosniff",
			} {
				if got := got.header.Get(name); got != value {
					t.Errorf("%s: header %s = %q, want %q", tc.name, name, got, value)
				}
			}
		}
	})
}

// Both families of one service have the same port and a count of their own.
func TestH1_FamiliesAnswerForThemselves(t *testing.T) {
	n, s, _, _ := servers(t)
	s.Sync([]state.HealthCheck{check(web, false, 30999, 1), check(web, true, 30999, 0)}, nil)
	if c := s.Conditions(); len(c) > 0 {
		t.Fatalf("conditions = %v, want none", c)
	}
	for ipv6, want := range map[bool]int{false: 200, true: 503} {
		if got := n.ask("http://" + loopbacks[ipv6] + ":30999/").code; got != want {
			t.Errorf("%s: status %d, want %d", loopbacks[ipv6], got, want)
		}
	}
	s.Sync([]state.HealthCheck{check(web, false, 30999, 1)}, nil)
	if got := n.ask("http://[::1]:30999/").code; got != 0 {
		t.Errorf("IPv6 of a service of IPv4 alone: status %d, want nobody to listen", got)
	}
}

func TestH1_PortsFollowServices(t *testing.T) {
	bothFamilies(t, func(t *testing.T, ipv6 bool) {
		n, s, _, _ := servers(t)
		for _, step := range []struct {
			name   string
			checks []state.HealthCheck
			want   map[int]string // the service that answers at a port, "" for none
		}{
			{"one service", []state.HealthCheck{check(web, ipv6, 30999, 1)}, map[int]string{30999: "web", 30998: ""}},
			{"a second one", []state.HealthCheck{check(api, ipv6, 30998, 1), check(web, ipv6, 30999, 1)}, map[int]string{30999: "web", 30998: "api"}},
			{"they exchange ports", []state.HealthCheck{check(api, ipv6, 30999, 1), check(web, ipv6, 30998, 1)}, map[int]string{30999: "api", 30998: "web"}},
			{"the field goes away", []state.HealthCheck{check(api, ipv6, 30999, 1)}, map[int]string{30999: "api", 30998: ""}},
			{"no service", nil, map[int]string{30999: "", 30998: ""}},
		} {
			s.Sync(step.checks, nil)
			if c := s.Conditions(); len(c) > 0 {
				t.Errorf("%s: conditions = %v, want none", step.name, c)
			}
			for port, want := range step.want {
				got := n.ask(fmt.Sprintf("http://%s:%d/", loopbacks[ipv6], port))
				if want == "" && got.code != 0 || want != "" && !strings.Contains(got.body, fmt.Sprintf("%q", want)) {
					t.Errorf("%s: port %d answers %d %s, want service %q", step.name, port, got.code, got.body, want)
				}
			}
		}
	})
}

func TestH1_BindErrorIsReportedAndRetried(t *testing.T) {
	bothFamilies(t, func(t *testing.T, ipv6 bool) {
		n, s, _, told := servers(t)
		network := map[bool]string{false: "tcp4", true: "tcp6"}[ipv6]
		other := n.occupy(network, ":30999")
		checks := []state.HealthCheck{check(api, ipv6, 30998, 1), check(web, ipv6, 30999, 1)}
		s.Sync(checks, nil)
		s.Sync(checks, nil)
		c := s.Conditions()
		if len(c) != 1 || c[0].Subject != "health check of default/web" || !strings.Contains(c[0].Error, "in use") || c[0].Since.IsZero() {
			t.Errorf("conditions = %+v, want one of default/web with its error", c)
		}
		if len(*told) != 1 || !strings.HasPrefix((*told)[0],
			`default/web FailedToStartServiceHealthcheck: node node-a failed to start healthcheck "default/web" on port 30999: `) {
			t.Errorf("events = %q, want one, as kube-proxy writes it", *told)
		}
		if got := n.ask("http://" + loopbacks[ipv6] + ":30998/").code; got != 200 {
			t.Errorf("the other service: status %d, want 200", got)
		}
		if err := other.Close(); err != nil {
			t.Fatal(err)
		}
		s.Sync(checks, nil)
		if c := s.Conditions(); len(c) > 0 {
			t.Errorf("conditions with the port free = %v, want none", c)
		}
		if got := n.ask("http://" + loopbacks[ipv6] + ":30999/").code; got != 200 {
			t.Errorf("with the port free: status %d, want 200", got)
		}
	})
}

func TestH1_ListensOnNodePortAddresses(t *testing.T) {
	n, s, _, _ := servers(t)
	checks := []state.HealthCheck{check(web, false, 30999, 1), check(web, true, 30999, 1)}
	asked := func(want map[string]int) {
		t.Helper()
		for host, code := range want {
			if got := n.ask("http://" + host + ":30999/").code; got != code {
				t.Errorf("%s: status %d, want %d", host, got, code)
			}
		}
	}
	s.Sync(checks, []netip.Addr{netip.MustParseAddr("127.0.0.2"), netip.MustParseAddr("127.0.0.3")})
	asked(map[string]int{"127.0.0.1": 0, "127.0.0.2": 200, "127.0.0.3": 200, "[::1]": 0})
	s.Sync(checks, []netip.Addr{netip.MustParseAddr("::1"), netip.MustParseAddr("127.0.0.2")})
	asked(map[string]int{"127.0.0.1": 0, "127.0.0.2": 200, "127.0.0.3": 0, "[::1]": 200})
	// One of two that cannot be bound leaves none: half a health check is a wrong one.
	s.Sync(checks, []netip.Addr{netip.MustParseAddr("127.0.0.2"), netip.MustParseAddr("192.0.2.1")})
	asked(map[string]int{"127.0.0.2": 0})
	if c := s.Conditions(); len(c) != 1 {
		t.Errorf("conditions = %v, want one of the address that is not this node's", c)
	}
	s.Close()
	s.Sync(checks, nil)
	asked(map[string]int{"127.0.0.1": 0})
}
