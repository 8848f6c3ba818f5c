// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/node"
)

// Encapsulation says who writes the outer headers of what pods send to other nodes through the overlay, and who takes those of known flows off.
type Encapsulation string

// The ways of encapsulation.
const (
	// EncapsulationAuto leaves it to the programs, for each node to which nothing speaks against it, else to the overlay device.
	EncapsulationAuto Encapsulation = "auto"
	// EncapsulationDevice leaves all of it to the overlay device.
	EncapsulationDevice Encapsulation = "device"
)

// ParseEncapsulation returns the way of encapsulation of that name.
func ParseEncapsulation(s string) (Encapsulation, error) {
	switch e := Encapsulation(s); e {
	case EncapsulationAuto, EncapsulationDevice:
		return e, nil
	}
	return "", fmt.Errorf("encapsulation %q: want %s or %s", s, EncapsulationAuto, EncapsulationDevice)
}

// tunnelEnds are the outer addresses towards another node.
type tunnelEnds struct{ local, remote netip.Addr }

// underlayRoute is how the programs send what they have encapsulated for a node. The zero value: they do not, the overlay device does.
type underlayRoute struct {
	device int  // ifindex
	onLink bool // the node is a neighbour there
}

// underlay is what a survey has found of the ways to the other nodes, and what that followed from.
type underlay struct {
	network string
	tunnels []node.Tunnel
	routes  map[tunnelEnds]underlayRoute
}

// Why the overlay device encapsulates.
var (
	errByFlag     = errors.New("the flag says so")
	errTransforms = errors.New("the node has xfrm policies, which the programs' packets would get past")
	errRules      = errors.New("a routing rule asks for more than addresses and marks")
	errOuterIPv6  = errors.New("outer IPv6 packets need a checksum")
	errMultipath  = errors.New("the kernel's route has several ways, or none that is a plain one")
	errUnderlay   = errors.New("the device of the kernel's route is no Ethernet device that is up, or too small")
)

// readUnderlay finds out for each node whether the programs may encapsulate. The kernel is asked again when anything has changed that the
// answers follow from; the same answers are the same map.
func (w *nodeWatcher) readUnderlay(s *survey) map[tunnelEnds]underlayRoute {
	if w.want == nil {
		return w.under.routes
	}
	network := s.underlayState()
	if w.under.routes != nil && w.under.network == network && slices.Equal(w.under.tunnels, w.want.tunnels) {
		return w.under.routes
	}
	routes, reasons, programs := make(map[tunnelEnds]underlayRoute, len(w.want.tunnels)), map[string]int{}, 0
	for _, t := range w.want.tunnels {
		r, err := w.underlayTo(s, t)
		if err != nil {
			reasons[err.Error()]++
		} else {
			programs++
		}
		routes[tunnelEnds{t.Local, t.Remote}] = r
	}
	if !maps.Equal(routes, w.under.routes) && len(routes) > 0 {
		w.log.Info("encapsulation towards other nodes", "byPrograms", programs, "byDevice", len(routes)-programs, "why", mostOf(reasons))
	}
	if maps.Equal(routes, w.under.routes) && w.under.routes != nil {
		routes = w.under.routes
	}
	w.under = underlay{network: network, tunnels: w.want.tunnels, routes: routes}
	return routes
}

// mostOf names the reason that most nodes have.
func mostOf(reasons map[string]int) string {
	names := slices.Collect(maps.Keys(reasons))
	slices.SortFunc(names, func(a, b string) int { return cmp.Or(reasons[b]-reasons[a], cmp.Compare(a, b)) })
	if len(names) == 0 {
		return ""
	}
	return names[0]
}

// underlayState changes when the programs' way to some node could.
func (s *survey) underlayState() string {
	var text strings.Builder
	fmt.Fprintf(&text, "%s xfrm %v rules %v", s.fingerprint(), s.transforms, s.narrowRules)
	for _, d := range s.devices {
		if !isPodDevice(d.name) {
			fmt.Fprintf(&text, " %d %v %v %d", d.index, d.ethernet, d.up, d.mtu)
		}
	}
	return text.String()
}

