// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/dump"
	"github.com/margay-cni/margay/pkg/link"
	"github.com/margay-cni/margay/pkg/netfilter"
)

// filterItems finds our tc filters on devices that stay: NICs, and the host-side devices of adopted interfaces. Ours are those that run a
// program pinned under our bpffs directory, and those that carry our name.
func filterItems(o *options) ([]item, error) {
	programs, err := pinnedPrograms(o.at(o.bpffs))
	if err != nil {
		return nil, err
	}
	qdiscs, err := dump.Whole(func() ([]netlink.Qdisc, error) { return netlink.QdiscList(nil) })
	if err != nil {
		return nil, fmt.Errorf("list queueing disciplines: %w", err)
	}
	var items []item
	for _, q := range qdiscs {
		if q.Type() != "clsact" {
			continue
		}
		device, err := netlink.LinkByIndex(q.Attrs().LinkIndex)
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			continue
		}
		if err != nil {
			return items, fmt.Errorf("look up device %d: %w", q.Attrs().LinkIndex, err)
		}
		if isOurs(device.Attrs().Name, device.Type(), device.Attrs().Alias) {
			continue
		}
		found, err := filtersOf(device, programs)
		if err != nil {
			return items, err
		}
		if len(found.ours) > 0 {
			name := device.Attrs().Name + ": " + strings.Join(found.names, ", ")
			items = append(items, item{"tc filters on", name, func() error { return removeFilters(device, programs) }})
		}
	}
	return items, nil
}

// attached are the BPF filters of one device, ours apart from everybody else's.
type attached struct {
	ours   []netlink.Filter
	names  []string // of ours: hook and filter name
	others int
}

func filtersOf(device netlink.Link, programs map[ebpf.ProgramID]bool) (attached, error) {
	var found attached
	for _, hook := range []struct {
		name   string
		parent uint32
	}{{"ingress", netlink.HANDLE_MIN_INGRESS}, {"egress", netlink.HANDLE_MIN_EGRESS}} {
		filters, err := dump.Whole(func() ([]netlink.Filter, error) { return netlink.FilterList(device, hook.parent) })
		if err != nil {
			return found, fmt.Errorf("list the %s filters of %s: %w", hook.name, device.Attrs().Name, err)
		}
		for _, f := range filters {
			if b, ok := f.(*netlink.BpfFilter); ok && (programs[ebpf.ProgramID(b.Id)] || strings.HasPrefix(b.Name, filterPrefix)) {
				found.ours = append(found.ours, f)
				found.names = append(found.names, hook.name+" "+b.Name)
			} else {
				found.others++
			}
		}
	}
	return found, nil
}

// removeFilters removes the whole clsact in one step where nobody else has a filter, so that no interrupted run leaves an empty one; else
// our filters only.
func removeFilters(device netlink.Link, programs map[ebpf.ProgramID]bool) error {
	found, err := filtersOf(device, programs)
	if err != nil {
		return ignore(err, unix.ENODEV)
	}
	if found.others > 0 {
		var errs []error
		for _, f := range found.ours {
			errs = append(errs, ignore(netlink.FilterDel(f), unix.ENOENT, unix.ENODEV))
		}
		return errors.Join(errs...)
	}
	clsact := &netlink.GenericQdisc{
		QdiscType:  "clsact",
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: device.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT},
	}
	return ignore(netlink.QdiscDel(clsact), unix.ENOENT, unix.EINVAL, unix.ENODEV)
}

// pinnedPrograms returns the ids of the programs that are pinned below dir.
func pinnedPrograms(dir string) (map[ebpf.ProgramID]bool, error) {
	ids := map[ebpf.ProgramID]bool{}
	err := filepath.WalkDir(filepath.Join(dir, "progs"), func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || d.IsDir() {
			return err
		}
		program, err := ebpf.LoadPinnedProgram(path, &ebpf.LoadPinOptions{ReadOnly: true})
		if err != nil {
			return fmt.Errorf("open the pinned program %s: %w", path, err)
		}
		defer program.Close()
		info, err := program.Info()
		if err != nil {
			return fmt.Errorf("ask about the pinned program %s: %w", path, err)
		}
		if id, ok := info.ID(); ok {
			ids[id] = true
		}
		return nil
	})
	return ids, err
}

// routeItems finds our routes, by their protocols, on devices that stay: pods' and those to other nodes, and what makes the rest of the own
// ranges unreachable.
func routeItems() ([]item, error) {
	var items []item
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		for _, protocol := range []netlink.RouteProtocol{link.RouteProtocol, link.NodeRouteProtocol} {
			routes, err := dump.Whole(func() ([]netlink.Route, error) {
				filter := &netlink.Route{Protocol: protocol, Table: unix.RT_TABLE_UNSPEC}
				return netlink.RouteListFiltered(family, filter, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
			})
			if err != nil {
				return items, fmt.Errorf("list routes: %w", err)
			}
			for _, r := range routes {
				device, err := netlink.LinkByIndex(r.LinkIndex)
				if err == nil && isOurs(device.Attrs().Name, device.Type(), device.Attrs().Alias) {
					continue
				}
				items = append(items, item{"route", r.Dst.String(), func() error { return ignore(netlink.RouteDel(&r), unix.ESRCH, unix.ENODEV) }})
			}
		}
	}
	return items, nil
}

// isOurs tells devices that we made, with which everything on them goes: pods' host-side ends, and the overlay device under whatever name.
func isOurs(name, kind, alias string) bool {
	pair := kind == "veth" && (name == link.HostDevice || name == link.ServiceDevice)
	return pair || strings.HasPrefix(name, link.HostPrefix) || (kind == "vxlan" && alias == link.OverlayAlias)
}

// nftablesItems finds the table with which the agent keeps conntrack away from the overlay.
func nftablesItems() ([]item, error) {
	there, err := netfilter.Exists()
	if err != nil || !there {
		return nil, err
	}
	remove := func() error {
		_, err := netfilter.Remove()
		return err
	}
	return []item{{"nftables table", "inet " + netfilter.Table, remove}}, nil
}

// ignore drops the errors by which the kernel says that a thing is gone already.
func ignore(err error, gone ...unix.Errno) error {
	for _, errno := range gone {
		if errors.Is(err, errno) {
			return nil
		}
	}
	return err
}
