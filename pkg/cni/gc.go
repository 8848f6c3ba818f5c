// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"log/slog"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/netns"
)

// GC removes what belongs to attachments that the runtime no longer knows, and has the IPAM plugin do the same. The list of valid ones is
// dropped from the configuration when it is empty, so an empty list does not say that nothing is valid: then only attachments whose
// namespace is gone are removed. Records of other networks are none of this command's business. Few runtimes call it: the agent's Collector
// does without being called what can be done without the list.
func (p *Plugin) GC(ctx context.Context, args *Args) (err error) {
	at, err := p.load(args)
	if at == nil {
		return err
	}
	defer at.done("GC", time.Now(), &err)
	if err := at.conf.validate(); err != nil {
		return err
	}
	records, unreadable := at.records().List()
	var faults []error
	if unreadable != nil {
		faults = append(faults, fail(types.ErrIOFailure, unreadable, "read the endpoint records in %s; remove the damaged ones", at.records().Dir()))
	}
	valid := map[types.GCAttachment]bool{}
	for _, v := range at.conf.ValidAttachments {
		valid[v] = true
	}
	for _, r := range records {
		if r.Network != at.conf.Name || valid[types.GCAttachment{ContainerID: r.ContainerID, IfName: r.IfName}] {
			continue
		}
		if len(valid) == 0 && namespaceAt(r.Netns, netns.ParseID(r.NetnsID), true) != gone {
			continue // in doubt it is alive
		}
		at.log.Info("attachment is no longer valid", slog.String("staleContainerID", r.ContainerID), slog.String("staleIfName", r.IfName))
		faults = append(faults, p.collect(ctx, at, r))
	}
	faults = append(faults, p.collectJournals(ctx, at, valid))
	if at.conf.IPAM.Type != "" {
		faults = append(faults, at.ipamGC(ctx))
	}
	return joinFaults(faults)
}

// collect does what DEL would have done for one stale attachment.
func (p *Plugin) collect(ctx context.Context, gc *attachment, r *endpoint.Record) error {
	lock, err := lockAttachment(ctx, gc.conf.RunDir, r.ContainerID, r.IfName)
	if err != nil {
		return err
	}
	defer gc.tidy("unlock", lock.release)
	args := *gc.args
	args.ContainerID, args.IfName, args.Netns = r.ContainerID, r.IfName, r.Netns
	return p.removeLocked(ctx, &attachment{
		conf: gc.conf, args: &args, pod: podArgs{namespace: r.Namespace, name: r.Name, uid: r.UID}, log: gc.log, closeLog: gc.closeLog,
	}, lock)
}

// collectJournals undoes what commands about other attachments than the valid ones left when they were killed or gave up.
func (p *Plugin) collectJournals(ctx context.Context, gc *attachment, valid map[types.GCAttachment]bool) error {
	journals, err := readJournals(gc.conf.RunDir)
	if err != nil {
		return fail(types.ErrIOFailure, err, "look for what interrupted commands left")
	}
	var faults []error
	for _, found := range journals {
		j := found.journal
		if j == nil || j.Network != gc.conf.Name || valid[types.GCAttachment{ContainerID: j.ContainerID, IfName: j.IfName}] {
			continue
		}
		lock, err := tryLock(found.path)
		if err != nil {
			faults = append(faults, fail(types.ErrIOFailure, err, "lock %s", found.path))
		}
		if lock == nil {
			continue
		}
		if lock.journal != nil && *lock.journal == *j {
			args := *gc.args
			args.ContainerID, args.IfName, args.Netns = j.ContainerID, j.IfName, j.Netns
			gc.log.Info("interrupted command is undone", slog.String("staleContainerID", j.ContainerID), slog.String("staleIfName", j.IfName))
			faults = append(faults, p.removeLocked(ctx, &attachment{conf: gc.conf, args: &args, log: gc.log, closeLog: gc.closeLog}, lock))
		}
		gc.tidy("unlock", lock.release)
	}
	return joinFaults(faults)
}
