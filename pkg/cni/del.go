// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/link"
	"github.com/margay-cni/margay/pkg/netns"
	"github.com/margay-cni/margay/pkg/pins"
)

// Del disconnects a pod. It needs neither the pod's namespace nor a valid configuration nor anything that ADD wrote: what is there is
// removed, what is missing is success, and one failure does not keep the rest from being removed. A CNI_NETNS that is the plugin's own
// namespace is an error, as the CNI library has it: after the work, which must not wait for a runtime that asks for the right one.
func (p *Plugin) Del(ctx context.Context, args *Args) (err error) {
	at, err := p.load(args)
	if at == nil {
		return err
	}
	defer at.done("DEL", time.Now(), &err)
	if err != nil {
		at.log.Warn("unusable CNI_ARGS are ignored", slog.Any("error", err))
	}
	if invalid := at.conf.validate(); invalid != nil {
		at.log.Warn("invalid configuration; DEL goes on", slog.Any("error", invalid))
	}
	if !filepath.IsAbs(at.conf.RunDir) || !filepath.IsAbs(at.conf.BPFFS) {
		return at.conf.validate() // nothing can be found
	}
	lock, err := lockAttachment(ctx, at.conf.RunDir, args.ContainerID, args.IfName)
	if err != nil {
		return err
	}
	defer at.tidy("unlock", lock.release)
	if err := p.removeLocked(ctx, at, lock); err != nil {
		return err
	}
	if isOwnNamespace(args) {
		return fail(types.ErrInvalidNetNS, nil, "CNI_NETNS %q is the plugin's own network namespace; the attachment is removed", args.Netns)
	}
	return nil
}

// isOwnNamespace tells whether CNI_NETNS is the plugin's own, which the runtime did not allow. The namespace of a pod that is gone is not.
func isOwnNamespace(args *Args) bool {
	if overrides(args) {
		return false
	}
	own, err := netns.Identify(args.Netns)
	if err != nil {
		return false
	}
	current, err := netns.Current()
	if err != nil {
		return false
	}
	id, err := current.ID()
	return errors.Join(err, current.Close()) == nil && id == own
}

// removeLocked undoes the attachment whose lock is held, and leaves a journal of what it could not undo.
func (p *Plugin) removeLocked(ctx context.Context, at *attachment, lock *attachmentLock) error {
	// On a full disk the rest must go on.
	at.tidy("write journal", func() error { return lock.write(at.journal("DEL")) })
	if err := p.remove(ctx, at); err != nil {
		return err
	}
	at.tidy("clear journal", lock.clear)
	return nil
}

// removal is what DEL, GC and a repeated ADD do to one attachment.
type removal struct {
	*attachment
	link     *link.Socket
	datapath dataplane        // nil when there is none
	record   *endpoint.Record // nil when there is none
}

// remove undoes the attachment. The caller holds its lock.
func (p *Plugin) remove(ctx context.Context, at *attachment) error {
	r := removal{attachment: at}
	var (
		faults []error
		err    error
	)
	if r.record, err = at.records().Load(at.args.ContainerID, at.args.IfName); err != nil && !errors.Is(err, fs.ErrNotExist) {
		at.log.Warn("unreadable record", slog.Any("error", err)) // it is removed with the rest
	}
	r.datapath, err = p.openExisting(ctx, at)
	switch {
	case errors.Is(err, fs.ErrNotExist): // no ADD ever came that far, or the pins are gone with everything else
	case err != nil:
		faults = append(faults, fail(codeDatapath, err, "open the datapath (bpffs %s)", at.conf.BPFFS))
	default:
		defer at.tidy("close datapath", r.datapath.Close)
	}
	if r.link, err = link.Open(-1); err != nil {
		faults = append(faults, fail(codeDevice, err, "open a netlink socket"))
	} else {
		defer r.link.Close()
		faults = append(faults, r.removeInterface())
	}
	gone := errors.Join(faults...)
	// An address goes back only when nothing routes to it any more, but it does go back whatever else failed: the runtime may
	// never ask again.
	if r.ownsInterface() {
		faults = append(faults, at.release(ctx))
	}
	if gone == nil { // else the next DEL needs to know what was here
		faults = append(faults, r.removeRecord())
	}
	return joinFaults(faults)
}

