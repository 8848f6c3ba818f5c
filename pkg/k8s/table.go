// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"maps"
	"reflect"

	"github.com/margay-cni/margay/pkg/state"
)

// table has the objects of one kind, trimmed. It hands its map out to snapshots, and copies it before it writes to it again.
type table[K comparable, T any] struct {
	live map[K]*T
	// shared says that a snapshot has the map.
	shared bool
	// log has the keys of what was written.
	log state.Log[K]
}

// share returns the map as it is now; nobody may write to it any more.
func (t *table[K, T]) share() map[K]*T {
	if t.live == nil {
		t.live = map[K]*T{}
	}
	t.shared = true
	return t.live
}

func (t *table[K, T]) writable() map[K]*T {
	switch {
	case t.live == nil:
		t.live = map[K]*T{}
	case t.shared:
		t.live = maps.Clone(t.live)
	}
	t.shared = false
	return t.live
}

// put makes v the object of that key, nil none, and reports whether that changes anything. An equal object keeps its place: by the pointer
// who reads snapshots sees that nothing has changed.
func (t *table[K, T]) put(k K, v *T) bool {
	before := t.live[k]
	switch {
	case v == nil && before == nil:
		return false
	case v == nil:
		delete(t.writable(), k)
	case before != nil && reflect.DeepEqual(before, v):
		return false
	default:
		t.writable()[k] = v
	}
	t.log.Note(k)
	return true
}

// replace makes these all objects, and reports whether that changes anything. It owns the map.
func (t *table[K, T]) replace(objects map[K]*T) bool {
	changed := len(objects) != len(t.live)
	for k, v := range objects {
		if before := t.live[k]; before != nil && reflect.DeepEqual(before, v) {
			objects[k] = before
		} else {
			changed = true
		}
	}
	if changed {
		t.live, t.shared = objects, false
		t.log.Forget()
	}
	return changed
}
