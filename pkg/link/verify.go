// SPDX-License-Identifier: Apache-2.0

package link

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/dump"
)

// Addresses returns the addresses of a device, of both families, link-local ones included.
func (c *Conn) Addresses(index int) ([]netip.Addr, error) {
	dev := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index}}
	list, err := dump.Whole(func() ([]netlink.Addr, error) { return c.h.AddrList(dev, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	out := make([]netip.Addr, 0, len(list))
	for _, a := range list {
		out = append(out, fromIP(a.IP))
	}
	return out, nil
}

// HasAddress says whether any device has the address.
func (c *Conn) HasAddress(a netip.Addr) (bool, error) {
	all, err := dump.Whole(func() ([]netlink.Addr, error) { return c.h.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return false, fmt.Errorf("list addresses: %w", err)
	}
	return slices.ContainsFunc(all, func(have netlink.Addr) bool { return fromIP(have.IP) == a.Unmap() }), nil
}

// VerifyPod reports everything that ConfigurePod(p) did and that is no longer so. Additions by others are fine.
func (c *Conn) VerifyPod(p Pod) error {
	have, err := c.Addresses(p.Index)
	if err != nil {
		return err
	}
	var faults []error
	for _, a := range p.Addresses {
		if !slices.Contains(have, a) {
			faults = append(faults, fmt.Errorf("pod address %s is missing", a))
		}
	}
	for _, gw := range gateways(p.Addresses) {
		faults = append(faults, c.verifyNeighbour(p.Index, gw, p.GatewayMAC))
	}
	faults = append(faults, c.verifyRoutes(p.Index, podRoutes(p)))
	return errors.Join(faults...)
}

// VerifyHost reports everything that ConfigureHost(h) did and that is no longer so.
func (c *Conn) VerifyHost(h Host) error {
	var (
		faults []error
		routes []route
	)
	for _, a := range h.Addresses {
		faults = append(faults, c.verifyNeighbour(h.Index, a, h.PodMAC))
		routes = append(routes, hostRoute(h.Index, a))
	}
	faults = append(faults, c.verifyRoutes(h.Index, routes))
	return errors.Join(faults...)
}

func (c *Conn) verifyNeighbour(index int, a netip.Addr, mac net.HardwareAddr) error {
	list, err := dump.Whole(func() ([]netlink.Neigh, error) { return c.h.NeighList(index, family(a)) })
	if err != nil {
		return fmt.Errorf("list neighbours: %w", err)
	}
	for _, n := range list {
		if fromIP(n.IP) != a {
			continue
		}
		if n.State&netlink.NUD_PERMANENT == 0 || !bytes.Equal(n.HardwareAddr, mac) {
			return fmt.Errorf("neighbour %s is %s (state %#x), want permanent %s", a, n.HardwareAddr, n.State, mac)
		}
		return nil
	}
	return fmt.Errorf("neighbour %s is missing", a)
}

func (c *Conn) verifyRoutes(index int, want []route) error {
	filter := &netlink.Route{LinkIndex: index, Table: unix.RT_TABLE_UNSPEC}
	var faults []error
	have := map[int][]netlink.Route{}
	for _, w := range want {
		f := family(w.Dst.Addr())
		if _, ok := have[f]; !ok {
			list, err := dump.Whole(func() ([]netlink.Route, error) {
				return c.h.RouteListFiltered(f, filter, netlink.RT_FILTER_OIF|netlink.RT_FILTER_TABLE)
			})
			if err != nil {
				return fmt.Errorf("list routes: %w", err)
			}
			have[f] = list
		}
		if !slices.ContainsFunc(have[f], func(h netlink.Route) bool { return sameRoute(h, w) }) {
			faults = append(faults, fmt.Errorf("route %s is missing", w))
		}
	}
	return errors.Join(faults...)
}

// sameRoute compares destination, next hop and table; the kernel fills in the rest.
func sameRoute(have netlink.Route, want route) bool {
	table := want.Table
	if table == 0 {
		table = unix.RT_TABLE_MAIN
	}
	if have.Table != table || fromIP(have.Gw) != want.gateway {
		return false
	}
	if have.Dst == nil { // default route
		return want.Dst.Bits() == 0
	}
	return have.Dst.String() == want.Dst.String()
}
