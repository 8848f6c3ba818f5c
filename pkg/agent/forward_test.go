// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/bpf/object"
	"github.com/margay-cni/margay/pkg/manifest"
	"github.com/margay-cni/margay/pkg/service"
	"github.com/margay-cni/margay/pkg/state"
)

var sameAddrPort = cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })

// byHash is the content of the lists by hash, by service id and slot.
func byHash(backends map[bpf.BackendKey]bpf.Backend) map[uint32]map[uint32]netip.AddrPort {
	out := map[uint32]map[uint32]netip.AddrPort{}
	for k, b := range backends {
		if k.List&bpf.BackendByHash == 0 {
			continue
		}
		id := k.List &^ bpf.BackendByHash
		if out[id] == nil {
			out[id] = map[uint32]netip.AddrPort{}
		}
		out[id][k.Slot] = b.AddrPort()
	}
	return out
}

// sameHash returns two backends of one family with one hash, the first one first in order.
func sameHash(t *testing.T, ipv6 bool) (first, second netip.AddrPort) {
	t.Helper()
	seen := map[uint32]netip.AddrPort{}
	for n := range 1 << 17 {
		a := netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)})
		if ipv6 {
			a = netip.MustParseAddr(fmt.Sprintf("fd00::%x:%x", n>>16, n&0xffff))
		}
		b := netip.AddrPortFrom(a, 8080)
		h := bpf.BackendHash(b)
		if had, ok := seen[h]; ok {
			return had, b
		}
		seen[h] = b
	}
	t.Fatal("no two of 131 072 backends have one hash of 16 bits")
	return first, second
}

func TestBackendsAreFoundByTheirHash(t *testing.T) {
	for name, ipv6 := range map[string]bool{"IPv4": false, "IPv6": true} {
		t.Run(name, func(t *testing.T) {
			a, b := sameHash(t, ipv6)
			other := netip.AddrPortFrom(a.Addr(), a.Port()+1)
			for _, order := range [][]netip.AddrPort{{a, b, other}, {b, a, other}} {
				w := newServiceMaps(&service.Result{LocalBackends: map[uint32][]netip.AddrPort{7: order, 9: {other}}})
				want := map[uint32]map[uint32]netip.AddrPort{
					7: {0: order[0], bpf.BackendHash(a): order[0], bpf.BackendHash(other): other},
					9: {0: other, bpf.BackendHash(other): other},
				}
				if diff := cmp.Diff(want, byHash(w.backends), sameAddrPort); diff != "" {
					t.Errorf("lists by hash of %v (-want +got):\n%s", order, diff)
				}
			}
		})
	}
}

func TestListNumbersLeaveRoomForListsByHash(t *testing.T) {
	if service.MaxList+1 != bpf.HostPortList || bpf.HostPortList+bpf.HostPortLast >= bpf.BackendByHash || service.MaxServiceID+1 != bpf.HostPortFirst {
		t.Errorf("lists end at %#x and service ids at %#x, want hostPorts' numbers above them, all below BACKEND_BY_HASH = %#x",
			service.MaxList, service.MaxServiceID, bpf.BackendByHash)
	}
}

func TestServiceFlags(t *testing.T) {
	for _, tt := range []struct {
		service service.Service
		want    uint32
	}{
		{service.Service{}, 0},
		{service.Service{ExternalLocal: true}, bpf.ServiceExternalLocal},
		{service.Service{DSR: true}, bpf.ServiceDSR},
		{service.Service{DSR: true, ExternalLocal: true, DropEmpty: [2]bool{true, false}},
			bpf.ServiceDSR | bpf.ServiceExternalLocal | bpf.ServiceDropExternal},
	} {
		if got := newService(tt.service).Flags; got != tt.want {
			t.Errorf("flags of %+v = %v, want %v", tt.service, object.ServiceFlagNames(got), object.ServiceFlagNames(tt.want))
		}
	}
}

func TestConfigNamesAKnownWayBack(t *testing.T) {
	for way, want := range map[state.ServiceReturn]state.ServiceReturn{
		"": state.ReturnTunnel, state.ReturnTunnel: state.ReturnTunnel, state.ReturnDSR: state.ReturnDSR, "DSR": "",
	} {
		c := Config{Node: "n1", Run: t.TempDir(), Source: manifest.New(t.TempDir(), "n1", nil), ServiceReturn: way}
		err := c.validate()
		switch {
		case want == "" && (err == nil || !strings.Contains(err.Error(), `service return is "DSR"`)):
			t.Errorf("validate() with service return %q = %v, want it named", way, err)
		case want != "" && (err != nil || c.ServiceReturn != want):
			t.Errorf("validate() with service return %q = %v and %q, want %q", way, err, c.ServiceReturn, want)
		}
	}
}

