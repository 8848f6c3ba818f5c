// SPDX-License-Identifier: Apache-2.0

package service

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/margay-cni/margay/pkg/state"
)

func (f family) podRange() netip.Prefix {
	return netip.PrefixFrom(f.pod(0), f.pod(0).BitLen()-8)
}

func TestLocalBackendsAreWhatAnyNodeMayChoose(t *testing.T) {
	bothFamilies(t, func(t *testing.T, f family) {
		for _, tc := range []struct {
			name      string
			endpoints []state.Endpoint
			tweak     func(*state.Snapshot)
			want      []int
		}{
			{"ready here and elsewhere", []state.Endpoint{f.ready(2, thisNode), f.ready(1, thisNode), f.ready(3, "node-b")}, nil, []int{1, 2}},
			{"none here", []state.Endpoint{f.ready(3, "node-b")}, nil, nil},
			// Another node with Local policy, or one that has not heard yet of the ready one, falls back to it.
			{"draining comes last", []state.Endpoint{f.draining(1, thisNode), f.ready(2, thisNode), f.ready(3, "node-b")}, nil, []int{2, 1}},
			{"neither ready nor draining", []state.Endpoint{f.unready(1, thisNode), f.gone(2, thisNode)}, nil, nil},
			{"hints for another zone", []state.Endpoint{
				hinted(f.ready(1, thisNode), nil, []string{"zone-2"}), hinted(f.ready(2, "node-b"), nil, []string{"zone-1"}),
			}, nil, []int{1}},
			{"no node named, address nowhere", []state.Endpoint{f.ready(1, "")}, nil, nil},
			{"no node named, a pod of ours", []state.Endpoint{f.ready(1, ""), f.ready(2, ""), f.ready(3, "")}, func(s *state.Snapshot) {
				for n, node := range map[int]string{1: thisNode, 2: "node-b", 3: thisNode} {
					key := state.Key{Namespace: "web", Name: f.pod(n).String()}
					s.Pods[key] = &state.Pod{Key: key, Node: node, IPs: []netip.Addr{f.pod(n)}, Finished: n == 3}
				}
			}, []int{1}},
			{"no node named, in our pod range", []state.Endpoint{f.ready(1, ""), f.ready(256, "")}, func(s *state.Snapshot) {
				s.Nodes[thisNode].PodCIDRs = []netip.Prefix{f.podRange()}
			}, []int{1}},
			{"no node named, our own address", []state.Endpoint{f.ready(1, ""), f.ready(2, "")}, func(s *state.Snapshot) {
				s.Nodes[thisNode].Addresses = []netip.Addr{f.pod(1)}
				s.Nodes["node-b"] = &state.Node{Name: "node-b", Addresses: []netip.Addr{f.pod(2)}}
			}, []int{1}},
			{"another node named, in our pod range", []state.Endpoint{f.ready(1, "node-b")}, func(s *state.Snapshot) {
				s.Nodes[thisNode].PodCIDRs = []netip.Prefix{f.podRange()}
			}, nil},
		} {
			t.Run(tc.name, func(t *testing.T) {
				for _, policies := range [][]func(*state.Service){{withNodePort}, {withNodePort, externalLocal, internalLocal}} {
					s := world(f.service(policies...), f.slice("a", tc.endpoints...))
					if tc.tweak != nil {
						tc.tweak(s)
					}
					r := NewCompiler(thisNode).Compile(s)
					want := map[uint32][]netip.AddrPort{}
					if len(tc.want) > 0 {
						for _, n := range tc.want {
							id := r.Frontends[f.nodeFrontend()].ID
							want[id] = append(want[id], f.backends(8080, n)...)
						}
					}
					if diff := cmp.Diff(want, r.LocalBackends, ignoreOrder); diff != "" {
						t.Errorf("LocalBackends (-want +got):\n%s", diff)
					}
				}
			})
		}
	})
}

