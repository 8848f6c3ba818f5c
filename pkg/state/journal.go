// SPDX-License-Identifier: Apache-2.0

package state

// Journal names the objects of one kind that were written or removed, in their order. A source hands one out with each snapshot: who has
// seen an earlier snapshot of the same source finds by it what to look at, instead of looking at everything. The zero Journal says nothing.
// It is immutable.
type Journal[K comparable] struct {
	// log tells the journals of different sources apart.
	log *byte
	// first is the number of the first of the keys that are still known.
	first uint64
	keys  []K
}

func (j Journal[K]) end() uint64 {
	return j.first + uint64(len(j.keys))
}

// Since returns the keys of all objects that may differ between the snapshots of earlier and of j, some perhaps more than once. It reports
// false when that is not known, and everything has to be compared. The caller must not write to the slice.
func (j Journal[K]) Since(earlier Journal[K]) (keys []K, known bool) {
	if j.log == nil || j.log != earlier.log || earlier.end() < j.first || earlier.end() > j.end() {
		return nil, false
	}
	return j.keys[earlier.end()-j.first:], true
}

// Same reports whether it is known that nothing has changed between the snapshots of earlier and of j.
func (j Journal[K]) Same(earlier Journal[K]) bool {
	keys, known := j.Since(earlier)
	return known && len(keys) == 0
}

// remembered is how many changes a log remembers at least, once there have been so many. Who is further behind compares everything, which
// costs little more than to look at so many objects one by one.
const remembered = 1024

// Log is a source's side of a Journal. Its zero value is ready. It is not safe for concurrent use; journals are.
type Log[K comparable] struct {
	journal Journal[K]
}

// Note says that the object with the key was written or removed.
func (l *Log[K]) Note(k K) {
	j := &l.journal
	if j.log == nil {
		j.log = new(byte)
	}
	if len(j.keys) == 2*remembered {
		// A new slice: journals have the old one.
		j.keys = append(make([]K, 0, 2*remembered), j.keys[remembered:]...)
		j.first += remembered
	}
	j.keys = append(j.keys, k)
}

// Forget says that any object may have been written or removed.
func (l *Log[K]) Forget() {
	l.journal = Journal[K]{log: new(byte)}
}

// Journal is what has been noted up to now.
func (l *Log[K]) Journal() Journal[K] {
	if l.journal.log == nil {
		l.Forget()
	}
	j := l.journal
	j.keys = j.keys[:len(j.keys):len(j.keys)]
	return j
}

// Journals are those of a snapshot. A snapshot that was made of another one has none for the kinds that are not the other's any more.
type Journals struct {
	Namespaces             Journal[string]
	Pods                   Journal[Key]
	Services               Journal[Key]
	EndpointSlices         Journal[Key]
	NetworkPolicies        Journal[Key]
	ClusterNetworkPolicies Journal[string]
	Nodes                  Journal[string]
	ServiceCIDRs           Journal[string]
}

// Equal is true: snapshots with the same objects are equal however they came to be (go-cmp asks).
func (Journals) Equal(Journals) bool {
	return true
}
