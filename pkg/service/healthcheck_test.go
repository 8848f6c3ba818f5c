// SPDX-License-Identifier: Apache-2.0

package service

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/pkg/state"
)

func healthChecked(s *state.Service) {
	s.Type, s.ExternalLocal, s.HealthCheckNodePort = state.LoadBalancer, true, 30999
}

func TestH1_HealthCheckCountsLocalReadyAddresses(t *testing.T) {
	for _, tc := range []struct {
		name      string
		service   []func(*state.Service)
		endpoints func(f family) []state.Endpoint
		want      int // -1: nothing to ask
	}{
		{"two here, one elsewhere", nil, func(f family) []state.Endpoint {
			return []state.Endpoint{f.ready(1, thisNode), f.ready(2, thisNode), f.ready(3, "node-b")}
		}, 2},
		{"one address on two ports counts once", []func(*state.Service){withSecondPort}, func(f family) []state.Endpoint {
			return []state.Endpoint{f.ready(1, thisNode)}
		}, 1},
		{"unready, terminating and gone do not count", nil, func(f family) []state.Endpoint {
			return []state.Endpoint{f.unready(1, thisNode), f.draining(2, thisNode), f.gone(3, thisNode)}
		}, 0},
		{"a draining one that serves as fallback does not count", nil, func(f family) []state.Endpoint {
			return []state.Endpoint{f.draining(1, thisNode)}
		}, 0},
		{"I7: the entry that is not terminating counts", nil, func(f family) []state.Endpoint {
			return []state.Endpoint{f.draining(1, thisNode), f.ready(1, thisNode)}
		}, 1},
		{"topology hints do not matter", nil, func(f family) []state.Endpoint {
			return []state.Endpoint{hinted(f.ready(1, thisNode), []string{"node-b"}, nil), hinted(f.ready(2, "node-b"), []string{"node-b"}, nil)}
		}, 1},
		{"no endpoint", nil, func(family) []state.Endpoint { return nil }, 0},
		{"no port", []func(*state.Service){func(s *state.Service) { s.HealthCheckNodePort = 0 }},
			func(f family) []state.Endpoint { return []state.Endpoint{f.ready(1, thisNode)} }, -1},
		{"external policy Cluster", []func(*state.Service){func(s *state.Service) { s.ExternalLocal = false }},
			func(f family) []state.Endpoint { return []state.Endpoint{f.ready(1, thisNode)} }, -1},
		{"type NodePort", []func(*state.Service){func(s *state.Service) { s.Type = state.NodePort }},
			func(f family) []state.Endpoint { return []state.Endpoint{f.ready(1, thisNode)} }, -1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bothFamilies(t, func(t *testing.T, f family) {
				svc := f.service(append([]func(*state.Service){healthChecked}, tc.service...)...)
				slice := f.slice("s", tc.endpoints(f)...)
				slice.Ports = append(slice.Ports, state.SlicePort{Name: "dns", Protocol: state.UDP, Port: 5353})
				var want []state.HealthCheck
				if tc.want >= 0 {
					want = []state.HealthCheck{{Service: apiKey, IPv6: bool(f), Port: 30999, LocalEndpoints: tc.want}}
				}
				if diff := cmp.Diff(want, NewCompiler(thisNode).Compile(world(svc, slice)).HealthChecks); diff != "" {
					t.Errorf("health checks (-want +got):\n%s", diff)
				}
			})
		})
	}
}

// A service of both families has two answers, as kube-proxy's two proxiers give.
func TestH1_HealthCheckOfEachFamily(t *testing.T) {
	v4, v6 := family(false), family(true)
	svc := v4.service(healthChecked, func(s *state.Service) { s.ClusterIPs = append(s.ClusterIPs, v6.vip(1)) })
	r := NewCompiler(thisNode).Compile(world(svc, v4.slice("a", v4.ready(1, thisNode), v4.ready(2, thisNode)), v6.slice("b", v6.ready(3, "node-b"))))
	want := []state.HealthCheck{
		{Service: apiKey, Port: 30999, LocalEndpoints: 2},
		{Service: apiKey, IPv6: true, Port: 30999},
	}
	if diff := cmp.Diff(want, r.HealthChecks); diff != "" {
		t.Errorf("health checks (-want +got):\n%s", diff)
	}
}
