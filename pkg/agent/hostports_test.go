// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/internal/testutil/privileged"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/bpf/object"
	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/pins"
	"github.com/margay-cni/margay/pkg/state"
)

func (k *fakeKernel) PutHostPort(p pins.HostPort) error {
	slot := bpf.BackendKey{List: bpf.HostPortList + p.ID}
	if b, taken := k.backends.entries[slot]; taken && b != bpf.NewBackend(p.Backend) {
		return pins.ErrHostPortID
	}
	if err := k.backends.Put(slot, bpf.NewBackend(p.Backend)); err != nil {
		return err
	}
	if err := k.members.Put(bpf.NewServiceBackend(p.ID, p.Backend), 1); err != nil {
		return err
	}
	if s, taken := k.services.entries[p.Frontend]; taken && s.Id != p.ID {
		return pins.ErrFrontendTaken
	}
	return k.services.Put(p.Frontend, p.Service())
}

func (k *fakeKernel) DeleteHostPort(p pins.HostPort) error {
	if s, ok := k.services.entries[p.Frontend]; ok && s.Id == p.ID {
		if err := k.services.Delete(p.Frontend, s); err != nil {
			return err
		}
	}
	if err := k.members.Delete(bpf.NewServiceBackend(p.ID, p.Backend), 1); err != nil {
		return err
	}
	slot := bpf.BackendKey{List: bpf.HostPortList + p.ID}
	return k.backends.Delete(slot, k.backends.entries[slot])
}

// hostPorts are the ids of hostPorts in each map, sorted.
func (k *fakeKernel) hostPorts() map[string][]uint32 {
	ids := map[string][]uint32{}
	for _, s := range k.services.entries {
		if pins.IsHostPort(s.Id) {
			ids["services"] = append(ids["services"], s.Id)
		}
	}
	for b := range k.backends.entries {
		if pins.IsHostPort(b.List - bpf.HostPortList) {
			ids["backends"] = append(ids["backends"], b.List-bpf.HostPortList)
		}
	}
	for m := range k.members.entries {
		if pins.IsHostPort(m.ServiceId) {
			ids["members"] = append(ids["members"], m.ServiceId)
		}
	}
	for _, list := range ids {
		slices.Sort(list)
	}
	return ids
}

func inAll(ids ...uint32) map[string][]uint32 {
	if len(ids) == 0 {
		return map[string][]uint32{}
	}
	return map[string][]uint32{"services": ids, "backends": ids, "members": ids}
}

// hostPortPod is a pod with a hostPort in both families, in its record alone.
func (r *rig) hostPortPod(port uint16) *endpoint.Record {
	r.t.Helper()
	rec := r.pod("web", 7, "10.0.0.5", "fd00::5")
	for i, all := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		rec.HostPorts = append(rec.HostPorts, endpoint.HostPort{
			Protocol: "tcp", Host: netip.AddrPortFrom(all, port), Pod: netip.AddrPortFrom(rec.Addresses[i], 80), ID: bpf.HostPortFirst + uint32(i),
		})
	}
	if err := r.store.Save(rec); err != nil {
		r.t.Fatal(err)
	}
	return rec
}

// plugin does what ADD does for the record's hostPorts.
func (r *rig) plugin(rec *endpoint.Record) {
	r.t.Helper()
	for _, w := range wantedHostPorts([]*endpoint.Record{rec}) {
		if err := r.kernel.PutHostPort(w.mapForm()); err != nil {
			r.t.Fatal(err)
		}
	}
}

// nodePort is a service with a NodePort and no endpoints.
func nodePort(port uint16) *state.Snapshot {
	s := state.NewSnapshot()
	key := state.Key{Namespace: "default", Name: "web"}
	s.Services[key] = &state.Service{
		Key: key, Type: state.NodePort,
		ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.1"), netip.MustParseAddr("fd96::1")},
		Ports:      []state.ServicePort{{Name: "http", Protocol: state.TCP, Port: 80, NodePort: port}},
	}
	return s
}