// The agent's default reaches the frontends, also when the source is incomplete and the compilers are made anew.
func TestAgentsDefaultWayBackReachesTheFrontends(t *testing.T) {
	k := newKernel(1)
	r := newRig(t, k, runDir(t))
	r.services.DefaultReturn = state.ReturnDSR
	s, records := shop(r)
	for _, incomplete := range [][]string{nil, {"all.yaml"}, nil} {
		r.incompleteFiles = incomplete
		r.give(s, records...)
		if len(k.services.entries) != 4 {
			t.Fatalf("%d frontends, want 4", len(k.services.entries))
		}
		for f, svc := range k.services.entries {
			if svc.Flags != bpf.ServiceDSR {
				t.Errorf("incomplete %v: flags of %v = %v, want dsr", incomplete, f.Addr.Netip(), object.ServiceFlagNames(svc.Flags))
			}
		}
	}
}

// remotePod is a pod of another node, as a manifest with spec.nodeName and a status says it.
func remotePod(addrs ...string) *state.Pod {
	p := &state.Pod{
		Key: state.Key{Namespace: "default", Name: "far"}, Labels: map[string]string{"app": "shop"}, Node: "n2", Ready: true,
	}
	for _, a := range addrs {
		p.IPs = append(p.IPs, netip.MustParseAddr(a))
	}
	return p
}

func TestListsByHashHoldThisNodesBackendsAlone(t *testing.T) {
	k := newKernel(1)
	r := newRig(t, k, runDir(t))
	s, records := shop(r)
	far := remotePod("10.9.0.1", "fd09::1")
	s.Pods[far.Key] = far

	// A frontend comes after what others forward to it is found.
	k.check = func(op string) {
		if op != "put services" {
			return
		}
		if diff := cmp.Diff(byHash(r.wantService.backends), byHash(k.backends.entries), sameAddrPort); diff != "" {
			t.Errorf("lists by hash when a frontend is written (-want +got):\n%s", diff)
		}
	}
	r.give(s, records...)
	k.check = nil
	for _, tt := range []struct {
		vip    string
		here   []string
		remote string
	}{
		{"10.96.0.1", []string{"10.0.0.1:8080", "10.0.0.2:8080"}, "10.9.0.1:8080"},
		{"fd96::1", []string{"[fd00::1]:8080", "[fd00::2]:8080"}, "[fd09::1]:8080"},
	} {
		svc := k.services.entries[bpf.NewFrontendKey(6, netip.MustParseAddr(tt.vip), 80)]
		if svc.Count != [2]uint32{3, 3} {
			t.Errorf("%s counts %v backends, want 3: those of other nodes as well", tt.vip, svc.Count)
		}
		want := map[uint32]netip.AddrPort{}
		for i, b := range tt.here {
			if i == 0 {
				want[0] = netip.MustParseAddrPort(b)
			}
			want[bpf.BackendHash(netip.MustParseAddrPort(b))] = netip.MustParseAddrPort(b)
		}
		if diff := cmp.Diff(want, byHash(k.backends.entries)[svc.Id], sameAddrPort); diff != "" {
			t.Errorf("list by hash of %s (-want +got):\n%s", tt.vip, diff)
		}
		if remote := bpf.BackendHash(netip.MustParseAddrPort(tt.remote)); want[remote].IsValid() {
			t.Fatalf("%s has the hash of a local backend: choose another address", tt.remote)
		}
	}
}

