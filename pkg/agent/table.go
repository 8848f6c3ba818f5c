// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/pins"
)

// Table is one map of the kernel as the pipeline uses it.
type Table[K, V comparable] interface {
	// Each shows every entry until see returns false. It reports whether it has shown all of them, none twice, as far as nobody else changes
	// the map meanwhile.
	Each(see func(K, V) bool) (once bool, err error)
	// Put creates or replaces an entry; an error that wraps ErrFull says that the map has no room.
	Put(k K, v V) error
	// Replace changes the entry had into v; an error that wraps ErrChanged says that there is no such entry any more.
	Replace(k K, had, v V) error
	// Delete removes the entry had; a missing one is no error, and one that somebody else has changed meanwhile stays (ErrChanged).
	Delete(k K, had V) error
}

// Errors that a Table tells apart.
var (
	ErrFull    = errors.New("map is full")
	ErrChanged = errors.New("entry was changed or removed by somebody else")
)

// Epochs raises the numbers that send known flows through the slow path again (pkg/datapath implements it).
type Epochs interface {
	// RaiseEndpointEpochs re-judges the flows of the pods behind these host-side devices.
	RaiseEndpointEpochs(ifindexes ...int) error
	// RaiseServiceEpochs re-selects the flows of these service ids whose backend left.
	RaiseServiceEpochs(ids ...uint32) error
	// RaiseRouteEpoch re-routes every flow.
	RaiseRouteEpoch() error
}

// Tables are the maps that the pipeline writes.
type Tables struct {
	Policy          Table[bpf.PolicyKey, bpf.PolicyEntry]
	IPCache         Table[bpf.IPCacheKey, bpf.IPCacheEntry]
	Endpoints       Table[bpf.Addr, bpf.Endpoint]
	Pending         Table[bpf.PendingKey, bpf.Pending]
	Services        Table[bpf.FrontendKey, bpf.Service]
	Backends        Table[bpf.BackendKey, bpf.Backend]
	ServiceBackends Table[bpf.ServiceBackend, uint32]
	NodeAddrs       Table[bpf.Addr, uint32]
	Nodes           Table[uint32, bpf.Node]
	Routes          Table[bpf.RouteKey, bpf.Route]
	EgressAddrs     Table[uint32, bpf.EgressAddrs]
	ReservedPorts   Table[uint32, uint64]
	NodeState       Table[uint32, bpf.NodeState]
	Maglev          Table[bpf.MaglevKey, bpf.MaglevChunk]
	SourceRanges    Table[bpf.SourceRangeKey, uint32]
	ServiceAddrs    Table[bpf.ServiceAddrKey, uint32]
}

// kernelTable is a Table over a pinned map.
type kernelTable[K, V comparable] struct {
	m *ebpf.Map
	// shared says that somebody else writes the map too: an entry is read again right before it is changed. The kernel has no
	// compare-and-swap, so this makes the moment of a lost race short, not impossible; the other side's record then sets it right.
	shared bool
}

// loadFirst and loadBatch are how many entries the first batched read asks for, and the largest. Some small maps are read in every round.
const (
	loadFirst = 256
	loadBatch = 4096
)

// Each reads the map in batches, or entry by entry where the kernel knows no batches for its type.
func (t kernelTable[K, V]) Each(see func(K, V) bool) (once bool, err error) {
	var (
		cursor ebpf.MapBatchCursor
		keys   = make([]K, loadFirst)
		values = make([]V, loadFirst)
		seen   int
	)
	for {
		n, err := t.m.BatchLookup(&cursor, keys, values, nil)
		for i := range n {
			if !see(keys[i], values[i]) {
				return false, nil
			}
		}
		seen += n
		switch {
		case errors.Is(err, ebpf.ErrKeyNotExist):
			return true, nil
		case errors.Is(err, ebpf.ErrNotSupported), errors.Is(err, unix.ENOSPC):
			// ENOSPC: a bucket of the hash holds more than fits the batch.
			all, err := t.oneByOne(see)
			return all && seen == 0, err
		case err != nil:
			return false, fmt.Errorf("read map: %w", err)
		}
		if len(keys) < loadBatch {
			keys, values = make([]K, 2*len(keys)), make([]V, 2*len(values))
		}
	}
}

func (t kernelTable[K, V]) oneByOne(see func(K, V) bool) (all bool, err error) {
	var (
		k  K
		v  V
		it = t.m.Iterate()
	)
	for it.Next(&k, &v) {
		if !see(k, v) {
			return false, nil
		}
	}
	if err := it.Err(); err != nil {
		return false, fmt.Errorf("read map: %w", err)
	}
	return true, nil
}

// Put creates or replaces an entry.
func (t kernelTable[K, V]) Put(k K, v V) error {
	return classify(t.m.Update(&k, &v, ebpf.UpdateAny))
}

// Replace changes the entry had into v.
func (t kernelTable[K, V]) Replace(k K, had, v V) error {
	if err := t.unchanged(k, had); err != nil {
		return err
	}
	return classify(t.m.Update(&k, &v, ebpf.UpdateExist))
}

// Delete removes the entry had; a missing one is no error.
func (t kernelTable[K, V]) Delete(k K, had V) error {
	if err := t.unchanged(k, had); err != nil {
		return err
	}
	if err := t.m.Delete(&k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return err
	}
	return nil
}

