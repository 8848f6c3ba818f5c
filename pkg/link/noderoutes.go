// SPDX-License-Identifier: Apache-2.0

package link

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/dump"
)

// NodeRouteProtocol marks the routes to other nodes' pods and the unreachable ones for our own ranges (rtm_protocol). It is not
// RouteProtocol: the pods' routes come and go with ADD and DEL, these are compared as a whole.
const NodeRouteProtocol = 78

// Metrics of those routes. A route that somebody else made for the same prefix, usually with metric 0, goes before ours and is never
// replaced by it.
const (
	nodeRouteMetric   = 1024
	unreachableMetric = 1 << 24
)

// NodeRoute is a route of the host to other nodes' pods, or one that makes the rest of its own range unreachable.
type NodeRoute struct {
	Dst netip.Prefix
	// Device is the ifindex; 0 means unreachable.
	Device int
	// Gateway is the next hop on the device; zero: the device itself.
	Gateway netip.Addr
	// Source is the address that the host sends from; zero: the kernel's choice.
	Source netip.Addr
}

// SyncNodeRoutes makes the routes with NodeRouteProtocol, in whatever table, exactly those of want, and returns how many routes it made
// and how many it deleted that nothing replaces. A prefix must be there once. With keep nothing is
// deleted but what is replaced. It goes on after an error, and joins them.
func (c *Conn) SyncNodeRoutes(want []NodeRoute, keep bool) (changed int, err error) {
	have, err := c.nodeRoutes()
	if err != nil {
		return 0, err
	}
	wanted := make(map[NodeRoute]bool, len(want))
	for _, r := range want {
		wanted[r] = true
	}
	var errs []error
	stale := map[NodeRoute]netlink.Route{}
	for _, r := range have {
		n := NewNodeRoute(r)
		if wanted[n] && r.Table == unix.RT_TABLE_MAIN && r.Priority == n.metric() {
			delete(wanted, n)
			continue
		}
		stale[n] = r
	}
	// New ones first: a route that gets another next hop replaces the old one in place. IPv6 would add one beside it: there the old one
	// goes before.
	for _, r := range want {
		if !wanted[r] {
			continue
		}
		if err := errors.Join(c.removeOld(r, stale), c.replace(r)); err != nil {
			errs = append(errs, err)
			continue
		}
		changed++
	}
	for n, r := range stale {
		if keep {
			break
		}
		if err := c.deleteRoute(n, r); err != nil {
			errs = append(errs, err)
			continue
		}
		changed++
	}
	return changed, errors.Join(errs...)
}

// removeOld deletes the stale routes with the prefix of r where replacing would leave them, and forgets those that replacing takes along.
func (c *Conn) removeOld(r NodeRoute, stale map[NodeRoute]netlink.Route) error {
	for old, kernel := range stale {
		if old.Dst != r.Dst {
			continue
		}
		same := kernel.Table == unix.RT_TABLE_MAIN && kernel.Priority == r.metric()
		if r.Dst.Addr().Is4() && same {
			delete(stale, old)
			continue
		}
		if err := c.deleteRoute(old, kernel); err != nil {
			return err
		}
		delete(stale, old)
	}
	return nil
}

func (c *Conn) deleteRoute(n NodeRoute, r netlink.Route) error {
	if err := c.h.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("delete node route %s: %w", n.Dst, err)
	}
	return nil
}

func (c *Conn) replace(n NodeRoute) error {
	r := netlink.Route{Dst: ipNet(n.Dst), LinkIndex: n.Device, Protocol: NodeRouteProtocol, Priority: n.metric(), Table: unix.RT_TABLE_MAIN}
	switch {
	case n.Device == 0:
		r.Type = unix.RTN_UNREACHABLE
	case n.Gateway.IsValid():
		r.Gw = n.Gateway.AsSlice()
	default:
		r.Scope = netlink.SCOPE_LINK
	}
	if n.Source.IsValid() {
		r.Src = n.Source.AsSlice()
	}
	if err := c.h.RouteReplace(&r); err != nil {
		return fmt.Errorf("add node route %s: %w", n.Dst, err)
	}
	return nil
}

func (n NodeRoute) metric() int {
	if n.Device == 0 {
		return unreachableMetric
	}
	return nodeRouteMetric
}

// nodeRoutes lists the routes with NodeRouteProtocol.
func (c *Conn) nodeRoutes() ([]netlink.Route, error) {
	filter := &netlink.Route{Protocol: NodeRouteProtocol, Table: unix.RT_TABLE_UNSPEC}
	var out []netlink.Route
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := dump.Whole(func() ([]netlink.Route, error) {
			return c.h.RouteListFiltered(family, filter, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return nil, fmt.Errorf("list node routes: %w", err)
		}
		out = append(out, list...)
	}
	return out, nil
}

// NodeRoutes returns the routes with NodeRouteProtocol.
func (c *Conn) NodeRoutes() ([]NodeRoute, error) {
	list, err := c.nodeRoutes()
	if err != nil {
		return nil, err
	}
	out := make([]NodeRoute, 0, len(list))
	for _, r := range list {
		out = append(out, NewNodeRoute(r))
	}
	return out, nil
}

// NewNodeRoute is a route of the kernel's in our form. The kernel shows an unreachable IPv6 route on the loopback device.
func NewNodeRoute(r netlink.Route) NodeRoute {
	n := NodeRoute{Device: r.LinkIndex}
	if r.Type == unix.RTN_UNREACHABLE {
		n.Device = 0
	}
	if r.Dst != nil {
		ones, _ := r.Dst.Mask.Size()
		n.Dst = netip.PrefixFrom(fromIP(r.Dst.IP), ones)
	}
	if len(r.Gw) > 0 {
		n.Gateway = fromIP(r.Gw)
	}
	if len(r.Src) > 0 {
		n.Source = fromIP(r.Src)
	}
	return n
}
