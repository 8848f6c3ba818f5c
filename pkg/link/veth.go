// SPDX-License-Identifier: Apache-2.0

package link

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/rtnetlink"
)

// HostPrefix starts the name of every host-side device that Margay makes.
const HostPrefix = "mgy"

// addrGenModeNone is IN6_ADDR_GEN_MODE_NONE: the kernel gives the device no link-local address of its own.
const addrGenModeNone = 1

// Attachment-derived names and addresses: the same attachment always gets the same ones, so whatever a killed ADD left can be found again
// without having written anything down.
func digest(containerID, ifName, use string) [sha256.Size]byte {
	return sha256.Sum256([]byte(use + "\x00" + containerID + "\x00" + ifName))
}

// HostName returns the name of the attachment's host-side device: 14 characters, of 15 that the kernel allows.
func HostName(containerID, ifName string) string {
	d := digest(containerID, ifName, "name")
	return HostPrefix + hex.EncodeToString(d[:])[:11]
}

// IsHostName says whether a device of that name is one of HostName's.
func IsHostName(name string) bool {
	digits, ok := strings.CutPrefix(name, HostPrefix)
	return ok && len(digits) == 11 && strings.Trim(digits, "0123456789abcdef") == ""
}

// MACs returns the attachment's addresses, locally administered and unicast.
func MACs(containerID, ifName string) (pod, host net.HardwareAddr) {
	return derivedMAC(containerID, ifName, "pod"), derivedMAC(containerID, ifName, "host")
}

func derivedMAC(containerID, ifName, use string) net.HardwareAddr {
	d := digest(containerID, ifName, use)
	d[0] = d[0]&^1 | 2
	return d[:6]
}

// VethSpec is a pair that does not exist yet.
type VethSpec struct {
	PodName  string
	HostName string
	// Both MACs are part of the creating message: a device whose address was set by its maker is left alone by udev, which otherwise
	// may change it at any later moment.
	PodMAC  net.HardwareAddr
	HostMAC net.HardwareAddr
	MTU     int // bytes, of both ends; 0: the kernel's choice
	// GSOMaxSize is how large a packet of several segments the pod's end takes, in bytes; 0: the kernel's 64 KiB. Kernels before 6.3 take it
	// for IPv6 alone.
	GSOMaxSize int
	HostNS     int // open file descriptor of the host's namespace
}

// vethQueues is how many queues either end has. Without a number the kernel makes one for each possible CPU, takes all but one back, and waits
// for RCU grace periods before it does.
const vethQueues = 1

// vethInfoPeer is VETH_INFO_PEER (linux/veth.h).
const vethInfoPeer = 1

// AddVeth makes the pair with one message: the pod's end in the namespace of c, the host's end in spec.HostNS. Both are down.
// It returns the ifindex of either end. The error wraps ErrExists when one of the names is taken.
func (c *Socket) AddVeth(spec VethSpec) (pod, host int, err error) {
	r := rtnetlink.NewRequest(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, deviceMessage(0, 0, 0))
	end := func(name string, mac net.HardwareAddr) {
		r.String(unix.IFLA_IFNAME, name)
		if mac != nil {
			r.Bytes(unix.IFLA_ADDRESS, mac)
		}
		if spec.MTU != 0 {
			r.Uint32(unix.IFLA_MTU, uint32(spec.MTU))
		}
		r.Uint32(unix.IFLA_NUM_TX_QUEUES, vethQueues)
		r.Uint32(unix.IFLA_NUM_RX_QUEUES, vethQueues)
	}
	end(spec.PodName, spec.PodMAC)
	if spec.GSOMaxSize != 0 {
		r.Uint32(unix.IFLA_GSO_MAX_SIZE, uint32(spec.GSOMaxSize))
		r.Uint32(unix.IFLA_GSO_IPV4_MAX_SIZE, uint32(spec.GSOMaxSize))
	}
	r.Nest(unix.IFLA_LINKINFO, func() {
		r.Bytes(unix.IFLA_INFO_KIND, []byte("veth"))
		r.Nest(unix.IFLA_INFO_DATA, func() {
			r.Nest(vethInfoPeer, func() {
				r.Raw(deviceMessage(0, 0, 0))
				end(spec.HostName, spec.HostMAC)
				r.Uint32(unix.IFLA_NET_NS_FD, uint32(spec.HostNS))
			})
		})
	})
	if err := c.s.Do(r); err != nil {
		if errors.Is(err, unix.EEXIST) {
			err = errors.Join(ErrExists, err)
		}
		return 0, 0, fmt.Errorf("make veth pair %s, %s: %w", spec.PodName, spec.HostName, err)
	}
	made, err := c.Device(spec.PodName)
	if err != nil {
		return 0, 0, err
	}
	return made.Index, made.Peer, nil
}

// defaultProbes are documentation addresses (RFC 5737, RFC 3849): nobody has a route to them but the default one.
var defaultProbes = []netip.Addr{
	netip.AddrFrom4([4]byte{192, 0, 2, 1}), netip.AddrFrom16([16]byte{0: 0x20, 1: 0x01, 2: 0x0d, 3: 0xb8, 15: 1}),
}

// DefaultMTU returns the MTU of the device that the default route uses, the smaller one when IPv4 and IPv6 differ, and 0 when there is no
// default route. It asks the kernel for one route instead of dumping a table that has an entry for each pod.
func (c *Socket) DefaultMTU() (int, error) {
	mtu := 0
	for _, probe := range defaultProbes {
		way, err := c.lookUpRoute(probe, true)
		if errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.EAFNOSUPPORT) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("look up default route: %w", err)
		}
		for _, index := range way.devices {
			d, err := c.DeviceByIndex(index)
			if err != nil {
				return 0, err
			}
			if d.Name != "lo" && d.MTU > 0 && (mtu == 0 || d.MTU < mtu) {
				mtu = d.MTU
			}
		}
	}
	return mtu, nil
}
