// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/pkg/service"
	"github.com/margay-cni/margay/pkg/state"
)

// Where packets end, in words: at the endpoint of the asked node, that of the other node, either of them, or nowhere.
const (
	here   = "here"
	there  = "there"
	either = "either"
	refuse = "refuse"
	drop   = "drop"
)

// stands is an endpoint of a flow case: on which node, and in which state.
type stands struct {
	node                        int
	ready, serving, terminating bool
}

var (
	readyHere, readyThere       = stands{0, true, true, false}, stands{1, true, true, false}
	drainingHere, drainingThere = stands{0, false, true, true}, stands{1, false, true, true}
	goneHere, goneThere         = stands{0, false, false, true}, stands{1, false, false, true}
	unreadyHere, unreadyThere   = stands{0, false, false, false}, stands{1, false, false, false}
)

// flowCase says where packets for a service end, whose endpoints are these.
type flowCase struct {
	name      string
	endpoints []stands
	// Packets to a cluster address, by the internal policy; whoever asks.
	clusterAddr, clusterAddrLocal string
	// Packets to NodePort, external and load balancer addresses, by the external policy, and under Local by who asks: pods of the node and
	// the node itself, or clients outside (rows V4 and V5).
	outside, outsideLocalFromInside, outsideLocalFromOutside string
}

var flowCases = []flowCase{
	{"no endpoint", nil, refuse, refuse, refuse, refuse, refuse},
	{"one here", []stands{readyHere}, here, here, here, here, here},
	{"one there", []stands{readyThere}, there, drop, there, there, drop},
	{"one here, one there", []stands{readyHere, readyThere}, either, here, either, either, here},
	{"terminating here", []stands{drainingHere}, here, here, here, here, here},
	{"terminating there", []stands{drainingThere}, there, drop, there, there, drop},
	{"terminating here and there", []stands{drainingHere, drainingThere}, either, here, either, either, here},
	{"terminating here, ready there", []stands{drainingHere, readyThere}, there, here, there, there, here},
	{"ready here, terminating there", []stands{readyHere, drainingThere}, here, here, here, here, here},
	{"not ready here and there", []stands{unreadyHere, unreadyThere}, refuse, refuse, refuse, refuse, refuse},
	{"not ready here, ready there", []stands{unreadyHere, readyThere}, there, drop, there, there, drop},
	{"gone here and there", []stands{goneHere, goneThere}, refuse, refuse, refuse, refuse, refuse},
	{"gone here, terminating there", []stands{goneHere, drainingThere}, there, drop, there, there, drop},
}

// flowService is the service of a flow case under one combination of policies. Its NodePort tells it from the others.
type flowService struct {
	number                       int
	internalLocal, externalLocal bool
}

var flowServices = []flowService{{1, false, false}, {2, true, false}, {3, false, true}, {4, true, true}}

var flowProtocols = map[pkt.Kind]state.Protocol{pkt.TCP: state.TCP, pkt.UDP: state.UDP, pkt.SCTP: state.SCTP}

// The backends' port, and the frontends' but for NodePorts.
const flowPort, flowBackendPort = 80, 8080

func flowAddr(v4, v6 string, number int, ipv6 bool) netip.Addr {
	if ipv6 {
		return netip.MustParseAddr(fmt.Sprintf("%s%x", v6, number))
	}
	return netip.MustParseAddr(fmt.Sprintf("%s%d", v4, number))
}

func (s flowService) nodePort() uint16 { return uint16(30000 + s.number) }

// frontends are where a service is reached, by kind, in one family.
func (s flowService) frontends(v6 bool) map[string]netip.AddrPort {
	unspecified := netip.IPv4Unspecified()
	if v6 {
		unspecified = netip.IPv6Unspecified()
	}
	return map[string]netip.AddrPort{
		"cluster address":       netip.AddrPortFrom(flowAddr("10.96.0.", "fd00:96::", s.number, v6), flowPort),
		"external address":      netip.AddrPortFrom(flowAddr("198.51.100.", "2001:db8:e::", s.number, v6), flowPort),
		"load balancer address": netip.AddrPortFrom(flowAddr("203.0.113.", "2001:db8:f::", s.number, v6), flowPort),
		"NodePort":              netip.AddrPortFrom(unspecified, s.nodePort()),
	}
}

