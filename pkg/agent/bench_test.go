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
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

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

// BenchmarkOnePolicyChanges is a round after one NetworkPolicy changed its text, without the cost of the kernel's system calls.
func BenchmarkOnePolicyChanges(b *testing.B) {
	for _, policies := range []int{100, 1000, 10000} {
		b.Run(fmt.Sprintf("policies=%d", policies), func(b *testing.B) {
			s := manyPolicies(policies)
			k := newKernel(1)
			r := newRig(b, k, runDir(b))
			r.give(s)
			key := state.Key{Namespace: "ns-0", Name: "policy-0"}
			k.written()
			begun := cpuTime(b)
			for i := 0; b.Loop(); i++ {
				next := *s
				next.NetworkPolicies = maps.Clone(s.NetworkPolicies)
				next.NetworkPolicies[key] = &state.NetworkPolicy{Key: key, Spec: onePolicy(0, 1+i%2)}
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

// manyPolicies are over 5000 pods in 100 namespaces, one in 50 of them on this node, and each allow an app, a range of ports and a CIDR in.
func manyPolicies(n int) *state.Snapshot {
	const namespaces, pods = 100, 5000
	s := state.NewSnapshot()
	for i := range namespaces {
		name := fmt.Sprintf("ns-%d", i)
		s.Namespaces[name] = state.ImplicitNamespace(name)
	}
	for i := range pods {
		key := state.Key{Namespace: fmt.Sprintf("ns-%d", i%namespaces), Name: fmt.Sprintf("pod-%d", i)}
		s.Pods[key] = &state.Pod{
			Key: key, Local: i/namespaces == i%50, Labels: map[string]string{"app": fmt.Sprint(i / namespaces % 10)},
			IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 244, byte(i >> 8), byte(i)}), netip.MustParseAddr(fmt.Sprintf("fd00:244::%x", i))},
		}
	}
	for i := range n {
		key := state.Key{Namespace: fmt.Sprintf("ns-%d", i%namespaces), Name: fmt.Sprintf("policy-%d", i/namespaces)}
		s.NetworkPolicies[key] = &state.NetworkPolicy{Key: key, Spec: onePolicy(i/namespaces, 0)}
	}
	return s
}

func onePolicy(i, version int) networkingv1.NetworkPolicySpec {
	port, end := intstr.FromInt32(int32(1000+10*i)), int32(1005+10*i+version)
	return networkingv1.NetworkPolicySpec{
		PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": fmt.Sprint(i % 10)}},
		PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress},
		Ingress: []networkingv1.NetworkPolicyIngressRule{{
			From: []networkingv1.NetworkPolicyPeer{
				{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": fmt.Sprint((i + 1) % 10)}}},
				{IPBlock: &networkingv1.IPBlock{CIDR: fmt.Sprintf("192.0.%d.0/24", i%100)}},
			},
			Ports: []networkingv1.NetworkPolicyPort{{Port: &port, EndPort: &end}},
		}},
	}
}
