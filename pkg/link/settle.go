// SPDX-License-Identifier: Apache-2.0

package link

import (
	"fmt"
	"net/netip"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// settleTimeout bounds waitLocal: the kernel's work queue needs the lock that every network change takes, and 200 pods that start at once
// on a slow machine make it wait for seconds. It looks again after settlePoll, then less and less often, so as not to be in its way.
const (
	settleTimeout = 10 * time.Second
	settlePoll    = 200 * time.Microsecond
	settlePollMax = 20 * time.Millisecond
)

// waitLocal returns when the kernel accepts packets for each of the addresses. It installs an IPv6 address's local route from a work
// queue, even without duplicate address detection: a packet that comes before it is lost, and costs a TCP client a second.
func (c *Socket) waitLocal(addresses []netip.Addr) error {
	deadline := time.Now().Add(settleTimeout)
	poll := settlePoll
	for _, a := range addresses {
		for a.Is6() && !c.isLocal(a) {
			if time.Now().After(deadline) {
				return fmt.Errorf("address %s is not usable %s after it was added", a, settleTimeout)
			}
			time.Sleep(poll)
			poll = min(poll*5/4, settlePollMax)
		}
	}
	return nil
}

func (c *Socket) isLocal(a netip.Addr) bool {
	way, err := c.lookUpRoute(a, false)
	return err == nil && way.kind == unix.RTN_LOCAL
}

// ifreqPointer is struct ifreq (netdevice(7)) with a pointer in its union.
type ifreqPointer struct {
	name [unix.IFNAMSIZ]byte
	data unsafe.Pointer
	_    [16]byte
}

// ethtoolValue is struct ethtool_value (linux/ethtool.h).
type ethtoolValue struct {
	cmd  uint32
	data uint32
}

// SyncCarrier makes the kernel act on a carrier that has just come up, on a device of the calling thread's namespace. Until its link
// watcher has run, the device has no queue and drops what the host sends: a pod's first answer from the host would be lost. ethtool's
// question for the link state runs the watcher for this device (on every kernel; from 6.9 on RTM_GETLINK would do).
func SyncCarrier(device string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open socket: %w", err)
	}
	defer unix.Close(fd)
	value := ethtoolValue{cmd: unix.ETHTOOL_GLINK}
	req := ifreqPointer{data: unsafe.Pointer(&value)}
	copy(req.name[:unix.IFNAMSIZ-1], device)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return fmt.Errorf("ask %s for its carrier: %w", device, errno)
	}
	if value.data == 0 {
		return fmt.Errorf("device %s has no carrier: its other end is not up", device)
	}
	return nil
}
