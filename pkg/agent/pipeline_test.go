// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/pins"
	"github.com/margay-cni/margay/pkg/service"
	"github.com/margay-cni/margay/pkg/state"
)

// shop is a cluster with two pods behind a service, and a deny policy in their namespace.
func shop(r *rig) (*state.Snapshot, []*endpoint.Record) {
	s := state.NewSnapshot()
	key := state.Key{Namespace: "default", Name: "shop"}
	s.Services[key] = &state.Service{
		Key: key, Type: state.NodePort, ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.1"), netip.MustParseAddr("fd96::1")},
		Ports:    []state.ServicePort{{Protocol: state.TCP, Port: 80, NodePort: 30080, TargetPort: 8080}},
		Selector: map[string]string{"app": "shop"},
	}
	deny := denyAll("default")
	s.NetworkPolicies[deny.Key] = deny
	a, b := r.pod("a", 10, "10.0.0.1", "fd00::1"), r.pod("b", 11, "10.0.0.2", "fd00::2")
	for _, rec := range []*endpoint.Record{a, b} {
		rec.Labels = map[string]string{"app": "shop"}
	}
	return s, []*endpoint.Record{a, b}
}

func TestI10_NothingIsWrittenBeforeTheFirstSnapshotAndTheRecords(t *testing.T) {
	k := newKernel(1)
	r := newRig(t, k, runDir(t))
	s, records := shop(r)
	r.work(true)
	r.takeRecords(records)
	r.work(true)
	if got := k.written(); len(got) > 0 {
		t.Errorf("operations before the first snapshot = %v, want none", got)
	}
	r.takeSnapshot(snapshotFrom{s, r.clock})
	r.work(false)
	if got := k.written(); len(got) == 0 {
		t.Errorf("operations after the first snapshot: none, want some")
	}
}

func TestServiceGetsTheEndpointsThatRecordsName(t *testing.T) {
	r := newRig(t, newKernel(1), runDir(t))
	s, records := shop(r)
	r.give(s, records...)
	for _, a := range []string{"10.96.0.1", "fd96::1"} {
		svc, ok := r.kernel.services.entries[bpf.NewFrontendKey(6, netip.MustParseAddr(a), 80)]
		if !ok || svc.Count != [2]uint32{2, 2} {
			t.Errorf("frontend %s = %+v, %v, want two backends in both scopes", a, svc, ok)
		}
	}
	for _, a := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		if _, ok := r.kernel.services.entries[bpf.NewFrontendKey(6, a, 30080)]; !ok {
			t.Errorf("node port frontend %s is missing", a)
		}
	}
}

func TestRestartWritesNothing(t *testing.T) {
	k := newKernel(1)
	run := runDir(t)
	r := newRig(t, k, run)
	s, records := shop(r)
	addrs := nodeFacts{addrs: map[netip.Addr]uint32{netip.MustParseAddr("192.0.2.1"): bpf.NodeAddrLocal}, routes: "r1"}
	r.facts = &addrs
	r.give(s, records...)
	r.work(true)
	k.written()

	again := newRig(t, k, run)
	again.host = r.host
	again.pipeline.host = r.host
	again.facts = &addrs
	again.give(s, records...)
	again.work(true)
	if got := k.written(); len(got) > 0 {
		t.Errorf("operations of a restart in which nothing changed = %v, want none", got)
	}
	if again.last.Faults != nil {
		t.Errorf("faults = %v, want none", again.last.Faults)
	}
}

func TestRestartWithoutUsableNumbers(t *testing.T) {
	for name, spoil := range map[string]func(path string) error{
		"missing":       os.Remove,
		"empty":         func(path string) error { return os.WriteFile(path, nil, 0o644) },
		"cut off":       func(path string) error { return os.Truncate(path, 40) },
		"other version": func(path string) error { return os.WriteFile(path, []byte(`{"version":99}`), 0o644) },
	} {
		t.Run(name, func(t *testing.T) {
			k := newKernel(1)
			run := runDir(t)
			r := newRig(t, k, run)
			s, records := shop(r)
			r.give(s, records...)
			old := map[uint32]bool{}
			for key := range k.policy.entries {
				old[key.PolicyId] = true
			}
			oldService := k.services.entries[bpf.NewFrontendKey(6, netip.MustParseAddr("10.96.0.1"), 80)]
			if err := spoil(filepath.Join(run, numbersFile)); err != nil {
				t.Fatal(err)
			}
			again := newRig(t, k, run)
			again.pipeline.host = r.host
			k.check = func(op string) {
				if wrong := k.halfBuilt(true); wrong != "" {
					t.Fatalf("after %s: %s", op, wrong)
				}
			}
			again.give(s, records...)
			again.settle()
			for key := range k.policy.entries {
				if old[key.PolicyId] {
					t.Errorf("policy id %d means something else than before, want a fresh number", key.PolicyId)
				}
			}
			now := k.services.entries[bpf.NewFrontendKey(6, netip.MustParseAddr("10.96.0.1"), 80)]
			if now.Id == oldService.Id || now.Count != oldService.Count {
				t.Errorf("service = %+v after %+v, want a fresh id and as many backends", now, oldService)
			}
			if k.endpointEpochs[10] == 0 || k.endpointEpochs[11] == 0 {
				t.Errorf("endpoint epochs = %v, want those of devices 10 and 11 raised", k.endpointEpochs)
			}
		})
	}
}