func (w *nodeWatcher) underlayTo(s *survey, t node.Tunnel) (underlayRoute, error) {
	switch {
	case w.encapsulation == EncapsulationDevice:
		return underlayRoute{}, errByFlag
	case s.transforms != nil:
		return underlayRoute{}, s.transforms
	case s.narrowRules:
		return underlayRoute{}, errRules
	case !t.Remote.Is4():
		return underlayRoute{}, errOuterIPv6
	}
	routes, err := w.routeTo(t.Local, t.Remote)
	if err != nil {
		return underlayRoute{}, fmt.Errorf("no route: %w", err)
	}
	if len(routes) != 1 || !isPlain(routes[0]) {
		return underlayRoute{}, errMultipath
	}
	r := routes[0]
	for _, d := range s.devices {
		if d.index == r.LinkIndex && d.ethernet && !d.overlay && d.up && min(d.mtu, cmp.Or(r.MTU, d.mtu)) >= t.MTU+node.Overhead4 {
			return underlayRoute{device: d.index, onLink: r.Gw == nil}, nil
		}
	}
	return underlayRoute{}, errUnderlay
}

// isPlain says that bpf_redirect_neigh sends a packet as this route would: one next hop of the same family, nothing written before it.
func isPlain(r netlink.Route) bool {
	return r.Type == unix.RTN_UNICAST && len(r.MultiPath) == 0 && r.Encap == nil && r.Via == nil && r.MPLSDst == nil && r.NewDst == nil
}

// kernelRoute returns the entry of the kernel's routes that leads from an address of this node to another one's, with all of its next hops.
func kernelRoute(local, remote netip.Addr) ([]netlink.Route, error) {
	return netlink.RouteGetWithOptions(remote.AsSlice(), &netlink.RouteGetOptions{SrcAddr: local.AsSlice(), FIBMatch: true})
}

// isNarrow says that a rule holds for some of the packets between two addresses only: a lookup by addresses does not tell of all. Packets
// from pods and from outside have no mark.
func isNarrow(r netlink.Rule) bool {
	return r.Family == unix.AF_INET &&
		(r.Dport != nil || r.Sport != nil || r.IPProto != 0 || r.UIDRange != nil || r.Tos != 0 || r.TunID != 0 || r.OifName != "")
}

// findTransforms returns errTransforms where the network namespace has xfrm policies (IPsec), and another error where the kernel does not
// say. A kernel without xfrm has none.
func findTransforms() error {
	req := nl.NewNetlinkRequest(nl.XFRM_MSG_GETSPDINFO, 0)
	req.AddRawData(make([]byte, 4)) // flags, of which there are none
	messages, err := req.Execute(unix.NETLINK_XFRM, nl.XFRM_MSG_NEWSPDINFO)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("count xfrm policies: %w", err)
	}
	for _, m := range messages {
		attributes, err := nl.ParseRouteAttr(m[min(4, len(m)):])
		if err != nil {
			return fmt.Errorf("count xfrm policies: %w", err)
		}
		for _, a := range attributes {
			// struct xfrmu_spdinfo: six counts, by direction, of policies and of those of sockets.
			if a.Attr.Type == spdInfo && slices.ContainsFunc(a.Value, func(b byte) bool { return b != 0 }) {
				return errTransforms
			}
		}
	}
	return nil
}

// spdInfo is XFRMA_SPD_INFO of linux/xfrm.h.
const spdInfo = 1

// encapsulate says in the entries of nodes who encapsulates. What nobody has looked up yet stays as it is: this agent's start changes nothing.
func (p *pipeline) encapsulate(nodes map[uint32]bpf.Node) {
	for i, n := range nodes {
		r, known := p.facts.underlay[tunnelEnds{n.Local.Netip(), n.Addr.Netip()}]
		switch have := p.m.nodes.have[i]; {
		case known:
			n.Ifindex = uint32(r.device)
			if r.onLink {
				n.Flags = bpf.NodeOnLink
			}
		case have.Addr == n.Addr && have.Local == n.Local:
			n.Ifindex, n.Flags = have.Ifindex, have.Flags
		}
		nodes[i] = n
	}
}