// object is the service in both families, with its slices.
func (s flowService) object(in *state.Snapshot, endpoints []stands) {
	key := state.Key{Namespace: "default", Name: fmt.Sprintf("svc%d", s.number)}
	svc := &state.Service{Key: key, Type: state.LoadBalancer, InternalLocal: s.internalLocal, ExternalLocal: s.externalLocal}
	for _, protocol := range flowProtocols {
		svc.Ports = append(svc.Ports, state.ServicePort{Name: protocol.String(), Protocol: protocol, Port: flowPort, NodePort: s.nodePort()})
	}
	in.Services[key] = svc
	for _, v6 := range []bool{false, true} {
		frontends := s.frontends(v6)
		svc.ClusterIPs = append(svc.ClusterIPs, frontends["cluster address"].Addr())
		svc.ExternalIPs = append(svc.ExternalIPs, frontends["external address"].Addr())
		svc.LoadBalancerIPs = append(svc.LoadBalancerIPs, frontends["load balancer address"].Addr())
		slice := &state.EndpointSlice{Key: state.Key{Namespace: "default", Name: fmt.Sprintf("svc%d-%v", s.number, v6)}, Service: key, IPv6: v6}
		for _, p := range svc.Ports {
			slice.Ports = append(slice.Ports, state.SlicePort{Name: p.Name, Protocol: p.Protocol, Port: flowBackendPort})
		}
		for _, e := range endpoints {
			slice.Endpoints = append(slice.Endpoints, state.Endpoint{
				Addr: flowPlaces[e.node](v6), Node: labNode(e.node), Ready: e.ready, Serving: e.serving, Terminating: e.terminating,
			})
		}
		in.EndpointSlices[slice.Key] = slice
	}
}

// flowPlaces are the addresses of the endpoints here and there: the second pod of each node.
var flowPlaces = [2]func(v6 bool) netip.Addr{
	func(v6 bool) netip.Addr { return flowAddr("10.244.0.", "fd00:244:0:0::", 11, v6) },
	func(v6 bool) netip.Addr { return flowAddr("10.244.1.", "fd00:244:0:1::", 11, v6) },
}

// wants is where packets for a frontend of the service end.
func (c flowCase) wants(s flowService, frontend string, inside bool) string {
	switch {
	case frontend == "cluster address" && s.internalLocal:
		return c.clusterAddrLocal
	case frontend == "cluster address":
		return c.clusterAddr
	case !s.externalLocal:
		return c.outside
	case inside:
		return c.outsideLocalFromInside
	}
	return c.outsideLocalFromOutside
}

// inWords says where the backends are.
func inWords(v6 bool, backends []netip.AddrPort) string {
	isHere := slices.Contains(backends, netip.AddrPortFrom(flowPlaces[0](v6), flowBackendPort))
	isThere := slices.Contains(backends, netip.AddrPortFrom(flowPlaces[1](v6), flowBackendPort))
	switch {
	case isHere && isThere && len(backends) == 2:
		return either
	case isHere && len(backends) == 1:
		return here
	case isThere && len(backends) == 1:
		return there
	}
	return fmt.Sprint(backends)
}

