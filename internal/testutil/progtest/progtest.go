// SPDX-License-Identifier: Apache-2.0

// Package progtest runs the shipped BPF programs on single packets (BPF_PROG_TEST_RUN) at the hooks of a node from nodetest: real
// devices, real routes, the node's own maps. Flows, counters and events are the fixture's alone, because the devices' own programs see
// what the kernels of node and pods send by themselves.
package progtest

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/bpf/object"
	"github.com/margay-cni/margay/pkg/datapath"
)

// The actions that the programs may return, of linux/pkt_cls.h.
const (
	OK       = 0
	Shot     = 2
	Redirect = 7
)

// Fixture is a node with two pods and a private instance of the programs.
type Fixture struct {
	*nodetest.Node
	A, B  *nodetest.Pod
	Flows *ebpf.Map
	// Affinity is what the fixture's programs remember of clients.
	Affinity *ebpf.Map
	// Flags are added to every run, for example ChecksumComplete; that one not to runs of from_pod.
	Flags uint32
	// Held and Cursor are the maps held_fragments and held_cursor, Fragments is that of the datagrams.
	Held, Cursor, Fragments *ebpf.Map

	// GSOSize makes every run's packet one that is to be cut into segments of so many bytes behind the transport header; 0: none.
	GSOSize  uint32
	counters *ebpf.Map
	progs    map[string]*ebpf.Program
}

// ChecksumComplete is BPF_F_TEST_SKB_CHECKSUM_COMPLETE: the packet comes with the sum of all its bytes, as from a NIC, and the run fails
// with EBADMSG if the sum is not right any more afterwards. Kernel 6.17; older ones answer EINVAL.
const ChecksumComplete = 1 << 2

// New makes the fixture. It needs root.
func New(t testing.TB) *Fixture {
	t.Helper()
	return NewSized(t, 0)
}

// NewSized is New with a flow table of so many entries; 0: as shipped.
func NewSized(t testing.TB, flows uint32) *Fixture {
	t.Helper()
	return on(t, nodetest.New(t), flows)
}

// NewCluster is New on each of two nodes that reach each other. What one fixture's program lets out is the other's to take in: the test is
// the wire between them, and FromOverlay the overlay device, whose metadata is no part of a test run by itself.
func NewCluster(t testing.TB, opts nodetest.ClusterOptions) (c *nodetest.Cluster, first, second *Fixture) {
	t.Helper()
	c = nodetest.NewCluster(t, 2, opts)
	return c, on(t, c.Nodes[0], 0), on(t, c.Nodes[1], 0)
}

// on adds two pods to the node and loads the programs once more, for test runs.
func on(t testing.TB, n *nodetest.Node, flows uint32) *Fixture {
	t.Helper()
	f := &Fixture{Node: n, progs: map[string]*ebpf.Program{}}
	f.A, f.B = f.AddPod("a"), f.AddPod("b")
	shared := map[string]*ebpf.Map{
		"endpoints": f.DP.Maps.Endpoints, "endpoint_epochs": f.DP.Maps.EndpointEpochs, "ipcache": f.DP.Maps.IPCache,
		"node_addrs": f.DP.Maps.NodeAddrs, "services": f.DP.Maps.Services, "backends": f.DP.Maps.Backends,
		"service_backends": f.DP.Maps.ServiceBackends, "service_epochs": f.DP.Maps.ServiceEpochs, "policy": f.DP.Maps.Policy,
		"node_state": f.DP.Maps.NodeState, "nodes": f.DP.Maps.Nodes, "routes": f.DP.Maps.Routes,
		"maglev": f.DP.Maps.Maglev, "source_ranges": f.DP.Maps.SourceRanges, "service_addrs": f.DP.Maps.ServiceAddrs,
		"affinity":     newMap(t, "affinity", 0),
		"egress_addrs": f.DP.Maps.EgressAddrs, "reserved_ports": f.DP.Maps.ReservedPorts,
		"flows": newMap(t, "flows", flows), "counters": newMap(t, "counters", 0), "events": newMap(t, "events", 0),
		"fragments": newMap(t, "fragments", 0), "held_fragments": newMap(t, "held_fragments", 0),
		"held_cursor": newMap(t, "held_cursor", 0), "fragment_scratch": newMap(t, "fragment_scratch", 0),
	}
	f.Flows, f.counters, f.Affinity = shared["flows"], shared["counters"], shared["affinity"]
	f.Held, f.Cursor, f.Fragments = shared["held_fragments"], shared["held_cursor"], shared["fragments"]
	specs, err := object.ProgramSpecs()
	if err != nil {
		t.Fatal(err)
	}
	for _, spec := range specs {
		coll, err := datapath.LoadPrograms(spec, shared)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(coll.Close)
		maps.Copy(f.progs, coll.Programs)
	}
	return f
}

