// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/endpoint"
)

// receive waits for the next value, bounded.
func receive[T any](t *testing.T, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(10 * time.Second):
		t.Fatalf("no %s after 10 s", what)
		panic("unreachable")
	}
}

func TestRecordWatcher(t *testing.T) {
	run := runDir(t)
	store := endpoint.NewStore(run)
	published := make(chan []*endpoint.Record, 100)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	w := &recordWatcher{store: store, log: slog.New(slog.DiscardHandler), resync: time.Hour, newWatcher: fsnotify.NewWatcher, publish: func(r []*endpoint.Record) { published <- r }}
	if err := store.Save(&endpoint.Record{ContainerID: "b", IfName: "eth0", Created: testEpoch.Add(time.Second)}); err != nil {
		t.Fatal(err)
	}
	go func() { done <- w.run(ctx) }()
	names := func() (out []string) {
		for _, r := range receive(t, published, "records") {
			out = append(out, r.ContainerID)
		}
		return out
	}
	if diff := cmp.Diff([]string{"b"}, names()); diff != "" {
		t.Fatalf("records at the start (-want +got):\n%s", diff)
	}
	if err := store.Save(&endpoint.Record{ContainerID: "a", IfName: "eth0", Created: testEpoch}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"a", "b"}, names()); diff != "" {
		t.Fatalf("records, oldest first (-want +got):\n%s", diff)
	}
	// Neither half of a record nor what is no record hides anything.
	for _, name := range []string{"c-eth0.json", ".d-eth0.json.tmp", "e.txt"} {
		if err := os.WriteFile(filepath.Join(store.Dir(), name), []byte(`{"conta`), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := store.Delete("b", "eth0"); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"a"}, names()); diff != "" {
		t.Fatalf("records after one is gone (-want +got):\n%s", diff)
	}
	cancel()
	if err := receive(t, done, "end of the watcher"); err != nil {
		t.Errorf("run() = %v, want nil after the context ends", err)
	}
}

// Other programs may have taken all of the machine's inotify instances: records are followed all the same, and watched again when one is free.
func TestRecordWatcherWithoutInotify(t *testing.T) {
	store := endpoint.NewStore(runDir(t))
	published := make(chan []*endpoint.Record, 100)
	var full atomic.Bool
	full.Store(true)
	watching := make(chan struct{}, 1)
	newWatcher := func() (*fsnotify.Watcher, error) {
		if full.Load() {
			return nil, unix.EMFILE
		}
		watching <- struct{}{}
		return fsnotify.NewWatcher()
	}
	w := &recordWatcher{store: store, log: slog.New(slog.DiscardHandler), resync: time.Hour, newWatcher: newWatcher, publish: func(r []*endpoint.Record) { published <- r }}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.run(ctx) }()
	receive(t, published, "records at the start")
	for i, name := range []string{"a", "b", "c"} {
		if err := store.Save(&endpoint.Record{ContainerID: name, IfName: "eth0", Created: testEpoch}); err != nil {
			t.Fatal(err)
		}
		if got := receive(t, published, "records"); len(got) != i+1 {
			t.Fatalf("records after %s = %d, want %d", name, len(got), i+1)
		}
		if i == 1 { // the third is seen by the kernel's word: nothing is listed within the next hour
			full.Store(false)
			receive(t, watching, "further try to watch")
		}
	}
	cancel()
	if err := receive(t, done, "end of the watcher"); err != nil {
		t.Errorf("run() = %v, want nil after the context ends", err)
	}
}

func TestLockIsExclusive(t *testing.T) {
	run := runDir(t)
	first, err := lockRun(run)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lockRun(run); err == nil {
		t.Errorf("second lock succeeded, want an error")
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := lockRun(run)
	if err != nil {
		t.Fatalf("lock after the first was given back: %v", err)
	}
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestLocalAPI(t *testing.T) {
	run, err := os.MkdirTemp("", "agent") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(run) })
	if err := os.WriteFile(filepath.Join(run, SocketFile), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := listen(run)
	if err != nil {
		t.Fatalf("listen() over a stale socket: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	status := make(chan Status, 1)
	go func() { done <- serve(ctx, l, func() Status { return <-status }) }()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(run, SocketFile))
	}}}
	for _, tt := range []struct {
		path string
		s    Status
		want int
	}{
		{"/healthz", Status{}, http.StatusServiceUnavailable},
		{"/healthz", Status{Ready: true}, http.StatusOK},
		{"/status", Status{}, http.StatusOK},
	} {
		status <- tt.s
		r, err := client.Get("http://agent" + tt.path)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Body.Close(); err != nil {
			t.Error(err)
		}
		if r.StatusCode != tt.want {
			t.Errorf("GET %s, ready %v = %d, want %d", tt.path, tt.s.Ready, r.StatusCode, tt.want)
		}
	}
	cancel()
	if err := receive(t, done, "end of the server"); err != nil {
		t.Errorf("serve() = %v, want nil after the context ends", err)
	}
}
