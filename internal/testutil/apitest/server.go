// SPDX-License-Identifier: Apache-2.0

// Package apitest is an API server for tests: it speaks the wire formats of the real one over TLS and HTTP/2, keeps objects in memory, and
// fails on demand. It knows list, watch (with initial events, bookmarks, selectors and expired versions) and the creation of events;
// nothing else of the API, and no validation.
package apitest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// Token is the bearer token that the server accepts.
const Token = "apitest-token"

// T is what the server needs of a testing.TB. The benchmarks, which are no test, have one of their own.
type T interface {
	Helper()
	// Fatal and Fatalf do not return.
	Fatal(args ...any)
	Fatalf(format string, args ...any)
	Errorf(format string, args ...any)
	Cleanup(f func())
	TempDir() string
}

// Server is an API server that lives until the test ends.
type Server struct {
	t     T
	ca    []byte // PEM
	cert  tls.Certificate
	addr  string
	token string

	*cluster

	mu     sync.Mutex
	server *http.Server
	// requests are those that came, newest last.
	requests []Request
	// faults by resource name, "" for all.
	faults map[string]Fault
	// noInitialEvents has the server refuse to stream lists, as old ones do.
	noInitialEvents bool
	conns           map[net.Conn]struct{}
}

// cluster is what the API servers of one cluster share.
type cluster struct {
	lock    sync.Mutex
	version uint64
	stores  map[string]*store
}

// Request is what a client asked.
type Request struct {
	Verb, Resource, Labels, Fields, Accept, Protocol, ServerName string
	ResourceVersion                                              string
}

// Fault is how a resource fails.
type Fault struct {
	// Code is the HTTP status of every answer; 0: none.
	Code int
	// Stall holds answers back until it is closed.
	Stall chan struct{}
}

// New starts a server on a free port of 127.0.0.1. Its certificate is valid for kubernetes.default.svc and for nothing else.
func New(t T) *Server {
	t.Helper()
	s := &Server{
		t: t, token: Token, cluster: &cluster{version: 100, stores: map[string]*store{}}, faults: map[string]Fault{}, conns: map[net.Conn]struct{}{},
	}
	s.makeCertificate()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = l.Addr().String()
	s.serve(l)
	t.Cleanup(s.Stop)
	return s
}

// Addr is where it listens, HOST:PORT.
func (s *Server) Addr() string {
	return s.addr
}

// Another starts a second server with the same objects and the same authority: two API servers of one cluster.
func (s *Server) Another() *Server {
	s.t.Helper()
	other := &Server{
		t: s.t, token: s.token, cluster: s.cluster, faults: map[string]Fault{}, conns: map[net.Conn]struct{}{}, ca: s.ca, cert: s.cert,
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		s.t.Fatal(err)
	}
	other.addr = l.Addr().String()
	other.serve(l)
	s.t.Cleanup(other.Stop)
	return other
}

func (s *Server) serve(l net.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := &http.Server{
		Handler:   http.HandlerFunc(s.handle),
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{s.cert}, NextProtos: []string{"h2", "http/1.1"}},
		ErrorLog:  log.New(io.Discard, "", 0),
	}
	s.server = h
	go func() { _ = h.ServeTLS(s.track(l), "", "") }() // it ends with Stop
}

// Stop ends the server and every connection.
func (s *Server) Stop() {
	s.mu.Lock()
	h := s.server
	s.server = nil
	s.mu.Unlock()
	if h != nil {
		_ = h.Close()
	}
	s.Drop()
}

// Start serves again, on the same port.
func (s *Server) Start() {
	s.t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		l, err := net.Listen("tcp", s.addr)
		if err == nil {
			s.serve(l)
			return
		}
		if time.Now().After(end) {
			s.t.Fatal(err)
		}
	}
}

// Drop closes every connection; clients may come again.
func (s *Server) Drop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		_ = c.Close()
	}
	clear(s.conns)
}

// Fail has a resource fail, "" all of them; the zero Fault ends that.
func (s *Server) Fail(resource string, f Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults[resource] = f
}

// RefuseInitialEvents has the server know no streamed lists.
func (s *Server) RefuseInitialEvents() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.noInitialEvents = true
}

// Requests are those for a resource, oldest first.
func (s *Server) Requests(resource string) (out []Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.requests {
		if r.Resource == resource {
			out = append(out, r)
		}
	}
	return out
}

// ServiceAccount writes the files that a pod finds, and returns their directory.
func (s *Server) ServiceAccount() string {
	s.t.Helper()
	dir := s.t.TempDir()
	for name, data := range map[string][]byte{"token": []byte(s.token), "ca.crt": s.ca} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			s.t.Fatal(err)
		}
	}
	return dir
}

// Kubeconfig writes a kubeconfig for the server and returns its path.
func (s *Server) Kubeconfig() string {
	s.t.Helper()
	dir := s.ServiceAccount()
	path := filepath.Join(dir, "kubeconfig")
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: c
contexts: [{name: c, context: {cluster: c, user: u}}]
clusters: [{name: c, cluster: {server: "https://%s", certificate-authority: %s, tls-server-name: kubernetes.default.svc}}]
users: [{name: u, user: {tokenFile: %s}}]
`, s.addr, filepath.Join(dir, "ca.crt"), filepath.Join(dir, "token"))
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	return path
}

// track notes connections, so that they can be dropped.
func (s *Server) track(l net.Listener) net.Listener {
	return &tracking{l, s}
}

type tracking struct {
	net.Listener
	server *Server
}

func (l *tracking) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.server.mu.Lock()
		l.server.conns[c] = struct{}{}
		l.server.mu.Unlock()
	}
	return c, err
}

func (s *Server) makeCertificate() {
	s.t.Helper()
	fatal := func(err error) {
		if err != nil {
			s.t.Fatal(err)
		}
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	fatal(err)
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "apitest"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	fatal(err)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	fatal(err)
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "kube-apiserver"}, NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		DNSNames: []string{"kubernetes.default.svc"}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, ca, &key.PublicKey, caKey)
	fatal(err)
	s.ca = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER})
	s.cert = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// SetToken replaces the token that the server accepts.
func (s *Server) SetToken(token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.token = token
}
