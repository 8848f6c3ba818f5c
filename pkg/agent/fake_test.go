// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/policy"
	"github.com/margay-cni/margay/pkg/state"
)

// fakeKernel behaves like the pinned maps. Operations fail with a probability, and after each one that succeeds a check looks at all maps.
type fakeKernel struct {
	policy    *fakeTable[bpf.PolicyKey, bpf.PolicyEntry]
	ipcache   *fakeTable[bpf.IPCacheKey, bpf.IPCacheEntry]
	endpoints *fakeTable[bpf.Addr, bpf.Endpoint]
	pending   *fakeTable[bpf.PendingKey, bpf.Pending]
	services  *fakeTable[bpf.FrontendKey, bpf.Service]
	backends  *fakeTable[bpf.BackendKey, bpf.Backend]
	members   *fakeTable[bpf.ServiceBackend, uint32]
	nodeAddrs *fakeTable[bpf.Addr, uint32]
	nodes     *fakeTable[uint32, bpf.Node]
	routes    *fakeTable[bpf.RouteKey, bpf.Route]
	egress    *fakeTable[uint32, bpf.EgressAddrs]
	reserved  *fakeTable[uint32, uint64]
	nodeState *fakeTable[uint32, bpf.NodeState]
	maglev    *fakeTable[bpf.MaglevKey, bpf.MaglevChunk]
	ranges    *fakeTable[bpf.SourceRangeKey, uint32]
	addrs     *fakeTable[bpf.ServiceAddrKey, uint32]

	rand  *rand.Rand
	fault float64
	// killAfter, if positive, is after how many operations everything panics with errKilled.
	killAfter int
	ops       []string
	// deleting says that the last change of a map was a delete.
	deleting bool
	check    func(op string)

	endpointEpochs map[int]int
	serviceEpochs  map[uint32]int
	routeEpoch     int
}

var (
	errInjected = errors.New("injected fault")
	errKilled   = errors.New("killed")
)

type fakeTable[K, V comparable] struct {
	name    string
	kernel  *fakeKernel
	entries map[K]V
	max     int
}

func newTable[K, V comparable](k *fakeKernel, name string) *fakeTable[K, V] {
	return &fakeTable[K, V]{name: name, kernel: k, entries: map[K]V{}, max: 1 << 20}
}

func newKernel(seed uint64) *fakeKernel {
	k := &fakeKernel{rand: rand.New(rand.NewPCG(seed, 0)), endpointEpochs: map[int]int{}, serviceEpochs: map[uint32]int{}}
	k.policy = newTable[bpf.PolicyKey, bpf.PolicyEntry](k, "policy")
	k.ipcache = newTable[bpf.IPCacheKey, bpf.IPCacheEntry](k, "ipcache")
	k.endpoints = newTable[bpf.Addr, bpf.Endpoint](k, "endpoints")
	k.pending = newTable[bpf.PendingKey, bpf.Pending](k, "pending")
	k.services = newTable[bpf.FrontendKey, bpf.Service](k, "services")
	k.backends = newTable[bpf.BackendKey, bpf.Backend](k, "backends")
	k.members = newTable[bpf.ServiceBackend, uint32](k, "service_backends")
	k.nodeAddrs = newTable[bpf.Addr, uint32](k, "node_addrs")
	k.nodes = newTable[uint32, bpf.Node](k, "nodes")
	k.routes = newTable[bpf.RouteKey, bpf.Route](k, "routes")
	k.egress = newTable[uint32, bpf.EgressAddrs](k, "egress_addrs")
	k.reserved = newTable[uint32, uint64](k, "reserved_ports")
	k.nodeState = newTable[uint32, bpf.NodeState](k, "node_state")
	k.maglev = newTable[bpf.MaglevKey, bpf.MaglevChunk](k, "maglev")
	k.ranges = newTable[bpf.SourceRangeKey, uint32](k, "source_ranges")
	k.addrs = newTable[bpf.ServiceAddrKey, uint32](k, "service_addrs")
	return k
}

func (k *fakeKernel) tables() Tables {
	return Tables{
		Policy: k.policy, IPCache: k.ipcache, Endpoints: k.endpoints, Pending: k.pending,
		Services: k.services, Backends: k.backends, ServiceBackends: k.members, NodeAddrs: k.nodeAddrs,
		Nodes: k.nodes, Routes: k.routes, EgressAddrs: k.egress, ReservedPorts: k.reserved, NodeState: k.nodeState,
		Maglev: k.maglev, SourceRanges: k.ranges, ServiceAddrs: k.addrs,
	}
}

