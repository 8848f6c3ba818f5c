// SPDX-License-Identifier: Apache-2.0

package link

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/dump"
)

// OverlayAlias is the alias of every VXLAN device that Margay makes. It finds one again whose configured name has changed since.
const OverlayAlias = "margay overlay"

// VXLAN is the wanted overlay device. It is a collect-metadata ("external") device: one for all other nodes and network numbers, because
// the programs say for each packet where it goes. It has group policy (GBP) to carry 16 bits along, no ARP, no address, and learns nothing.
type VXLAN struct {
	Name string
	Port uint16 // UDP
	MTU  int    // bytes; 0 = leave it to the kernel
	// MAC is given to a device that is made: one whose address was set by its maker is left alone by udev.
	MAC net.HardwareAddr
}

// OverlayMAC returns the address of the overlay device of the node of that name: locally administered, and another one on each node,
// because the kernel drops a frame that comes from the receiving device's own address.
func OverlayMAC(node string) net.HardwareAddr {
	d := sha256.Sum256([]byte("overlay\x00" + node))
	d[0] = d[0]&^1 | 2
	return d[:6]
}

// EnsureVXLAN makes the device, down, or brings the one that is there to what is wanted: another MTU is set, anything else that differs
// means a new device. Overlay devices of ours under other names are removed, because they may hold the port. A device of that name of
// another kind is somebody else's, and an error that wraps ErrExists.
func (c *Conn) EnsureVXLAN(want VXLAN) (Device, error) {
	links, err := dump.Whole(c.h.LinkList)
	if err != nil {
		return Device{}, fmt.Errorf("list devices: %w", err)
	}
	var have *netlink.Vxlan
	for _, l := range links {
		a := l.Attrs()
		v, vxlan := l.(*netlink.Vxlan)
		switch {
		case a.Name == want.Name && !vxlan:
			return Device{}, fmt.Errorf("device %s is a %s: %w; give the overlay device another name", want.Name, l.Type(), ErrExists)
		case a.Name == want.Name && isOverlay(v, want.Port):
			have = v
		case a.Name == want.Name, vxlan && a.Alias == OverlayAlias:
			if err := c.Delete(a.Index); err != nil {
				return Device{}, err
			}
		}
	}
	if have == nil {
		if have, err = c.addVXLAN(want); err != nil {
			return Device{}, err
		}
	}
	if err := c.setVXLAN(have, want.MTU); err != nil {
		return Device{}, err
	}
	return c.DeviceByIndex(have.Index)
}

// isOverlay compares what cannot be changed later.
func isOverlay(v *netlink.Vxlan, port uint16) bool {
	return v.FlowBased && v.GBP && !v.Learning && v.Port == int(port)
}

func (c *Conn) addVXLAN(want VXLAN) (*netlink.Vxlan, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = want.Name, want.MTU, want.MAC
	v := &netlink.Vxlan{LinkAttrs: attrs, FlowBased: true, GBP: true, Port: int(want.Port)}
	if err := c.h.LinkAdd(v); err != nil {
		if errors.Is(err, unix.EEXIST) {
			return nil, fmt.Errorf("make VXLAN device %s: %w: another VXLAN device has UDP port %d; give the overlay another one on every node",
				want.Name, err, want.Port)
		}
		return nil, fmt.Errorf("make VXLAN device %s: %w", want.Name, err)
	}
	l, err := c.h.LinkByName(want.Name)
	if err != nil {
		return nil, fmt.Errorf("look up device %s: %w", want.Name, notFound(err))
	}
	made, ok := l.(*netlink.Vxlan)
	if !ok {
		return nil, fmt.Errorf("device %s is a %s: %w", want.Name, l.Type(), ErrExists)
	}
	return made, nil
}

// setVXLAN sets what can be changed on the device, and costs nothing where it is so already.
func (c *Conn) setVXLAN(v *netlink.Vxlan, mtu int) error {
	if v.Alias != OverlayAlias {
		if err := c.h.LinkSetAlias(v, OverlayAlias); err != nil {
			return fmt.Errorf("mark device %s: %w", v.Name, err)
		}
	}
	if v.RawFlags&unix.IFF_NOARP == 0 {
		if err := c.h.LinkSetARPOff(v); err != nil {
			return fmt.Errorf("switch ARP off on %s: %w", v.Name, err)
		}
	}
	err := c.h.LinkSetIP6AddrGenMode(v, addrGenModeNone)
	if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("switch off address generation on %s: %w", v.Name, err)
	}
	if mtu > 0 && v.MTU != mtu {
		return c.SetMTU(v.Index, mtu)
	}
	return nil
}

// DeleteVXLANs removes every overlay device of ours.
func (c *Conn) DeleteVXLANs() error {
	links, err := dump.Whole(c.h.LinkList)
	if err != nil {
		return fmt.Errorf("list devices: %w", err)
	}
	var errs []error
	for _, l := range links {
		if l.Type() == "vxlan" && l.Attrs().Alias == OverlayAlias {
			errs = append(errs, c.Delete(l.Attrs().Index))
		}
	}
	return errors.Join(errs...)
}

// SetUp brings a device up.
func (c *Conn) SetUp(index int) error {
	if err := c.h.LinkSetUp(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index}}); err != nil {
		return fmt.Errorf("bring device %d up: %w", index, notFound(err))
	}
	return nil
}

// SetMTU changes a device's MTU, in bytes.
func (c *Conn) SetMTU(index, mtu int) error {
	if err := c.h.LinkSetMTU(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index}}, mtu); err != nil {
		return fmt.Errorf("set the MTU of device %d to %d: %w", index, mtu, notFound(err))
	}
	return nil
}
