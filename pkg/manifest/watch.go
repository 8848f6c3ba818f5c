// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

// watch says when to look at the directory again. It only ever makes looks come sooner: every look reads everything, so a lost event costs
// time and nothing else.
type watch struct {
	dir     string
	timing  timing
	watcher *fsnotify.Watcher
	err     error // of making the watcher
	watched os.FileInfo
}

func newWatch(dir string, t timing) *watch {
	w := &watch{dir: filepath.Clean(dir), timing: t}
	w.watcher, w.err = fsnotify.NewWatcher()
	return w
}

func (w *watch) close() {
	if w.watcher != nil {
		_ = w.watcher.Close()
	}
}

// renew watches the directory that the path leads to now: it may have been replaced, or a link to it turned. It is called before each look,
// so that no change after the look goes unseen. A directory that is missing is for the look to report.
func (w *watch) renew() *Problem {
	err := w.err
	if err == nil {
		err = w.follow()
	}
	if err == nil || os.IsNotExist(err) {
		return nil
	}
	return &Problem{
		File:     w.dir,
		Message:  fmt.Sprintf("cannot be watched, so it is read every %v: %v", w.timing.retry, err),
		Severity: Warning,
	}
}

func (w *watch) follow() error {
	info, err := os.Stat(w.dir)
	if err != nil {
		return err
	}
	if w.watched != nil && os.SameFile(w.watched, info) {
		return nil
	}
	if w.watched != nil {
		_ = w.watcher.Remove(w.dir) // Of a directory that is gone: it may have ended by itself.
		w.watched = nil
	}
	if err := w.watcher.Add(w.dir); err != nil {
		return err
	}
	w.watched = info
	return nil
}

// wait returns when it is time for a look: after a change has settled, or when d has passed. told says that the kernel has told of the changes
// there are; ended that ctx ends.
func (w *watch) wait(ctx context.Context, d time.Duration) (told, ended bool) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	var events chan fsnotify.Event
	var errs chan error
	if w.watcher != nil {
		events, errs = w.watcher.Events, w.watcher.Errors
	}
	lost := false
	var last time.Time // by which a look is due however much goes on
	for {
		select {
		case <-ctx.Done():
			return false, true
		case <-timer.C:
			return told, false
		case <-errs: // Events were lost.
			told, lost = false, true
			timer.Reset(w.timing.settle)
		case e := <-events:
			if !w.matters(e) {
				continue
			}
			told = !lost
			now := time.Now()
			if last.IsZero() {
				last = now.Add(w.timing.limit)
			}
			timer.Reset(min(w.timing.settle, last.Sub(now)))
		}
	}
}

// matters leaves out what cannot change any manifest. A link like ..data of a mounted ConfigMap can, although it is none itself.
func (w *watch) matters(e fsnotify.Event) bool {
	if filepath.Clean(e.Name) == w.dir {
		if e.Has(fsnotify.Remove) || e.Has(fsnotify.Rename) {
			w.watched = nil // Another directory may get the same inode.
		}
		return true
	}
	return e.Op != fsnotify.Chmod || isManifest(filepath.Base(e.Name))
}
