// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestWatchFollowsALinkedDirectory turns the link that leads to the directory: what is watched must turn with it.
func TestWatchFollowsALinkedDirectory(t *testing.T) {
	base := t.TempDir()
	link := filepath.Join(base, "manifests")
	turn := func(to string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Join(base, to), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(to, link+".tmp"); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(link+".tmp", link); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	turn("first")
	w := newWatch(link, defaultTiming)
	defer w.close()
	for _, dir := range []string{"first", "second", "first"} {
		turn(dir)
		if p := w.renew(); p != nil {
			t.Fatalf("renew() = %v, want no problem", p)
		}
		if err := os.WriteFile(filepath.Join(base, dir, "a.yaml"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if _, ended := w.wait(ctx, time.Hour); ended {
			t.Fatalf("a file written to %s went unseen", dir)
		}
	}
}

func TestWaitEndsWithItsContext(t *testing.T) {
	w := newWatch(t.TempDir(), defaultTiming)
	defer w.close()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, ended := w.wait(ctx, time.Hour); !ended {
		t.Error("wait() did not notice that its context ended")
	}
}

// TestWaitEndsUnderEndlessChange writes faster than changes settle.
func TestWaitEndsUnderEndlessChange(t *testing.T) {
	dir := t.TempDir()
	limits := defaultTiming
	limits.settle, limits.limit = time.Hour, 50*time.Millisecond
	w := newWatch(dir, limits)
	defer w.close()
	if p := w.renew(); p != nil {
		t.Fatal(p)
	}
	if err := os.WriteFile(filepath.Join(dir, "a.yaml"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	if _, ended := w.wait(ctx, time.Hour); ended {
		t.Error("wait() did not end at its limit")
	}
}

// TestUnwatchedDirectoryIsPolled takes the watcher away, as on a machine whose inotify instances are used up.
func TestUnwatchedDirectoryIsPolled(t *testing.T) {
	w := &watch{dir: t.TempDir(), timing: defaultTiming, err: os.ErrPermission}
	if p := w.renew(); p == nil || p.Severity != Warning {
		t.Errorf("renew() = %v, want a warning", p)
	}
	if told, ended := w.wait(context.Background(), time.Millisecond); told || ended {
		t.Errorf("wait() = %v, %v; want a look after the given time, without an event", told, ended)
	}
}
