// SPDX-License-Identifier: Apache-2.0

package service

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/pkg/state"
)

func frontendNames(r *Result) []string {
	var out []string
	for f := range r.Frontends {
		out = append(out, f.String())
	}
	slices.Sort(out)
	return out
}

func TestI4_FamiliesAreSeparateServices(t *testing.T) {
	v4, v6 := family(false), family(true)
	svc := v4.service(withNodePort, func(s *state.Service) { s.ClusterIPs = append(s.ClusterIPs, v6.vip(1)) })
	r := NewCompiler(thisNode).Compile(world(svc, v4.slice("a", v4.ready(1, thisNode)), v6.slice("b", v6.ready(2, thisNode))))

	want := []string{"TCP 10.96.0.1:80", "TCP NodePort 30080 (IPv4)", "TCP NodePort 30080 (IPv6)", "TCP [fd00:96::1]:80"}
	if diff := cmp.Diff(want, frontendNames(r)); diff != "" {
		t.Errorf("frontends (-want +got):\n%s", diff)
	}
	for f, pod := range map[family]int{v4: 1, v6: 2} {
		for _, frontend := range []Frontend{f.clusterFrontend(), f.nodeFrontend()} {
			if diff := cmp.Diff(forward(f.backends(8080, pod)), look(t, r, frontend, Internal), ignoreOrder); diff != "" {
				t.Errorf("%v (-want +got):\n%s", frontend, diff)
			}
		}
		if a, b := r.Frontends[f.clusterFrontend()].ID, r.Frontends[f.nodeFrontend()].ID; a != b {
			t.Errorf("%v: cluster address and NodePort have ids %d and %d, want one", f, a, b)
		}
	}
	if a, b := r.Frontends[v4.clusterFrontend()].ID, r.Frontends[v6.clusterFrontend()].ID; a == b {
		t.Errorf("both families have id %d, want two", a)
	}

	t.Run("no cluster address, no part", func(t *testing.T) {
		r := NewCompiler(thisNode).Compile(world(v4.service(withNodePort), v6.slice("b", v6.ready(2, thisNode))))
		if diff := cmp.Diff([]string{"TCP 10.96.0.1:80", "TCP NodePort 30080 (IPv4)"}, frontendNames(r)); diff != "" {
			t.Errorf("frontends (-want +got):\n%s", diff)
		}
		if got := look(t, r, v4.nodeFrontend(), External); got.Verdict != "refuse" {
			t.Errorf("IPv4 NodePort with IPv6 endpoints only: %v, want refuse", got)
		}
	})
}

func TestI5_SlicesJoinByNameAndProtocol(t *testing.T) {
	bothFamilies(t, func(t *testing.T, f family) {
		other := f.slice("b", f.ready(2, thisNode))
		other.Ports = []state.SlicePort{
			{Name: "http", Protocol: state.TCP, Port: 9090},
			{Name: "http", Protocol: state.UDP, Port: 1},
			{Name: "web", Protocol: state.TCP, Port: 80},
			{Name: "dns", Protocol: state.UDP, Port: 5353},
		}
		r := NewCompiler(thisNode).Compile(world(f.service(withSecondPort), f.slice("a", f.ready(1, thisNode)), other))
		want := append(f.backends(8080, 1), f.backends(9090, 2)...)
		if diff := cmp.Diff(forward(want), look(t, r, f.clusterFrontend(), Internal), ignoreOrder); diff != "" {
			t.Errorf("TCP 80 (-want +got):\n%s", diff)
		}
		dns := Frontend{Addr: f.vip(1), Port: 80, Protocol: state.UDP}
		if diff := cmp.Diff(forward(f.backends(5353, 2)), look(t, r, dns, Internal), ignoreOrder); diff != "" {
			t.Errorf("UDP 80 (-want +got):\n%s", diff)
		}
	})
}