func newMap(t testing.TB, name string, size uint32) *ebpf.Map {
	t.Helper()
	specs, err := object.MapSpecs()
	if err != nil {
		t.Fatal(err)
	}
	if size != 0 {
		specs[name].MaxEntries = size
	}
	m, err := ebpf.NewMap(specs[name])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// RequireChecksumComplete makes every further run one with ChecksumComplete, or skips the test where the kernel does not know it.
func (f *Fixture) RequireChecksumComplete(t testing.TB) {
	t.Helper()
	f.Flags = ChecksumComplete
	if _, err := f.TryRun(t, f.FromNetdev(), pkt.ARPRequest(f.A.MAC, f.A.Addr(false), f.B.Addr(false))); err != nil {
		t.Skipf("BPF_F_TEST_SKB_CHECKSUM_COMPLETE (kernel 6.17): %v", err)
	}
}

// Hook is a program on a device.
type Hook struct {
	Program string
	Ifindex int
	// Ingress is the device that the packet came in on before the stack; 0: it is of the node's own.
	Ingress int
	first   *ebpf.Program // of Before; nil: none
}

// FromPod is the hook of what a pod sends.
func FromPod(p *nodetest.Pod) Hook { return Hook{Program: bpf.ProgFromPod, Ifindex: p.Ifindex} }

// ToPod is the hook of what the node's own processes send to a pod.
func ToPod(p *nodetest.Pod) Hook { return Hook{Program: bpf.ProgToPod, Ifindex: p.Ifindex} }

// FromNetdev is the hook of what comes from outside.
func (f *Fixture) FromNetdev() Hook {
	return Hook{Program: bpf.ProgFromNetdev, Ifindex: f.ClientDevice, Ingress: f.ClientDevice}
}

// ToNetdev is the hook of what the node's own processes send to the outside.
func (f *Fixture) ToNetdev() Hook { return Hook{Program: bpf.ProgToNetdev, Ifindex: f.ClientDevice} }

// Program returns the fixture's instance of a program, for tests that run it in their own way.
func (f *Fixture) Program(name string) *ebpf.Program { return f.progs[name] }

// Result is what one run of a program did.
type Result struct {
	Action int
	Out    []byte
	// Drops counts by reason, both directions.
	Drops map[string]uint64
}

// buff is the beginning of struct __sk_buff; what lies before and between must be zero.
type buff struct {
	_              [9]uint32
	IngressIfindex uint32
	Ifindex        uint32
	_              [25]uint32
	_              [4]uint32 // flow_keys, tstamp
	_              [4]uint32 // wire_len, gso_segs, sk
	GSOSize        uint32
	_              [3]uint32
}

// Context is the hook as RunOptions.Context wants it.
func Context(h Hook) any { return (&Fixture{}).context(h) }

func (f *Fixture) context(h Hook) buff {
	return buff{Ifindex: uint32(h.Ifindex), IngressIfindex: uint32(h.Ingress), GSOSize: f.GSOSize}
}

// Run runs the hook's program once on a frame.
func (f *Fixture) Run(t testing.TB, h Hook, frame []byte) Result {
	t.Helper()
	r, err := f.TryRun(t, h, frame)
	if err != nil {
		t.Fatalf("run %s: %v\n%s", h.Program, err, pkt.Dump(frame))
	}
	return r
}

// TryRun is Run for frames that the kernel may refuse to run a program on: those too short for the header that their EtherType names
// (EINVAL).
func (f *Fixture) TryRun(t testing.TB, h Hook, frame []byte) (Result, error) {
	t.Helper()
	before := f.Drops(t)
	flags := f.Flags
	if h.Program == bpf.ProgFromPod {
		flags &^= ChecksumComplete // a pod's kernel hands on no NIC's sum, and from_pod keeps none up (forward.h)
	}
	opts := &ebpf.RunOptions{
		Data: frame, DataOut: make([]byte, len(frame)+256), Flags: flags,
		Context: f.context(h),
	}
	var action uint32
	var err error
	prog := f.progs[h.Program]
	if h.first != nil {
		prog = h.first
	}
	f.NS.Do(func() { action, err = prog.Run(opts) })
	if err != nil {
		return Result{}, err
	}
	r := Result{Action: int(action), Out: opts.DataOut, Drops: f.Drops(t)}
	for reason, n := range before {
		if r.Drops[reason] -= n; r.Drops[reason] == 0 {
			delete(r.Drops, reason)
		}
	}
	return r, nil
}

// Drops returns the drop counters by reason, reasons without drops left out.
func (f *Fixture) Drops(t testing.TB) map[string]uint64 {
	t.Helper()
	slots, cpus := int(f.counters.MaxEntries()), ebpf.MustPossibleCPU()
	keys, values := make([]uint32, slots), make([]bpf.Counter, slots*cpus)
	n, err := f.counters.BatchLookup(&ebpf.MapBatchCursor{}, keys, values, nil)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) || n != slots {
		t.Fatalf("read %d of %d counters: %v", n, slots, err)
	}
	out := map[string]uint64{}
	for i, c := range values {
		if c.Packets != 0 {
			out[object.DropReasonName(uint8(keys[i/cpus]/2))] += c.Packets
		}
	}
	return out
}

