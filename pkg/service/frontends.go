// SPDX-License-Identifier: Apache-2.0

package service

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/margay-cni/margay/pkg/state"
)

// kind orders the claims on one frontend: nobody may take over a cluster address by naming it as an outside one.
type kind int

const (
	clusterIP kind = iota
	loadBalancerIP
	externalIP
	nodePort
)

// claim is a frontend that a service port wants.
type claim struct {
	frontend Frontend
	kind     kind
	service  Service
	// order is the claim's place among those of its service; only Update needs it.
	order int
}

// outside is where a service port is reached by traffic that the external traffic policy governs (row V2).
type outside struct {
	addr netip.AddrPort
	kind kind
}

// outsideAddrs lists the outside frontends of a service port in one family, and what it wants but does not get.
func outsideAddrs(svc *state.Service, sp state.ServicePort, ipv6 bool) (out []outside, problems []string) {
	add := func(addrs []netip.Addr, k kind) {
		for _, a := range ofFamily(addrs, ipv6) {
			// The unspecified address stands for NodePorts in a frontend; as an address of its own it would take them all over.
			if a.IsUnspecified() {
				problems = append(problems, "address "+a.String()+" cannot be served")
				continue
			}
			out = append(out, outside{addr: netip.AddrPortFrom(a, sp.Port), kind: k})
		}
	}
	add(svc.LoadBalancerIPs, loadBalancerIP)
	add(svc.ExternalIPs, externalIP)
	if sp.NodePort != 0 {
		a := netip.IPv4Unspecified()
		if ipv6 {
			a = netip.IPv6Unspecified()
		}
		out = append(out, outside{addr: netip.AddrPortFrom(a, sp.NodePort), kind: nodePort})
	}
	return out, problems
}

// sourceRanges returns the ranges that restrict a family: none if one of the family's is everything (row V10).
func sourceRanges(svc *state.Service, ipv6 bool) []netip.Prefix {
	var out []netip.Prefix
	for _, r := range svc.LoadBalancerSourceRanges {
		if r.Addr().Is6() != ipv6 {
			continue
		}
		if r.Bits() == 0 {
			return nil
		}
		out = append(out, r.Masked())
	}
	return out
}

// addSourceRanges adds what may use the service's load balancer addresses in a family, and reports whether there is any limit. Where the node
// itself may, so may a packet whose source is one of these addresses: a node that has one on a device of its own, as some load balancers
// want it, asks from it (row V10).
func (r *run) addSourceRanges(id uint32, svc *state.Service, ipv6 bool) bool {
	balancers := ofFamily(svc.LoadBalancerIPs, ipv6)
	ranges := sourceRanges(svc, ipv6)
	if len(balancers) == 0 || len(ranges) == 0 {
		return false
	}
	allow := func(p netip.Prefix) { r.result.SourceRanges[SourceRange{Service: id, Prefix: p}] = struct{}{} }
	node := ofFamily(r.nodeAddrs, ipv6)
	for _, p := range ranges {
		allow(p)
		if len(node) == 0 || !p.Contains(node[0]) {
			continue
		}
		for _, a := range balancers {
			allow(netip.PrefixFrom(a, a.BitLen()))
		}
	}
	return true
}

// placeFrontends gives every frontend to one claim: the better kind, then the service first by name.
func (r *run) placeFrontends() {
	slices.SortStableFunc(r.claims, func(a, b claim) int { return cmp.Compare(a.kind, b.kind) })
	for _, c := range r.claims {
		holder, taken := r.result.Frontends[c.frontend]
		switch {
		case !taken:
			r.result.Frontends[c.frontend] = c.service
		case holder.ID != c.service.ID:
			r.result.Problems = append(r.result.Problems, c.problem(holder))
		}
	}
}

// String is the frontend as a person writes it.
func (f Frontend) String() string {
	if f.Addr.IsUnspecified() {
		family := "IPv4"
		if f.Addr.Is6() {
			family = "IPv6"
		}
		return fmt.Sprintf("%s NodePort %d (%s)", f.Protocol, f.Port, family)
	}
	return fmt.Sprintf("%s %s", f.Protocol, netip.AddrPortFrom(f.Addr, f.Port))
}

func ofFamily(addrs []netip.Addr, ipv6 bool) []netip.Addr {
	var out []netip.Addr
	for _, a := range addrs {
		if a = a.Unmap(); a.Is6() == ipv6 {
			out = append(out, a)
		}
	}
	return out
}
