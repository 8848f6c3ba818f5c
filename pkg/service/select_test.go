// SPDX-License-Identifier: Apache-2.0

package service

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/margay-cni/margay/pkg/state"
)

// family is false for IPv4 and true for IPv6. The tests describe a world in terms of one family and run it in both.
type family bool

func (f family) String() string {
	if f {
		return "IPv6"
	}
	return "IPv4"
}

func (f family) pod(n int) netip.Addr {
	if f {
		return netip.MustParseAddr(fmt.Sprintf("fd00:10::%x", n))
	}
	return netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)})
}

func (f family) vip(n int) netip.Addr {
	if f {
		return netip.MustParseAddr(fmt.Sprintf("fd00:96::%x", n))
	}
	return netip.AddrFrom4([4]byte{10, 96, byte(n >> 8), byte(n)})
}

func (f family) outside(n int) netip.Addr {
	if f {
		return netip.MustParseAddr(fmt.Sprintf("2001:db8::%x", n))
	}
	return netip.AddrFrom4([4]byte{192, 0, 2, byte(n)})
}

func (f family) unspecified() netip.Addr {
	if f {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified()
}

func bothFamilies(t *testing.T, run func(*testing.T, family)) {
	for _, f := range []family{false, true} {
		t.Run(f.String(), func(t *testing.T) { run(t, f) })
	}
}

const thisNode = "node-a"

var apiKey = state.Key{Namespace: "web", Name: "api"}

func (f family) service(tweak ...func(*state.Service)) *state.Service {
	s := &state.Service{
		Key:        apiKey,
		Type:       state.ClusterIP,
		ClusterIPs: []netip.Addr{f.vip(1)},
		Ports:      []state.ServicePort{{Name: "http", Protocol: state.TCP, Port: 80}},
	}
	for _, fn := range tweak {
		fn(s)
	}
	return s
}

// slice has one port, http over TCP on 8080.
func (f family) slice(name string, endpoints ...state.Endpoint) *state.EndpointSlice {
	return &state.EndpointSlice{
		Key: state.Key{Namespace: "web", Name: name}, Service: apiKey, IPv6: bool(f), Endpoints: endpoints,
		Ports: []state.SlicePort{{Name: "http", Protocol: state.TCP, Port: 8080}},
	}
}

// The states an endpoint can be in.
func (f family) ready(n int, node string) state.Endpoint {
	return state.Endpoint{Addr: f.pod(n), Node: node, Ready: true, Serving: true}
}

func (f family) draining(n int, node string) state.Endpoint {
	return state.Endpoint{Addr: f.pod(n), Node: node, Serving: true, Terminating: true}
}

func (f family) gone(n int, node string) state.Endpoint {
	return state.Endpoint{Addr: f.pod(n), Node: node, Terminating: true}
}

func (f family) unready(n int, node string) state.Endpoint {
	return state.Endpoint{Addr: f.pod(n), Node: node}
}

func hinted(e state.Endpoint, nodes, zones []string) state.Endpoint {
	e.ForNodes, e.ForZones = nodes, zones
	return e
}

func internalLocal(s *state.Service) { s.InternalLocal = true }
func externalLocal(s *state.Service) { s.ExternalLocal = true }
func withNodePort(s *state.Service)  { s.Type, s.Ports[0].NodePort = state.NodePort, 30080 }
func doubled(s *state.Service)       { s.Ports = append(s.Ports, s.Ports[0]) }
func withSecondPort(s *state.Service) {
	s.Ports = append(s.Ports, state.ServicePort{Name: "dns", Protocol: state.UDP, Port: 80})
}

func world(objects ...any) *state.Snapshot {
	s := state.NewSnapshot()
	s.Nodes[thisNode] = &state.Node{Name: thisNode, Labels: map[string]string{"topology.kubernetes.io/zone": "zone-1"}}
	for _, o := range objects {
		switch o := o.(type) {
		case *state.Service:
			s.Services[o.Key] = o
		case *state.EndpointSlice:
			s.EndpointSlices[o.Key] = o
		default:
			panic(fmt.Sprintf("world of %T", o))
		}
	}
	return s
}

// seen is what one frontend offers one scope, in words that a test can state.
type seen struct {
	Backends []netip.AddrPort
	Verdict  string // "forward", "drop" or "refuse"
}

func look(t *testing.T, r *Result, f Frontend, scope Scope) seen {
	t.Helper()
	s, ok := r.Frontends[f]
	if !ok {
		t.Fatalf("frontend %v is missing from %v", f, r.Frontends)
	}
	list, ok := r.Lists[s.Lists[scope]]
	if !ok || s.Lists[scope] == 0 {
		t.Fatalf("frontend %v: list %d of scope %d is missing", f, s.Lists[scope], scope)
	}
	if int(s.Counts[scope]) != len(list) {
		t.Errorf("frontend %v: Counts[%d] = %d, want %d", f, scope, s.Counts[scope], len(list))
	}
	out := seen{Backends: slices.SortedFunc(slices.Values(list), netip.AddrPort.Compare), Verdict: "forward"}
	if len(list) == 0 {
		out.Verdict = "refuse"
		if s.DropEmpty[scope] {
			out.Verdict = "drop"
		}
	} else if s.DropEmpty[scope] {
		t.Errorf("frontend %v: DropEmpty[%d] with %d backends, want false", f, scope, len(list))
	}
	return out
}

func (f family) backends(port uint16, pods ...int) []netip.AddrPort {
	var out []netip.AddrPort
	for _, n := range pods {
		out = append(out, netip.AddrPortFrom(f.pod(n), port))
	}
	return out
}

func forward(backends []netip.AddrPort) seen { return seen{Backends: backends, Verdict: "forward"} }

var ignoreOrder = cmp.Options{cmpopts.EquateEmpty(), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })}