// Case is one packet at one hook and everything that must come of it.
type Case struct {
	Name       string
	Hook       Hook
	In         []byte
	WantAction int
	// WantOut is the golden packet; nil: the one that came in.
	WantOut []byte
	// WantDrop is the one drop reason that is counted, once; empty: none.
	WantDrop string
}

// Check runs the case and compares.
func (f *Fixture) Check(t testing.TB, c Case) {
	t.Helper()
	got := f.Run(t, c.Hook, c.In)
	what := fmt.Sprintf("%s, %s", c.Name, c.Hook.Program)
	if got.Action != c.WantAction {
		t.Errorf("%s: action = %d, want %d; drops %v; the packet:\n%s", what, got.Action, c.WantAction, got.Drops, pkt.Dump(c.In))
	}
	want := map[string]uint64{}
	if c.WantDrop != "" {
		want[c.WantDrop] = 1
	}
	if diff := cmp.Diff(want, got.Drops); diff != "" {
		t.Errorf("%s: drops (-want +got):\n%sthe packet:\n%s", what, diff, pkt.Dump(c.In))
	}
	if c.WantAction == Shot {
		return
	}
	wantOut := c.WantOut
	if wantOut == nil {
		wantOut = c.In
	} else if err := pkt.VerifyChecksums(wantOut); err != nil {
		t.Fatalf("%s: the wanted packet is wrong: %v", what, err)
	}
	if !bytes.Equal(wantOut, got.Out) {
		t.Errorf("%s: the packet in:\n%swant out:\n%sgot out:\n%s", what, pkt.Dump(c.In), pkt.Dump(wantOut), pkt.Dump(got.Out))
	}
}

// Flow returns the entry of a tuple.
func (f *Fixture) Flow(t testing.TB, key bpf.FlowKey) (flow bpf.Flow, ok bool) {
	t.Helper()
	switch err := f.Flows.Lookup(&key, &flow); {
	case err == nil:
		return flow, true
	case isMissing(err):
		return flow, false
	default:
		t.Fatal(err)
	}
	return flow, false
}

// ClearFlows forgets every flow.
func (f *Fixture) ClearFlows(t testing.TB) {
	t.Helper()
	for key := range f.AllFlows(t) {
		if err := f.Flows.Delete(&key); err != nil && !isMissing(err) {
			t.Fatal(err)
		}
	}
}

// AllFlows returns the flow table.
func (f *Fixture) AllFlows(t testing.TB) map[bpf.FlowKey]bpf.Flow {
	t.Helper()
	var key bpf.FlowKey
	var flow bpf.Flow
	out := map[bpf.FlowKey]bpf.Flow{}
	it := f.Flows.Iterate()
	for it.Next(&key, &flow) {
		out[key] = flow
	}
	if err := it.Err(); err != nil {
		t.Fatal(err)
	}
	return out
}

func isMissing(err error) bool { return errors.Is(err, ebpf.ErrKeyNotExist) }
