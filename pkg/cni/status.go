// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"time"

	"github.com/containernetworking/cni/pkg/types"
)

// Status fails only when ADD cannot work here at all: containerd asks every few seconds and takes the node NotReady on any error, which
// evicts its pods. A stopped agent or a full address range is not that; nothing loaded and no loader is.
func (p *Plugin) Status(ctx context.Context, args *Args) (err error) {
	at, err := p.load(args)
	if at == nil {
		return err
	}
	start := time.Now()
	defer func() {
		if err != nil { // a success every few seconds is no news
			at.done("STATUS", start, &err)
		} else {
			_ = at.closeLog()
		}
	}()
	if err := at.conf.validate(); err != nil {
		return err
	}
	if err := p.check(at.conf.datapath()); err != nil {
		return fail(types.ErrPluginNotAvailable, err, "ADD cannot work here: the datapath is not available (bpffs %s)", at.conf.BPFFS)
	}
	if at.conf.IPAM.Type == "" {
		return nil
	}
	return at.ipamStatus(ctx)
}
