// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/pkg/state"
)

// flowModel answers the slow way, straight from the contract's rows, where a packet may end that is asked at the first node. It knows no
// lists, scopes, ids or maps.
type flowModel struct {
	snapshot *state.Snapshot
	// addrs are the nodes' own addresses.
	addrs [2][]netip.Addr
	// last is the backend of a client's last connection to a service port (row V11).
	last map[modelClient]netip.AddrPort
}

// modelPort is a service port in one family: what affinity and traffic of one kind of socket belong to.
type modelPort struct {
	service state.Key
	name    string
	ipv6    bool
}

type modelClient struct {
	port   modelPort
	client netip.Addr
}

// modelHit is the service port that an address belongs to, and by which kind of frontend.
type modelHit struct {
	service *state.Service
	port    state.ServicePort
	kind    string // "cluster", "balancer", "external", "nodeport"
}

// expected is what may become of a packet.
type expected struct {
	verdict  string // as in outcome
	reason   string
	backends []netip.AddrPort
	hit      *modelHit
}

// sorted are the services by name: of two that claim an address the first has it.
func (m *flowModel) sorted() []*state.Service {
	return slices.SortedFunc(maps.Values(m.snapshot.Services), func(a, b *state.Service) int { return cmp.Compare(a.Name, b.Name) })
}

// find is rows V1, V2, V3, V6: cluster addresses before load balancer addresses before external ones, NodePorts last.
func (m *flowModel) find(to netip.AddrPort, protocol state.Protocol, a asker) *modelHit {
	for _, kind := range []string{"cluster", "balancer", "external", "nodeport"} {
		for _, s := range m.sorted() {
			claimed := map[string][]netip.Addr{"cluster": s.ClusterIPs, "balancer": s.LoadBalancerIPs, "external": s.ExternalIPs}[kind]
			number := func(p state.ServicePort) uint16 { return p.Port }
			if kind == "nodeport" {
				number = func(p state.ServicePort) uint16 { return p.NodePort }
				claimed = m.addrs[0]
				// A pod's own node answers for the others, where these have no say of their own.
				if a.pod != nil && !s.ExternalLocal {
					claimed = slices.Concat(m.addrs[0], m.addrs[1])
				}
			}
			for _, p := range s.Ports {
				if p.Protocol == protocol && number(p) == to.Port() && slices.Contains(claimed, to.Addr()) && m.inFamily(s, to.Addr().Is6()) {
					return &modelHit{s, p, kind}
				}
			}
		}
	}
	return nil
}

// inFamily is row I4.
func (m *flowModel) inFamily(s *state.Service, ipv6 bool) bool {
	return slices.ContainsFunc(s.ClusterIPs, func(a netip.Addr) bool { return a.Is6() == ipv6 })
}

// endpoints are those of a service port in a family, by address and port (rows I5 and I7).
func (m *flowModel) endpoints(p modelPort, protocol state.Protocol) map[netip.AddrPort]state.Endpoint {
	out := map[netip.AddrPort]state.Endpoint{}
	slicesByName := slices.SortedFunc(maps.Values(m.snapshot.EndpointSlices), func(a, b *state.EndpointSlice) int { return cmp.Compare(a.Name, b.Name) })
	for _, slice := range slicesByName {
		for _, sp := range slice.Ports {
			if slice.Service != p.service || slice.IPv6 != p.ipv6 || sp.Name != p.name || sp.Protocol != protocol {
				continue
			}
			for _, e := range slice.Endpoints {
				b := netip.AddrPortFrom(e.Addr, sp.Port)
				if had, ok := out[b]; !ok || had.Terminating && !e.Terminating {
					out[b] = e
				}
			}
		}
	}
	return out
}

// serves says whether flows may go on to a backend (row U1).
func (m *flowModel) serves(p modelPort, protocol state.Protocol, b netip.AddrPort) bool {
	s := m.snapshot.Services[p.service]
	if s == nil || !m.inFamily(s, p.ipv6) || !slices.ContainsFunc(s.Ports, func(sp state.ServicePort) bool { return sp.Name == p.name && sp.Protocol == protocol }) {
		return false
	}
	e, ok := m.endpoints(p, protocol)[b]
	return ok && (e.Serving || e.Ready)
}

