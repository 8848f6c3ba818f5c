// SPDX-License-Identifier: Apache-2.0

package link

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
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
	MTU     int // bytes, of both ends
	// GSOMaxSize is how large a packet of several segments the pod's end takes, in bytes; 0: the kernel's 64 KiB. Kernels before 6.3 take it
	// for IPv6 alone.
	GSOMaxSize int
	HostNS     int // open file descriptor of the host's namespace
}

// vethQueues is how many queues either end has. Without a number the kernel makes one for each possible CPU, takes all but one back, and waits
// for RCU grace periods before it does.
const vethQueues = 1

// AddVeth makes the pair with one message: the pod's end in the namespace of c, the host's end in spec.HostNS. Both are down.
// It returns the ifindex of either end. The error wraps ErrExists when one of the names is taken.
func (c *Conn) AddVeth(spec VethSpec) (pod, host int, err error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = spec.PodName
	attrs.HardwareAddr = spec.PodMAC
	attrs.MTU = spec.MTU
	attrs.NumTxQueues, attrs.NumRxQueues = vethQueues, vethQueues // the library takes them for both ends
	attrs.GSOMaxSize, attrs.GSOIPv4MaxSize = uint32(spec.GSOMaxSize), uint32(spec.GSOMaxSize)
	veth := netlink.NewVeth(attrs)
	veth.PeerName = spec.HostName
	veth.PeerHardwareAddr = spec.HostMAC
	veth.PeerMTU = uint32(spec.MTU)
	veth.PeerNamespace = netlink.NsFd(spec.HostNS)
	if err := c.h.LinkAdd(veth); err != nil {
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
var defaultProbes = []net.IP{net.IPv4(192, 0, 2, 1), net.ParseIP("2001:db8::1")}

// DefaultMTU returns the MTU of the device that the default route uses, the smaller one when IPv4 and IPv6 differ, and 0 when there is no
// default route. It asks the kernel for one route instead of dumping a table that has an entry for each pod.
func (c *Conn) DefaultMTU() (int, error) {
	mtu := 0
	for _, probe := range defaultProbes {
		routes, err := c.h.RouteGetWithOptions(probe, &netlink.RouteGetOptions{FIBMatch: true})
		if errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.EAFNOSUPPORT) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("look up default route: %w", err)
		}
		for _, r := range routes {
			for _, index := range outDevices(r) {
				d, err := c.DeviceByIndex(index)
				if err != nil {
					return 0, err
				}
				if d.Name != "lo" && d.MTU > 0 && (mtu == 0 || d.MTU < mtu) {
					mtu = d.MTU
				}
			}
		}
	}
	return mtu, nil
}

func outDevices(r netlink.Route) []int {
	if len(r.MultiPath) == 0 {
		if r.LinkIndex == 0 {
			return nil // unreachable, blackhole
		}
		return []int{r.LinkIndex}
	}
	var out []int
	for _, hop := range r.MultiPath {
		out = append(out, hop.LinkIndex)
	}
	return out
}
