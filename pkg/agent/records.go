// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/margay-cni/margay/pkg/endpoint"
)

// recordWatcher follows the directory of endpoint records.
type recordWatcher struct {
	store *endpoint.Store
	log   *slog.Logger
	// resync is how often the directory is listed whatever the kernel said about it.
	resync time.Duration
	// publish gets every new list, oldest record first. It must not change it.
	publish func([]*endpoint.Record)

	// newWatcher is fsnotify.NewWatcher.
	newWatcher func() (*fsnotify.Watcher, error)

	blind   bool                        // the kernel says nothing about the directory
	records map[string]*endpoint.Record // by file name
	broken  map[string]string           // by file name, what was logged
}

// run publishes the records that are there, then each change, until ctx ends.
func (w *recordWatcher) run(ctx context.Context) error {
	if err := os.MkdirAll(w.store.Dir(), 0o755); err != nil {
		return fmt.Errorf("make record directory: %w", err)
	}
	// Watch first, list then: what changes in between is an event.
	watch, events, lost := w.watch()
	defer func() {
		if watch != nil {
			_ = watch.Close()
		}
	}()
	w.records, w.broken = map[string]*endpoint.Record{}, map[string]string{}
	if err := w.list(); err != nil {
		return err
	}
	w.send()
	tick := time.NewTicker(w.interval(events))
	defer tick.Stop()
	for {
		changed := false
		select {
		case <-ctx.Done():
			return nil
		case e := <-events:
			changed = w.event(e)
		case err := <-lost:
			// The queue overflowed: the directory is the truth.
			w.log.Warn("events about endpoint records were lost; listing them", "err", err)
			changed = w.relist()
		case <-tick.C:
			if events == nil {
				watch, events, lost = w.watch()
				tick.Reset(w.interval(events))
			} else if err := errors.Join(os.MkdirAll(w.store.Dir(), 0o755), watch.Add(w.store.Dir())); err != nil {
				// Adding again is idempotent, and follows a directory that was removed and made anew.
				w.log.Error("endpoint records cannot be watched", "err", err)
			}
			changed = w.relist()
		}
		for drained := false; !drained; {
			select {
			case e := <-events:
				changed = w.event(e) || changed
			default:
				drained = true
			}
		}
		if changed {
			w.send()
		}
	}
}

// blindInterval is how often the records are listed while the kernel says nothing about them.
const blindInterval = time.Second

// watch watches the directory. Where it cannot, because the machine's inotify instances are all in use, the channels are nil and the
// directory is listed more often: other programs' watches must not keep pods' policies from being followed.
func (w *recordWatcher) watch() (watch *fsnotify.Watcher, events chan fsnotify.Event, lost chan error) {
	watch, err := w.newWatcher()
	if err == nil {
		if err = watch.Add(w.store.Dir()); err == nil {
			w.blind = false
			return watch, watch.Events, watch.Errors
		}
		_ = watch.Close()
	}
	if !w.blind {
		w.log.Error("endpoint records cannot be watched and are listed every second; if too many files are open, raise the sysctls "+
			"fs.inotify.max_user_instances and fs.inotify.max_user_watches", "err", err)
	}
	w.blind = true
	return nil, nil, nil
}

func (w *recordWatcher) interval(events chan fsnotify.Event) time.Duration {
	if events == nil {
		return min(blindInterval, w.resync)
	}
	return w.resync
}

// event reads the file that an event names and reports whether that changed a record.
func (w *recordWatcher) event(e fsnotify.Event) bool {
	name := filepath.Base(e.Name)
	if e.Has(fsnotify.Chmod) || !isRecord(name) {
		return false
	}
	return w.read(name)
}

func isRecord(name string) bool {
	return strings.HasSuffix(name, ".json") && !endpoint.IsTemporary(name)
}

// read takes one file in and reports whether that changed a record. A file that cannot be used hides the record that it held.
func (w *recordWatcher) read(name string) bool {
	r, err := endpoint.ReadFile(filepath.Join(w.store.Dir(), name))
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) && w.broken[name] != err.Error() {
			w.broken[name] = err.Error()
			w.log.Error("endpoint record is of no use", "err", err)
		}
		_, had := w.records[name]
		delete(w.records, name)
		return had
	}
	delete(w.broken, name)
	if old := w.records[name]; old != nil && reflect.DeepEqual(old, r) {
		return false
	}
	w.records[name] = r
	return true
}

// list reads the whole directory.
func (w *recordWatcher) list() error {
	_, err := w.readAll()
	return err
}

// relist reads the whole directory and reports whether a record changed. What cannot be listed stays as it was.
func (w *recordWatcher) relist() bool {
	changed, err := w.readAll()
	if err != nil {
		w.log.Error("endpoint records cannot be listed", "err", err)
	}
	return changed
}

func (w *recordWatcher) readAll() (changed bool, err error) {
	files, err := os.ReadDir(w.store.Dir())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("list endpoint records: %w", err)
	}
	there := make(map[string]bool, len(files))
	for _, f := range files {
		if isRecord(f.Name()) {
			there[f.Name()] = true
			changed = w.read(f.Name()) || changed
		}
	}
	for name := range w.records {
		if !there[name] {
			delete(w.records, name)
			changed = true
		}
	}
	return changed, nil
}

// send publishes the records, oldest first.
func (w *recordWatcher) send() {
	out := make([]*endpoint.Record, 0, len(w.records))
	for _, r := range w.records {
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b *endpoint.Record) int {
		return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.ContainerID, b.ContainerID), cmp.Compare(a.IfName, b.IfName))
	})
	w.publish(out)
}