// unchanged wraps ErrChanged when the entry of a shared map is not had any more.
func (t kernelTable[K, V]) unchanged(k K, had V) error {
	if !t.shared {
		return nil
	}
	var now V
	if err := t.m.Lookup(&k, &now); err != nil {
		return classify(err)
	}
	if now != had {
		return ErrChanged
	}
	return nil
}

// arrayTable is a Table over a pinned array, whose elements all exist: one that is zero counts as missing.
type arrayTable[V comparable] struct {
	kernelTable[uint32, V]
}

// Each shows every element that is not zero.
func (t arrayTable[V]) Each(see func(uint32, V) bool) (once bool, err error) {
	var zero V
	return t.kernelTable.Each(func(k uint32, v V) bool { return v == zero || see(k, v) })
}

// Delete makes the element zero.
func (t arrayTable[V]) Delete(k uint32, _ V) error {
	var zero V
	return t.Put(k, zero)
}

// serviceTable is the Table of frontends. The plugin makes some as well, for hostPorts: they are never replaced.
type serviceTable struct {
	kernelTable[bpf.FrontendKey, bpf.Service]
}

// Put creates or replaces an entry; one that the plugin has made stays (ErrChanged). The plugin never replaces an entry, so none can become
// the plugin's between two of the steps.
func (t serviceTable) Put(k bpf.FrontendKey, v bpf.Service) error {
	err := t.m.Update(&k, &v, ebpf.UpdateNoExist)
	if !errors.Is(err, ebpf.ErrKeyExist) {
		return classify(err)
	}
	var have bpf.Service
	if err := t.m.Lookup(&k, &have); err != nil {
		return classify(err)
	}
	if pins.IsHostPort(have.Id) {
		return fmt.Errorf("%w: a hostPort has it", ErrChanged)
	}
	return classify(t.m.Update(&k, &v, ebpf.UpdateExist))
}

func newArrayTable[V comparable](m *ebpf.Map) Table[uint32, V] {
	return arrayTable[V]{kernelTable[uint32, V]{m: m}}
}

// KernelTables are the tables of an opened datapath.
func KernelTables(m *datapath.Maps) Tables {
	return Tables{
		Policy:          kernelTable[bpf.PolicyKey, bpf.PolicyEntry]{m: m.Policy},
		IPCache:         kernelTable[bpf.IPCacheKey, bpf.IPCacheEntry]{m: m.IPCache},
		Endpoints:       kernelTable[bpf.Addr, bpf.Endpoint]{m: m.Endpoints, shared: true},
		Pending:         kernelTable[bpf.PendingKey, bpf.Pending]{m: m.Pending},
		Services:        serviceTable{kernelTable[bpf.FrontendKey, bpf.Service]{m: m.Services}},
		Backends:        kernelTable[bpf.BackendKey, bpf.Backend]{m: m.Backends},
		ServiceBackends: kernelTable[bpf.ServiceBackend, uint32]{m: m.ServiceBackends},
		NodeAddrs:       kernelTable[bpf.Addr, uint32]{m: m.NodeAddrs},
		Nodes:           newArrayTable[bpf.Node](m.Nodes),
		Routes:          kernelTable[bpf.RouteKey, bpf.Route]{m: m.Routes},
		EgressAddrs:     kernelTable[uint32, bpf.EgressAddrs]{m: m.EgressAddrs},
		ReservedPorts:   newArrayTable[uint64](m.ReservedPorts),
		NodeState:       newArrayTable[bpf.NodeState](m.NodeState),
		Maglev:          kernelTable[bpf.MaglevKey, bpf.MaglevChunk]{m: m.Maglev},
		SourceRanges:    kernelTable[bpf.SourceRangeKey, uint32]{m: m.SourceRanges},
		ServiceAddrs:    kernelTable[bpf.ServiceAddrKey, uint32]{m: m.ServiceAddrs},
	}
}

// MapSizes gives the sizes of those maps, and of the flow table, by name.
func MapSizes(m *datapath.Maps) map[string]uint32 {
	sizes := map[string]uint32{}
	for name, one := range map[string]*ebpf.Map{
		"policy": m.Policy, "ipcache": m.IPCache, "endpoints": m.Endpoints, "pending": m.Pending, "services": m.Services,
		"backends": m.Backends, "service_backends": m.ServiceBackends, "node_addrs": m.NodeAddrs, "nodes": m.Nodes, "routes": m.Routes,
		"egress_addrs": m.EgressAddrs, "flows": m.Flows,
		"maglev": m.Maglev, "source_ranges": m.SourceRanges, "service_addrs": m.ServiceAddrs,
	} {
		sizes[name] = one.MaxEntries()
	}
	return sizes
}

// classify names the errors that the pipeline reacts to. A hash map without room says E2BIG, an LPM trie ENOSPC.
func classify(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.E2BIG), errors.Is(err, unix.ENOSPC):
		return fmt.Errorf("%w: %w", ErrFull, err)
	case errors.Is(err, ebpf.ErrKeyNotExist):
		return fmt.Errorf("%w: %w", ErrChanged, err)
	}
	return err
}