// op is the moment of one operation: it may fail, or be the last one.
func (k *fakeKernel) op(name string) error {
	if k.killAfter > 0 {
		if k.killAfter--; k.killAfter == 0 {
			panic(errKilled)
		}
	}
	if k.fault > 0 && k.rand.Float64() < k.fault {
		return fmt.Errorf("%s: %w", name, errInjected)
	}
	k.ops = append(k.ops, name)
	return nil
}

func (k *fakeKernel) done(name string) {
	if k.check != nil {
		k.check(name)
	}
}

func (t *fakeTable[K, V]) Load() (map[K]V, error) {
	if t.kernel.fault > 0 && t.kernel.rand.Float64() < t.kernel.fault/10 {
		return nil, errInjected
	}
	return maps.Clone(t.entries), nil
}

func (t *fakeTable[K, V]) Each(see func(K, V) bool) (once bool, err error) {
	all, err := t.Load()
	for k, v := range all {
		if !see(k, v) {
			return false, nil
		}
	}
	return true, err
}

func (t *fakeTable[K, V]) Put(k K, v V) error {
	if _, ok := t.entries[k]; !ok && len(t.entries) >= t.max {
		return ErrFull
	}
	op := "put " + t.name
	if err := t.kernel.op(op); err != nil {
		return err
	}
	t.entries[k] = v
	t.kernel.deleting = false
	t.kernel.done(op)
	return nil
}

func (t *fakeTable[K, V]) Replace(k K, had, v V) error {
	if now, ok := t.entries[k]; !ok || now != had {
		return ErrChanged
	}
	return t.Put(k, v)
}

func (t *fakeTable[K, V]) Delete(k K, had V) error {
	now, ok := t.entries[k]
	if !ok {
		return nil
	}
	if now != had {
		return ErrChanged
	}
	op := "delete " + t.name
	if err := t.kernel.op(op); err != nil {
		return err
	}
	delete(t.entries, k)
	t.kernel.deleting = true
	t.kernel.done(op)
	return nil
}

func (k *fakeKernel) RaiseEndpointEpochs(ifindexes ...int) error {
	if err := k.op("raise endpoints"); err != nil {
		return err
	}
	for _, i := range ifindexes {
		k.endpointEpochs[i]++
	}
	return nil
}

func (k *fakeKernel) RaiseServiceEpochs(ids ...uint32) error {
	if err := k.op("raise services"); err != nil {
		return err
	}
	for _, id := range ids {
		k.serviceEpochs[id]++
	}
	k.done("raise services")
	return nil
}

func (k *fakeKernel) RaiseRouteEpoch() error {
	if err := k.op("raise routes"); err != nil {
		return err
	}
	k.routeEpoch++
	k.done("raise routes")
	return nil
}

// fakeHost is a machine with these devices.
type fakeHost struct {
	devices  map[int]string
	reserved []portRange
	// hostPorts are reserved too; hostPortErr is what reserving them ends with.
	hostPorts   []uint16
	hostPortErr error
}

func (h *fakeHost) ReserveHostPorts(ports []uint16) error {
	if h.hostPortErr == nil {
		h.hostPorts = ports
	}
	return h.hostPortErr
}

func (h *fakeHost) Devices() (map[int]string, error) { return h.devices, nil }

func (h *fakeHost) ReservedPorts() ([]portRange, error) { return h.reserved, nil }

// rig is a pipeline on a fake kernel that a test drives round by round.
type rig struct {
	*pipeline
	t      testing.TB
	kernel *fakeKernel
	host   *fakeHost
	// incomplete is what the source cannot read.
	incompleteFiles []string
	clock           time.Time
	last            Round
	// wanted is what the pipeline last wanted of devices and kernel routes.
	wanted *wantedNetwork
}

// testEpoch is when every test happens.
var testEpoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// newRig starts a pipeline on the kernel and the run directory, as an agent start does.
func newRig(t testing.TB, k *fakeKernel, run string) *rig {
	t.Helper()
	cfg := Config{
		Node: "n1", Run: run, SelectorSlices: true, Tables: k.tables(), Epochs: k, HostPorts: k, Resync: time.Hour,
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Reach: Reach{Masquerade: true},
	}
	if err := cfg.Reach.validate(); err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, kernel: k, host: &fakeHost{devices: map[int]string{}}, clock: testEpoch}
	r.pipeline = newPipeline(&cfg, func() []string { return r.incompleteFiles })
	r.pipeline.host = r.host
	r.pipeline.now = func() time.Time { return r.clock }
	r.pipeline.network = func(w *wantedNetwork) { r.wanted = w }
	r.pipeline.publish = func(round Round) { r.last = round }
	return r
}

