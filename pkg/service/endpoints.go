// SPDX-License-Identifier: Apache-2.0

package service

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/margay-cni/margay/pkg/state"
)

// endpoint is an endpoint of one service port.
type endpoint struct {
	*state.Endpoint
	backend netip.AddrPort
	local   bool
}

// fallback says that the endpoint is used only where no ready one is.
func (e *endpoint) fallback() bool {
	return !e.Ready && e.Serving && e.Terminating
}

// sliceIndex finds the slices of a service.
type sliceIndex map[state.Key][]*state.EndpointSlice

// indexSlices groups slices by service, each group in the order of names so that the outcome does not depend on map order.
func indexSlices(s *state.Snapshot) sliceIndex {
	out := make(sliceIndex, len(s.Services))
	for _, slice := range s.EndpointSlices {
		out[slice.Service] = append(out[slice.Service], slice)
	}
	for _, group := range out {
		slices.SortFunc(group, func(a, b *state.EndpointSlice) int { return cmp.Compare(a.Name, b.Name) })
	}
	return out
}

// mergeEndpoints collects the endpoints of one service port in one family from all slices of the service, joined by port name and
// protocol (row I5), each address and port once. Of two entries for the same one, the one that is not terminating counts: an address was
// given to a new pod, or an endpoint moved between slices (row I7).
func mergeEndpoints(group []*state.EndpointSlice, port state.ServicePort, ipv6 bool, node string) []endpoint {
	var out []endpoint
	at := map[netip.AddrPort]int{}
	for _, slice := range group {
		if slice.IPv6 != ipv6 {
			continue
		}
		for _, sp := range slice.Ports {
			if sp.Name != port.Name || sp.Protocol != port.Protocol {
				continue
			}
			for i := range slice.Endpoints {
				e := endpoint{Endpoint: &slice.Endpoints[i], local: node != "" && slice.Endpoints[i].Node == node}
				e.backend = netip.AddrPortFrom(e.Addr.Unmap(), sp.Port)
				had, known := at[e.backend]
				switch {
				case !known:
					at[e.backend] = len(out)
					out = append(out, e)
				case out[had].Terminating && !e.Terminating:
					out[had] = e
				}
			}
		}
	}
	return out
}

// location are the addresses of one node and of its pods.
type location struct {
	addrs  map[netip.Addr]bool
	ranges []netip.Prefix
}

// addrsOf collects the addresses that are known to be on a node. Finished pods have given theirs back, and a pod on the host's network has
// the node's.
func addrsOf(s *state.Snapshot, node string) location {
	l := location{addrs: map[netip.Addr]bool{}}
	if n := s.Nodes[node]; n != nil {
		l.ranges = n.PodCIDRs
		for _, a := range n.Addresses {
			l.addrs[a.Unmap()] = true
		}
	}
	for _, p := range s.Pods {
		if node == "" || p.Node != node || p.Finished {
			continue
		}
		for _, a := range p.IPs {
			l.addrs[a.Unmap()] = true
		}
	}
	return l
}

// has reports whether other nodes forward the endpoint's traffic to this place. They go by its address, so an endpoint that names no node
// (a slice written by hand) is found by its address here too, although for traffic policies it is nowhere (row I8).
func (l location) has(e *endpoint) bool {
	if e.Node != "" {
		return e.local
	}
	a := e.backend.Addr()
	return l.addrs[a] || slices.ContainsFunc(l.ranges, func(p netip.Prefix) bool { return p.Contains(a) })
}

// selection is what a service port's traffic may use.
type selection struct {
	cluster, local []netip.AddrPort
	serving        []netip.AddrPort
	// here is what any node's list may hold of this node's endpoints.
	here []netip.AddrPort
	// any says that there is a usable endpoint somewhere (row S5).
	any bool
}

// members adds the service port's endpoints that serve, with the lists that they are in.
func (s *selection) members(id uint32, to map[Member]Membership) {
	for _, b := range s.serving {
		to[Member{Service: id, Backend: b}] = Membership{}
	}
	for _, b := range s.cluster {
		m := Member{Service: id, Backend: b}
		to[m] = Membership{Cluster: true, Local: to[m].Local}
	}
	for _, b := range s.local {
		m := Member{Service: id, Backend: b}
		to[m] = Membership{Cluster: to[m].Cluster, Local: true}
	}
}

// selectEndpoints chooses the endpoints for both traffic policies (rows S2 to S5).
func selectEndpoints(endpoints []endpoint, node, zone string, here location) selection {
	var out selection
	topology := hints(endpoints, node, zone)
	var clusterFallback, localFallback, ready, draining []netip.AddrPort
	for i := range endpoints {
		e := &endpoints[i]
		if e.Ready || e.Serving {
			out.serving = append(out.serving, e.backend)
		}
		switch {
		case e.Ready:
			out.any = true
			if topology(e) {
				out.cluster = append(out.cluster, e.backend)
			}
			if e.local {
				out.local = append(out.local, e.backend)
			}
			if here.has(e) {
				ready = append(ready, e.backend)
			}
		case e.fallback():
			out.any = true
			clusterFallback = append(clusterFallback, e.backend)
			if e.local {
				localFallback = append(localFallback, e.backend)
			}
			if here.has(e) {
				draining = append(draining, e.backend)
			}
		}
	}
	if len(out.cluster) == 0 {
		out.cluster = clusterFallback
	}
	if len(out.local) == 0 {
		out.local = localFallback
	}
	slices.SortFunc(ready, netip.AddrPort.Compare)
	slices.SortFunc(draining, netip.AddrPort.Compare)
	out.here = append(ready, draining...)
	return out
}

// hints returns which ready endpoints the topology hints leave for this node (row S4). Hints count only when every ready endpoint has
// them and one names this node, or else this zone; so the result always leaves one.
func hints(endpoints []endpoint, node, zone string) func(*endpoint) bool {
	allNodes, allZones, thisNode, thisZone := true, true, false, false
	for i := range endpoints {
		e := &endpoints[i]
		if !e.Ready {
			continue
		}
		allNodes = allNodes && len(e.ForNodes) > 0
		allZones = allZones && len(e.ForZones) > 0
		thisNode = thisNode || slices.Contains(e.ForNodes, node)
		thisZone = thisZone || slices.Contains(e.ForZones, zone)
	}
	switch {
	case node != "" && allNodes && thisNode:
		return func(e *endpoint) bool { return slices.Contains(e.ForNodes, node) }
	case zone != "" && allZones && thisZone:
		return func(e *endpoint) bool { return slices.Contains(e.ForZones, zone) }
	}
	return func(*endpoint) bool { return true }
}
