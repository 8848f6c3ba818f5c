// SPDX-License-Identifier: Apache-2.0

//go:build cluster

package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	// loadTime is how long an exchange of a load may take. It says when something is lost, not what is slow: the machine has much to do.
	loadTime = 20 * time.Second
	// loadPause is between the exchanges of one stream.
	loadPause = 150 * time.Millisecond
)

// stream is one sort of traffic between two places, repeated until its load ends.
type stream struct {
	name  string
	open  func() (exchange, error)
	rests bool // says nothing between its first exchange and its last one

	mu     sync.Mutex
	took   durations
	faults []string
}

// exchange sends one question and waits for its answer; with end it closes what is open and sends nothing.
type exchange func(end bool) error

// load is traffic that goes on while something happens. Every TCP connection and every datagram of it has to be answered: datagrams are not
// sent again, so they show what TCP would hide.
type load struct {
	streams []*stream
	stop    chan struct{}
	done    sync.WaitGroup
}

// route is where a load's traffic goes from and to.
type route struct {
	name string
	from place
	at   func(network string) netip.AddrPort
}

// startLoad starts all sorts of traffic on each route, and returns when each stream has had its first answers. stop must be called.
func startLoad(t *testing.T, routes ...route) *load {
	t.Helper()
	l := &load{stop: make(chan struct{})}
	for _, r := range routes {
		tcp, udp := r.at("tcp"), r.at("udp")
		l.add(r.name+", kept connection", false, func() (exchange, error) { return keepTCP(r.from, tcp) })
		l.add(r.name+", silent connection", true, func() (exchange, error) { return keepTCP(r.from, tcp) })
		l.add(r.name+", kept datagrams", false, func() (exchange, error) { return keepUDP(r.from, udp) })
		l.add(r.name+", new connections", false, func() (exchange, error) {
			return afresh(func() error { _, err := r.from.ask("tcp", tcp, "hostname", loadTime); return err })
		})
		l.add(r.name+", new datagrams", false, func() (exchange, error) {
			return afresh(func() error { _, err := r.from.ask("udp", udp, "hostname", loadTime); return err })
		})
	}
	for _, s := range l.streams {
		l.done.Go(func() { s.run(l.stop) })
	}
	t.Cleanup(l.end) // for a test that fails before it has stopped it
	l.passes(t, "before anything happens")
	return l
}

func (l *load) add(name string, rests bool, open func() (exchange, error)) {
	l.streams = append(l.streams, &stream{name: name, rests: rests, open: open})
}

// loadRoutes are a pod's ways to the pods of a service on both nodes, and the client's by each node's NodePort: in every family.
func loadRoutes(from pod, pods []pod, svc service) []route {
	var all []route
	for _, f := range families() {
		for _, to := range pods {
			all = append(all, route{fmt.Sprintf("%s pod to pod, node%d to node%d", f.name, from.node, to.node), from.place,
				func(network string) netip.AddrPort { return f.at(to.place, portOf(network)) }})
		}
		all = append(all, route{f.name + " ClusterIP", from.place, func(string) netip.AddrPort { return f.at(svc.place, 80) }})
		for i := range cluster.Nodes() {
			all = append(all, route{fmt.Sprintf("%s NodePort of node%d", f.name, i+1), clientPlace(),
				func(network string) netip.AddrPort { return f.at(nodePlace(i+1), svc.nodePort(network)) }})
		}
	}
	return all
}

// run repeats the stream's exchange until the load stops, and then once more.
func (s *stream) run(stop <-chan struct{}) {
	ask, err := s.open()
	if err != nil {
		s.note(0, err)
		return
	}
	defer func() { _ = ask(true) }()
	for last := false; ; {
		start := time.Now()
		err := ask(false)
		s.note(time.Since(start), err)
		if last || err != nil && s.broken() {
			return
		}
		pause := time.After(loadPause)
		if s.rests {
			pause = nil
		}
		select {
		case <-stop:
			last = true
		case <-pause:
		}
	}
}

// note records how an exchange went.
func (s *stream) note(took time.Duration, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.faults = append(s.faults, fmt.Sprintf("%s after %v: %v", time.Now().Format("15:04:05.000"), took.Round(time.Millisecond), err))
		return
	}
	s.took = append(s.took, took)
}

