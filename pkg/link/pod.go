// SPDX-License-Identifier: Apache-2.0

package link

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/addr"
)

// Route is one route of a pod. Its next hop is always the pod's gateway of that family.
type Route struct {
	Dst      netip.Prefix
	MTU      int // bytes; 0 = the device's
	AdvMSS   int // bytes; 0 = derived from the MTU
	Priority int
	Table    int // 0 = main
}

// Pod is how a pod's end of the pair is configured.
type Pod struct {
	Index     int
	Addresses []netip.Addr
	Routes    []Route
	// GatewayMAC is the host-side device's.
	GatewayMAC net.HardwareAddr
	// EnableIPv6 is called when the kernel says that IPv6 is disabled on the device (container engines do that to namespaces whose
	// pods have no IPv6 address of theirs). It must clear disable_ipv6 inside the pod's namespace; see EnableIPv6.
	EnableIPv6 func() error
}

// GatewayOf returns the gateway for destinations of a's family.
func GatewayOf(a netip.Addr) netip.Addr {
	if a.Unmap().Is4() {
		return Gateway4
	}
	return Gateway6
}

// gateways returns the gateway of each family that has an address, IPv4 first.
func gateways(addresses []netip.Addr) []netip.Addr {
	var v4, v6 []netip.Addr
	for _, a := range addresses {
		if a.Is4() {
			v4 = []netip.Addr{Gateway4}
		} else {
			v6 = []netip.Addr{Gateway6}
		}
	}
	return append(v4, v6...)
}

// ConfigurePod brings the pod's end up and gives it addresses, neighbours and routes. c is in the pod's namespace. Nothing that was there
// is removed, so it can be repeated.
func (c *Socket) ConfigurePod(p Pod) error {
	if err := c.setUp(p.Index); err != nil {
		return fmt.Errorf("bring pod interface up: %w", err)
	}
	for _, a := range p.Addresses {
		err := c.setAddress(p.Index, a)
		if errors.Is(err, ErrIPv6Disabled) && p.EnableIPv6 != nil {
			if err := p.EnableIPv6(); err != nil {
				return fmt.Errorf("enable IPv6 on the pod interface: %w", err)
			}
			err = c.setAddress(p.Index, a)
		}
		if err != nil {
			return err
		}
	}
	for _, gw := range gateways(p.Addresses) {
		if err := c.setNeighbour(p.Index, gw, p.GatewayMAC); err != nil {
			return err
		}
	}
	for _, r := range podRoutes(p) {
		if err := c.setRoute(r); err != nil {
			return fmt.Errorf("add pod route %s: %w", r, err)
		}
	}
	return c.waitLocal(p.Addresses)
}

// podRoutes returns all of the pod's routes: first what makes the IPv4 gateway reachable (fe80::1 is link-local anyway).
func podRoutes(p Pod) []route {
	var out []route
	for _, gw := range gateways(p.Addresses) {
		if gw.Is4() {
			out = append(out, route{
				Route: Route{Dst: addr.HostPrefix(gw)}, device: p.Index, scope: unix.RT_SCOPE_LINK, protocol: unix.RTPROT_BOOT,
			})
		}
	}
	for _, r := range p.Routes {
		r.Dst = r.Dst.Masked()
		out = append(out, route{Route: r, device: p.Index, gateway: GatewayOf(r.Dst.Addr()), protocol: unix.RTPROT_BOOT})
	}
	return out
}

// EnableIPv6 clears disable_ipv6 of a device in the calling thread's namespace.
func EnableIPv6(device string) error {
	path := filepath.Join("/proc/sys/net/ipv6/conf", device, "disable_ipv6")
	if err := os.WriteFile(path, []byte("0"), 0); err != nil {
		return fmt.Errorf("write sysctl: %w", err)
	}
	return nil
}

// Host is how the host's end of the pair is configured.
type Host struct {
	Index     int
	PodMAC    net.HardwareAddr
	Addresses []netip.Addr
}

// ConfigureHost brings the host's end up and adds a route and a permanent neighbour entry for each of the pod's addresses. A route for
// the same address to another device is replaced: the address has one owner, and this is it. c is in the host's namespace.
func (c *Socket) ConfigureHost(h Host) error {
	// The host never speaks from this device's own address. Without one it also sends the pod no router solicitations, multicast
	// reports and duplicate address probes.
	if err := c.setAddrGenMode(h.Index, addrGenModeNone); err != nil {
		return fmt.Errorf("switch off address generation: %w", err)
	}
	if err := c.setUp(h.Index); err != nil {
		return fmt.Errorf("bring host device up: %w", err)
	}
	for _, a := range h.Addresses {
		if err := c.setNeighbour(h.Index, a, h.PodMAC); err != nil {
			return err
		}
		if err := c.setRoute(hostRoute(h.Index, a)); err != nil {
			return fmt.Errorf("add host route %s: %w", a, err)
		}
	}
	return nil
}

// hostRoute is the node's route to a pod's address.
func hostRoute(device int, a netip.Addr) route {
	return route{Route: Route{Dst: addr.HostPrefix(a)}, device: device, scope: unix.RT_SCOPE_LINK, protocol: RouteProtocol}
}
