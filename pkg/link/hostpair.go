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

// The veth pair by which the host's own sockets reach services. Both ends are the host's: routes to service addresses lead into HostDevice,
// and from_host is on ServiceDevice, where it sees what the host sends as from_pod sees what a pod sends.
const (
	HostDevice    = "margay.host"
	ServiceDevice = "margay.svc"
)

// ServiceRouteProtocol marks the routes into HostDevice (rtm_protocol).
const ServiceRouteProtocol = 79

// hostPairMTU is the largest that a veth device has: what the host sends to itself by the loopback device (64 KiB) crosses the pair, too. How
// large a packet to a service may be the routes say.
const hostPairMTU = 65535

// serviceRouteMetric leaves a route that somebody else made for the same prefix before ours, and a pod's: their metric is usually 0, over IPv6 1024.
const serviceRouteMetric = 2048

// ServiceRoute is a route of the host to service addresses, by HostDevice.
type ServiceRoute struct {
	Dst netip.Prefix
	// Source is the address that the host sends from, one by which other nodes know this one; zero: the kernel's choice.
	Source netip.Addr
	// MTU of the way to any backend, bytes; 0 = the pair's.
	MTU int
}

// EnsureHostPair makes the pair, or brings the one that is there to what is wanted: both ends up, with the largest MTU, without ARP and without
// addresses. What it finds under one of the names and is no such pair is an error that wraps ErrExists.
func (c *Conn) EnsureHostPair() (host, service Device, err error) {
	host, err = c.hostPair()
	if errors.Is(err, ErrNotFound) {
		if err = c.addHostPair(); err == nil {
			host, err = c.hostPair()
		}
	}
	if err != nil {
		return Device{}, Device{}, err
	}
	for _, index := range []int{host.Index, host.Peer} {
		if err := c.setHostEnd(index); err != nil {
			return Device{}, Device{}, err
		}
	}
	if host, err = c.Device(HostDevice); err == nil {
		service, err = c.Device(ServiceDevice)
	}
	return host, service, err
}

// hostPair finds the pair. One end without the other is what is left where somebody moved or removed something: it goes.
func (c *Conn) hostPair() (Device, error) {
	host, err := c.Device(HostDevice)
	if err != nil && !errors.Is(err, ErrNotFound) {
		return Device{}, err
	}
	service, missing := c.Device(ServiceDevice)
	if missing != nil && !errors.Is(missing, ErrNotFound) {
		return Device{}, missing
	}
	for _, d := range []Device{host, service} {
		if d.Index != 0 && d.Kind != "veth" {
			return Device{}, fmt.Errorf("device %s is a %s: %w", d.Name, d.Kind, ErrExists)
		}
	}
	if err == nil && missing == nil && host.Peer == service.Index && service.Peer == host.Index {
		return host, nil
	}
	for _, d := range []Device{host, service} {
		if d.Index == 0 {
			continue
		}
		if err := c.Delete(d.Index); err != nil {
			return Device{}, err
		}
	}
	return Device{}, fmt.Errorf("look up devices %s and %s: %w", HostDevice, ServiceDevice, ErrNotFound)
}

func (c *Conn) addHostPair() error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = HostDevice, hostPairMTU
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerMTU = ServiceDevice, hostPairMTU
	veth.HardwareAddr, veth.PeerHardwareAddr = MACs(HostDevice, ServiceDevice)
	if err := c.h.LinkAdd(veth); err != nil {
		return fmt.Errorf("make veth pair %s, %s: %w", HostDevice, ServiceDevice, err)
	}
	return nil
}

func (c *Conn) setHostEnd(index int) error {
	l, err := c.h.LinkByIndex(index)
	if err != nil {
		return fmt.Errorf("look up device %d: %w", index, notFound(err))
	}
	name := l.Attrs().Name
	if l.Attrs().RawFlags&unix.IFF_NOARP == 0 {
		if err := c.h.LinkSetARPOff(l); err != nil {
			return fmt.Errorf("switch ARP off on %s: %w", name, err)
		}
	}
	err = c.h.LinkSetIP6AddrGenMode(l, addrGenModeNone)
	if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("switch off address generation on %s: %w", name, err)
	}
	if l.Attrs().MTU != hostPairMTU {
		if err := c.SetMTU(index, hostPairMTU); err != nil {
			return err
		}
	}
	if l.Attrs().RawFlags&unix.IFF_UP == 0 {
		return c.SetUp(index)
	}
	return nil
}

// SyncServiceRoutes makes the routes with ServiceRouteProtocol, in whatever table, exactly those of want, on the device with that index, and
// returns how many it made or deleted. A prefix must be there once. With keep nothing is deleted but what is replaced. It goes on after an
// error, and joins them.
func (c *Conn) SyncServiceRoutes(device int, want []ServiceRoute, keep bool) (changed int, err error) {
	wanted, replaced := make(map[ServiceRoute]bool, len(want)), make(map[netip.Prefix]bool, len(want))
	for _, r := range want {
		wanted[r], replaced[r.Dst] = true, true
	}
	var stale []netlink.Route
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		filter := &netlink.Route{Protocol: ServiceRouteProtocol, Table: unix.RT_TABLE_UNSPEC}
		have, err := dump.Whole(func() ([]netlink.Route, error) {
			return c.h.RouteListFiltered(family, filter, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return 0, fmt.Errorf("list service routes: %w", err)
		}
		for _, r := range have {
			s := NewServiceRoute(r)
			if wanted[s] && r.LinkIndex == device && r.Table == unix.RT_TABLE_MAIN && r.Priority == serviceRouteMetric {
				delete(wanted, s)
			} else if !keep || replaced[s.Dst] {
				stale = append(stale, r)
			}
		}
	}
	var errs []error
	// The old ones first: IPv6 does not replace a route by one with another source, but keeps both.
	for _, r := range stale {
		if err := c.h.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("delete service route %s: %w", r.Dst, err))
			continue
		}
		changed++
	}
	for _, r := range want {
		if !wanted[r] {
			continue
		}
		if err := c.addServiceRoute(device, r); err != nil {
			errs = append(errs, err)
			continue
		}
		changed++
	}
	return changed, errors.Join(errs...)
}

// addServiceRoute names a next hop, though nobody resolves it: so one neighbour entry serves every service address.
func (c *Conn) addServiceRoute(device int, s ServiceRoute) error {
	r := &netlink.Route{
		Dst: ipNet(s.Dst), LinkIndex: device, Gw: GatewayOf(s.Dst.Addr()).AsSlice(), Flags: int(netlink.FLAG_ONLINK), MTU: s.MTU,
		Protocol: ServiceRouteProtocol, Priority: serviceRouteMetric, Table: unix.RT_TABLE_MAIN,
	}
	if s.Source.IsValid() {
		r.Src = s.Source.AsSlice()
	}
	if err := c.h.RouteReplace(r); err != nil {
		return fmt.Errorf("add service route %s: %w", s.Dst, err)
	}
	return nil
}

// NewServiceRoute is a route of the kernel's in our form.
func NewServiceRoute(r netlink.Route) ServiceRoute {
	s := ServiceRoute{MTU: r.MTU}
	if len(r.Src) > 0 {
		s.Source = fromIP(r.Src)
	}
	if r.Dst != nil {
		ones, _ := r.Dst.Mask.Size()
		s.Dst = netip.PrefixFrom(fromIP(r.Dst.IP), ones)
	}
	return s
}