func (f family) clusterFrontend() Frontend {
	return Frontend{Addr: f.vip(1), Port: 80, Protocol: state.TCP}
}

func (f family) nodeFrontend() Frontend {
	return Frontend{Addr: f.unspecified(), Port: 30080, Protocol: state.TCP}
}

// selectionCase says what a NodePort service offers: through its cluster address, and through its NodePort from outside and inside.
type selectionCase struct {
	name      string
	service   []func(*state.Service)
	endpoints func(f family) []state.Endpoint
	want      func(f family) (cluster, external, internal seen)
}

func runSelection(t *testing.T, cases []selectionCase) {
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			bothFamilies(t, func(t *testing.T, f family) {
				svc := f.service(append([]func(*state.Service){withNodePort}, tc.service...)...)
				r := NewCompiler(thisNode).Compile(world(svc, f.slice("s", tc.endpoints(f)...)))
				cluster, external, internal := tc.want(f)
				for _, c := range []struct {
					what     string
					frontend Frontend
					scope    Scope
					want     seen
				}{
					{"cluster address from outside", f.clusterFrontend(), External, cluster},
					{"cluster address from inside", f.clusterFrontend(), Internal, cluster},
					{"NodePort from outside", f.nodeFrontend(), External, external},
					{"NodePort from inside", f.nodeFrontend(), Internal, internal},
				} {
					if diff := cmp.Diff(c.want, look(t, r, c.frontend, c.scope), ignoreOrder); diff != "" {
						t.Errorf("%s (-want +got):\n%s", c.what, diff)
					}
				}
			})
		})
	}
}

func all(s func(f family) seen) func(family) (seen, seen, seen) {
	return func(f family) (seen, seen, seen) { return s(f), s(f), s(f) }
}

