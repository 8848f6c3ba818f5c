// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// SocketFile is the local API's socket in the run directory.
const SocketFile = "agent.sock"

// ErrRunning is wrapped by Run's error when another agent owns the run directory.
var ErrRunning = errors.New("another agent is running on this run directory")

// lockRun takes the run directory for this agent. The kernel gives the lock back when the process ends, however it ends.
func lockRun(run string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(run, "agent.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrRunning
		}
		return nil, errors.Join(fmt.Errorf("lock %s: %w", f.Name(), err), f.Close())
	}
	return f, nil
}

// listen makes the socket anew. The lock says that a socket that is there belongs to nobody.
func listen(run string) (net.Listener, error) {
	path := filepath.Join(run, SocketFile)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove stale socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen for the local API: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("restrict the local API: %w", err), l.Close())
	}
	return l, nil
}

// serve answers on l until ctx ends: GET /healthz is 200 once the source's first snapshot is in the maps and 503 before, GET /status the
// JSON form of Status.
func serve(ctx context.Context, l net.Listener, status func() Status) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if !status().Ready {
			http.Error(w, "waiting for the source", http.StatusServiceUnavailable)
			return
		}
		_, _ = fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		_ = e.Encode(status()) // the client went away: nobody is left to tell
	})
	s := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	select {
	case err := <-done:
		return fmt.Errorf("serve the local API: %w", err)
	case <-ctx.Done():
	}
	err := s.Close()
	<-done
	return err
}
