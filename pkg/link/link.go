// SPDX-License-Identifier: Apache-2.0

// Package link makes and removes the devices, addresses, routes and neighbour entries that connect a pod to its node, and verifies that
// they are still there. It knows nothing of BPF, of namespaces' paths (pkg/netns) and of who a pod is.
//
// A Socket or Conn is a netlink socket bound to one network namespace for good, so nothing here switches threads between namespaces. Dumps go
// through pkg/dump.
//
// A pod has /32 and /128 addresses, a default route through a link-local gateway that no device really has, and a permanent neighbour
// entry that resolves the gateway to the host-side device: no ARP or neighbour discovery is needed in either direction.
package link

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/addr"
	"github.com/margay-cni/margay/pkg/dump"
)

// The gateways that every pod sees. They exist only as neighbour entries.
var (
	Gateway4 = netip.AddrFrom4([4]byte{169, 254, 1, 1})
	Gateway6 = netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 15: 1})
)

// RouteProtocol marks our routes in the node's routing table, so that they can be told from everybody else's (rtm_protocol).
const RouteProtocol = 77

// ErrNotFound is wrapped by the error about a device that is not there.
var ErrNotFound = errors.New("no such device")

// ErrExists is wrapped by the error about a device name that is taken.
var ErrExists = errors.New("device exists")

// ErrIPv6Disabled is wrapped when the kernel refuses an IPv6 address because disable_ipv6 is set on the device.
var ErrIPv6Disabled = errors.New("IPv6 is disabled on the device")

// Conn is a Socket, and beside it one of a netlink library's for tables and for devices other than pods'. It may be used by one goroutine at a
// time.
type Conn struct {
	*Socket
	h *netlink.Handle
}

// Dial opens both sockets in the namespace with the open file descriptor fd; -1 means the calling thread's namespace.
func Dial(fd int) (*Conn, error) {
	s, err := Open(fd)
	if err != nil {
		return nil, err
	}
	ns := netns.None()
	if fd >= 0 {
		ns = netns.NsHandle(fd)
	}
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	return &Conn{s, h}, nil
}

// Close closes both sockets.
func (c *Conn) Close() {
	c.Socket.Close()
	c.h.Close()
}

// Device is what Margay needs to know of a network device.
type Device struct {
	Index int
	Name  string
	Kind  string // "veth", "bridge", "device", ...
	Alias string
	MAC   net.HardwareAddr
	MTU   int
	Up    bool
	// Peer is the ifindex of the other end of a veth pair, in the namespace that the other end lives in; 0 for other kinds.
	Peer int
}

func newDevice(l netlink.Link) Device {
	a := l.Attrs()
	d := Device{
		Index: a.Index,
		Name:  a.Name,
		Kind:  l.Type(),
		Alias: a.Alias,
		MAC:   a.HardwareAddr,
		MTU:   a.MTU,
		Up:    a.Flags&net.FlagUp != 0,
	}
	if d.Kind == "veth" {
		d.Peer = a.ParentIndex
	}
	return d
}

// Devices returns every device of the namespace.
func (c *Conn) Devices() ([]Device, error) {
	links, err := dump.Whole(c.h.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	devices := make([]Device, 0, len(links))
	for _, l := range links {
		devices = append(devices, newDevice(l))
	}
	return devices, nil
}

// notFound adds ErrNotFound to the library's and the kernel's ways of saying it.
func notFound(err error) error {
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) || errors.Is(err, unix.ENODEV) {
		return errors.Join(ErrNotFound, err)
	}
	return err
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func hostNet(a netip.Addr) *net.IPNet {
	return ipNet(addr.HostPrefix(a))
}

func fromIP(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

func family(a netip.Addr) int {
	if a.Unmap().Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
