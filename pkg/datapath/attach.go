// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/pins"
)

// hookPoint is one side of a device.
type hookPoint struct {
	program string
	parent  uint32
}

var (
	netdevHooks = []hookPoint{{bpf.ProgFromNetdev, netlink.HANDLE_MIN_INGRESS}, {bpf.ProgToNetdev, netlink.HANDLE_MIN_EGRESS}}
	// A device without link layer needs another program, and to_netdev does not know its packets.
	l3NetdevHooks = []hookPoint{{bpf.ProgFromL3Netdev, netlink.HANDLE_MIN_INGRESS}}
	hostHooks     = []hookPoint{{bpf.ProgFromHost, netlink.HANDLE_MIN_INGRESS}}
	loopbackHooks = []hookPoint{{bpf.ProgToLoopback, netlink.HANDLE_MIN_EGRESS}}
	overlayHooks  = []hookPoint{{bpf.ProgFromOverlay, netlink.HANDLE_MIN_INGRESS}, {bpf.ProgToOverlay, netlink.HANDLE_MIN_EGRESS}}
)

// AttachNetdev attaches from_netdev and to_netdev to a network device of the node, or from_l3_netdev to one without link layer;
// otherwise like AttachPod.
func (d *Datapath) AttachNetdev(ifindex int) error {
	hooks, err := netdevHooksOf(ifindex)
	if err != nil {
		return err
	}
	return d.attach(ifindex, hooks)
}

// DetachNetdev is like DetachPod for a network device of the node.
func (d *Datapath) DetachNetdev(ifindex int) error {
	return detach(ifindex, slices.Concat(netdevHooks, l3NetdevHooks))
}

// NetdevAttached is like PodAttached for a network device of the node.
func (d *Datapath) NetdevAttached(ifindex int) error {
	hooks, err := netdevHooksOf(ifindex)
	if err != nil {
		return err
	}
	return d.attached(ifindex, hooks)
}

// NetdevPrograms names the programs that belong on a network device of the node, ingress before egress; none if there is no such device.
func NetdevPrograms(ifindex int) (names []string) {
	hooks, err := netdevHooksOf(ifindex)
	if err != nil {
		return nil
	}
	for _, h := range hooks {
		names = append(names, h.program)
	}
	return names
}

// netdevHooksOf returns what belongs on a network device of the node.
func netdevHooksOf(ifindex int) ([]hookPoint, error) {
	l, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		return nil, fmt.Errorf("look at device %d: %w", ifindex, err)
	}
	if l.Attrs().EncapType == "ether" {
		return netdevHooks, nil
	}
	return l3NetdevHooks, nil
}

// AttachOverlay attaches from_overlay and to_overlay to the VXLAN device; otherwise like AttachPod.
func (d *Datapath) AttachOverlay(ifindex int) error { return d.attach(ifindex, overlayHooks) }

// OverlayAttached is like PodAttached for the VXLAN device.
func (d *Datapath) OverlayAttached(ifindex int) error { return d.attached(ifindex, overlayHooks) }

func (d *Datapath) attach(ifindex int, hooks []hookPoint) error {
	return pins.Attach(ifindex, d.hooks(hooks)...)
}

func (d *Datapath) attached(ifindex int, hooks []hookPoint) error {
	return pins.Attached(ifindex, d.hooks(hooks)...)
}

func detach(ifindex int, hooks []hookPoint) error {
	return pins.Detach(ifindex, (&Datapath{}).hooks(hooks)...)
}

// hooks adds the programs.
func (d *Datapath) hooks(hooks []hookPoint) (out []pins.Hook) {
	for _, h := range hooks {
		hook := pins.Hook{Program: h.program, Parent: h.parent, FD: -1}
		if prog := d.progs[h.program]; prog != nil {
			hook.FD = prog.FD()
		}
		out = append(out, hook)
	}
	return out
}

func fromIP(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}
