// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/service"
	"github.com/margay-cni/margay/pkg/state"
)

// randomServices is a cluster with some services whose endpoints and traffic policies come and go. Backends of service n in slice
// n live in 10.n.0.0/16 and fd00:n::/32, so that a backend tells whose it is.
func randomServices(r *rand.Rand) *state.Snapshot {
	s := state.NewSnapshot()
	for n := range 5 {
		if r.IntN(5) == 0 {
			continue
		}
		key := state.Key{Namespace: "default", Name: fmt.Sprintf("svc%d", n)}
		svc := &state.Service{
			Key: key, Type: state.NodePort, ExternalLocal: r.IntN(2) == 0, InternalLocal: r.IntN(4) == 0,
			Balancing:       []state.LoadBalancing{state.BalanceRandom, state.BalanceMaglev, state.BalanceMaglev}[r.IntN(3)],
			LoadBalancerIPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 96, 1, byte(n + 1)}), netip.MustParseAddr(fmt.Sprintf("fd96::1:%d", n+1))},
			ClusterIPs:      []netip.Addr{netip.AddrFrom4([4]byte{10, 96, 0, byte(n + 1)}), netip.MustParseAddr(fmt.Sprintf("fd96::%d", n+1))},
			Ports:           []state.ServicePort{{Name: "web", Protocol: state.TCP, Port: 80, NodePort: uint16(30000 + n)}},
		}
		for range r.IntN(3) {
			bits := r.IntN(24) + 8
			svc.LoadBalancerSourceRanges = append(svc.LoadBalancerSourceRanges, netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, 0}), bits).Masked())
		}
		s.Services[key] = svc
		for _, ipv6 := range []bool{false, true} {
			slice := &state.EndpointSlice{
				Key: state.Key{Namespace: "default", Name: fmt.Sprintf("svc%d-%v", n, ipv6)}, Service: key, IPv6: ipv6,
				Ports: []state.SlicePort{{Name: "web", Protocol: state.TCP, Port: 8080}},
			}
			for b := range r.IntN(6) {
				a := netip.AddrFrom4([4]byte{10, byte(n), 0, byte(b*r.IntN(3) + 1)})
				if ipv6 {
					a = netip.MustParseAddr(fmt.Sprintf("fd00:%d::%d", n, b*r.IntN(3)+1))
				}
				slice.Endpoints = append(slice.Endpoints, state.Endpoint{
					Addr: a, Node: fmt.Sprintf("n%d", 1+r.IntN(2)), Ready: r.IntN(4) > 0, Serving: true, Terminating: r.IntN(4) == 0,
				})
			}
			s.EndpointSlices[slice.Key] = slice
		}
	}
	return s
}

// halfBuilt returns what is wrong with the service maps at this instant, or "". faultless says that no write has failed: where one has, a
// frontend may be closed for a while, but it leads nowhere that it should not.
func (k *fakeKernel) halfBuilt(faultless bool) string {
	for frontend, svc := range k.services.entries {
		for scope := range svc.List {
			for slot := range svc.Count[scope] {
				if _, ok := k.backends.entries[bpf.BackendKey{List: svc.List[scope], Slot: slot}]; !ok {
					return fmt.Sprintf("frontend %v counts %d backends of list %d, slot %d is not there",
						frontend, svc.Count[scope], svc.List[scope], slot)
				}
			}
		}
		if wrong := k.tableFault(svc); wrong != "" {
			return fmt.Sprintf("frontend %v: %s", frontend, wrong)
		}
		// A frontend whose ranges cannot be written is closed, not open.
		if faultless && svc.Flags&bpf.ServiceSourceRanges != 0 && !k.hasRange(svc.Id) {
			return fmt.Sprintf("frontend %v is limited to sources, and has none", frontend)
		}
	}
	if faultless {
		return k.addrFault()
	}
	return ""
}