// TestFlowTableCompiled holds what is compiled for the first node against the table, for every frontend and scope. The node itself asks
// with the scope of its pods.
func TestFlowTableCompiled(t *testing.T) {
	for _, c := range flowCases {
		s := state.NewSnapshot()
		for _, svc := range flowServices {
			svc.object(s, c.endpoints)
		}
		r := service.NewCompiler(labNode(0)).Compile(s)
		for _, svc := range flowServices {
			for _, v6 := range []bool{false, true} {
				for kind, frontend := range svc.frontends(v6) {
					for _, protocol := range flowProtocols {
						compiled, ok := r.Frontends[service.Frontend{Addr: frontend.Addr(), Port: frontend.Port(), Protocol: protocol}]
						if !ok {
							t.Fatalf("%s: %s of %+v is not compiled", c.name, kind, svc)
						}
						for _, scope := range []service.Scope{service.External, service.Internal} {
							got := inWords(v6, r.Lists[compiled.Lists[scope]])
							if compiled.Counts[scope] == 0 {
								got = map[bool]string{true: drop, false: refuse}[compiled.DropEmpty[scope]]
							}
							if want := c.wants(svc, kind, scope == service.Internal); got != want {
								t.Errorf("%s: %s %s of %+v, scope %d: ends %s, want %s", c.name, protocol, kind, svc, scope, got, want)
							}
						}
					}
				}
			}
		}
	}
}

// TestFlowTable sends packets for every cell of the table through the programs: each kind of frontend, policy, protocol and source in both families.
// It also holds the source that the backend sees against the table of TestV13_WhoSeesWhichSource.
func TestFlowTable(t *testing.T) {
	t.Parallel()
	l := newFlowLab(t)
	for _, c := range flowCases {
		t.Run(c.name, func(t *testing.T) {
			l.afresh(t)
			s := l.snapshot()
			for _, svc := range flowServices {
				svc.object(s, c.endpoints)
			}
			l.give(t, s)
			for _, svc := range flowServices {
				for _, v6 := range []bool{false, true} {
					for frontend, to := range svc.frontends(v6) {
						if frontend == "NodePort" {
							to = netip.AddrPortFrom(l.nodes[0].Addrs[map[bool]int{true: 1}[v6]], to.Port())
						}
						for kind := range flowProtocols {
							l.checkCell(t, c, svc, frontend, kind, to)
						}
					}
				}
			}
		})
	}
}

// flowAskers are the sources of the table.
func (l *flowLab) flowAskers(v6 bool) map[string]asker {
	n := l.nodes[0]
	return map[string]asker{
		"pod":           {pod: n.A},
		"backend's pod": {pod: n.B},
		"node":          {node: n.Node},
		"outside":       {client: nodetest.ClientAddrs[map[bool]int{true: 1}[v6]]},
	}
}

func (l *flowLab) checkCell(t *testing.T, c flowCase, svc flowService, frontend string, kind pkt.Kind, to netip.AddrPort) {
	t.Helper()
	v6 := to.Addr().Is6()
	for name, a := range l.flowAskers(v6) {
		what := fmt.Sprintf("%s: %s from %s to %s %v of %+v", c.name, kind, name, frontend, to, svc)
		l.nodes[0].ClearFlows(t)
		want := c.wants(svc, frontend, a.inside())
		var backends []netip.AddrPort
		// One of two is missed forty times in a row once in 10¹² cells.
		for port := uint16(4000); port < 4040 && (port == 4000 || want == either && len(backends) < 2); port++ {
			p := a.opens(kind, port, to)
			got := l.ask(t, a, p)
			if got.Verdict != "backend" {
				if got.Verdict != want || got.Reason != map[string]string{refuse: "service_no_backend", drop: "service_no_local"}[want] {
					t.Errorf("%s: %+v, want %s", what, got, want)
				}
				continue
			}
			l.translatedThere(t, p, got)
			l.answered(t, p, got)
			if !slices.Contains(backends, got.Backend) {
				backends = append(backends, got.Backend)
			}
			seen := p.Src
			if got.Backend.Addr() == p.Src.Addr() {
				seen = netip.AddrPortFrom(to.Addr(), p.Src.Port())
			}
			if got.Source != seen {
				t.Errorf("%s: %v sees %v, want %v", what, got.Backend, got.Source, seen)
			}
		}
		if want != refuse && want != drop {
			if got := inWords(v6, backends); got != want {
				t.Errorf("%s: ends %s, want %s", what, got, want)
			}
		}
	}
}

