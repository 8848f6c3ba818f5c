// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
)

const nodePortsSection = "External client → NodePort, both ends pinned to one CPU"

// benchNodePorts measures an external client that asks a NodePort on the first node, with the backend there or on the other one, beside
// kube-proxy's. Where the backend is on the node that was asked, the ways back do not differ.
func benchNodePorts(ctx context.Context, b *bench) (err error) {
	tunnel := b.node.margayCluster("tunnel", "Margay, tunnel", "--routing-mode", "direct")
	dsr := b.node.margayCluster("dsr", "Margay, DSR", "--routing-mode", "direct", "--service-return", "dsr")
	nftables, iptables := b.node.referenceCluster("nftables"), b.node.referenceCluster("iptables")
	clusters := map[*contender]*cluster{}
	for _, c := range []*contender{tunnel, nftables, iptables, dsr} {
		k, err := b.startCluster(ctx, "nodeports-"+c.id, c, 0)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, k.close()) }()
		clusters[c] = k
	}
	for _, f := range families {
		for _, mode := range []string{modeRequests, modeConnects} {
			for _, w := range serviceWays {
				lanes := map[*contender]*lane{}
				var all []*lane
				for _, c := range []*contender{tunnel, nftables, dsr, iptables} {
					lanes[c] = &lane{course: clusters[c].nodePort(w.service, f.v6)}
					all = append(all, lanes[c])
				}
				if err := b.inTurns(ctx, mode, all...); err != nil {
					return err
				}
				for _, ours := range []*contender{tunnel, dsr} {
					for _, theirs := range []*contender{nftables, iptables} {
						b.compare(comparison{
							section: nodePortsSection, rate: 1, strict: true,
							id:   fmt.Sprintf("nodeport.%s.%s.%s.%s.%s", mode, idOf(f.name), w.id, ours.id, theirs.id),
							name: fmt.Sprintf("%s, %s, backend on the %s, %s", modeNames[mode], f.name, w.name, ours.name),
						}, lanes[ours], lanes[theirs])
					}
				}
			}
		}
	}
	return nil
}