// openExisting opens the datapath where there is one. Right after an upgrade of the plugin the maps are there, but not yet this build's
// programs: then the datapath is made complete, or the endpoint's map entries would stay. Where there are no maps, nothing is made.
func (p *Plugin) openExisting(ctx context.Context, at *attachment) (dataplane, error) {
	cfg := at.conf.datapath()
	d, err := p.open(cfg)
	if !errors.Is(err, fs.ErrNotExist) {
		return d, err
	}
	if _, err := os.Stat(pins.MapPath(cfg, "endpoints")); err != nil {
		return nil, err
	}
	return p.ensure(ctx, cfg)
}

// ownsInterface says whether we made the interface, as opposed to adopted it. Without a record the configuration knows: only the plugin
// that makes the interface has an IPAM section.
func (r *removal) ownsInterface() bool {
	if r.record != nil {
		return !r.record.Adopted
	}
	return r.conf.IPAM.Type != ""
}

// removeInterface removes the endpoint's map entries and the device, or takes the programs off an adopted one.
func (r *removal) removeInterface() error {
	if !r.ownsInterface() {
		return r.detachAdopted()
	}
	host, err := r.link.Device(link.HostName(r.args.ContainerID, r.args.IfName))
	if err != nil && !errors.Is(err, link.ErrNotFound) {
		return fail(codeDevice, err, "look up the host device")
	}
	index := host.Index
	if r.record != nil {
		index = r.record.HostIfindex // also when the device is gone already
	}
	fault := r.removeEntries(index)
	if err == nil {
		if err := r.link.Delete(host.Index); err != nil {
			return errors.Join(fault, fail(codeDevice, err, "delete host device %s", host.Name))
		}
	}
	return fault
}

// removeEntries deletes the endpoint's map entries if they still belong to the device: the address may be another pod's by now.
func (r *removal) removeEntries(ifindex int) error {
	if r.datapath == nil {
		return nil
	}
	fault := r.removeHostPorts()
	if ifindex == 0 {
		return fault
	}
	if err := deleteEndpoints(r.datapath, r.addresses(), ifindex); err != nil {
		return errors.Join(fault, fail(codeRegister, err, "delete the endpoint's map entries"))
	}
	return fault
}

// addresses are the pod's; without a record those of prevResult.
func (r *removal) addresses() []netip.Addr {
	if r.record != nil {
		return r.record.Addresses
	}
	prev, err := r.conf.prevResult()
	if err != nil || prev == nil {
		return nil
	}
	return interfaceAddresses(prev, r.args.IfName, r.args.Netns)
}

// detachAdopted leaves the interface to the plugin that made it. Without a record it is found through the pod's namespace, if that is
// still there.
func (r *removal) detachAdopted() error {
	index := 0
	if r.record != nil {
		index = r.record.HostIfindex
	} else if found, err := r.findAdopted(); err == nil {
		index = found
	}
	if index == 0 || r.datapath == nil {
		return nil
	}
	fault := r.removeEntries(index)
	if err := r.datapath.DetachPod(index); err != nil {
		return errors.Join(fault, fail(codeAttach, err, "take the programs off device %d", index))
	}
	return fault
}

func (r *removal) findAdopted() (ifindex int, err error) {
	if isOwnNamespace(r.args) {
		return 0, fmt.Errorf("%s is the plugin's own namespace: %w", r.args.Netns, link.ErrNotFound) // the device of that name is the node's
	}
	ns, err := netns.Open(r.args.Netns)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, ns.Close()) }()
	pod, err := link.Open(ns.FD())
	if err != nil {
		return 0, err
	}
	defer pod.Close()
	d, err := pod.Device(r.args.IfName)
	if err != nil {
		return 0, err
	}
	host, err := hostEnd(r.link, d)
	return host.Index, err
}

func (r *removal) removeRecord() error {
	if err := r.records().Delete(r.args.ContainerID, r.args.IfName); err != nil {
		return fail(types.ErrIOFailure, err, "delete the endpoint's record")
	}
	return nil
}

// joinFaults returns one CNI error for several: the first one's code, everybody's words.
func joinFaults(faults []error) error {
	var first *types.Error
	var rest []error
	for _, f := range faults {
		if f == nil {
			continue
		}
		if first == nil {
			first = asError(f)
		} else {
			rest = append(rest, f)
		}
	}
	if first == nil {
		return nil
	}
	if len(rest) == 0 {
		return first
	}
	details := errors.Join(rest...).Error()
	if first.Details != "" {
		details = first.Details + "\n" + details
	}
	return types.NewError(first.Code, first.Msg, details)
}
