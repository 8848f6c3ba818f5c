// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"time"
)

// Fault is a condition of one map that keeps the kernel from holding what it should. It lasts until a round goes through without it.
type Fault struct {
	// Map is the map's name.
	Map string `json:"map"`
	// Failed is how many operations of the last round failed.
	Failed int `json:"failed"`
	// Error is the first of their errors.
	Error string `json:"error"`
	// Cure says what a person can do, where there is something.
	Cure string `json:"cure,omitempty"`
	// Since is when the condition began.
	Since time.Time `json:"since"`
}

// trust is how many loads that find the kernel's content as it is known leave alone what is known of how that differs from what it should
// be. Only a fault of this program could have made that wrong.
const trust = 30

// errUrgent says that a load was given up for something better to do.
var errUrgent = errors.New("something urgent has come in")

// urgentEvery is how many entries are read between two looks for something better to do.
const urgentEvery = 512

// mirror is what the kernel holds in one table, as far as the pipeline knows: every write goes through it, and a full compare reads it
// anew. It belongs to the pipeline's goroutine.
type mirror[K, V comparable] struct {
	name  string
	table Table[K, V]
	log   *slog.Logger
	// have is nil until the first load.
	have map[K]V
	// pods tells the entries that are the plugin's and no business of the mirror; nil: none are. Those of the last load are in others.
	pods   func(K, V) bool
	others map[K]V
	// differ has every key at which have may not be what it should; nil: any key.
	differ map[K]struct{}
	// trusted counts down to the load after which have is compared with all of what it should be again.
	trusted int

	writes  uint64
	failed  int
	err     error
	current *Fault
}

func newMirror[K, V comparable](name string, table Table[K, V], log *slog.Logger) *mirror[K, V] {
	return &mirror[K, V]{name: name, table: table, log: log}
}

// load makes have what the kernel holds. After an error have is what it was. Usually the kernel holds what it held: then have is only compared,
// because the maps are large, and others to put in their place would be as large; urgent, which may be nil, says when there is something better
// to do (errUrgent).
func (m *mirror[K, V]) load(urgent func() bool) error {
	if m.have != nil {
		unchanged, err := m.verify(urgent)
		switch {
		case errors.Is(err, errUrgent):
			return err
		case err != nil:
			return m.unread(err)
		}
		if unchanged {
			if m.trusted--; m.trusted < 0 {
				m.trusted, m.differ = trust, nil
			}
			return nil
		}
	}
	have, others := map[K]V{}, map[K]V(nil)
	_, err := m.table.Each(func(k K, v V) bool {
		if m.pods == nil || !m.pods(k, v) {
			have[k] = v
			return true
		}
		if others == nil {
			others = map[K]V{}
		}
		others[k] = v
		return true
	})
	if err != nil {
		return m.unread(err)
	}
	m.have, m.others, m.differ, m.trusted = have, others, nil, trust
	return nil
}

func (m *mirror[K, V]) unread(err error) error {
	err = fmt.Errorf("load map %s: %w", m.name, err)
	m.fail(err)
	return err
}

// verify reports whether the kernel holds just what it is known to hold.
func (m *mirror[K, V]) verify(urgent func() bool) (bool, error) {
	seen, interrupted := 0, false
	once, err := m.table.Each(func(k K, v V) bool {
		if seen++; seen%urgentEvery == 0 && urgent != nil && urgent() {
			interrupted = true
			return false
		}
		known := m.have
		if m.pods != nil && m.pods(k, v) {
			known = m.others
		}
		before, ok := known[k]
		return ok && before == v
	})
	if interrupted {
		return false, errUrgent
	}
	return once && seen == len(m.have)+len(m.others), err
}

// compare finds where have is not want, unless that is known already.
func (m *mirror[K, V]) compare(want map[K]V) {
	if m.differ != nil {
		return
	}
	differ := map[K]struct{}{}
	for k := range m.missing(want) {
		differ[k] = struct{}{}
	}
	for _, k := range m.surplus(want) {
		differ[k] = struct{}{}
	}
	m.differ = differ
}

// touch says that what k should be has changed.
func (m *mirror[K, V]) touch(k K) {
	if m.differ != nil {
		m.differ[k] = struct{}{}
	}
}

// settle forgets the keys at which have is want now. A map keeps the room for as many keys as it ever had, and looking through it costs as
// much: what is left moves to a new one.
func (m *mirror[K, V]) settle(want map[K]V) {
	if len(m.differ) == 0 {
		return
	}
	left := map[K]struct{}{}
	for k := range m.differ {
		have, held := m.have[k]
		if v, wanted := want[k]; held != wanted || have != v {
			left[k] = struct{}{}
		}
	}
	m.differ = left
}