func TestReturnMode(t *testing.T) {
	bothFamilies(t, func(t *testing.T, f family) {
		for _, tc := range []struct {
			byDefault, annotation state.ServiceReturn
			dsr                   bool
			problem               string
		}{
			{"", "", false, ""},
			{state.ReturnTunnel, "", false, ""},
			{state.ReturnDSR, "", true, ""},
			{state.ReturnTunnel, state.ReturnDSR, true, ""},
			{state.ReturnDSR, state.ReturnTunnel, false, ""},
			{state.ReturnTunnel, "DSR", false, `margay.io/service-return is "DSR", want "tunnel" or "dsr"`},
			{state.ReturnDSR, "teleport", true, `margay.io/service-return is "teleport", want "tunnel" or "dsr"`},
		} {
			t.Run(string("default "+tc.byDefault+" annotation "+tc.annotation), func(t *testing.T) {
				c := NewCompiler(thisNode)
				c.DefaultReturn = tc.byDefault
				r := c.Compile(world(f.service(withNodePort, withSecondPort, func(s *state.Service) { s.Return = tc.annotation })))
				if len(r.Frontends) != 3 {
					t.Errorf("frontends = %v, want three", frontendNames(r))
				}
				for frontend, s := range r.Frontends {
					if s.DSR != tc.dsr {
						t.Errorf("%v: DSR = %v, want %v", frontend, s.DSR, tc.dsr)
					}
				}
				if tc.problem == "" {
					if len(r.Problems) != 0 {
						t.Errorf("problems = %v, want none", r.Problems)
					}
				} else if len(r.Problems) != 1 || r.Problems[0].Service != apiKey || !strings.Contains(r.Problems[0].Message, tc.problem) {
					t.Errorf("problems = %v, want one of %s that says %q", r.Problems, apiKey, tc.problem)
				}
			})
		}
	})
}

// Forwarding relies on it: whatever backend a node may choose, the backend's own node knows it as one of the service port's.
func TestEveryChosenBackendIsKnownOnItsNode(t *testing.T) {
	nodes := []string{thisNode, "node-b", "node-c"}
	families := []family{false, true}
	rapid.Check(t, func(t *rapid.T) {
		s := drawWorld(t)
		for i, node := range nodes {
			s.Nodes[node] = &state.Node{Name: node, Labels: map[string]string{
				"topology.kubernetes.io/zone": rapid.SampledFrom([]string{"", "zone-1", "zone-2"}).Draw(t, "zone"),
			}}
			// drawEndpoint's addresses 1 to 6, two for each node: where an endpoint is that names none.
			for _, f := range families {
				first := f.pod(2*i + 1)
				s.Nodes[node].PodCIDRs = append(s.Nodes[node].PodCIDRs, netip.PrefixFrom(first, first.BitLen()))
			}
		}
		// What the other nodes route by: an endpoint's own word, else the ranges.
		home := func(b netip.AddrPort, frontend Frontend, svc Service) string {
			if node := named(s, svc.Name, state.SlicePort{Name: svc.PortName, Protocol: frontend.Protocol, Port: b.Port()}, b.Addr()); node != "" {
				return node
			}
			for _, node := range nodes {
				for _, p := range s.Nodes[node].PodCIDRs {
					if p.Contains(b.Addr()) {
						return node
					}
				}
			}
			return ""
		}
		results := map[string]*Result{}
		for _, node := range nodes {
			c := NewCompiler(node)
			// Numbers are each node's own: a compiler with a past gives others.
			if rapid.Bool().Draw(t, "has a past") {
				c.Compile(drawWorld(t))
			}
			results[node] = c.Compile(s)
		}
		for chooser, r := range results {
			for frontend, svc := range r.Frontends {
				for _, list := range svc.Lists {
					for _, b := range r.Lists[list] {
						at := home(b, frontend, svc)
						there := results[at]
						if there == nil {
							continue // on no node of the cluster: nobody forwards to it
						}
						if id := there.Frontends[frontend].ID; !slices.Contains(there.LocalBackends[id], b) {
							t.Fatalf("%s may choose %v for %v, %s knows only %v", chooser, b, frontend, at, there.LocalBackends[id])
						}
					}
				}
			}
		}
		for node, r := range results {
			for id, backends := range r.LocalBackends {
				for _, b := range backends {
					if _, serving := r.Serving[Member{Service: id, Backend: b}]; !serving {
						t.Fatalf("%s: local backend %v of %d does not serve", node, b, id)
					}
				}
			}
		}
	})
}

// named is the node that an endpoint of a service port names: the entry that counts (row I7) is the first that is not terminating, else the first.
func named(s *state.Snapshot, key state.Key, port state.SlicePort, a netip.Addr) string {
	var all []state.Endpoint
	for _, suffix := range []string{"a", "b", "c"} {
		slice := s.EndpointSlices[state.Key{Namespace: key.Namespace, Name: key.Name + "-" + suffix}]
		if slice == nil || !slices.Contains(slice.Ports, port) {
			continue
		}
		for _, e := range slice.Endpoints {
			if e.Addr == a {
				all = append(all, e)
			}
		}
	}
	if i := slices.IndexFunc(all, func(e state.Endpoint) bool { return !e.Terminating }); i > 0 {
		return all[i].Node
	}
	return all[0].Node
}
