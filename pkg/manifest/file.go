// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"bytes"
	"os"
	"time"
)

// file is what the source knows of one file.
type file struct {
	// objects are the last good content. good says that there has been one, even if empty.
	objects []object
	good    bool
	// data was read last; problems are about it. bad says that it is not in force.
	data     []byte
	problems []Problem
	bad      bool

	missingSince time.Time
	// openSince is when somebody was first seen to have the file open for writing with the content in pending.
	openSince time.Time
	pending   []byte
}

// update reads the file again. It returns whether its good content changed, and whether it should be looked at again soon.
func (f *file) update(dir, name, node string, now time.Time, t timing) (changed, soon bool) {
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
		f.data, f.bad = nil, true
		f.problems = []Problem{{File: name, Message: err.Error(), Severity: Error}}
		return false, false
	}
	if f.data != nil && bytes.Equal(f.data, data) {
		f.openSince, f.pending = time.Time{}, nil
		return false, false
	}
	if writing && !f.patienceIsOver(data, now, t.patience) {
		return false, true
	}
	f.openSince, f.pending = time.Time{}, nil
	return f.take(name, node, data), false
}

// patienceIsOver says that a file open for writing has not changed for so long that its writer seems to be done.
func (f *file) patienceIsOver(data []byte, now time.Time, patience time.Duration) bool {
	if f.openSince.IsZero() || !bytes.Equal(f.pending, data) {
		f.openSince, f.pending = now, data
	}
	return now.Sub(f.openSince) >= patience
}

// take judges new text, and puts it in force if it is good.
func (f *file) take(name, node string, data []byte) (changed bool) {
	f.data = data
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
