// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/dump"
	"github.com/margay-cni/margay/pkg/link"
	"github.com/margay-cni/margay/pkg/node"
)

// device is a network device of the node, as far as choosing needs it.
type device struct {
	index    int
	name     string
	kind     string // netlink's: "device", "veth", "bridge", ...
	ethernet bool
	loopback bool
	// defaultRoute says that a default route leaves by it.
	defaultRoute bool
	// overlay says that it is the VXLAN device that we made.
	overlay bool
	up      bool
	mtu     int // bytes
	// addrs are its global addresses, networks the same with the length of the network that each is on, and usable those that new
	// connections may start from.
	addrs    []netip.Addr
	networks []netip.Prefix
	usable   []netip.Addr
}

// survey is one reading of the node's network.
type survey struct {
	devices []device
	routes  []string
	// nodeRoutes are the kernel's routes to other nodes that we made.
	nodeRoutes map[link.NodeRoute]bool
	// serviceRoutes are those to service addresses, by the device that they lead into.
	serviceRoutes map[int]map[link.ServiceRoute]bool
	// transforms is errTransforms where there are xfrm policies, another error where nobody knows, else nil.
	transforms error
	// narrowRules says that a routing rule does not hold for all packets between two addresses.
	narrowRules bool
}

// podDevicePrefix begins the name of every host-side device that Margay makes.
const podDevicePrefix = "mgy"