func TestPendingIsPublishedForScheduledPods(t *testing.T) {
	k := newKernel(1)
	r := newRig(t, k, runDir(t))
	s := state.NewSnapshot()
	here := state.Key{Namespace: "shop", Name: "here"}
	s.Pods[here] = &state.Pod{Key: here, UID: "u1", Node: "n1", Local: true}
	there := state.Key{Namespace: "shop", Name: "there"}
	s.Pods[there] = &state.Pod{Key: there, UID: "u2", Node: "n2"}
	s.Namespaces["open"] = state.ImplicitNamespace("open")
	s.Namespaces["shop"] = state.ImplicitNamespace("shop")
	deny := denyAll("shop")
	s.NetworkPolicies[deny.Key] = deny
	r.give(s)
	got := k.pending.entries
	pod, ok := got[pins.PendingKeyOf("shop", "here", "u1")]
	if !ok || pod.Flags != bpf.PendingPod || pod.PolicyId[0] < bpf.PolicyFirst || pod.PolicyId[1] < bpf.PolicyFirst {
		t.Errorf("pending of the pod scheduled here = %+v, %v, want its own policies", pod, ok)
	}
	if e, ok := got[pins.PendingKeyOf("shop", "there", "u2")]; ok {
		t.Errorf("pending of a pod of another node = %+v, want none", e)
	}
	restricted := bpf.Pending{Identity: bpf.IdentityPodUnknown, PolicyId: [2]uint32{bpf.PolicyNodeOnly, bpf.PolicyNodeOnly}, Flags: bpf.PendingRestricted}
	open := bpf.Pending{Identity: bpf.IdentityPodUnknown, Flags: bpf.PendingOpen}
	for namespace, want := range map[string]bpf.Pending{"shop": restricted, "open": open, "": restricted} {
		if diff := cmp.Diff(want, got[pins.PendingKeyOf(namespace, "", "")]); diff != "" {
			t.Errorf("summary of namespace %q (-want +got):\n%s", namespace, diff)
		}
	}
	s = state.NewSnapshot()
	r.give(s)
	want := map[bpf.PendingKey]bpf.Pending{pins.PendingKeyOf("", "", ""): open}
	if diff := cmp.Diff(want, k.pending.entries); diff != "" {
		t.Errorf("pending without pods and policies (-want +got):\n%s", diff)
	}
}

func TestStartedPodIsClassified(t *testing.T) {
	k := newKernel(1)
	r := newRig(t, k, runDir(t))
	s, records := shop(r)
	r.give(s, records...)
	for _, a := range []string{"10.0.0.1", "fd00::1", "10.0.0.2", "fd00::2"} {
		e := k.endpoints.entries[bpf.NewAddr(netip.MustParseAddr(a))]
		if e.PolicyId[0] < bpf.PolicyFirst || e.PolicyId[1] < bpf.PolicyFirst || e.Identity < bpf.IdentityFirst || e.Flags != 0 {
			t.Errorf("endpoint %s = %+v, want its identity and policies, and no longer pending", a, e)
		}
	}
	if k.endpointEpochs[10] != 1 || k.endpointEpochs[11] != 1 {
		t.Errorf("endpoint epochs = %v, want one raise each for devices 10 and 11", k.endpointEpochs)
	}
}