func TestM3_HostPortIsRebuiltFromItsRecord(t *testing.T) {
	for name, fault := range map[string]float64{"": 0, "with faults": 0.2} {
		t.Run(name, func(t *testing.T) {
			k := newKernel(1)
			r := newRig(t, k, runDir(t))
			rec := r.hostPortPod(8080)
			k.fault = fault
			r.give(state.NewSnapshot(), rec)
			k.fault = 0
			r.work(true)
			r.settle()
			if diff := cmp.Diff(inAll(bpf.HostPortFirst, bpf.HostPortFirst+1), k.hostPorts()); diff != "" {
				t.Errorf("ids of hostPorts (-want +got):\n%s", diff)
			}
			k.written()
			again := newRig(t, k, r.store.Dir()+"/..")
			again.pipeline.host = r.host
			again.give(state.NewSnapshot(), rec)
			again.work(true)
			if got := k.written(); len(got) > 0 {
				t.Errorf("operations of a restart in which nothing changed = %v, want none", got)
			}
			if got := k.reserved.entries[8080/64]; got&(1<<(8080%64)) == 0 {
				t.Errorf("reserved ports of word %d = %#x, want port 8080 among them", 8080/64, got)
			}
		})
	}
}

// Services come and go around a hostPort: its entries, which the agent did not make, stay as they are, and no service gets its numbers.
func TestM3_HostPortSurvivesEveryRound(t *testing.T) {
	k := newKernel(3)
	run := runDir(t)
	r := newRig(t, k, run)
	rec := r.hostPortPod(8080)
	r.plugin(rec)
	want := k.hostPorts()
	k.check = func(op string) {
		if diff := cmp.Diff(want, k.hostPorts()); diff != "" {
			t.Fatalf("after %s: ids of hostPorts (-want +got):\n%s", op, diff)
		}
	}
	for i := range 20 {
		r.give(randomServices(k.rand), rec)
		r.work(i%2 == 0)
		if i == 10 { // numbers are lost
			r = newRig(t, k, t.TempDir())
			if err := r.store.Save(rec); err != nil {
				t.Fatal(err)
			}
			r.pipeline.host = &fakeHost{devices: map[int]string{rec.HostIfindex: rec.HostIfName}}
		}
	}
	for _, s := range r.wantService.services {
		if pins.IsHostPort(s.Id) || s.List[0] >= bpf.HostPortList {
			t.Errorf("service %+v has a hostPort's numbers", s)
		}
	}
}

func TestM3_HostPortWithoutRecordIsRemoved(t *testing.T) {
	k := newKernel(1)
	r := newRig(t, k, runDir(t))
	rec := r.hostPortPod(8080)
	r.plugin(rec)
	r.give(state.NewSnapshot()) // the record is there, but has not arrived yet
	r.work(true)
	if diff := cmp.Diff(inAll(bpf.HostPortFirst, bpf.HostPortFirst+1), k.hostPorts()); diff != "" {
		t.Errorf("ids of hostPorts while the record is on its way (-want +got):\n%s", diff)
	}
	if err := r.store.Delete(rec.ContainerID, rec.IfName); err != nil {
		t.Fatal(err)
	}
	r.work(false)
	r.work(true)
	if diff := cmp.Diff(inAll(), k.hostPorts()); diff != "" {
		t.Errorf("ids of hostPorts without a record (-want +got):\n%s", diff)
	}
	if r.last.Leaks != 2 {
		t.Errorf("leaks = %d, want 2", r.last.Leaks)
	}
}

// The kernel keeps hostPorts from being chosen for as long as a record has them.
func TestM3_HostPortIsKeptFromTheNodesOwnConnections(t *testing.T) {
	k := newKernel(1)
	r := newRig(t, k, runDir(t))
	rec := r.hostPortPod(8080)
	r.plugin(rec)
	r.host.hostPortErr = errInjected
	r.give(state.NewSnapshot(), rec)
	if len(r.host.hostPorts) != 0 || !slices.ContainsFunc(r.last.Problems, func(p string) bool { return strings.Contains(p, "hostPorts could not") }) {
		t.Errorf("reserved %v with problems %q, want none and one about it", r.host.hostPorts, r.last.Problems)
	}
	r.host.hostPortErr = nil
	r.work(false)
	if diff := cmp.Diff([]uint16{8080}, r.host.hostPorts); diff != "" {
		t.Errorf("reserved hostPorts (-want +got):\n%s", diff)
	}
	r.host.hostPorts = nil // somebody sets the list anew
	r.work(true)
	if diff := cmp.Diff([]uint16{8080}, r.host.hostPorts); diff != "" {
		t.Errorf("reserved hostPorts after a full compare (-want +got):\n%s", diff)
	}
	r.give(state.NewSnapshot())
	if len(r.host.hostPorts) != 0 {
		t.Errorf("reserved hostPorts %v without a record, want none", r.host.hostPorts)
	}
}