// tableFault returns what is wrong with the Maglev tables that a service uses: a part is missing, or names a slot without backend.
func (k *fakeKernel) tableFault(svc bpf.Service) string {
	for scope, size := range svc.Maglev {
		positions := int(service.TableSizes()[size])
		for first := 0; first < positions; first += bpf.MaglevSlots {
			key := bpf.MaglevKey{List: svc.List[scope], Size: size, Chunk: uint16(first / bpf.MaglevSlots)}
			chunk, ok := k.maglev.entries[key]
			if !ok {
				return fmt.Sprintf("part %d of the table of list %d is not there", key.Chunk, key.List)
			}
			for _, slot := range chunk.Slot[:min(bpf.MaglevSlots, positions-first)] {
				if _, ok := k.backends.entries[bpf.BackendKey{List: key.List, Slot: uint32(slot)}]; !ok {
					return fmt.Sprintf("the table of list %d names slot %d, which is not there", key.List, slot)
				}
			}
		}
	}
	return ""
}

func (k *fakeKernel) hasRange(id uint32) bool {
	for r := range k.ranges.entries {
		if r.ServiceId == id {
			return true
		}
	}
	return false
}

// addrFault returns which cluster address refuses all ports because none of its frontends has been written yet, or "".
func (k *fakeKernel) addrFault() string {
	for a, what := range k.addrs.entries {
		served := what != bpf.ServiceAddrActive
		for f := range k.services.entries {
			served = served || f.Addr == a.Addr
		}
		if !served && !k.deleting {
			return fmt.Sprintf("%v refuses all ports", a.Addr.Netip())
		}
	}
	return ""
}

// astray returns which frontend of randomServices leads to another service's backend, in its lists or by a hash, or "".
func (k *fakeKernel) astray() string {
	hashed := byHash(k.backends.entries)
	for frontend, svc := range k.services.entries {
		for slot, b := range hashed[svc.Id] {
			if want, got := owner(frontend), owner(bpf.FrontendKey{Addr: bpf.NewAddr(b.Addr())}); want != got {
				return fmt.Sprintf("frontend %v leads by hash to %v", frontend, b)
			}
			if slot != 0 && slot != bpf.BackendHash(b) {
				return fmt.Sprintf("service %d has %v under hash %d, want %d", svc.Id, b, slot, bpf.BackendHash(b))
			}
		}
		for scope := range svc.List {
			for slot := range svc.Count[scope] {
				b := k.backends.entries[bpf.BackendKey{List: svc.List[scope], Slot: slot}]
				if want, got := owner(frontend), owner(bpf.FrontendKey{Addr: b.Addr}); want != got {
					return fmt.Sprintf("frontend %v leads to %v", frontend, b.AddrPort())
				}
			}
		}
	}
	return ""
}

// owner is the number of the service that an address, or a node port, belongs to.
func owner(k bpf.FrontendKey) int {
	a := k.Addr.Netip()
	if a.IsUnspecified() {
		return int(bpf.Port16(k.Port)) - 30000
	}
	b := a.As16()
	switch {
	case a.Is4() && a.As4()[1] == 96:
		return int(a.As4()[3]) - 1
	case a.Is4():
		return int(a.As4()[1])
	case b[0] == 0xfd && b[1] == 0x96:
		return int(b[15]) - 1
	}
	return int(b[3])
}

func TestServicesAreNeverHalfBuilt(t *testing.T) {
	for seed := range uint64(30) {
		for _, fault := range []float64{0, 0.2} {
			t.Run(fmt.Sprintf("seed %d fault %v", seed, fault), func(t *testing.T) {
				k := newKernel(seed)
				k.fault = fault
				k.check = func(op string) {
					if wrong := k.halfBuilt(fault == 0) + k.astray(); wrong != "" {
						t.Fatalf("after %s: %s", op, wrong)
					}
				}
				r := newRig(t, k, runDir(t))
				for range 15 {
					r.give(randomServices(k.rand))
				}
				k.fault = 0
				r.settle()
				if diff := cmp.Diff(r.wantService.services, k.services.entries); diff != "" {
					t.Errorf("services (-want +got):\n%s", diff)
				}
				if diff := cmp.Diff(r.wantService.backends, k.backends.entries); diff != "" {
					t.Errorf("backends (-want +got):\n%s", diff)
				}
				if diff := cmp.Diff(r.wantService.members, k.members.entries); diff != "" {
					t.Errorf("service_backends (-want +got):\n%s", diff)
				}
				if diff := cmp.Diff(r.wantService.maglev, k.maglev.entries); diff != "" {
					t.Errorf("maglev (-want +got):\n%s", diff)
				}
				if diff := cmp.Diff(r.wantService.ranges, k.ranges.entries); diff != "" {
					t.Errorf("source_ranges (-want +got):\n%s", diff)
				}
				if diff := cmp.Diff(r.wantService.addrs, k.addrs.entries); diff != "" {
					t.Errorf("service_addrs (-want +got):\n%s", diff)
				}
			})
		}
	}
}

