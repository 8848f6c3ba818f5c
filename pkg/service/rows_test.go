// SPDX-License-Identifier: Apache-2.0

package service

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/pkg/state"
)

// Contract row S1: a service port has the list of all nodes' endpoints where its internal policy is Cluster or it is reached from outside
// the cluster at all, and that of this node's where a policy that governs one of its frontends is Local.
func TestS1_ListsThatAServicePortHas(t *testing.T) {
	for _, tc := range []struct {
		name           string
		tweaks         []func(*state.Service)
		cluster, local bool
	}{
		{"cluster address, Cluster", nil, true, false},
		{"cluster address, Local", []func(*state.Service){internalLocal}, false, true},
		{"external Local without an outside address", []func(*state.Service){externalLocal}, true, false},
		{"both Local without an outside address", []func(*state.Service){internalLocal, externalLocal}, false, true},
		{"NodePort, Cluster", []func(*state.Service){withNodePort}, true, false},
		{"NodePort, internal Local", []func(*state.Service){withNodePort, internalLocal}, true, true},
		{"NodePort, external Local", []func(*state.Service){withNodePort, externalLocal}, true, true},
		{"NodePort, both Local", []func(*state.Service){withNodePort, internalLocal, externalLocal}, true, true},
	} {
		bothFamilies(t, func(t *testing.T, f family) {
			r := NewCompiler(thisNode).Compile(world(f.service(tc.tweaks...), f.slice("a", f.ready(1, thisNode), f.ready(2, "node-b"))))
			var cluster, local bool
			for _, l := range r.Lists {
				cluster, local = cluster || len(l) == 2, local || len(l) == 1
			}
			if cluster != tc.cluster || local != tc.local || len(r.Lists) > 2 {
				t.Errorf("%s: lists %v, want the cluster's: %v, the node's own: %v", tc.name, r.Lists, tc.cluster, tc.local)
			}
		})
	}
}

// Contract row I9: only the endpoint's own conditions count; what the service says of addresses that are not ready was for whoever
// made the slice.
func TestI9_PublishNotReadyIsForTheSliceAlone(t *testing.T) {
	bothFamilies(t, func(t *testing.T, f family) {
		for name, tc := range map[string]struct {
			endpoint state.Endpoint
			want     seen
		}{
			"not ready in the slice":                  {f.unready(1, thisNode), seen{Verdict: "refuse"}},
			"ready in the slice, though it ends":      {state.Endpoint{Addr: f.pod(1), Node: thisNode, Ready: true, Terminating: true}, forward(f.backends(8080, 1))},
			"ready in the slice, though not the pods": {state.Endpoint{Addr: f.pod(1), Node: thisNode, Ready: true}, forward(f.backends(8080, 1))},
		} {
			svc := f.service(func(s *state.Service) { s.PublishNotReady = true })
			r := NewCompiler(thisNode).Compile(world(svc, f.slice("a", tc.endpoint)))
			if diff := cmp.Diff(tc.want, look(t, r, f.clusterFrontend(), Internal), ignoreOrder); diff != "" {
				t.Errorf("%s (-want +got):\n%s", name, diff)
			}
		}
	})
}