// Devices returns the names of the host's network devices by index.
func (systemHost) Devices() (map[int]string, error) {
	links, err := dump.Whole(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	names := make(map[int]string, len(links))
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	return names, nil
}

// readSurvey reads devices, addresses, routes and rules of the network namespace, and whether it has xfrm policies. Routes to our own pods are left out: the endpoints map
// decides about those, and a pod's start must not send every flow of the node through the slow path.
func readSurvey() (*survey, error) {
	links, err := dump.Whole(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	addrs, err := dump.Whole(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, unix.AF_UNSPEC) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	routes, err := dump.Whole(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(unix.AF_UNSPEC, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	rules, err := dump.Whole(func() ([]netlink.Rule, error) { return netlink.RuleList(unix.AF_UNSPEC) })
	if err != nil {
		return nil, fmt.Errorf("list routing rules: %w", err)
	}
	s := &survey{nodeRoutes: map[link.NodeRoute]bool{}, serviceRoutes: map[int]map[link.ServiceRoute]bool{}}
	byIndex := map[int]*device{}
	for _, l := range links {
		a := l.Attrs()
		s.devices = append(s.devices, device{
			index: a.Index, name: a.Name, kind: l.Type(), ethernet: a.EncapType == "ether", loopback: a.EncapType == "loopback",
			overlay: l.Type() == "vxlan" && a.Alias == link.OverlayAlias, up: a.RawFlags&unix.IFF_UP != 0, mtu: a.MTU,
		})
	}
	for i := range s.devices {
		byIndex[s.devices[i].index] = &s.devices[i]
	}
	for _, a := range addrs {
		if d, ip := byIndex[a.LinkIndex], toAddr(a); d != nil && ip.IsValid() {
			d.addAddress(ip, a)
		}
	}
	for _, r := range routes {
		s.addRoute(r, byIndex)
	}
	for _, r := range rules {
		s.routes = append(s.routes, fmt.Sprintf("rule %+v", r))
		s.narrowRules = s.narrowRules || isNarrow(r)
	}
	slices.Sort(s.routes)
	s.transforms = findTransforms()
	return s, nil
}

// unusable are the flags of addresses that no new connection should start from: on their way out, not checked yet, or made for privacy
// and gone tomorrow.
const unusable = unix.IFA_F_DEPRECATED | unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED

func (d *device) addAddress(ip netip.Addr, a netlink.Addr) {
	d.addrs = append(d.addrs, ip)
	if ones, bits := a.Mask.Size(); bits > 0 {
		d.networks = append(d.networks, netip.PrefixFrom(ip, ones))
	}
	// The same bit means "secondary" for IPv4, "temporary" for IPv6.
	if a.Flags&unusable == 0 && (ip.Is4() || a.Flags&unix.IFA_F_TEMPORARY == 0) {
		d.usable = append(d.usable, ip)
	}
}

// addRoute takes a route into the fingerprint's lines and notes who has a default route.
func (s *survey) addRoute(r netlink.Route, byIndex map[int]*device) {
	hops := []*netlink.NexthopInfo{{LinkIndex: r.LinkIndex, Gw: r.Gw, Via: r.Via}}
	if len(r.MultiPath) > 0 {
		hops = r.MultiPath
	}
	var line strings.Builder
	fmt.Fprintf(&line, "route %d %v table %d type %d metric %d src %v mtu %d encap %v", r.Family, r.Dst, r.Table, r.Type, r.Priority, r.Src, r.MTU, r.Encap)
	podOnly := r.Protocol == link.RouteProtocol
	for _, h := range hops {
		d := byIndex[h.LinkIndex]
		if d == nil {
			// A blackhole, or a device that went away between two dumps: its own event will make us look again.
			d = &device{index: h.LinkIndex}
		}
		podOnly = podOnly || isPodDevice(d.name)
		if r.Table == unix.RT_TABLE_MAIN && isDefault(r) && r.Type == unix.RTN_UNICAST {
			d.defaultRoute = true
		}
		fmt.Fprintf(&line, " via %v %v dev %d mtu %d", h.Gw, h.Via, h.LinkIndex, d.mtu) // Via: a gateway of the other family
	}
	if r.Protocol == link.ServiceRouteProtocol {
		s.addServiceRoute(r)
		return
	}
	if r.Protocol == link.NodeRouteProtocol {
		s.nodeRoutes[link.NewNodeRoute(r)] = true
	}
	if !podOnly {
		s.routes = append(s.routes, line.String())
	}
}

// addServiceRoute keeps a route to service addresses out of the fingerprint: what pods send there the services decide, and a new service must
// not send every flow of the node through the slow path.
func (s *survey) addServiceRoute(r netlink.Route) {
	if s.serviceRoutes[r.LinkIndex] == nil {
		s.serviceRoutes[r.LinkIndex] = map[link.ServiceRoute]bool{}
	}
	s.serviceRoutes[r.LinkIndex][link.NewServiceRoute(r)] = true
}

func isDefault(r netlink.Route) bool {
	if r.Dst == nil {
		return true
	}
	ones, _ := r.Dst.Mask.Size()
	return ones == 0 && r.Dst.IP.IsUnspecified()
}

func isPodDevice(name string) bool {
	return strings.HasPrefix(name, podDevicePrefix)
}

// isHostPair says that the device is one of the two by which the host reaches services.
func isHostPair(name string) bool {
	return name == link.HostDevice || name == link.ServiceDevice
}

// toAddr returns the global address, or the zero Addr for one of another scope.
func toAddr(a netlink.Addr) netip.Addr {
	ip, ok := netip.AddrFromSlice(a.IP)
	if !ok || a.Scope == unix.RT_SCOPE_HOST || a.Scope == unix.RT_SCOPE_LINK {
		return netip.Addr{}
	}
	ip = ip.Unmap()
	if ip.IsLoopback() || ip.IsLinkLocalUnicast() || ip.IsMulticast() || ip.IsUnspecified() {
		return netip.Addr{}
	}
	return ip
}

// fingerprint changes when a packet's way could change.
func (s *survey) fingerprint() string {
	sum := sha256.Sum256([]byte(strings.Join(s.routes, "\n")))
	return hex.EncodeToString(sum[:16])
}

// chooser decides which devices carry from_netdev.
type chooser struct {
	// patterns are names as path.Match knows them; empty: devices that the node is reached by.
	patterns []string
	// pods are the host-side devices of our pods, by index: made by us or adopted.
	pods map[int]bool
	// fresh are veth devices too young to be judged by: another plugin may be making one for a pod that Margay then adopts.
	fresh map[int]bool
}

// virtualKinds are devices with addresses on which no packet from outside arrives as itself, or only what another device has
// delivered already.
var virtualKinds = []string{"dummy", "ifb", "nlmon", "vcan", "vrf"}

// choose returns why the device carries from_netdev, or "".
func (c chooser) choose(d device) string {
	if d.loopback || d.overlay || isPodDevice(d.name) || isHostPair(d.name) || c.pods[d.index] {
		return ""
	}
	if len(c.patterns) > 0 {
		for _, p := range c.patterns {
			if ok, err := path.Match(p, d.name); ok && err == nil {
				return "named by " + p
			}
		}
		return ""
	}
	switch {
	case !d.ethernet || slices.Contains(virtualKinds, d.kind):
		// Without link layer (WireGuard, IP tunnels): usually a way of the node's own, for an administrator to name.
		return ""
	case d.defaultRoute:
		return "default route"
	case d.kind == "bridge":
		// docker0, cni0, virbr0: what is behind them is on this node.
		return ""
	case d.kind == "veth" && c.fresh[d.index]:
		return ""
	case len(d.addrs) > 0:
		return "global address"
	}
	return ""
}

// facts gives the node's addresses (all of them are local, and NodePorts are served on those of the chosen devices), the chosen devices,
// and what the compiler of pkg/node is told of the machine.
func (s *survey) facts(c chooser) (map[netip.Addr]uint32, []DeviceStatus, node.Machine) {
	addrs := map[netip.Addr]uint32{}
	var (
		chosen  []DeviceStatus
		machine node.Machine
	)
	for _, d := range s.devices {
		flags := bpf.NodeAddrLocal
		if reason := c.choose(d); reason != "" {
			flags |= bpf.NodeAddrNodePort
			chosen = append(chosen, DeviceStatus{Name: d.name, Ifindex: d.index, Reason: reason})
			machine.Devices = append(machine.Devices, node.Device{
				Index: d.index, Name: d.name, MTU: d.mtu, DefaultRoute: d.defaultRoute, Addresses: d.networks, Usable: d.usable,
			})
		}
		for _, a := range d.addrs {
			addrs[a] |= flags
		}
		machine.Addresses = append(machine.Addresses, d.addrs...)
	}
	return addrs, chosen, machine
}

// overlay returns the VXLAN device that we made, nil if there is none.
func (s *survey) overlay() *device {
	for i := range s.devices {
		if s.devices[i].overlay {
			return &s.devices[i]
		}
	}
	return nil
}

// named returns the device of that name, nil if there is none.
func (s *survey) named(name string) *device {
	for i := range s.devices {
		if s.devices[i].name == name {
			return &s.devices[i]
		}
	}
	return nil
}
