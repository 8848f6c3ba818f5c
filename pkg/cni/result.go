// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"net"
	"net/netip"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/margay-cni/margay/pkg/addr"
	"github.com/margay-cni/margay/pkg/link"
)

// podConfig turns the IPAM plugin's result into what the pod gets: its addresses, whatever their prefix lengths, and its routes. A family
// for which the IPAM plugin names no route gets a default route. Next hops are not taken from the result: a pod's only neighbour is its
// gateway.
func podConfig(r *types100.Result) ([]netip.Addr, []link.Route, error) {
	var (
		addresses []netip.Addr
		routes    []link.Route
		routed    = map[bool]bool{} // is IPv4 → has a route
		present   = map[bool]bool{} // is IPv4 → has an address
	)
	for _, ip := range r.IPs {
		a, ok := netip.AddrFromSlice(ip.Address.IP)
		if !ok {
			return nil, nil, fail(codeIPAM, nil, "the IPAM plugin's result has an address that is none: %v", ip.Address)
		}
		addresses = append(addresses, a.Unmap())
		present[a.Unmap().Is4()] = true
	}
	if len(addresses) == 0 {
		return nil, nil, fail(codeIPAM, nil, "the IPAM plugin's result has no address: configure a range")
	}
	for _, route := range r.Routes {
		dst, ok := prefixOf(route.Dst)
		if !ok {
			return nil, nil, fail(codeIPAM, nil, "the IPAM plugin's result has a route whose destination is none: %v", route.Dst)
		}
		if !present[dst.Addr().Is4()] {
			continue // the pod could not send such packets anyway
		}
		routed[dst.Addr().Is4()] = true
		lr := link.Route{Dst: dst, MTU: route.MTU, AdvMSS: route.AdvMSS, Priority: route.Priority}
		if route.Table != nil {
			lr.Table = *route.Table
		}
		routes = append(routes, lr)
	}
	for _, d := range []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)} {
		if present[d.Addr().Is4()] && !routed[d.Addr().Is4()] {
			routes = append(routes, link.Route{Dst: d})
		}
	}
	return addresses, routes, nil
}

func prefixOf(n net.IPNet) (netip.Prefix, bool) {
	a, ok := netip.AddrFromSlice(n.IP)
	ones, bits := n.Mask.Size()
	if !ok || bits == 0 {
		return netip.Prefix{}, false
	}
	if a.Is4In6() && bits == 128 { // an IPv4 network in 16 bytes
		ones -= addr.Bits4
	}
	p := netip.PrefixFrom(a.Unmap(), ones)
	return p.Masked(), p.IsValid()
}

// ownResult lists both ends, the host's one first and without a sandbox: that is how the plugins behind us (portmap, bandwidth, tuning)
// find what they are looking for.
func (a *addition) ownResult() *types100.Result {
	r := &types100.Result{
		CNIVersion: types100.ImplementedSpecVersion,
		Interfaces: []*types100.Interface{
			{Name: a.hostIf.Name, Mac: a.hostIf.MAC.String(), Mtu: a.mtu},
			{Name: a.podIf.Name, Mac: a.podIf.MAC.String(), Mtu: a.mtu, Sandbox: a.args.Netns},
		},
		DNS: a.conf.DNS,
	}
	if r.DNS.IsEmpty() {
		r.DNS = a.ipam.DNS
	}
	for _, ip := range a.record.Addresses {
		r.IPs = append(r.IPs, &types100.IPConfig{
			Interface: types100.Int(1),
			Address:   toIPNet(addr.HostPrefix(ip)),
			Gateway:   link.GatewayOf(ip).AsSlice(),
		})
	}
	for _, route := range a.routes {
		tr := &types.Route{Dst: toIPNet(route.Dst), GW: link.GatewayOf(route.Dst.Addr()).AsSlice(),
			MTU: route.MTU, AdvMSS: route.AdvMSS, Priority: route.Priority}
		if route.Table != 0 {
			tr.Table = &route.Table
		}
		r.Routes = append(r.Routes, tr)
	}
	return forVersion(r, a.conf.CNIVersion)
}

// forVersion removes what only 1.1.0 knows from a result for an older version; the library converts the rest.
func forVersion(r *types100.Result, v string) *types100.Result {
	if ok, err := version.GreaterThanOrEqualTo(v, "1.1.0"); ok || err != nil {
		return r
	}
	for _, i := range r.Interfaces {
		i.Mtu, i.SocketPath, i.PciID = 0, "", ""
	}
	for _, route := range r.Routes {
		*route = types.Route{Dst: route.Dst, GW: route.GW}
	}
	return r
}

func toIPNet(p netip.Prefix) net.IPNet {
	return net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
