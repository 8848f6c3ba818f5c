// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
)

const nodesSection = "Pods on two nodes, both ends pinned to one CPU"

// Issue: what pods on two nodes must keep of the nodes' own traffic, as a rate of requests.
const (
	directTarget  = 0.95
	overlayTarget = 0.85
)

// benchNodes measures the traffic of pods on two nodes beside that of the nodes themselves.
func benchNodes(ctx context.Context, b *bench) (err error) {
	reference := b.node.referenceCluster("nftables")
	direct := b.node.margayCluster("direct", "Margay, direct", "--routing-mode", "direct")
	overlay := b.node.margayCluster("vxlan", "Margay, VXLAN", "--routing-mode", "vxlan")
	clusters := map[*contender]*cluster{}
	for _, c := range []*contender{bare, reference, direct, overlay} {
		k, err := b.startCluster(ctx, "nodes-"+c.id, c, 0)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, k.close()) }()
		clusters[c] = k
	}
	for _, f := range families {
		for _, mode := range []string{modeRequests, modeConnects} {
			lanes := map[*contender]*lane{}
			for c, k := range clusters {
				lanes[c] = &lane{course: k.between(f.v6)}
			}
			if err := b.inTurns(ctx, mode, lanes[bare], lanes[direct], lanes[reference], lanes[overlay]); err != nil {
				return err
			}
			for _, c := range []*contender{direct, overlay} {
				target := map[*contender]float64{direct: directTarget, overlay: overlayTarget}[c]
				if mode == modeConnects {
					target = 0 // the issue has none
				}
				id := fmt.Sprintf("nodes.%s.%s.%s", mode, idOf(f.name), c.id)
				name := fmt.Sprintf("%s, %s, %s", modeNames[mode], f.name, c.name)
				b.compare(comparison{section: nodesSection, id: id, name: name, rate: target}, lanes[c], lanes[bare])
				b.compare(comparison{section: nodesSection, id: id + ".reference", name: name}, lanes[c], lanes[reference])
			}
		}
	}
	return nil
}