func TestListsByHashAreTakenBackLast(t *testing.T) {
	k := newKernel(1)
	r := newRig(t, k, runDir(t))
	s, records := shop(r)
	r.give(s, records...)
	before := byHash(k.backends.entries)

	k.check = func(op string) {
		if op != "delete backends" && len(byHash(k.backends.entries)) != len(before) {
			t.Errorf("at %s: lists by hash %v, want those of %v still there", op, byHash(k.backends.entries), before)
		}
	}
	k.written()
	r.give(s, records[0])
	ops := k.written()
	first := slices.Index(ops, "delete backends")
	last := max(lastIndex(ops, "put services"), lastIndex(ops, "delete service_backends"), lastIndex(ops, "raise services"))
	if first < 0 || last < 0 || first < last {
		t.Errorf("operations when a backend leaves = %v, want the deletes from backends last", ops)
	}
	k.check = nil
	for id, slots := range byHash(k.backends.entries) {
		if len(slots) != 2 || len(before[id]) != 3 || slots[0] != before[id][0] {
			t.Errorf("list by hash of %d = %v after %v, want the backend that stayed, by its hash and in slot 0", id, slots, before[id])
		}
	}

	r.give(state.NewSnapshot(), records[0])
	if len(k.backends.entries) > 0 {
		t.Errorf("backends without any service = %v, want none", k.backends.entries)
	}
}

// Whatever wrote it, a list by hash that no service explains does not outlive the next full compare.
func TestStaleListsByHashAreRemoved(t *testing.T) {
	k := newKernel(1)
	run := runDir(t)
	r := newRig(t, k, run)
	s, records := shop(r)
	r.give(s, records...)
	want := byHash(k.backends.entries)
	stale := bpf.NewBackend(netip.MustParseAddrPort("10.0.0.77:8080"))
	for id := range want {
		k.backends.entries[bpf.BackendKey{List: bpf.BackendByHash | id, Slot: bpf.BackendHash(stale.AddrPort())}] = stale
	}
	k.backends.entries[bpf.BackendKey{List: bpf.BackendByHash | 999, Slot: 5}] = stale
	r.work(true)
	if diff := cmp.Diff(want, byHash(k.backends.entries), sameAddrPort); diff != "" {
		t.Errorf("lists by hash after a full compare (-want +got):\n%s", diff)
	}
}

// Without its numbers an agent gives new ones: ordinary lists must stay below the lists by hash that the maps hold, and no service may take
// over the id of one.
func TestNumbersAfreshDoNotMeetListsByHash(t *testing.T) {
	k := newKernel(1)
	run := runDir(t)
	r := newRig(t, k, run)
	s, records := shop(r)
	r.give(s, records...)
	orphan := bpf.BackendKey{List: bpf.BackendByHash | 3, Slot: 5}
	k.backends.entries[orphan] = bpf.NewBackend(netip.MustParseAddrPort("10.0.0.77:8080"))
	if err := os.Remove(filepath.Join(run, numbersFile)); err != nil {
		t.Fatal(err)
	}
	again := newRig(t, k, run)
	again.pipeline.host = r.host
	again.give(s, records...)
	again.settle()
	for f, svc := range k.services.entries {
		if svc.Id == 3 || svc.List[0] > service.MaxList || svc.List[1] > service.MaxList {
			t.Errorf("frontend %v = %+v, want an ordinary list and an id without leftovers", f.Addr.Netip(), svc)
		}
		if len(byHash(k.backends.entries)[svc.Id]) != 3 {
			t.Errorf("list by hash of %d = %v, want two backends and slot 0", svc.Id, byHash(k.backends.entries)[svc.Id])
		}
	}
	if _, still := k.backends.entries[orphan]; still || len(byHash(k.backends.entries)) != 2 {
		t.Errorf("lists by hash = %v, want one for each family", byHash(k.backends.entries))
	}
}

// A node's own records say where their pods are; of other pods their manifests do.
func TestEndpointsFromSelectorsNameTheirNodes(t *testing.T) {
	r := newRig(t, newKernel(1), runDir(t))
	s, records := shop(r)
	far := remotePod("10.9.0.1", "fd09::1")
	s.Pods[far.Key] = far
	// Known to the source as well, which does not say where it is.
	key := state.Key{Namespace: "default", Name: records[0].Name}
	s.Pods[key] = &state.Pod{Key: key, Labels: map[string]string{"app": "shop"}, Ready: true}
	r.give(s, records...)
	got := map[string]string{}
	for _, slice := range r.merged.EndpointSlices {
		for _, e := range slice.Endpoints {
			got[e.Addr.String()] = e.Node
		}
	}
	want := map[string]string{
		"10.0.0.1": "n1", "fd00::1": "n1", "10.0.0.2": "n1", "fd00::2": "n1", "10.9.0.1": "n2", "fd09::1": "n2",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("nodes of the endpoints (-want +got):\n%s", diff)
	}
}

func lastIndex(ops []string, op string) int {
	for i := len(ops) - 1; i >= 0; i-- {
		if ops[i] == op {
			return i
		}
	}
	return -1
}
