// SPDX-License-Identifier: Apache-2.0

package pins

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/dump"
	"github.com/margay-cni/margay/pkg/rtnetlink"
)

// FilterPriority and FilterHandle are where our filters sit on a device's clsact qdisc. Lower priorities run first. The handle is one
// that nobody else picks (most people take 1): a filter under the same two numbers would be replaced.
const (
	FilterPriority = 1
	FilterHandle   = 0x6d67
)

// ErrNotAttached is wrapped when a device lacks one of our programs, or has another build's.
var ErrNotAttached = errors.New("program is not attached")

// Hook is a program on one side of a device.
type Hook struct {
	Program string
	Parent  uint32 // netlink.HANDLE_MIN_INGRESS or HANDLE_MIN_EGRESS
	FD      int    // of the program; not needed to detach
}

// AttachPod attaches from_pod and to_pod to a pod's host-side device, like Attach.
func (p *Pods) AttachPod(ifindex int) error { return Attach(ifindex, p.hooks()...) }

// DetachPod is like Detach.
func (p *Pods) DetachPod(ifindex int) error { return Detach(ifindex, p.hooks()...) }

// PodAttached is like Attached.
func (p *Pods) PodAttached(ifindex int) error { return Attached(ifindex, p.hooks()...) }

func (p *Pods) hooks() []Hook {
	return []Hook{{bpf.ProgFromPod, netlink.HANDLE_MIN_INGRESS, p.fromPod}, {bpf.ProgToPod, netlink.HANDLE_MIN_EGRESS, p.toPod}}
}

// Attach puts the programs on a device, in the calling thread's network namespace. An older build's programs are replaced without a gap. It
// takes one netlink message, and one for each program, which waits for an expedited grace period where the qdisc is new:
// docs/design/0003-attach.md.
func Attach(ifindex int, hooks ...Hook) (err error) {
	s, err := rtnetlink.Open(-1)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	qdisc := rtnetlink.NewRequest(unix.RTM_NEWQDISC, unix.NLM_F_CREATE|unix.NLM_F_EXCL,
		trafficControl(ifindex, netlink.MakeHandle(0xffff, 0), netlink.HANDLE_CLSACT, 0))
	qdisc.String(attrKind, "clsact")
	if err := s.Do(qdisc); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add clsact to device %d: %w", ifindex, err)
	}
	for _, hook := range hooks {
		if err := s.Do(filter(ifindex, hook)); err != nil {
			return fmt.Errorf("attach %s to device %d: %w", hook.Program, ifindex, err)
		}
	}
	return nil
}

// Attributes of a filter (linux/rtnetlink.h, linux/pkt_cls.h), and the flag that makes the program's return value the verdict.
const (
	attrKind          = unix.TCA_KIND
	attrOptions       = unix.TCA_OPTIONS
	attrBPFFD         = 6
	attrBPFName       = 7
	attrBPFFlags      = 8
	flagDirectVerdict = 1
)

// trafficControl returns a struct tcmsg.
func trafficControl(ifindex int, handle, parent, info uint32) []byte {
	b := make([]byte, 4, 20)
	for _, v := range []uint32{uint32(ifindex), handle, parent, info} {
		b = binary.NativeEndian.AppendUint32(b, v)
	}
	return b
}

// filter makes the filter, or gives the one that is there our program.
func filter(ifindex int, hook Hook) *rtnetlink.Request {
	var protocol [2]byte
	binary.BigEndian.PutUint16(protocol[:], unix.ETH_P_ALL)
	info := netlink.MakeHandle(FilterPriority, binary.NativeEndian.Uint16(protocol[:]))
	r := rtnetlink.NewRequest(unix.RTM_NEWTFILTER, unix.NLM_F_CREATE, trafficControl(ifindex, FilterHandle, hook.Parent, info))
	r.String(attrKind, "bpf")
	r.Nest(attrOptions, func() {
		r.Uint32(attrBPFFD, uint32(hook.FD))
		r.String(attrBPFName, "margay/"+hook.Program)
		r.Uint32(attrBPFFlags, flagDirectVerdict)
	})
	return r
}

// Detach removes our programs from a device that stays. A missing device or filter is no error. It leaves the qdisc: removing it would remove
// other people's filters, and it costs nothing without any.
func Detach(ifindex int, hooks ...Hook) error {
	var errs []error
	for _, hook := range hooks {
		have, err := ours(ifindex, hook)
		if err != nil || have == nil {
			errs = append(errs, err)
			continue
		}
		if err := netlink.FilterDel(have); err != nil && !Gone(err) {
			errs = append(errs, fmt.Errorf("detach %s from device %d: %w", hook.Program, ifindex, err))
		}
	}
	return errors.Join(errs...)
}

// Attached wraps ErrNotAttached unless the very programs are on the device.
func Attached(ifindex int, hooks ...Hook) error {
	for _, hook := range hooks {
		have, err := ours(ifindex, hook)
		if err != nil {
			return err
		}
		id, err := programID(hook.FD)
		if err != nil {
			return fmt.Errorf("look at program %s: %w", hook.Program, err)
		}
		if have == nil || have.Id != int(id) {
			return fmt.Errorf("%w: %s on device %d", ErrNotAttached, hook.Program, ifindex)
		}
	}
	return nil
}

// Others says whether the side of the device has a filter that is not ours.
func Others(ifindex int, hook Hook) (bool, error) {
	_, others, err := find(ifindex, hook)
	return others, err
}

// ours finds our filter on one side of a device; nil when there is none, or no such device.
func ours(ifindex int, hook Hook) (*netlink.BpfFilter, error) {
	own, _, err := find(ifindex, hook)
	return own, err
}

// find looks at the filters on one side of a device: ours, nil when there is none, and whether there are others.
func find(ifindex int, hook Hook) (own *netlink.BpfFilter, others bool, err error) {
	dev := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: ifindex}}
	filters, err := dump.Whole(func() ([]netlink.Filter, error) { return netlink.FilterList(dev, hook.Parent) })
	if err != nil {
		if Gone(err) {
			return nil, false, nil
		}
		return nil, false, fmt.Errorf("list filters of device %d: %w", ifindex, err)
	}
	for _, f := range filters {
		if b, ok := f.(*netlink.BpfFilter); ok && b.Priority == FilterPriority && b.Handle == FilterHandle && b.Name == "margay/"+hook.Program {
			own = b
		} else {
			others = true
		}
	}
	return own, others, nil
}

// Gone says that the kernel has no such device, qdisc or filter.
func Gone(err error) bool {
	return errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL)
}