func TestI7_EndpointsMergeAcrossSlices(t *testing.T) {
	bothFamilies(t, func(t *testing.T, f family) {
		for _, tc := range []struct {
			name string
			a, b []state.Endpoint
			want []netip.AddrPort
		}{
			{"different ones add up", []state.Endpoint{f.ready(1, thisNode)}, []state.Endpoint{f.ready(2, "node-b")}, f.backends(8080, 1, 2)},
			{"the same counts once", []state.Endpoint{f.ready(1, thisNode)}, []state.Endpoint{f.ready(1, thisNode)}, f.backends(8080, 1)},
			{"terminating first", []state.Endpoint{f.gone(1, "node-b")}, []state.Endpoint{f.ready(1, thisNode)}, f.backends(8080, 1)},
			{"terminating second", []state.Endpoint{f.ready(1, thisNode)}, []state.Endpoint{f.gone(1, "node-b")}, f.backends(8080, 1)},
			{"inside one slice", []state.Endpoint{f.draining(1, "node-b"), f.ready(1, thisNode)}, nil, f.backends(8080, 1)},
		} {
			t.Run(tc.name, func(t *testing.T) {
				r := NewCompiler(thisNode).Compile(world(f.service(internalLocal), f.slice("a", tc.a...), f.slice("b", tc.b...)))
				got := look(t, r, f.clusterFrontend(), Internal)
				var want []netip.AddrPort // what of it is local
				for _, b := range tc.want {
					if b.Addr() == f.pod(1) {
						want = append(want, b)
					}
				}
				if diff := cmp.Diff(forward(want), got, ignoreOrder); diff != "" {
					t.Errorf("local list (-want +got):\n%s", diff)
				}
				if got := slices.SortedFunc(servingOf(r), netip.AddrPort.Compare); !slices.Equal(got, tc.want) {
					t.Errorf("serving = %v, want %v", got, tc.want)
				}
			})
		}
	})
}

func servingOf(r *Result) func(func(netip.AddrPort) bool) {
	return func(yield func(netip.AddrPort) bool) {
		for m := range r.Serving {
			if !yield(m.Backend) {
				return
			}
		}
	}
}

func TestI8_LocalIsTheNodeName(t *testing.T) {
	bothFamilies(t, func(t *testing.T, f family) {
		s := world(f.service(internalLocal), f.slice("a", f.ready(1, ""), f.ready(2, thisNode)))
		if diff := cmp.Diff(forward(f.backends(8080, 2)), look(t, NewCompiler(thisNode).Compile(s), f.clusterFrontend(), Internal), ignoreOrder); diff != "" {
			t.Errorf("local list (-want +got):\n%s", diff)
		}
		if got := look(t, NewCompiler("").Compile(s), f.clusterFrontend(), Internal); got.Verdict != "drop" {
			t.Errorf("a node without name has local endpoints: %v", got)
		}
	})
}

func TestU1_ServingIgnoresPolicyAndTopology(t *testing.T) {
	bothFamilies(t, func(t *testing.T, f family) {
		published := f.unready(5, "node-b")
		published.Ready = true
		s := world(f.service(internalLocal), f.slice("a",
			hinted(f.ready(1, "node-b"), nil, []string{"zone-2"}), hinted(f.ready(2, thisNode), nil, []string{"zone-1"}),
			f.draining(3, "node-b"), f.gone(4, thisNode), published, f.unready(6, thisNode)))
		r := NewCompiler(thisNode).Compile(s)
		id := r.Frontends[f.clusterFrontend()].ID
		// Not every ready endpoint has hints, so they count for nothing.
		want := map[Member]Membership{}
		for n, in := range map[int]Membership{1: {Cluster: true}, 2: {Cluster: true, Local: true}, 3: {}, 5: {Cluster: true}} {
			want[Member{Service: id, Backend: f.backends(8080, n)[0]}] = in
		}
		if !maps.Equal(r.Serving, want) {
			t.Errorf("Serving = %v, want %v", r.Serving, want)
		}
	})
}

func TestV2_OutsideAddressesFollowTheExternalPolicy(t *testing.T) {
	bothFamilies(t, func(t *testing.T, f family) {
		svc := f.service(externalLocal, func(s *state.Service) {
			s.ExternalIPs = []netip.Addr{f.outside(1), family(!f).outside(1)}
			s.LoadBalancerIPs = []netip.Addr{f.outside(2)}
			s.AffinitySeconds = 60
		})
		r := NewCompiler(thisNode).Compile(world(svc, f.slice("a", f.ready(1, thisNode), f.ready(2, "node-b"))))
		if len(r.Frontends) != 3 || len(r.Problems) != 0 {
			t.Fatalf("frontends %v, problems %v, want 3 and none", frontendNames(r), r.Problems)
		}
		for n := 1; n <= 2; n++ {
			frontend := Frontend{Addr: f.outside(n), Port: 80, Protocol: state.TCP}
			if diff := cmp.Diff(forward(f.backends(8080, 1)), look(t, r, frontend, External), ignoreOrder); diff != "" {
				t.Errorf("%v from outside (-want +got):\n%s", frontend, diff)
			}
			if diff := cmp.Diff(forward(f.backends(8080, 1, 2)), look(t, r, frontend, Internal), ignoreOrder); diff != "" {
				t.Errorf("%v from inside (-want +got):\n%s", frontend, diff)
			}
		}
		for frontend, s := range r.Frontends {
			want := Service{ID: s.ID, Lists: s.Lists, Counts: s.Counts, AffinitySeconds: 60, Name: apiKey, PortName: "http"}
			want.ExternalLocal = frontend != f.clusterFrontend()
			if s != want {
				t.Errorf("%v = %+v, want %+v", frontend, s, want)
			}
		}
	})
}

