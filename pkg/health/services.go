// SPDX-License-Identifier: Apache-2.0

package health

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/margay-cni/margay/pkg/state"
)

// ReasonBindFailed is the reason of the event about a health check that cannot be served, as kube-proxy names it.
const ReasonBindFailed = "FailedToStartServiceHealthcheck"

// Recorder passes a warning about a service on to its users, as an event of the cluster. It must not block.
type Recorder interface {
	Warn(service state.Key, reason, message string)
}

// Services are the servers of healthCheckNodePort: one for each service and family that has one (row H1).
type Services struct {
	node    string
	healthy func() bool
	events  Recorder
	log     *slog.Logger
	listen  listenFunc
	now     func() time.Time

	mu      sync.Mutex
	closed  bool
	servers map[checkKey]*checkServer
}

type checkKey struct {
	service state.Key
	ipv6    bool
}

// checkServer serves one check, or tries to. Fields are guarded by Services.mu.
type checkServer struct {
	check     state.HealthCheck
	addrs     []netip.Addr
	listeners []net.Listener
	servers   []*http.Server
	running   sync.WaitGroup
	condition *Condition
}

// NewServices returns servers for no service. node names this node in events, healthy is asked with each answer, and events may be nil.
func NewServices(node string, healthy func() bool, events Recorder, log *slog.Logger) *Services {
	return &Services{
		node: node, healthy: healthy, events: events, log: log, listen: net.Listen, now: time.Now, servers: map[checkKey]*checkServer{},
	}
}

// Sync makes the servers those of checks, on these addresses, each family on its own; nil: on all addresses of the node. What is served
// already goes on undisturbed, and what could not be bound is tried again, so it is to be called from time to time.
func (s *Services) Sync(checks []state.HealthCheck, addrs []netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	want := make(map[checkKey]state.HealthCheck, len(checks))
	for _, c := range checks {
		want[checkKey{c.Service, c.IPv6}] = c
	}
	// Closing comes first: a port may have moved from one service to another.
	for key, server := range s.servers {
		c, ok := want[key]
		if !ok || c.Port != server.check.Port || !slices.Equal(server.addrs, listenAddrs(c.IPv6, addrs)) {
			s.log.Info("health check ends", "service", key.service, "port", server.check.Port)
			server.close()
			delete(s.servers, key)
		}
	}
	for _, c := range checks {
		key := checkKey{c.Service, c.IPv6}
		server := s.servers[key]
		if server == nil {
			server = &checkServer{check: c, addrs: listenAddrs(c.IPv6, addrs)}
			s.servers[key] = server
		}
		server.check = c
		if len(server.listeners) < len(server.addrs) {
			s.report(server, s.open(server, key))
		}
	}
}

// listenAddrs are the addresses of one family: given ones, or the one that means all.
func listenAddrs(ipv6 bool, addrs []netip.Addr) []netip.Addr {
	if addrs == nil && ipv6 {
		return []netip.Addr{netip.IPv6Unspecified()}
	}
	if addrs == nil {
		return []netip.Addr{netip.IPv4Unspecified()}
	}
	var out []netip.Addr
	for _, a := range addrs {
		if a = a.Unmap(); a.Is6() == ipv6 {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// open binds all addresses of a server, or none.
func (s *Services) open(server *checkServer, key checkKey) error {
	// "tcp6" keeps [::] from taking IPv4 along, which is another server's.
	network := map[bool]string{false: "tcp4", true: "tcp6"}[key.ipv6]
	var listeners []net.Listener
	for _, a := range server.addrs {
		l, err := s.listen(network, netip.AddrPortFrom(a, server.check.Port).String())
		if err != nil {
			for _, l := range listeners {
				err = errors.Join(err, l.Close())
			}
			return err
		}
		listeners = append(listeners, l)
	}
	server.listeners = listeners
	for _, l := range listeners {
		h := newHTTPServer(s.handler(key), s.log)
		server.servers = append(server.servers, h)
		server.running.Go(func() {
			if err := h.Serve(l); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
				s.log.Error("health check does not answer any more", "service", key.service, "address", l.Addr(), "err", err)
			}
		})
	}
	return nil
}

// report keeps the condition of a server; it is logged, and told the service's users, when it begins.
func (s *Services) report(server *checkServer, err error) {
	c := server.check
	switch {
	case err == nil:
		s.log.Info("health check answers", "service", c.Service, "port", c.Port, "ipv6", c.IPv6)
		server.condition = nil
	case server.condition != nil:
		server.condition.Error = err.Error()
	default:
		server.condition = &Condition{Subject: "health check of " + c.Service.String(), Error: err.Error(), Since: s.now()}
		s.log.Error("health check cannot be served; trying again", "service", c.Service, "port", c.Port, "err", err)
		if s.events != nil {
			s.events.Warn(c.Service, ReasonBindFailed,
				fmt.Sprintf("node %s failed to start healthcheck %q on port %d: %v", s.node, c.Service.String(), c.Port, err))
		}
	}
}

// Conditions returns what cannot be served, sorted.
func (s *Services) Conditions() []Condition {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []Condition
	for _, server := range s.servers {
		if server.condition != nil {
			out = append(out, *server.condition)
		}
	}
	slices.SortFunc(out, func(a, b Condition) int {
		return cmp.Or(strings.Compare(a.Subject, b.Subject), strings.Compare(a.Error, b.Error))
	})
	return out
}

// Close ends every server and waits for it. After it Sync does nothing.
func (s *Services) Close() {
	s.mu.Lock()
	s.closed = true
	servers := slices.Collect(maps.Values(s.servers))
	clear(s.servers)
	s.mu.Unlock()
	for _, server := range servers {
		server.close()
	}
	for _, server := range servers {
		server.running.Wait()
	}
}

// close ends the server's connections with it: a load balancer must not keep one open and go on believing.
func (c *checkServer) close() {
	for i, h := range c.servers {
		// A server that has not begun to serve does not know its listener yet. Both are closed whatever they say.
		_ = h.Close()
		_ = c.listeners[i].Close()
	}
}

// answerBody is what kube-proxy answers, to the byte: load balancers' controllers compare it.
const answerBody = `{
	"service": {
		"namespace": %q,
		"name": %q
	},
	"localEndpoints": %d,
	"serviceProxyHealthy": %v
}`

// handler answers every path: load balancers ask what they were configured to.
func (s *Services) handler(key checkKey) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		s.mu.Lock()
		server := s.servers[key]
		count := 0
		if server != nil {
			count = server.check.LocalEndpoints
		}
		s.mu.Unlock()
		healthy := s.healthy()
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Header().Set("X-Load-Balancing-Endpoint-Weight", strconv.Itoa(count))
		code := http.StatusServiceUnavailable
		if count > 0 && healthy {
			code = http.StatusOK
		}
		w.WriteHeader(code)
		_, _ = fmt.Fprintf(w, answerBody, key.service.Namespace, key.service.Name, count, healthy)
	})
}
