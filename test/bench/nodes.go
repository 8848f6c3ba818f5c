// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
)

const nodesSection = "Pod to pod on two nodes"

// Issue: what pods on two nodes must keep of the nodes' own traffic.
var (
	directTargets  = map[string]float64{modeRequests: 0.95}
	overlayTargets = map[string]float64{modeRequests: 0.85}
)

// benchNodes measures the traffic of pods on two nodes beside that of the nodes themselves.
func benchNodes(ctx context.Context, b *bench) (err error) {
	direct := b.margay.with("direct", "Margay, direct", "--routing-mode", "direct")
	overlay := b.margay.with("vxlan", "Margay, VXLAN", "--routing-mode", "vxlan")
	others := append([]*contender{b.proxy("nftables")}, b.others()...)
	order := append([]*contender{bare, direct, others[0], overlay, bareVXLAN}, others[1:]...)
	clusters, err := b.startClusters(ctx, "nodes", cast(order...)...)
	defer func() { err = errors.Join(err, closeClusters(clusters)) }()
	if err != nil {
		return err
	}
	for _, f := range families {
		got := map[*contender]*runner{}
		var all []*runner
		for _, c := range order {
			k := clusters[casting{c, 0}]
			if got[c], err = k.runner(k.between(f.v6), "remote"); err != nil {
				return err
			}
			all = append(all, got[c])
		}
		if err := b.race(ctx, b.choose(40, 12, 1), kinds[:3], all); err != nil {
			return err
		}
		c := comparison{section: nodesSection, id: "nodes.direct." + idOf(f.name), name: direct.Name + ", " + f.name, tails: true, targets: directTargets}
		b.compare(c, got[direct], got[bare])
		c.targets, c.further = nil, true
		for _, other := range others {
			b.compare(c, got[direct], got[other])
		}
		c = comparison{section: nodesSection, id: "nodes.vxlan." + idOf(f.name), name: overlay.Name + ", " + f.name, tails: true, targets: overlayTargets}
		b.compare(c, got[overlay], got[bare])
		c.targets, c.further = nil, true
		b.compare(c, got[overlay], got[bareVXLAN])
		for _, other := range others {
			b.compare(c, got[overlay], got[other])
		}
	}
	return nil
}