// The plugin writes record and map entry one after the other; between the two the agent leaves the map alone, and looks again soon.
func TestRecordBeforeItsMapEntry(t *testing.T) {
	k := newKernel(1)
	r := newRig(t, k, runDir(t))
	s, records := shop(r)
	records[0].Created = r.clock
	plugin := k.endpoints.entries[bpf.NewAddr(records[0].Addresses[0])]
	for _, a := range records[0].Addresses {
		delete(k.endpoints.entries, bpf.NewAddr(a))
	}
	r.takeSnapshot(snapshotFrom{s, r.clock})
	r.takeRecords(records)
	if got := r.work(true); got != lookAgain {
		t.Errorf("next round after %v, want %v", got, lookAgain)
	}
	if e, ok := k.endpoints.entries[bpf.NewAddr(records[0].Addresses[0])]; ok {
		t.Errorf("endpoint = %+v, want none: its ADD is at work", e)
	}
	for _, a := range records[0].Addresses {
		k.endpoints.entries[bpf.NewAddr(a)] = plugin
	}
	if got := r.work(false); got != 0 {
		t.Errorf("next round after %v, want none", got)
	}
	if e := k.endpoints.entries[bpf.NewAddr(records[0].Addresses[0])]; e.PolicyId[1] < bpf.PolicyFirst {
		t.Errorf("endpoint = %+v, want it classified", e)
	}
}

func TestLostEndpointsAreRebuilt(t *testing.T) {
	k := newKernel(1)
	run := runDir(t)
	r := newRig(t, k, run)
	s, records := shop(r)
	r.give(s, records...)
	want := r.m.endpoints.have
	clear(k.endpoints.entries)
	again := newRig(t, k, run)
	again.pipeline.host = r.host
	delete(r.host.devices, 11)
	again.give(s, records...)
	for _, a := range records[0].Addresses {
		if diff := cmp.Diff(want[bpf.NewAddr(a)], k.endpoints.entries[bpf.NewAddr(a)]); diff != "" {
			t.Errorf("rebuilt endpoint %s (-want +got):\n%s", a, diff)
		}
	}
	if len(k.endpoints.entries) != 2 {
		t.Errorf("endpoints = %v, want only those whose device is there", k.endpoints.entries)
	}
}

func TestLeakedEndpointsAreRemoved(t *testing.T) {
	k := newKernel(1)
	r := newRig(t, k, runDir(t))
	s, records := shop(r)
	leak := bpf.NewAddr(netip.MustParseAddr("10.0.0.99"))
	k.endpoints.entries[leak] = bpf.Endpoint{Ifindex: 99}
	starting := bpf.NewAddr(netip.MustParseAddr("10.0.0.98"))
	k.endpoints.entries[starting] = bpf.Endpoint{Ifindex: 98}
	r.host.devices[98] = "mgy98"
	restored := bpf.NewAddr(records[0].Addresses[0]) // its device is gone, but there is a record: the collector's business
	k.endpoints.entries[restored] = bpf.Endpoint{Ifindex: uint32(records[0].HostIfindex)}
	delete(r.host.devices, records[0].HostIfindex)
	r.work(true)
	if _, ok := k.endpoints.entries[leak]; !ok {
		t.Errorf("endpoint was removed before the records were read")
	}
	r.takeRecords(records)
	r.work(true)
	if _, ok := k.endpoints.entries[restored]; !ok {
		t.Errorf("endpoint with a record was removed")
	}
	r.host.devices[records[0].HostIfindex] = records[0].HostIfName
	r.takeSnapshot(snapshotFrom{s, r.clock})
	r.work(true)
	if _, ok := k.endpoints.entries[leak]; ok {
		t.Errorf("endpoint without record and device is there, want it removed")
	}
	if _, ok := k.endpoints.entries[starting]; !ok {
		t.Errorf("endpoint without record whose device is there was removed")
	}
	if len(k.endpoints.entries) != 5 {
		t.Errorf("%d endpoints, want 5", len(k.endpoints.entries))
	}
}

// A file that cannot be read at the start may hold the very policy or endpoints that the maps hold: they stay.
func TestNothingIsTakenBackWhileTheSourceIsIncomplete(t *testing.T) {
	k := newKernel(1)
	run := runDir(t)
	r := newRig(t, k, run)
	s, records := shop(r)
	r.give(s, records...)
	k.written()
	again := newRig(t, k, run)
	again.pipeline.host = r.host
	again.incompleteFiles = []string{"all.yaml"}
	again.give(state.NewSnapshot(), records...)
	again.work(true)
	for _, op := range k.written() {
		t.Errorf("%s, want no change: the source cannot read everything", op)
	}
	again.incompleteFiles = nil
	again.give(s, records...)
	if got := k.written(); len(got) > 0 {
		t.Errorf("operations once the file is readable again = %v, want none", got)
	}
}