// broken reports whether it is no use to go on: every further exchange would fail the same way.
func (s *stream) broken() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.faults) >= 10 || strings.HasSuffix(s.name, "kept connection")
}

func (s *stream) counts() (answers, faults int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.took), len(s.faults)
}

// passes waits until each stream that does not rest has had three answers more.
func (l *load) passes(t *testing.T, when string) {
	t.Helper()
	before := make([]int, len(l.streams))
	for i, s := range l.streams {
		before[i], _ = s.counts()
	}
	eventually(t, "traffic passes "+when, 2*time.Minute, func() error {
		for i, s := range l.streams {
			n, faults := s.counts()
			if faults == 0 && n < before[i]+3 && !(s.rests && n > 0) {
				return fmt.Errorf("%s: %d answers, and it had %d", s.name, n, before[i])
			}
		}
		return nil
	})
}

// end stops all traffic, the silent connections after a last word. It may be repeated.
func (l *load) end() {
	select {
	case <-l.stop:
	default:
		close(l.stop)
	}
	l.done.Wait()
}

// finish waits until traffic has gone on after what happened, ends it, and requires that nothing of it was lost.
func (l *load) finish(t *testing.T, what string) {
	t.Helper()
	l.passes(t, "after "+what)
	l.end()
	sorts := map[string]durations{}
	lost := 0
	for _, s := range l.streams {
		sort := s.name[strings.LastIndex(s.name, ", ")+2:]
		sorts[sort] = append(sorts[sort], s.took...)
		if len(s.faults) > 0 {
			lost++
			t.Errorf("%s: %s: %d of %d exchanges failed:\n  %s", what, s.name, len(s.faults), len(s.faults)+len(s.took),
				strings.Join(s.faults[:min(5, len(s.faults))], "\n  "))
		}
	}
	for sort, took := range sorts {
		t.Logf("%s: %s: %v", what, sort, took)
	}
	if lost == 0 {
		t.Logf("%s: nothing of %d streams was lost", what, len(l.streams))
	}
}

// afresh is an exchange that keeps nothing.
func afresh(ask func() error) (exchange, error) {
	return func(end bool) error {
		if end {
			return nil
		}
		return ask()
	}, nil
}

// keepTCP opens a connection on which every exchange is one HTTP request.
func keepTCP(from place, at netip.AddrPort) (exchange, error) {
	ctx, cancel := context.WithTimeout(context.Background(), loadTime)
	defer cancel()
	c, err := from.dial(ctx, "tcp", at.String())
	if err != nil {
		return nil, err
	}
	r := bufio.NewReader(c)
	return func(end bool) error {
		if end {
			return c.Close()
		}
		if err := c.SetDeadline(time.Now().Add(loadTime)); err != nil {
			return err
		}
		if _, err := io.WriteString(c, "GET /hostname HTTP/1.1\r\nHost: e2e\r\n\r\n"); err != nil {
			return err
		}
		response, err := http.ReadResponse(r, nil)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		_, err = io.Copy(io.Discard, response.Body)
		return err
	}, nil
}

// keepUDP opens a socket on which every exchange is one datagram that must come back. It is not sent again.
func keepUDP(from place, at netip.AddrPort) (exchange, error) {
	ctx, cancel := context.WithTimeout(context.Background(), loadTime)
	defer cancel()
	c, err := from.dial(ctx, "udp", at.String())
	if err != nil {
		return nil, err
	}
	n, buf := 0, make([]byte, 2048)
	return func(end bool) error {
		if end {
			return c.Close()
		}
		n++
		want := strconv.Itoa(n)
		if err := c.SetDeadline(time.Now().Add(loadTime)); err != nil {
			return err
		}
		if _, err := io.WriteString(c, "echo "+want); err != nil {
			return err
		}
		for {
			got, err := c.Read(buf)
			if err != nil {
				return fmt.Errorf("datagram %d: %w", n, err)
			}
			if string(buf[:got]) == want { // not the late answer to an earlier one
				return nil
			}
		}
	}, nil
}