func TestV10_SourceRangesLimitTheLoadBalancerAddresses(t *testing.T) {
	bothFamilies(t, func(t *testing.T, f family) {
		o := family(!f)
		host := func(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
		restrict := netip.PrefixFrom(f.pod(0), f.pod(0).BitLen()-8).Masked()
		withNode := netip.PrefixFrom(f.outside(0), f.outside(0).BitLen()-8).Masked()
		otherFamily := netip.PrefixFrom(o.outside(0), 24).Masked()
		for _, tc := range []struct {
			name   string
			ranges []netip.Prefix
			want   []netip.Prefix // nil: everybody may
		}{
			{"none", nil, nil},
			{"this family", []netip.Prefix{restrict}, []netip.Prefix{restrict}},
			{"the other family only", []netip.Prefix{otherFamily}, nil},
			{"both families", []netip.Prefix{otherFamily, restrict}, []netip.Prefix{restrict}},
			{"everything", []netip.Prefix{restrict, netip.PrefixFrom(f.unspecified(), 0)}, nil},
			{"everything of the other family", []netip.Prefix{restrict, netip.PrefixFrom(o.unspecified(), 0)}, []netip.Prefix{restrict}},
			{"the node's own address", []netip.Prefix{withNode, restrict}, []netip.Prefix{restrict, withNode, host(f.outside(2)), host(f.outside(3))}},
			{"the node's second address", []netip.Prefix{host(f.outside(9))}, []netip.Prefix{host(f.outside(9))}},
		} {
			t.Run(tc.name, func(t *testing.T) {
				s := world(f.service(withNodePort, withSecondPort, func(s *state.Service) {
					s.ExternalIPs, s.LoadBalancerIPs = []netip.Addr{f.outside(1)}, []netip.Addr{f.outside(2), f.outside(3)}
					s.LoadBalancerSourceRanges = tc.ranges
				}))
				s.Nodes[thisNode].Addresses = []netip.Addr{o.outside(7), f.outside(7), f.outside(9)}
				r := NewCompiler(thisNode).Compile(s)
				want := map[SourceRange]struct{}{}
				for frontend, svc := range r.Frontends {
					limited := len(tc.want) > 0 && (frontend.Addr == f.outside(2) || frontend.Addr == f.outside(3))
					if svc.SourceRanges != limited {
						t.Errorf("%v: limited = %v, want %v", frontend, svc.SourceRanges, limited)
					}
					for _, p := range tc.want {
						want[SourceRange{Service: svc.ID, Prefix: p}] = struct{}{}
					}
				}
				if len(r.Frontends) != 9 {
					t.Errorf("frontends = %v, want 9", frontendNames(r))
				}
				if !maps.Equal(r.SourceRanges, want) || len(r.Problems) > 0 {
					t.Errorf("ranges = %v with problems %v, want %v", r.SourceRanges, r.Problems, want)
				}
			})
		}
	})
}

func TestV9_ClusterAddressesOfAllServices(t *testing.T) {
	bothFamilies(t, func(t *testing.T, f family) {
		second := f.service(func(s *state.Service) { s.Name, s.ClusterIPs = "second", []netip.Addr{f.vip(2), family(!f).vip(2)} })
		r := NewCompiler(thisNode).Compile(world(f.service(withNodePort, func(s *state.Service) {
			s.ExternalIPs = []netip.Addr{f.outside(1)}
		}), second))
		want := map[netip.Addr]struct{}{f.vip(1): {}, f.vip(2): {}, family(!f).vip(2): {}}
		if !maps.Equal(r.ClusterAddrs, want) {
			t.Errorf("ClusterAddrs = %v, want %v", r.ClusterAddrs, want)
		}
	})
}

func TestConflictsAreReportedAndDecided(t *testing.T) {
	bothFamilies(t, func(t *testing.T, f family) {
		another := func(name string, tweak func(*state.Service)) *state.Service {
			return f.service(func(s *state.Service) { s.Name = name }, tweak)
		}
		for _, tc := range []struct {
			name    string
			service *state.Service
			problem string
		}{
			{"a cluster address cannot be taken over as an outside one", another("aaa", func(s *state.Service) {
				s.ClusterIPs, s.ExternalIPs = []netip.Addr{f.vip(9)}, []netip.Addr{f.vip(1)}
			}), "is already served by web/api"},
			{"same cluster address: first by name", another("bbb", func(*state.Service) {}), "is already served by web/api"},
			{"same NodePort: first by name", another("bbb", func(s *state.Service) {
				s.ClusterIPs, s.Ports = []netip.Addr{f.vip(9)}, []state.ServicePort{{Name: "http", Protocol: state.TCP, Port: 80, NodePort: 30080}}
			}), "NodePort 30080"},
			{"unspecified address", another("bbb", func(s *state.Service) {
				s.ClusterIPs, s.ExternalIPs = []netip.Addr{f.vip(9)}, []netip.Addr{f.unspecified()}
				s.Ports = []state.ServicePort{{Name: "http", Protocol: state.TCP, Port: 30080}}
			}), "cannot be served"},
			{"unspecified cluster address", another("bbb", func(s *state.Service) {
				s.ClusterIPs, s.Ports = []netip.Addr{f.unspecified()}, []state.ServicePort{{Name: "http", Protocol: state.TCP, Port: 30080}}
			}), "cannot be served"},
		} {
			t.Run(tc.name, func(t *testing.T) {
				r := NewCompiler(thisNode).Compile(world(f.service(withNodePort), tc.service))
				for _, frontend := range []Frontend{f.clusterFrontend(), f.nodeFrontend()} {
					if got := r.Frontends[frontend].Name; tc.service.Name != "aaa" && got != apiKey || frontend == f.clusterFrontend() && got != apiKey {
						t.Errorf("%v belongs to %v, want %v", frontend, got, apiKey)
					}
				}
				if len(r.Problems) != 1 || r.Problems[0].Service != tc.service.Key || !strings.Contains(r.Problems[0].Message, tc.problem) {
					t.Errorf("problems = %v, want one of %s that says %q", r.Problems, tc.service.Key, tc.problem)
				}
			})
		}
		t.Run("the same port twice", func(t *testing.T) {
			r := NewCompiler(thisNode).Compile(world(f.service(doubled)))
			if len(r.Problems) != 1 || len(r.Frontends) != 1 {
				t.Errorf("problems %v, frontends %v, want one each", r.Problems, frontendNames(r))
			}
		})
	})
}

func TestEpochsToRaise(t *testing.T) {
	bothFamilies(t, func(t *testing.T, f family) {
		c := NewCompiler(thisNode)
		first := c.Compile(world(f.service(), f.slice("a", f.ready(1, thisNode), f.ready(2, "node-b"))))
		id := first.Frontends[f.clusterFrontend()].ID
		for _, step := range []struct {
			name string
			next *state.Snapshot
			want []uint32
		}{
			{"nothing changed", world(f.service(), f.slice("a", f.ready(1, thisNode), f.ready(2, "node-b"))), nil},
			{"one came", world(f.service(), f.slice("a", f.ready(1, thisNode), f.ready(2, "node-b"), f.ready(3, ""))), nil},
			{"one only left the list", world(f.service(), f.slice("a", f.ready(1, thisNode), f.draining(2, "node-b"), f.ready(3, ""))), nil},
			{"policy changed", world(f.service(internalLocal), f.slice("a", f.ready(1, thisNode), f.draining(2, "node-b"), f.ready(3, ""))), nil},
			{"one stopped serving", world(f.service(internalLocal), f.slice("a", f.ready(1, thisNode), f.gone(2, "node-b"), f.ready(3, ""))), []uint32{id}},
			{"one left", world(f.service(), f.slice("a", f.ready(1, thisNode))), []uint32{id}},
			{"service left", world(f.slice("a", f.ready(1, thisNode))), []uint32{id}},
		} {
			second := c.Compile(step.next)
			if got := EpochsToRaise(first, second); !slices.Equal(got, step.want) {
				t.Errorf("%s: EpochsToRaise() = %v, want %v", step.name, got, step.want)
			}
			first = second
		}
		if got := EpochsToRaise(nil, first); got != nil {
			t.Errorf("EpochsToRaise(nil, …) = %v, want nothing", got)
		}
	})
}