func TestNumbersAreSavedBeforeTheWritesThatUseThem(t *testing.T) {
	k := newKernel(1)
	run := runDir(t)
	r := newRig(t, k, run)
	s, records := shop(r)
	k.check = func(op string) {
		var n numbers
		if err := (&savedFile{path: filepath.Join(run, numbersFile)}).load(&n); err != nil {
			t.Fatalf("at %s: %v", op, err)
		}
		for key := range k.policy.entries {
			if key.PolicyId >= n.Policy.Policies.Next {
				t.Fatalf("at %s: policy id %d is in the map, numbers.json knows those below %d", op, key.PolicyId, n.Policy.Policies.Next)
			}
		}
		for _, svc := range k.services.entries {
			if !slices.ContainsFunc(n.Service.Ports, func(p service.PortNumbers) bool { return p.ID == svc.Id }) {
				t.Fatalf("at %s: service %d is in the map, numbers.json does not know it", op, svc.Id)
			}
		}
	}
	r.give(s, records...)
	var names, rules map[string]string
	if err := (&savedFile{path: filepath.Join(run, servicesFile)}).load(&names); err != nil {
		t.Fatal(err)
	}
	if err := (&savedFile{path: filepath.Join(run, rulesFile)}).load(&rules); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]string{"1": "default/shop:80", "2": "default/shop:80"}, names); diff != "" {
		t.Errorf("services.json (-want +got):\n%s", diff)
	}
	want := map[string]string{"1": "NetworkPolicy default/deny egress isolation", "2": "NetworkPolicy default/deny ingress isolation"}
	if diff := cmp.Diff(want, rules); diff != "" {
		t.Errorf("rules.json (-want +got):\n%s", diff)
	}
}

func TestI11_NodeFacts(t *testing.T) {
	k := newKernel(1)
	run := runDir(t)
	r := newRig(t, k, run)
	remote, stale := netip.MustParseAddr("192.0.2.9"), netip.MustParseAddr("192.0.2.8")
	k.nodeAddrs.entries[bpf.NewAddr(remote)] = bpf.NodeAddrRemote
	k.nodeAddrs.entries[bpf.NewAddr(stale)] = bpf.NodeAddrLocal
	local := netip.MustParseAddr("192.0.2.1")
	r.facts = &nodeFacts{routes: "r1", addrs: map[netip.Addr]uint32{local: bpf.NodeAddrLocal | bpf.NodeAddrNodePort}}
	r.work(false)
	want := map[bpf.Addr]uint32{bpf.NewAddr(remote): bpf.NodeAddrRemote, bpf.NewAddr(local): bpf.NodeAddrLocal | bpf.NodeAddrNodePort}
	if diff := cmp.Diff(want, k.nodeAddrs.entries); diff != "" {
		t.Errorf("node_addrs before the first snapshot (-want +got):\n%s", diff)
	}
	s := state.NewSnapshot()
	s.Nodes["n2"] = &state.Node{Name: "n2", Addresses: []netip.Addr{netip.MustParseAddr("2001:db8::2")}}
	s.Nodes["n1"] = &state.Node{Name: "n1", Addresses: []netip.Addr{local}}
	r.give(s)
	want = map[bpf.Addr]uint32{bpf.NewAddr(netip.MustParseAddr("2001:db8::2")): bpf.NodeAddrRemote | bpf.NodeAddrNodePort | 1<<bpf.NodeAddrIndexShift, bpf.NewAddr(local): bpf.NodeAddrLocal | bpf.NodeAddrNodePort}
	if diff := cmp.Diff(want, k.nodeAddrs.entries); diff != "" {
		t.Errorf("node_addrs (-want +got):\n%s", diff)
	}
	if k.routeEpoch != 2 {
		t.Errorf("route epoch was raised %d times, want twice: for this node's addresses, then for the others'", k.routeEpoch)
	}
	r.facts = &nodeFacts{routes: "r2", addrs: r.facts.addrs}
	r.work(false)
	again := newRig(t, k, run)
	again.facts = r.facts
	again.give(s)
	if k.routeEpoch != 3 {
		t.Errorf("route epoch was raised %d times, want three times: at the change, not at the restart", k.routeEpoch)
	}
}

func TestI12_FaultsAreRetriedWithGrowingDelay(t *testing.T) {
	k := newKernel(1)
	r := newRig(t, k, runDir(t))
	k.services.max = 0
	s, records := shop(r)
	r.takeSnapshot(snapshotFrom{s, r.clock})
	r.takeRecords(records)
	var delays []time.Duration
	for range 8 {
		delays = append(delays, r.work(false))
	}
	if delays[0] != retryFirst || delays[1] != 2*retryFirst || delays[7] != retryMax {
		t.Errorf("delays = %v, want %v doubling up to %v", delays, retryFirst, retryMax)
	}
	if len(k.members.entries) == 0 || len(k.policy.entries) == 0 {
		t.Errorf("other maps are empty, want them written in spite of the fault")
	}
	k.services.max = 100
	if got := r.work(false); got != 0 || len(k.services.entries) != 4 {
		t.Errorf("next round after %v with %d services, want none due and 4 services", got, len(k.services.entries))
	}
}
