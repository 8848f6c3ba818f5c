// SPDX-License-Identifier: Apache-2.0

package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/rtnetlink"
)

var native = binary.NativeEndian

// Socket makes, configures, looks up and removes single devices: what ADD and DEL need. Conn adds to it what compares with the kernel's tables,
// and all the other devices. It is bound to one namespace, and may be used by one goroutine at a time.
type Socket struct {
	s *rtnetlink.Socket
}

// Open opens a socket in the namespace with the open file descriptor fd; -1 means the calling thread's namespace.
func Open(fd int) (*Socket, error) {
	s, err := rtnetlink.Open(fd)
	if err != nil {
		return nil, err
	}
	return &Socket{s}, nil
}

// Close closes the socket.
func (c *Socket) Close() {
	_ = c.s.Close() // nothing is lost with it
}

// deviceMessage returns a struct ifinfomsg.
func deviceMessage(index int, flags, change uint32) []byte {
	b := make([]byte, unix.SizeofIfInfomsg)
	native.PutUint32(b[4:], uint32(index))
	native.PutUint32(b[8:], flags)
	native.PutUint32(b[12:], change)
	return b
}

// Device returns the device of that name. The error wraps ErrNotFound when there is none.
func (c *Socket) Device(name string) (Device, error) {
	r := rtnetlink.NewRequest(unix.RTM_GETLINK, 0, deviceMessage(0, 0, 0))
	r.String(unix.IFLA_IFNAME, name)
	d, err := c.device(r)
	if err != nil {
		return Device{}, fmt.Errorf("look up device %s: %w", name, err)
	}
	return d, nil
}

// DeviceByIndex returns the device with that ifindex. The error wraps ErrNotFound when there is none.
func (c *Socket) DeviceByIndex(index int) (Device, error) {
	d, err := c.device(rtnetlink.NewRequest(unix.RTM_GETLINK, 0, deviceMessage(index, 0, 0)))
	if err != nil {
		return Device{}, fmt.Errorf("look up device %d: %w", index, err)
	}
	return d, nil
}

func (c *Socket) device(r *rtnetlink.Request) (Device, error) {
	answer, err := c.s.Get(r)
	if errors.Is(err, unix.ENODEV) {
		err = errors.Join(ErrNotFound, err)
	}
	if err != nil {
		return Device{}, err
	}
	return parseDevice(answer)
}

// parseDevice reads a struct ifinfomsg and its attributes. What it returns shares no memory with the message.
func parseDevice(b []byte) (Device, error) {
	if len(b) < unix.SizeofIfInfomsg {
		return Device{}, fmt.Errorf("message about a device of %d bytes: %w", len(b), unix.EMSGSIZE)
	}
	d := Device{Index: int(native.Uint32(b[4:])), Up: native.Uint32(b[8:])&unix.IFF_UP != 0, Kind: "device"}
	lower := 0
	for kind, value := range rtnetlink.Attributes(b[unix.SizeofIfInfomsg:]) {
		switch kind {
		case unix.IFLA_IFNAME:
			d.Name = text(value)
		case unix.IFLA_IFALIAS:
			d.Alias = text(value)
		case unix.IFLA_ADDRESS:
			d.MAC = append(net.HardwareAddr(nil), value...)
		case unix.IFLA_MTU:
			d.MTU = number(value)
		case unix.IFLA_LINK:
			lower = number(value)
		case unix.IFLA_LINKINFO:
			for kind, value := range rtnetlink.Attributes(value) {
				if kind == unix.IFLA_INFO_KIND {
					d.Kind = text(value)
				}
			}
		}
	}
	if d.Kind == "veth" {
		d.Peer = lower
	}
	return d, nil
}

// text is an attribute's value up to the zero byte.
func text(value []byte) string {
	return unix.ByteSliceToString(value)
}

func number(value []byte) int {
	if len(value) < 4 {
		return 0
	}
	return int(int32(native.Uint32(value)))
}

// Delete removes a device, and with a veth its other end, in one message. A device that is not there is success. The kernel waits for
// RCU grace periods before it answers: this is what DEL's time goes into.
func (c *Socket) Delete(index int) error {
	err := c.s.Do(rtnetlink.NewRequest(unix.RTM_DELLINK, 0, deviceMessage(index, 0, 0)))
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete device %d: %w", index, err)
	}
	return nil
}

// setUp brings a device up.
func (c *Socket) setUp(index int) error {
	return c.s.Do(rtnetlink.NewRequest(unix.RTM_NEWLINK, 0, deviceMessage(index, unix.IFF_UP, unix.IFF_UP)))
}

// inet6AddrGenMode is IFLA_INET6_ADDR_GEN_MODE, which golang.org/x/sys/unix lacks.
const inet6AddrGenMode = 8

// setAddrGenMode says how the kernel makes the device's link-local addresses. A kernel without IPv6 makes none, and that is success.
func (c *Socket) setAddrGenMode(index int, mode byte) error {
	r := rtnetlink.NewRequest(unix.RTM_SETLINK, 0, deviceMessage(index, 0, 0))
	r.Nest(unix.IFLA_AF_SPEC, func() {
		r.Nest(unix.AF_INET6, func() { r.Bytes(inet6AddrGenMode, []byte{mode}) })
	})
	err := c.s.Do(r)
	if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	return err
}