// give hands over a snapshot and records and does one round.
func (r *rig) give(s *state.Snapshot, records ...*endpoint.Record) {
	r.takeSnapshot(snapshotFrom{s, r.clock})
	r.takeRecords(records)
	r.work(false)
}

// settle repeats rounds until one goes without a fault.
func (r *rig) settle() {
	r.t.Helper()
	for range 1000 {
		if r.work(false); len(r.last.Faults) == 0 && r.raise.empty() {
			return
		}
	}
	r.t.Fatalf("no round without a fault in 1000: %+v", r.last.Faults)
}

// written counts the operations since the last call.
func (k *fakeKernel) written() []string {
	ops := k.ops
	k.ops = nil
	return ops
}

// pod makes a record, and the device and map entry that the plugin would have made, node-only as without a pending entry.
func (r *rig) pod(name string, index int, addrs ...string) *endpoint.Record {
	rec := &endpoint.Record{
		Version: 1, ContainerID: "c-" + name, IfName: "eth0", Netns: "/run/netns/" + name, Namespace: "default", Name: name,
		MAC: "02:00:00:00:00:01", HostMAC: "02:00:00:00:00:02", HostIfName: fmt.Sprintf("mgy%d", index), HostIfindex: index,
		Created: testEpoch.Add(-time.Hour),
	}
	for _, a := range addrs {
		rec.Addresses = append(rec.Addresses, netip.MustParseAddr(a))
	}
	r.host.devices[index] = rec.HostIfName
	e, err := endpointOf(rec)
	if err != nil {
		r.t.Fatal(err)
	}
	e.Flags = bpf.EndpointPending
	for _, a := range rec.Addresses {
		r.kernel.endpoints.entries[bpf.NewAddr(a)] = e
	}
	if err := r.store.Save(rec); err != nil {
		r.t.Fatal(err)
	}
	return rec
}

// decide answers as the programs do: each end's policy, looked up in the maps.
func (k *fakeKernel) decide(src, dst netip.Addr, proto state.Protocol, port uint16) policy.Decision {
	d := policy.Decision{Egress: true, Ingress: true}
	if e, ok := k.endpoints.entries[bpf.NewAddr(src)]; ok {
		d.Egress = k.verdict(e.PolicyId[bpf.Egress], bpf.Egress, k.identity(dst), proto, port)
	}
	if e, ok := k.endpoints.entries[bpf.NewAddr(dst)]; ok {
		d.Ingress = k.verdict(e.PolicyId[bpf.Ingress], bpf.Ingress, k.identity(src), proto, port)
	}
	return d
}

// identity is the longest prefix match in ipcache.
func (k *fakeKernel) identity(a netip.Addr) uint32 {
	best, id := -1, bpf.IdentityWorld
	for key, e := range k.ipcache.entries {
		p, err := key.Prefix()
		if err == nil && p.Contains(a) && int(key.Prefixlen) > best {
			best, id = int(key.Prefixlen), e.Identity
		}
	}
	return id
}

// verdict is the lookup that bpf/types.h describes at struct policy_entry.
func (k *fakeKernel) verdict(id, direction, identity uint32, proto state.Protocol, port uint16) bool {
	switch id {
	case bpf.PolicyNone:
		return true
	case bpf.PolicyNodeOnly:
		return false
	}
	var best *bpf.PolicyEntry
	for _, peer := range []uint32{identity, bpf.IdentityAny} {
		for bits := 24; bits >= 0; bits-- {
			if bits > 0 && bits < 8 {
				continue
			}
			key := policy.Key{Policy: id, Identity: peer, Direction: policy.Direction(direction), Bits: uint8(bits)}
			if bits >= 8 {
				key.Protocol = uint8(proto)
			}
			if bits > 8 {
				key.Port = port &^ (1<<(24-bits) - 1)
			}
			if e, ok := k.policy.entries[newPolicyKey(key)]; ok {
				if best == nil || e.Rank < best.Rank || (e.Rank == best.Rank && e.Verdict == bpf.VerdictDeny) {
					best = &e
				}
				break
			}
		}
	}
	return best != nil && best.Verdict == bpf.VerdictAllow
}

func runDir(t testing.TB) string {
	return filepath.Clean(t.TempDir())
}
