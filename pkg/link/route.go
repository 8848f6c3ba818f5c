// SPDX-License-Identifier: Apache-2.0

package link

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/rtnetlink"
)

// replaceFlags make what is not there, and change what is.
const replaceFlags = unix.NLM_F_CREATE | unix.NLM_F_REPLACE

// route is a route with one next hop or none.
type route struct {
	Route
	device   int
	gateway  netip.Addr // zero: none
	scope    byte       // RT_SCOPE_
	protocol byte       // RTPROT_ or one of ours
}

func (r route) String() string {
	if !r.gateway.IsValid() {
		return r.Dst.String()
	}
	return fmt.Sprintf("%s via %s", r.Dst, r.gateway)
}

// setRoute adds a route, in place of the one that is there for the same destination, table and priority.
func (c *Socket) setRoute(r route) error {
	table := r.Table
	if table == 0 {
		table = unix.RT_TABLE_MAIN
	}
	short := byte(unix.RT_TABLE_UNSPEC) // larger numbers are in the attribute alone
	if table < 256 {
		short = byte(table)
	}
	dst := r.Dst.Masked()
	// struct rtmsg: family, length of destination and source, TOS, table, protocol, scope, type, flags
	fixed := []byte{byte(family(dst.Addr())), byte(dst.Bits()), 0, 0, short, r.protocol, r.scope, unix.RTN_UNICAST, 0, 0, 0, 0}
	m := rtnetlink.NewRequest(unix.RTM_NEWROUTE, replaceFlags, fixed)
	m.Bytes(unix.RTA_DST, dst.Addr().AsSlice())
	if r.gateway.IsValid() {
		m.Bytes(unix.RTA_GATEWAY, r.gateway.AsSlice())
	}
	m.Uint32(unix.RTA_OIF, uint32(r.device))
	m.Uint32(unix.RTA_TABLE, uint32(table))
	if r.Priority != 0 {
		m.Uint32(unix.RTA_PRIORITY, uint32(r.Priority))
	}
	if r.MTU != 0 || r.AdvMSS != 0 {
		m.Nest(unix.RTA_METRICS, func() {
			if r.MTU != 0 {
				m.Uint32(unix.RTAX_MTU, uint32(r.MTU))
			}
			if r.AdvMSS != 0 {
				m.Uint32(unix.RTAX_ADVMSS, uint32(r.AdvMSS))
			}
		})
	}
	return c.s.Do(m)
}

// setAddress gives a device an address, which may be there already. The error wraps ErrIPv6Disabled where that is the reason.
func (c *Socket) setAddress(index int, a netip.Addr) error {
	var flags byte
	if a.Is6() {
		// Nobody else can have the address: duplicate address detection would only delay the pod by a second.
		flags = unix.IFA_F_NODAD
	}
	fixed := []byte{byte(family(a)), byte(a.BitLen()), flags, unix.RT_SCOPE_UNIVERSE, 0, 0, 0, 0} // struct ifaddrmsg
	native.PutUint32(fixed[4:], uint32(index))
	r := rtnetlink.NewRequest(unix.RTM_NEWADDR, replaceFlags, fixed)
	r.Bytes(unix.IFA_LOCAL, a.AsSlice())
	r.Bytes(unix.IFA_ADDRESS, a.AsSlice())
	err := c.s.Do(r)
	if errors.Is(err, unix.EACCES) && a.Is6() {
		err = errors.Join(ErrIPv6Disabled, err)
	}
	if err != nil {
		return fmt.Errorf("add address %s: %w", a, err)
	}
	return nil
}

// setNeighbour makes a permanent neighbour entry, in place of the one that is there.
func (c *Socket) setNeighbour(index int, a netip.Addr, mac net.HardwareAddr) error {
	fixed := make([]byte, unix.SizeofNdMsg)
	fixed[0] = byte(family(a))
	native.PutUint32(fixed[4:], uint32(index))
	native.PutUint16(fixed[8:], unix.NUD_PERMANENT)
	r := rtnetlink.NewRequest(unix.RTM_NEWNEIGH, replaceFlags, fixed)
	r.Bytes(unix.NDA_DST, a.AsSlice())
	r.Bytes(unix.NDA_LLADDR, mac)
	if err := c.s.Do(r); err != nil {
		return fmt.Errorf("set neighbour %s: %w", a, err)
	}
	return nil
}

// found is what the kernel answers about the way to one address.
type found struct {
	kind    byte  // RTN_
	devices []int // of all next hops; none for a route that leads nowhere
}

// lookUpRoute asks for the way to an address: the route with its destination and all its next hops, or, without fibMatch, what a packet would
// take.
func (c *Socket) lookUpRoute(a netip.Addr, fibMatch bool) (found, error) {
	flags := uint32(unix.RTM_F_LOOKUP_TABLE)
	if fibMatch {
		flags |= unix.RTM_F_FIB_MATCH
	}
	fixed := make([]byte, unix.SizeofRtMsg)
	fixed[0], fixed[1] = byte(family(a)), byte(a.BitLen())
	native.PutUint32(fixed[8:], flags)
	r := rtnetlink.NewRequest(unix.RTM_GETROUTE, 0, fixed)
	r.Bytes(unix.RTA_DST, a.AsSlice())
	b, err := c.s.Get(r)
	if err != nil {
		return found{}, err
	}
	if len(b) < unix.SizeofRtMsg {
		return found{}, fmt.Errorf("message about a route of %d bytes: %w", len(b), unix.EMSGSIZE)
	}
	f := found{kind: b[7]}
	for kind, value := range rtnetlink.Attributes(b[unix.SizeofRtMsg:]) {
		switch kind {
		case unix.RTA_OIF:
			if device := number(value); device != 0 {
				f.devices = append(f.devices, device)
			}
		case unix.RTA_MULTIPATH:
			f.devices = append(f.devices, nextHops(value)...)
		}
	}
	return f, nil
}

// nextHops returns the devices of a list of struct rtnexthop, each with attributes of its own.
func nextHops(b []byte) (devices []int) {
	for len(b) >= unix.SizeofRtNexthop {
		size := int(native.Uint16(b))
		if size < unix.SizeofRtNexthop || size > len(b) {
			break
		}
		devices = append(devices, number(b[4:8]))
		b = b[min(len(b), (size+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1)):]
	}
	return devices
}
