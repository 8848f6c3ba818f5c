// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"crypto/sha256"
	"os"
	"path/filepath"
	"time"
)

// file is what the source knows of one file.
type file struct {
	// objects are the last good content. good says that there has been one, even if empty.
	objects []object
	good    bool
	// text is the digest of what was read last, at is the file's state then; problems are about it. bad says that it is not in force.
	text     *digest
	at       stamp
	problems []Problem
	bad      bool

	missingSince time.Time
	// openSince is when somebody was first seen to have the file open for writing with the content in pending.
	openSince time.Time
	pending   digest
}

// digest stands for a text: texts are large, and kept for nothing but to see whether they change.
type digest [sha256.Size]byte

// update reads the file again, with quick only if it seems to be another one. It returns whether its good content changed, and whether it
// should be looked at again soon.
func (f *file) update(dir, name, node string, now time.Time, t timing, quick bool) (changed, soon bool) {
	if quick && f.text != nil && f.at.still(dir, name) {
		f.openSince, f.missingSince = time.Time{}, time.Time{}
		return false, false
	}
	at := stampOf(dir, name, now)
	data, writing, err := read(dir, name)
	if os.IsNotExist(err) {
		// It vanished since it was listed, or is a link whose target is just being exchanged; later, a link to nothing.
		if f.missingSince.IsZero() {
			f.missingSince = now
		}
		if now.Sub(f.missingSince) < t.grace {
			return false, true
		}
	} else {
		f.missingSince = time.Time{}
	}
	if err != nil {
		f.text, f.bad = nil, true
		f.problems = []Problem{{File: name, Message: err.Error(), Severity: Error}}
		return false, false
	}
	sum := digest(sha256.Sum256(data))
	if f.text != nil && *f.text == sum {
		f.openSince, f.at = time.Time{}, at
		return false, false
	}
	if writing && !f.patienceIsOver(sum, now, t.patience) {
		return false, true
	}
	f.openSince, f.text, f.at = time.Time{}, &sum, at
	return f.take(name, node, data), false
}

// patienceIsOver says that a file open for writing has not changed for so long that its writer seems to be done.
func (f *file) patienceIsOver(text digest, now time.Time, patience time.Duration) bool {
	if f.openSince.IsZero() || f.pending != text {
		f.openSince, f.pending = now, text
	}
	return now.Sub(f.openSince) >= patience
}

// take judges new text, and puts it in force if it is good.
func (f *file) take(name, node string, data []byte) (changed bool) {
	c := parse(name, node, data)
	f.problems = c.problems
	if c.empty && len(f.objects) > 0 {
		f.bad = true
		message := "is empty: what it held stays in force; remove the file to withdraw it"
		f.problems = append(f.problems, Problem{File: name, Message: message, Severity: Warning})
		return false
	}
	if f.bad = hasErrors(c.problems); f.bad {
		return false
	}
	f.objects, f.good = c.objects, true
	return true
}

// stamp is what tells that a file is the one it was, without reading it.
type stamp struct {
	info os.FileInfo
	// settled says that the file had not changed for a while: one that changes twice within a tick of the clock has one time for both.
	settled bool
}

// clockTick is longer than the ticks of any file system's clock.
const clockTick = time.Second

// stampOf takes the stamp of a file that is about to be read.
func stampOf(dir, name string, now time.Time) stamp {
	info, err := os.Stat(filepath.Join(dir, name))
	if err != nil {
		return stamp{}
	}
	return stamp{info, now.Sub(info.ModTime()) > clockTick}
}

// still reports whether the file seems to be the one it was. A writer that sets times back, or writes through a mapping, goes unseen here; the
// next look that is not quick sees it.
func (s stamp) still(dir, name string) bool {
	if !s.settled {
		return false
	}
	now, err := os.Stat(filepath.Join(dir, name))
	return err == nil && os.SameFile(s.info, now) && now.Size() == s.info.Size() && now.ModTime().Equal(s.info.ModTime())
}