// What a pod left in the maps goes while the cluster is not known yet, and while it cannot be read entirely.
func TestLeaksGoWithoutASource(t *testing.T) {
	for name, prepare := range map[string]func(r *rig){
		"no snapshot yet":   func(r *rig) { r.takeRecords(nil) },
		"source incomplete": func(r *rig) { r.incompleteFiles = []string{"all.yaml"}; r.give(state.NewSnapshot()) },
	} {
		t.Run(name, func(t *testing.T) {
			k := newKernel(1)
			r := newRig(t, k, runDir(t))
			rec := r.hostPortPod(8080)
			r.plugin(rec)
			clear(r.host.devices)
			if err := r.store.Delete(rec.ContainerID, rec.IfName); err != nil {
				t.Fatal(err)
			}
			prepare(r)
			r.work(true)
			if diff := cmp.Diff(inAll(), k.hostPorts()); diff != "" {
				t.Errorf("ids of hostPorts (-want +got):\n%s", diff)
			}
			if len(k.endpoints.entries) != 0 {
				t.Errorf("endpoints = %v, want none", k.endpoints.entries)
			}
		})
	}
}

func TestM3_HostPortAndNodePortOfOneNumber(t *testing.T) {
	frontend := bpf.NewFrontendKey(6, netip.IPv4Unspecified(), 30080)
	t.Run("the pod was first", func(t *testing.T) {
		k := newKernel(1)
		r := newRig(t, k, runDir(t))
		rec := r.hostPortPod(30080)
		r.plugin(rec)
		r.give(nodePort(30080), rec)
		if s := k.services.entries[frontend]; !pins.IsHostPort(s.Id) {
			t.Errorf("frontend = %+v, want the hostPort's", s)
		}
		want := "Service default/web: TCP NodePort 30080 (IPv4) is taken by a hostPort of pod default/web"
		if !slices.ContainsFunc(r.last.Problems, func(p string) bool { return strings.Contains(p, want) }) {
			t.Errorf("problems = %q, want %q among them", r.last.Problems, want)
		}
		// DEL: the service gets what it waits for.
		for _, w := range wantedHostPorts([]*endpoint.Record{rec}) {
			if err := k.DeleteHostPort(w.mapForm()); err != nil {
				t.Fatal(err)
			}
		}
		r.give(nodePort(30080))
		if s, ok := k.services.entries[frontend]; !ok || pins.IsHostPort(s.Id) || len(r.last.Problems) != 0 {
			t.Errorf("frontend after DEL = %+v, %v, problems = %q: want the NodePort's and none", s, ok, r.last.Problems)
		}
	})
	t.Run("the service was first", func(t *testing.T) {
		k := newKernel(1)
		r := newRig(t, k, runDir(t))
		r.give(nodePort(30080))
		before := maps.Clone(k.services.entries)
		// An ADD that is about to be refused has written its record.
		r.give(nodePort(30080), r.hostPortPod(30080))
		if diff := cmp.Diff(before, k.services.entries); diff != "" {
			t.Errorf("frontends (-want +got):\n%s", diff)
		}
	})
}

// The kernel's table never replaces what the plugin has made, not even when the mirror does not know of it yet.
func TestM3_HostPortIsNotOverwrittenInTheKernel(t *testing.T) {
	privileged.Require(t)
	specs, err := object.MapSpecs()
	if err != nil {
		t.Fatal(err)
	}
	m, err := ebpf.NewMap(specs["services"])
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	table := KernelTables(&datapath.Maps{Services: m}).Services
	k := bpf.NewFrontendKey(6, netip.IPv6Unspecified(), 30080)
	theirs := pins.HostPort{ID: bpf.HostPortFirst, Frontend: k}.Service()
	if err := m.Update(&k, &theirs, ebpf.UpdateAny); err != nil {
		t.Fatal(err)
	}
	var got bpf.Service
	if err := table.Put(k, bpf.Service{Id: 1}); !errors.Is(err, ErrChanged) || m.Lookup(&k, &got) != nil || got != theirs {
		t.Errorf("Put over a hostPort = %v, entry = %+v, want ErrChanged and the hostPort's", err, got)
	}
	if err := m.Delete(&k); err != nil {
		t.Fatal(err)
	}
	for _, id := range []uint32{1, 2} { // made, then changed
		if err := table.Put(k, bpf.Service{Id: id}); err != nil || m.Lookup(&k, &got) != nil || got.Id != id {
			t.Errorf("Put = %v, entry = %+v, want id %d", err, got, id)
		}
	}
}