// missing yields the entries of want that the kernel does not hold.
func (m *mirror[K, V]) missing(want map[K]V) iter.Seq2[K, V] {
	return func(yield func(K, V) bool) {
		if m.differ == nil {
			for k, v := range want {
				if !m.holds(k, v) && !yield(k, v) {
					return
				}
			}
			return
		}
		for k := range m.differ {
			if v, ok := want[k]; ok && !m.holds(k, v) && !yield(k, v) {
				return
			}
		}
	}
}

// holds reports whether the kernel's entry of k is v.
func (m *mirror[K, V]) holds(k K, v V) bool {
	have, ok := m.have[k]
	return ok && have == v
}

// put makes k's entry v and reports whether the kernel holds it now. One that the plugin has made meanwhile stays, and is no fault.
func (m *mirror[K, V]) put(k K, v V) bool {
	if m.holds(k, v) {
		return true
	}
	err := m.table.Put(k, v)
	if errors.Is(err, ErrChanged) {
		return false
	}
	return m.wrote(k, v, err)
}

// replace makes k's entry, which exists, v. An entry that somebody else changed meanwhile is no fault, but the result is false.
func (m *mirror[K, V]) replace(k K, v V) bool {
	if m.holds(k, v) {
		return true
	}
	err := m.table.Replace(k, m.have[k], v)
	if errors.Is(err, ErrChanged) {
		return false
	}
	return m.wrote(k, v, err)
}

func (m *mirror[K, V]) wrote(k K, v V, err error) bool {
	if err != nil {
		m.fail(fmt.Errorf("write map %s: %w", m.name, err))
		return false
	}
	m.writes++
	m.have[k] = v
	return true
}

// remove deletes k's entry and reports whether it is gone. One that somebody else changed meanwhile stays, and is no fault.
func (m *mirror[K, V]) remove(k K) bool {
	had, ok := m.have[k]
	if !ok {
		return true
	}
	err := m.table.Delete(k, had)
	switch {
	case errors.Is(err, ErrChanged):
		return false
	case err != nil:
		m.fail(fmt.Errorf("delete from map %s: %w", m.name, err))
		return false
	}
	m.writes++
	delete(m.have, k)
	return true
}

// plan returns the keys of want whose entry is another one, and those of entries that want does not have; replace and drop may refuse.
func (m *mirror[K, V]) plan(want map[K]V, replace func(have, want V) bool, drop func(have V) bool) (put, gone []K) {
	for k, v := range want {
		have, ok := m.have[k]
		if !ok || (have != v && replace(have, v)) {
			put = append(put, k)
		}
	}
	for _, k := range m.surplus(want) {
		if drop(m.have[k]) {
			gone = append(gone, k)
		}
	}
	return put, gone
}

// surplus returns the keys of entries that want does not have.
func (m *mirror[K, V]) surplus(want map[K]V) []K {
	var keys []K
	if m.differ == nil {
		for k := range m.have {
			if _, ok := want[k]; !ok {
				keys = append(keys, k)
			}
		}
		return keys
	}
	for k := range m.differ {
		_, held := m.have[k]
		if _, ok := want[k]; held && !ok {
			keys = append(keys, k)
		}
	}
	return keys
}

func (m *mirror[K, V]) fail(err error) {
	m.failed++
	if m.err == nil {
		m.err = err
	}
}

// begin starts a round: failures are counted anew.
func (m *mirror[K, V]) begin() {
	m.failed, m.err = 0, nil
}

// fault ends a round: it returns the condition of the table, nil when there is none, and logs when that changed.
func (m *mirror[K, V]) fault(now time.Time) *Fault {
	if m.err == nil {
		if m.current != nil {
			m.log.Info("map works again", "map", m.name, "after", now.Sub(m.current.Since))
			m.current = nil
		}
		return nil
	}
	f := &Fault{Map: m.name, Failed: m.failed, Error: m.err.Error(), Since: now}
	if errors.Is(m.err, ErrFull) {
		f.Cure = sizeCure(m.name)
	}
	if m.current != nil {
		f.Since = m.current.Since
	}
	if m.current == nil || m.current.Cure != f.Cure {
		m.log.Error("map could not be written; trying again", "map", m.name, "failed", f.Failed, "err", m.err, "cure", f.Cure)
	}
	m.current = f
	return f
}

// tableStatus is what the status shows of one table.
func (m *mirror[K, V]) status() MapStatus {
	return MapStatus{Map: m.name, Entries: len(m.have) + len(m.others), Writes: m.writes}
}
