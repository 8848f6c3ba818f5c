// SPDX-License-Identifier: Apache-2.0

package health

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"
)

// retryBind is how soon an address that could not be bound is tried again; kube-proxy waits as long.
const retryBind = 5 * time.Second

// listenFunc is net.Listen, or a test's.
type listenFunc func(network, address string) (net.Listener, error)

// Server serves one handler on one address until its context ends, and comes back when the address is taken or lost.
type Server struct {
	subject string
	address string
	handler http.Handler
	log     *slog.Logger
	listen  listenFunc
	retry   time.Duration

	mu        sync.Mutex
	condition *Condition
}

// NewServer describes a server; Run makes it one. subject is what people know it by, address HOST:PORT with an empty or unspecified host
// for all addresses of both families.
func NewServer(subject, address string, handler http.Handler, log *slog.Logger) *Server {
	return &Server{subject: subject, address: address, handler: handler, log: log, listen: net.Listen, retry: retryBind}
}

// Run serves until ctx ends and then returns nil.
func (s *Server) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		l, err := s.listen("tcp", s.address)
		if err == nil {
			s.report(nil)
			err = serve(ctx, l, s.handler, s.log)
		}
		if ctx.Err() != nil {
			break
		}
		s.report(err)
		select {
		case <-ctx.Done():
		case <-time.After(s.retry):
		}
	}
	return nil
}

// serve answers on l, which it closes, until ctx ends, or until l fails, which is the error.
func serve(ctx context.Context, l net.Listener, h http.Handler, log *slog.Logger) error {
	server := newHTTPServer(h, log)
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	select {
	case err := <-done:
		return errors.Join(err, server.Close())
	case <-ctx.Done():
	}
	err := server.Close()
	<-done
	return err
}

// newHTTPServer bounds what a client can hold: these ports are open to whoever reaches the node.
func newHTTPServer(h http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
}

// report keeps the condition, and logs when it begins and ends.
func (s *Server) report(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case err == nil && s.condition != nil:
		s.log.Info("server answers", "server", s.subject, "address", s.address, "after", time.Since(s.condition.Since))
		s.condition = nil
	case err == nil:
	case s.condition == nil:
		s.condition = &Condition{Subject: s.subject, Error: err.Error(), Since: time.Now()}
		s.log.Error("server does not answer; trying again", "server", s.subject, "address", s.address, "err", err)
	default:
		s.condition.Error = err.Error()
	}
}

// Conditions returns what keeps the server from answering: nothing, or one thing.
func (s *Server) Conditions() []Condition {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.condition == nil {
		return nil
	}
	return []Condition{*s.condition}
}