// A question to another node's NodePort: under external policy Cluster a pod's own node answers it, under Local that node does (row V4 allows
// both); a client's packet that is only routed by is nobody's business here.
func TestV4_NodePortOfAnotherNode(t *testing.T) {
	t.Parallel()
	l := newFlowLab(t)
	l.afresh(t)
	s := l.snapshot()
	for _, svc := range flowServices {
		svc.object(s, []stands{readyHere, readyThere})
	}
	l.give(t, s)
	for _, svc := range flowServices {
		for i, v6 := range []bool{false, true} {
			to := netip.AddrPortFrom(l.nodes[1].Addrs[i], svc.nodePort())
			askers := l.flowAskers(v6)
			delete(askers, "node") // its routes lead to the other node
			for name, a := range askers {
				want := "not a service's"
				if a.pod != nil && !svc.externalLocal {
					want = "backend"
				}
				if got := l.ask(t, a, a.opens(pkt.TCP, 4000, to)); got.Verdict != want {
					t.Errorf("%s to %v of %+v: %+v, want %s", name, to, svc, got, want)
				}
			}
		}
	}
}

// sourceRow is one line of the table of docs/services.md about who sees which source.
type sourceRow struct {
	from, to, policy  string
	kubeProxy, margay string
}

const (
	kept, nodesOwn, frontendAddr = "the client's", "the node's", "the frontend's"
	masqueraded                  = "masqueraded"
)

var sourceRows = []sourceRow{
	{"pod", "cluster address", "any", kept, kept},
	{"pod", "NodePort, external, load balancer address", "`Cluster`", masqueraded, kept},
	{"pod", "NodePort, external, load balancer address", "`Local`", kept, kept},
	{"backend's pod", "any", "any", masqueraded, frontendAddr},
	{"outside", "cluster address", "any", masqueraded, kept},
	{"outside", "NodePort, external, load balancer address", "`Cluster`", masqueraded, kept},
	{"outside", "NodePort, external, load balancer address", "`Local`", kept, kept},
	{"node", "any", "any", masqueraded, nodesOwn},
}

// Contract row V13: what a backend sees as the source of packets that came through a service. docs/services.md has the
// same table.
func TestV13_WhoSeesWhichSource(t *testing.T) {
	t.Parallel()
	doc, err := os.ReadFile("../../docs/services.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range sourceRows {
		line := "| " + strings.Join([]string{row.from, row.to, row.policy, row.kubeProxy, row.margay}, " | ") + " |"
		if !bytes.Contains(doc, []byte(line)) {
			t.Errorf("docs/services.md has no line %s", line)
		}
	}
	l := newFlowLab(t)
	l.afresh(t)
	s := l.snapshot()
	for _, svc := range flowServices {
		svc.object(s, []stands{readyHere})
	}
	l.give(t, s)
	for _, row := range sourceRows {
		for _, svc := range flowServices {
			for i, v6 := range []bool{false, true} {
				a, ours := l.flowAskers(v6)[row.from]
				for frontend, to := range svc.frontends(v6) {
					if frontend == "NodePort" {
						to = netip.AddrPortFrom(l.nodes[0].Addrs[i], to.Port())
					}
					if !ours || !row.covers(svc, frontend) {
						continue
					}
					l.nodes[0].ClearFlows(t)
					p := a.opens(pkt.TCP, 4000, to)
					want := map[string]netip.Addr{kept: p.Src.Addr(), nodesOwn: l.nodes[0].Addrs[i], frontendAddr: to.Addr()}[row.margay]
					if got := l.ask(t, a, p); got.Verdict != "backend" || got.Source != netip.AddrPortFrom(want, p.Src.Port()) {
						t.Errorf("%s to %s %v: %+v, want %v seen", row.from, frontend, to, got, want)
					}
				}
			}
		}
	}
}

func (r sourceRow) covers(svc flowService, frontend string) bool {
	return (r.to == "any" || (r.to == "cluster address") == (frontend == "cluster address")) &&
		(r.policy == "any" || (r.policy == "`Local`") == svc.externalLocal)
}