func TestS2_ClusterListPrefersReadyEndpoints(t *testing.T) {
	runSelection(t, []selectionCase{
		{
			name: "ready anywhere",
			endpoints: func(f family) []state.Endpoint {
				return []state.Endpoint{f.ready(1, thisNode), f.ready(2, "node-b"), f.draining(3, thisNode), f.unready(4, thisNode)}
			},
			want: all(func(f family) seen { return forward(f.backends(8080, 1, 2)) }),
		},
		{
			name: "terminating ones that serve stand in",
			endpoints: func(f family) []state.Endpoint {
				return []state.Endpoint{f.draining(1, thisNode), f.draining(2, "node-b"), f.gone(3, "node-b"), f.unready(4, thisNode)}
			},
			want: all(func(f family) seen { return forward(f.backends(8080, 1, 2)) }),
		},
		{
			name: "serving without ready or terminating is not used",
			endpoints: func(f family) []state.Endpoint {
				return []state.Endpoint{{Addr: f.pod(1), Node: thisNode, Serving: true}}
			},
			want: all(func(family) seen { return seen{Verdict: "refuse"} }),
		},
	})
}

func TestS3_LocalListFallsBackOnItsOwn(t *testing.T) {
	runSelection(t, []selectionCase{
		{
			name:    "local terminating although remote ready exists",
			service: []func(*state.Service){internalLocal, externalLocal},
			endpoints: func(f family) []state.Endpoint {
				return []state.Endpoint{f.draining(1, thisNode), f.ready(2, "node-b")}
			},
			want: func(f family) (seen, seen, seen) {
				return forward(f.backends(8080, 1)), forward(f.backends(8080, 1)), forward(f.backends(8080, 2))
			},
		},
		{
			name:    "local ready hides local terminating",
			service: []func(*state.Service){internalLocal, externalLocal},
			endpoints: func(f family) []state.Endpoint {
				return []state.Endpoint{f.draining(1, thisNode), f.ready(2, thisNode), f.ready(3, "node-b")}
			},
			want: func(f family) (seen, seen, seen) {
				return forward(f.backends(8080, 2)), forward(f.backends(8080, 2)), forward(f.backends(8080, 2, 3))
			},
		},
	})
}

func TestS4_TopologyHints(t *testing.T) {
	one, two := []string{"zone-1"}, []string{"zone-2"}
	mine, other := []string{thisNode}, []string{"node-b"}
	runSelection(t, []selectionCase{
		{
			name: "zone",
			endpoints: func(f family) []state.Endpoint {
				return []state.Endpoint{hinted(f.ready(1, "node-b"), nil, one), hinted(f.ready(2, thisNode), nil, two)}
			},
			want: all(func(f family) seen { return forward(f.backends(8080, 1)) }),
		},
		{
			name: "node before zone",
			endpoints: func(f family) []state.Endpoint {
				return []state.Endpoint{hinted(f.ready(1, thisNode), mine, one), hinted(f.ready(2, "node-b"), other, one)}
			},
			want: all(func(f family) seen { return forward(f.backends(8080, 1)) }),
		},
		{
			name: "no hint names this node: zone decides",
			endpoints: func(f family) []state.Endpoint {
				return []state.Endpoint{hinted(f.ready(1, "node-c"), other, one), hinted(f.ready(2, "node-b"), other, two)}
			},
			want: all(func(f family) seen { return forward(f.backends(8080, 1)) }),
		},
		{
			name: "one ready endpoint without hint turns it off",
			endpoints: func(f family) []state.Endpoint {
				return []state.Endpoint{hinted(f.ready(1, "node-b"), nil, one), f.ready(2, "node-b")}
			},
			want: all(func(f family) seen { return forward(f.backends(8080, 1, 2)) }),
		},
		{
			name: "no hint names this zone",
			endpoints: func(f family) []state.Endpoint {
				return []state.Endpoint{hinted(f.ready(1, "node-b"), nil, two), hinted(f.ready(2, "node-b"), nil, two)}
			},
			want: all(func(f family) seen { return forward(f.backends(8080, 1, 2)) }),
		},
		{
			name: "endpoints that are not ready have no say",
			endpoints: func(f family) []state.Endpoint {
				return []state.Endpoint{hinted(f.ready(1, "node-b"), nil, one), hinted(f.ready(2, "node-b"), nil, two), f.draining(3, "node-b")}
			},
			want: all(func(f family) seen { return forward(f.backends(8080, 1)) }),
		},
		{
			name: "the fallback ignores topology",
			endpoints: func(f family) []state.Endpoint {
				return []state.Endpoint{hinted(f.draining(1, "node-b"), nil, one), hinted(f.draining(2, "node-b"), nil, two)}
			},
			want: all(func(f family) seen { return forward(f.backends(8080, 1, 2)) }),
		},
		{
			name:    "the local list ignores topology",
			service: []func(*state.Service){externalLocal},
			endpoints: func(f family) []state.Endpoint {
				return []state.Endpoint{hinted(f.ready(1, thisNode), nil, two), hinted(f.ready(2, "node-b"), nil, one)}
			},
			want: func(f family) (seen, seen, seen) {
				return forward(f.backends(8080, 2)), forward(f.backends(8080, 1)), forward(f.backends(8080, 2))
			},
		},
	})
}

