// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/state"
)

// BenchmarkOneEndpointChanges is a round after one endpoint of one service changed, without the cost of the kernel's system calls.
func BenchmarkOneEndpointChanges(b *testing.B) {
	for _, services := range []int{100, 1000, 10000} {
		b.Run(fmt.Sprintf("services=%d", services), func(b *testing.B) {
			s := manyServices(services)
			k := newKernel(1)
			r := newRig(b, k, runDir(b))
			r.give(s)
			key := state.Key{Namespace: "default", Name: "svc7"}
			changed := *s.EndpointSlices[key]
			changed.Endpoints = slices.Clone(changed.Endpoints)
			changed.Endpoints[3].Addr = netip.MustParseAddr("10.255.0.1")
			versions := []*state.EndpointSlice{&changed, s.EndpointSlices[key]}
			k.written()
			begun := cpuTime(b)
			for i := 0; b.Loop(); i++ {
				next := *s
				next.EndpointSlices = maps.Clone(s.EndpointSlices)
				next.EndpointSlices[key] = versions[i%2]
				r.takeSnapshot(snapshotFrom{&next, r.clock})
				r.work(false)
			}
			b.ReportMetric(float64(cpuTime(b)-begun)/float64(b.N), "cpu-ns/op")
			if len(k.written()) == 0 {
				b.Error("no operations: nothing changed")
			}
		})
	}
}

// cpuTime is what the process has used of all CPUs: on a machine with other work on it the steadier figure.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// manyServices have ten endpoints each.
func manyServices(n int) *state.Snapshot {
	s := state.NewSnapshot()
	for i := range n {
		key := state.Key{Namespace: "default", Name: fmt.Sprintf("svc%d", i)}
		s.Services[key] = &state.Service{
			Key: key, Type: state.ClusterIP, ClusterIPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)})},
			Ports: []state.ServicePort{{Name: "web", Protocol: state.TCP, Port: 80}},
		}
		slice := &state.EndpointSlice{Key: key, Service: key, Ports: []state.SlicePort{{Name: "web", Protocol: state.TCP, Port: 8080}}}
		for e := range 10 {
			slice.Endpoints = append(slice.Endpoints, state.Endpoint{
				Addr: netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), byte(e)}), Node: "n2", Ready: true, Serving: true,
			})
		}
		s.EndpointSlices[key] = slice
	}
	return s
}
