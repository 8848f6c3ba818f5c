// SPDX-License-Identifier: Apache-2.0

package main

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

func TestNth(t *testing.T) {
	for _, tt := range []struct {
		cidr string
		n    uint32
		want string
	}{
		{"10.96.0.0/14", 1, "10.96.0.1"},
		{"10.96.0.0/14", 1000 + 10_000, "10.96.42.248"},
		{"fd00:96::/108", 0x1_0002, "fd00:96::1:2"},
	} {
		if got := nth(tt.cidr, tt.n).String(); got != tt.want {
			t.Errorf("nth(%s, %d) = %s, want %s", tt.cidr, tt.n, got, tt.want)
		}
	}
}

// Every service has addresses of its own, slices of both families, and endpoints in each.
func TestOtherServices(t *testing.T) {
	const count = 3000
	addrs, services, slices := map[string]bool{}, 0, 0
	for _, measured := range []clusterService{serviceLocal, serviceRemote, serviceMoving} {
		addrs[measured.addr(false).String()], addrs[measured.addr(true).String()] = true, true
	}
	for _, o := range otherServices(count) {
		switch o := o.(type) {
		case *corev1.Service:
			services++
			for _, a := range o.Spec.ClusterIPs {
				if addrs[a] {
					t.Fatalf("%s has %s, which is another one's", o.Name, a)
				}
				addrs[a] = true
			}
		case *discoveryv1.EndpointSlice:
			slices++
			if len(o.Endpoints) != 2 || o.Endpoints[0].Addresses[0] == o.Endpoints[1].Addresses[0] {
				t.Fatalf("%s has endpoints %v, want two different ones", o.Name, o.Endpoints)
			}
		}
	}
	if services != count || slices != 2*count {
		t.Errorf("%d services and %d slices, want %d and %d", services, slices, count, 2*count)
	}
}

func TestInverse(t *testing.T) {
	for rate, want := range map[float64]float64{0: 0, 1: 1, 0.95: 1.05, 0.85: 1.18} {
		if got := inverse(rate); got != want {
			t.Errorf("inverse(%v) = %v, want %v", rate, got, want)
		}
	}
}
