// SPDX-License-Identifier: Apache-2.0

// Package manifest is a source of snapshots: a watched directory of ordinary Kubernetes YAML or JSON, for machines without a cluster. It
// owns reading, checking and watching the files, and naming what is wrong with them by file and line. It does what the API
// server would do to the objects (defaults, validation) and nothing of what controllers would do with them.
//
// Files are *.yaml, *.yml and *.json in the directory itself; names that begin with a dot are left alone. A file is one unit: while
// anything in it is wrong, or it is still being written, or it is empty, what it last said stays in force as a whole. Removing the file
// withdraws it. Between files, what comes first in the order of file names counts: a second object of the same name is left out, a NodePort
// that is taken is not served; both are reported. Unknown fields and unknown kinds are reported as warnings and ignored.
//
// A writer that renames a finished file into place is never seen half done. One that writes in place is waited for as long as it has the
// file open, where the kernel tells.
package manifest

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/margay-cni/margay/pkg/state"
)

// timing is how long the source waits for what.
type timing struct {
	settle   time.Duration // quiet time after a change
	limit    time.Duration // longest wait for quiet
	grace    time.Duration // a file that vanished may be back by then: many editors remove and write anew
	patience time.Duration // how long a file that is open for writing may stay the same before it is read
	resync   time.Duration // full look without an event: changes behind a link outside the directory make none
	retry    time.Duration // look at a directory that is missing or cannot be watched
}

var defaultTiming = timing{
	settle:   50 * time.Millisecond,
	limit:    500 * time.Millisecond,
	grace:    200 * time.Millisecond,
	patience: 3 * time.Second,
	resync:   10 * time.Second,
	retry:    time.Second,
}

// Source reads one directory.
type Source struct {
	dir, node string
	log       *slog.Logger
	timing    timing

	// The goroutine of Run owns these.
	files      map[string]*file
	readOnce   bool
	dirProblem *Problem

	mu         sync.Mutex
	problems   []Problem
	incomplete []string
}

// New returns a source that reads dir; node is this node's name, and decides which pods are local.
func New(dir, node string, log *slog.Logger) *Source {
	return &Source{dir: dir, node: node, log: log, timing: defaultTiming, files: map[string]*file{}}
}

// Problems lists what is wrong now, sorted by file and line. It may be called at any time, by any goroutine.
func (s *Source) Problems() []Problem {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.problems)
}

// Incomplete lists the files that have had no good content since the start. What they held before the start may still be in the maps
// and rightly so: whoever writes maps should hold deletions back while there are any. Sorted; safe as Problems is.
func (s *Source) Incomplete() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.incomplete)
}

// Run publishes a snapshot once every file has been read, and a new one after each settled change, until ctx ends; then it returns nil.
// Calls of publish do not overlap; while one lasts, changes add up. A directory that does not exist is a problem, not an error:
// nothing is published until it has been read once. Snapshots are never written to after they were published.
func (s *Source) Run(ctx context.Context, publish func(*state.Snapshot)) error {
	w := newWatch(s.dir, s.timing)
	defer w.close()
	published, quick := false, false
	var whole time.Time // the last look at everything
	for {
		if quick = quick && time.Since(whole) < s.timing.resync; !quick {
			whole = time.Now()
		}
		watchProblem := w.renew()
		changed, again := s.scan(quick)
		snapshot, problems := s.assemble()
		for _, p := range []*Problem{watchProblem, s.dirProblem} {
			if p != nil {
				problems = append(problems, *p)
				again = min(again, s.timing.retry)
			}
		}
		s.setProblems(problems)
		if s.readOnce && (changed || !published) {
			published = true
			publish(snapshot)
		}
		var ended bool
		if quick, ended = w.wait(ctx, again); ended {
			return nil
		}
	}
}

// scan looks at every file, with quick only at those that seem to be others. It returns whether good content changed and how long the next
// look may wait.
func (s *Source) scan(quick bool) (changed bool, again time.Duration) {
	again = s.timing.resync
	names, err := list(s.dir)
	if err != nil {
		// What was read stays in force: a directory does not go away because somebody wants all policies gone.
		s.dirProblem = &Problem{File: s.dir, Message: err.Error(), Severity: Error}
		return false, s.timing.retry
	}
	s.dirProblem, s.readOnce = nil, true
	now := time.Now()
	for _, name := range names {
		f := s.files[name]
		if f == nil {
			f = &file{}
			s.files[name] = f
		}
		fileChanged, soon := f.update(s.dir, name, s.node, now, s.timing, quick)
		changed = changed || fileChanged
		if soon {
			again = s.timing.grace
		}
	}
	for name, f := range s.files {
		if _, there := slices.BinarySearch(names, name); there {
			continue
		}
		if f.missingSince.IsZero() {
			f.missingSince = now
		}
		if now.Sub(f.missingSince) < s.timing.grace {
			again = min(again, s.timing.grace)
			continue
		}
		delete(s.files, name)
		changed = changed || len(f.objects) > 0
	}
	return changed, again
}

// assemble joins what is in force, and collects all problems.
func (s *Source) assemble() (*state.Snapshot, []Problem) {
	var sources []source
	var problems []Problem
	ignored := map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(s.files)) {
		f := s.files[name]
		sources = append(sources, source{file: name, objects: f.objects})
		for _, p := range f.problems {
			// One word about a kind that Margay does not know is enough.
			if p.Severity == Warning && p.Object == "" && ignored[p.Message] {
				continue
			}
			ignored[p.Message] = true
			problems = append(problems, p)
		}
	}
	snapshot, between := assemble(sources)
	return snapshot, append(problems, between...)
}

// setProblems makes the problems known, and logs what is new and what is over.
func (s *Source) setProblems(problems []Problem) {
	sortProblems(problems)
	var incomplete []string
	for name, f := range s.files {
		if f.bad && !f.good {
			incomplete = append(incomplete, name)
		}
	}
	slices.Sort(incomplete)
	s.mu.Lock()
	before := s.problems
	s.problems, s.incomplete = problems, incomplete
	s.mu.Unlock()
	for _, p := range problems {
		if slices.Contains(before, p) {
			continue
		}
		level := slog.LevelWarn
		if p.Severity == Error {
			level = slog.LevelError
		}
		s.log.Log(context.Background(), level, "manifest problem", "problem", p.String())
	}
	for _, p := range before {
		if !slices.Contains(problems, p) {
			s.log.Info("manifest problem is over", "problem", p.String())
		}
	}
}
