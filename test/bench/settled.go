// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/pkg/agent"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/netns"
)

// margaySettled says whether the node's devices have their tcx links, where the kernel has any.
func margaySettled(on *clusterNode) (settled bool, err error) {
	d, err := datapath.Open(datapath.Config{BPFFS: on.bpffs(), Run: filepath.Join(on.dir, "run")})
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if has, err := d.HasTCX(); !has || err != nil {
		return err == nil, err
	}
	err = netns.Do(on.path, func() error {
		settled = true
		for device, programs := range map[string][]string{
			"eth0": {bpf.ProgFromNetdev, bpf.ProgToNetdev}, agent.DefaultVXLANDevice: {bpf.ProgFromOverlay, bpf.ProgToOverlay},
		} {
			l, err := netlink.LinkByName(device)
			if err != nil {
				return err
			}
			for _, p := range programs {
				settled = settled && d.Linked(l.Attrs().Index, p)
			}
		}
		return nil
	})
	return settled, err
}

// settle waits until nothing is put off any more on the nodes that have a daemon.
func (k *cluster) settle(ctx context.Context) error {
	for _, n := range k.nodes {
		for n.served && k.contender.settled != nil {
			settled, err := k.contender.settled(n)
			if err == nil && !settled {
				err = waitOr(ctx, 20*time.Millisecond)
			}
			if err != nil {
				return fmt.Errorf("%s, %s does not settle: %w", k.contender.Name, n.name, err)
			}
			if settled {
				break
			}
		}
	}
	return nil
}

func waitOr(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
