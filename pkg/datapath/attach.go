// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/bpf"
)

// FilterPriority and FilterHandle are where our filters sit on a device's clsact qdisc. Lower priorities run first. The handle is one
// that nobody else picks (most people take 1): a filter under the same two numbers would be replaced.
const (
	FilterPriority = 1
	FilterHandle   = 0x6d67
)

// ErrNotAttached is wrapped when a device lacks one of our programs, or has another build's.
var ErrNotAttached = errors.New("program is not attached")

// hookPoint is one side of a device.
type hookPoint struct {
	program string
	parent  uint32
}

var (
	podHooks    = []hookPoint{{bpf.ProgFromPod, netlink.HANDLE_MIN_INGRESS}, {bpf.ProgToPod, netlink.HANDLE_MIN_EGRESS}}
	netdevHooks = []hookPoint{{bpf.ProgFromNetdev, netlink.HANDLE_MIN_INGRESS}, {bpf.ProgToNetdev, netlink.HANDLE_MIN_EGRESS}}
	// A device without link layer needs another program, and to_netdev does not know its packets.
	l3NetdevHooks = []hookPoint{{bpf.ProgFromL3Netdev, netlink.HANDLE_MIN_INGRESS}}
	hostHooks     = []hookPoint{{bpf.ProgFromHost, netlink.HANDLE_MIN_INGRESS}}
	loopbackHooks = []hookPoint{{bpf.ProgToLoopback, netlink.HANDLE_MIN_EGRESS}}
	overlayHooks  = []hookPoint{{bpf.ProgFromOverlay, netlink.HANDLE_MIN_INGRESS}, {bpf.ProgToOverlay, netlink.HANDLE_MIN_EGRESS}}
)

// AttachPod attaches from_pod and to_pod to a pod's host-side device, in the calling thread's network namespace. An older build's
// programs are replaced without a gap. It takes three netlink messages and waits for no grace period: docs/design/0003-attach.md.
func (d *Datapath) AttachPod(ifindex int) error { return d.attach(ifindex, podHooks) }

// DetachPod removes our programs from a device that stays. A missing device or filter is no error.
func (d *Datapath) DetachPod(ifindex int) error { return detach(ifindex, podHooks) }

// PodAttached wraps ErrNotAttached unless both programs of this build are on the device.
func (d *Datapath) PodAttached(ifindex int) error { return d.attached(ifindex, podHooks) }

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
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink socket: %w", err)
	}
	defer h.Close()
	qdisc := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: ifindex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
	if err := h.QdiscAdd(qdisc); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add clsact to device %d: %w", ifindex, err)
	}
	for _, hook := range hooks {
		if err := h.FilterReplace(filter(ifindex, hook, d.progs[hook.program])); err != nil {
			return fmt.Errorf("attach %s to device %d: %w", hook.program, ifindex, err)
		}
	}
	return nil
}

func filter(ifindex int, hook hookPoint, prog *ebpf.Program) *netlink.BpfFilter {
	f := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: ifindex, Parent: hook.parent, Handle: FilterHandle, Priority: FilterPriority, Protocol: unix.ETH_P_ALL,
		},
		Name:         "margay/" + hook.program,
		DirectAction: true,
	}
	if prog != nil {
		f.Fd = prog.FD()
	}
	return f
}

// detach leaves the qdisc: removing it would remove other people's filters, and it costs nothing without any.
func detach(ifindex int, hooks []hookPoint) error {
	var errs []error
	for _, hook := range hooks {
		have, err := ours(ifindex, hook)
		if err != nil || have == nil {
			errs = append(errs, err)
			continue
		}
		if err := netlink.FilterDel(have); err != nil && !gone(err) {
			errs = append(errs, fmt.Errorf("detach %s from device %d: %w", hook.program, ifindex, err))
		}
	}
	return errors.Join(errs...)
}

func (d *Datapath) attached(ifindex int, hooks []hookPoint) error {
	for _, hook := range hooks {
		have, err := ours(ifindex, hook)
		if err != nil {
			return err
		}
		info, err := d.progs[hook.program].Info()
		if err != nil {
			return fmt.Errorf("look at program %s: %w", hook.program, err)
		}
		id, _ := info.ID()
		if have == nil || have.Id != int(id) {
			return fmt.Errorf("%w: %s on device %d", ErrNotAttached, hook.program, ifindex)
		}
	}
	return nil
}

// ours finds our filter on one side of a device; nil when there is none, or no such device.
func ours(ifindex int, hook hookPoint) (*netlink.BpfFilter, error) {
	dev := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: ifindex}}
	filters, err := retryDump(func() ([]netlink.Filter, error) { return netlink.FilterList(dev, hook.parent) })
	if err != nil {
		if gone(err) {
			return nil, nil
		}
		return nil, fmt.Errorf("list filters of device %d: %w", ifindex, err)
	}
	for _, f := range filters {
		if b, ok := f.(*netlink.BpfFilter); ok && b.Priority == FilterPriority && b.Handle == FilterHandle && b.Name == "margay/"+hook.program {
			return b, nil
		}
	}
	return nil, nil
}

// gone says that the kernel has no such device, qdisc or filter.
func gone(err error) bool {
	return errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL)
}

// retryDump repeats a netlink dump that another writer interrupted, because only a whole one is consistent.
func retryDump[T any](list func() ([]T, error)) ([]T, error) {
	for range 31 {
		if out, err := list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return out, err
		}
	}
	return list()
}

func fromIP(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}