func TestS5_EmptyListRefusesOrDrops(t *testing.T) {
	runSelection(t, []selectionCase{
		{
			name:      "no endpoints at all",
			service:   []func(*state.Service){internalLocal, externalLocal},
			endpoints: func(family) []state.Endpoint { return nil },
			want:      all(func(family) seen { return seen{Verdict: "refuse"} }),
		},
		{
			name:    "unusable endpoints only",
			service: []func(*state.Service){internalLocal, externalLocal},
			endpoints: func(f family) []state.Endpoint {
				return []state.Endpoint{f.unready(1, thisNode), f.gone(2, "node-b")}
			},
			want: all(func(family) seen { return seen{Verdict: "refuse"} }),
		},
		{
			name:    "terminating elsewhere counts as some",
			service: []func(*state.Service){internalLocal, externalLocal},
			endpoints: func(f family) []state.Endpoint {
				return []state.Endpoint{f.draining(1, "node-b")}
			},
			want: func(f family) (seen, seen, seen) {
				return seen{Verdict: "drop"}, seen{Verdict: "drop"}, forward(f.backends(8080, 1))
			},
		},
	})
}

func TestV1_InternalLocalNeverLeavesTheNode(t *testing.T) {
	runSelection(t, []selectionCase{{
		name:      "none here, some elsewhere",
		service:   []func(*state.Service){internalLocal},
		endpoints: func(f family) []state.Endpoint { return []state.Endpoint{f.ready(1, "node-b")} },
		want: func(f family) (seen, seen, seen) {
			return seen{Verdict: "drop"}, forward(f.backends(8080, 1)), forward(f.backends(8080, 1))
		},
	}})
}

func TestV4_InsideTrafficShortCircuitsExternalLocal(t *testing.T) {
	runSelection(t, []selectionCase{{
		name:      "none here, some elsewhere",
		service:   []func(*state.Service){externalLocal},
		endpoints: func(f family) []state.Endpoint { return []state.Endpoint{f.ready(1, "node-b")} },
		want: func(f family) (seen, seen, seen) {
			return forward(f.backends(8080, 1)), seen{Verdict: "drop"}, forward(f.backends(8080, 1))
		},
	}})
}

func TestV5_ExternalLocalUsesLocalEndpoints(t *testing.T) {
	runSelection(t, []selectionCase{{
		name:      "one here, one elsewhere",
		service:   []func(*state.Service){externalLocal},
		endpoints: func(f family) []state.Endpoint { return []state.Endpoint{f.ready(1, thisNode), f.ready(2, "node-b")} },
		want: func(f family) (seen, seen, seen) {
			return forward(f.backends(8080, 1, 2)), forward(f.backends(8080, 1)), forward(f.backends(8080, 1, 2))
		},
	}})
}
