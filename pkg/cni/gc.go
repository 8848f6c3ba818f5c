// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"log/slog"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/netns"
)

// GC removes what belongs to attachments that the runtime no longer knows, and has the IPAM plugin do the same. The list of valid ones is
// dropped from the configuration when it is empty, so an empty list does not say that nothing is valid: then only attachments whose
// namespace is gone are removed. Records of other networks are none of this command's business.
func (p *Plugin) GC(ctx context.Context, args *skel.CmdArgs) (err error) {
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
		if len(valid) == 0 {
			exists, err := netns.Exists(r.Netns)
			if err != nil || exists {
				continue // in doubt it is alive
			}
		}
		at.log.Info("attachment is no longer valid", slog.String("staleContainerID", r.ContainerID), slog.String("staleIfName", r.IfName))
		faults = append(faults, p.collect(ctx, at, r))
	}
	if at.conf.IPAM.Type != "" {
		faults = append(faults, at.ipamGC(ctx))
	}
	return joinFaults(faults)
}

// collect does what DEL would have done for one stale attachment.
func (p *Plugin) collect(ctx context.Context, gc *attachment, r *endpoint.Record) error {
	unlock, err := lockAttachment(ctx, gc.conf.RunDir, r.ContainerID, r.IfName)
	if err != nil {
		return err
	}
	defer gc.tidy("unlock", unlock)
	args := *gc.args
	args.ContainerID, args.IfName, args.Netns = r.ContainerID, r.IfName, r.Netns
	return p.remove(ctx, &attachment{
		conf: gc.conf, args: &args, pod: podArgs{namespace: r.Namespace, name: r.Name, uid: r.UID}, log: gc.log, closeLog: gc.closeLog,
	})
}