// usable are the backends that a new connection may go to (rows S1 to S5), and whether there is any somewhere.
func (m *flowModel) usable(p modelPort, protocol state.Protocol, local bool) (out []netip.AddrPort, somewhere bool) {
	all := m.endpoints(p, protocol)
	pick := func(keep func(state.Endpoint) bool) (found []netip.AddrPort) {
		for b, e := range all {
			if keep(e) {
				found = append(found, b)
			}
		}
		return found
	}
	ready := func(e state.Endpoint) bool { return e.Ready }
	draining := func(e state.Endpoint) bool { return !e.Ready && e.Serving && e.Terminating }
	mine := func(e state.Endpoint) bool { return !local || e.Node == labNode(0) }
	somewhere = len(pick(ready))+len(pick(draining)) > 0
	if out = pick(func(e state.Endpoint) bool { return ready(e) && mine(e) }); len(out) == 0 {
		return pick(func(e state.Endpoint) bool { return draining(e) && mine(e) }), somewhere
	}
	if local {
		return out, somewhere
	}
	for _, hint := range []struct {
		me    string
		names func(state.Endpoint) []string
	}{
		{labNode(0), func(e state.Endpoint) []string { return e.ForNodes }},
		{"zone-0", func(e state.Endpoint) []string { return e.ForZones }},
	} {
		hinted := pick(func(e state.Endpoint) bool { return e.Ready && slices.Contains(hint.names(e), hint.me) })
		if unhinted := pick(func(e state.Endpoint) bool { return e.Ready && len(hint.names(e)) == 0 }); len(hinted) > 0 && len(unhinted) == 0 {
			return hinted, somewhere
		}
	}
	return out, somewhere
}

// admits is row V10.
func (m *flowModel) admits(h *modelHit, client netip.Addr) bool {
	limited := false
	for _, r := range h.service.LoadBalancerSourceRanges {
		if r.Addr().Is6() != client.Is6() {
			continue
		}
		if r.Bits() == 0 || r.Contains(client) {
			return true
		}
		limited = true
	}
	return !limited || h.kind != "balancer"
}

// expect says where the first packet of a new flow may end.
func (m *flowModel) expect(a asker, p pkt.Packet) expected {
	client, to, protocol := p.Src.Addr(), p.Dst, flowProtocols[p.Kind]
	h := m.find(to, protocol, a)
	if h == nil {
		nobodys := m.expectNobodys(to.Addr())
		if a.node != nil && nobodys.verdict == "not a service's" && !slices.Contains(a.node.Addrs, to.Addr()) {
			// The route for the node's own sockets is there a moment longer than the service.
			return expected{verdict: "refuse", reason: "service_unknown_port"}
		}
		return nobodys
	}
	if !m.admits(h, client) {
		return expected{verdict: "drop", reason: "source_range", hit: h}
	}
	local := h.service.ExternalLocal && !a.inside() // rows V4, V5
	if h.kind == "cluster" {
		local = h.service.InternalLocal
	}
	port := h.modelPort(to)
	backends, somewhere := m.usable(port, protocol, local)
	switch {
	case len(backends) == 0 && somewhere:
		return expected{verdict: "drop", reason: "service_no_local", hit: h}
	case len(backends) == 0:
		return expected{verdict: "refuse", reason: "service_no_backend", hit: h}
	}
	if had, ok := m.last[modelClient{port, client}]; ok && h.service.AffinitySeconds > 0 && slices.Contains(backends, had) {
		backends = []netip.AddrPort{had}
	}
	return expected{verdict: "backend", backends: backends, hit: h}
}

// expectNobodys is row V9.
func (m *flowModel) expectNobodys(to netip.Addr) expected {
	for _, s := range m.snapshot.Services {
		if slices.Contains(s.ClusterIPs, to) {
			return expected{verdict: "refuse", reason: "service_unknown_port"}
		}
	}
	for _, c := range labCIDRs {
		if c.Contains(to) {
			return expected{verdict: "drop", reason: "service_unallocated"}
		}
	}
	return expected{verdict: "not a service's"}
}

// sees is the source that a backend sees (rows V12 and V13). The node's own answers to itself come back by themselves.
func (m *flowModel) sees(a asker, p pkt.Packet, backend netip.AddrPort) netip.AddrPort {
	if backend.Addr() == p.Src.Addr() && a.node == nil {
		return netip.AddrPortFrom(p.Dst.Addr(), p.Src.Port())
	}
	return p.Src
}

func (h *modelHit) modelPort(to netip.AddrPort) modelPort {
	return modelPort{h.service.Key, h.port.Name, to.Addr().Is6()}
}

// note remembers a client's backend.
func (m *flowModel) note(h *modelHit, p pkt.Packet, backend netip.AddrPort) {
	if h.service.AffinitySeconds > 0 {
		m.last[modelClient{h.modelPort(p.Dst), p.Src.Addr()}] = backend
	}
}