// A Maglev table waits for the backends that it names: where the map of backends is full, it is not written.
func TestTableWaitsForItsBackends(t *testing.T) {
	k := newKernel(1)
	s := manyServices(1)
	for _, svc := range s.Services {
		svc.Balancing = state.BalanceMaglev
	}
	k.check = func(op string) {
		for table, chunk := range k.maglev.entries {
			if _, ok := k.backends.entries[bpf.BackendKey{List: table.List, Slot: uint32(chunk.Slot[0])}]; !ok {
				t.Fatalf("after %s: the table of list %d names slot %d, which is not there", op, table.List, chunk.Slot[0])
			}
		}
	}
	r := newRig(t, k, runDir(t))
	limit := k.backends.max
	k.backends.max = 2
	r.give(s)
	if len(k.maglev.entries) != 0 || len(k.services.entries) != 0 {
		t.Errorf("%d parts of tables and %d services are there without their backends", len(k.maglev.entries), len(k.services.entries))
	}
	k.backends.max = limit
	r.settle()
	if len(k.maglev.entries) == 0 || len(k.services.entries) != 1 {
		t.Errorf("%d parts of tables and %d services once there is room, want some and 1", len(k.maglev.entries), len(k.services.entries))
	}
}

// A kill at any instant, even in the middle of a fault, leaves maps from which the next start goes on, and no raise is lost: an epoch is
// raised after the last member that a service loses, whoever raises it.
func TestKillBetweenAnyTwoWritesLosesNoServiceEpoch(t *testing.T) {
	for kill := 1; ; kill++ {
		k := newKernel(1)
		run := runDir(t)
		s := rand.New(rand.NewPCG(7, 7))
		first, second := randomServices(s), randomServices(s)
		r := newRig(t, k, run)
		r.give(first)
		before := r.wantService.members
		outstanding := map[uint32]bool{}
		clear(k.serviceEpochs)
		k.check = func(op string) {
			if wrong := k.halfBuilt(true) + k.astray(); wrong != "" {
				t.Fatalf("kill at %d: after %s: %s", kill, op, wrong)
			}
			switch op {
			case "delete service_backends":
				for m := range before {
					if _, ok := k.members.entries[m]; !ok {
						outstanding[m.ServiceId] = true
					}
				}
			case "raise services":
				for id := range outstanding {
					if k.serviceEpochs[id] > 0 {
						delete(outstanding, id)
					}
				}
			}
		}
		k.killAfter = kill
		killed := survives(func() { r.give(second) })
		k.killAfter = 0
		r = newRig(t, k, run)
		r.give(second)
		if len(outstanding) > 0 {
			t.Fatalf("kill at %d: services %v lost a backend and their epoch was not raised after it", kill, outstanding)
		}
		if diff := cmp.Diff(r.wantService.members, k.members.entries); diff != "" {
			t.Fatalf("kill at %d: service_backends (-want +got):\n%s", kill, diff)
		}
		if !killed {
			if kill < 10 {
				t.Fatalf("only %d operations: the test does not reach what it is about", kill)
			}
			return
		}
	}
}

// survives reports whether f was killed.
func survives(f func()) (killed bool) {
	defer func() {
		if e := recover(); e == errKilled {
			killed = true
		} else if e != nil {
			panic(e)
		}
	}()
	f()
	return false
}
