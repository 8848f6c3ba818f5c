// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
)

const nodePortsSection = "External client → NodePort"

// Issue: better than kube-proxy in every figure.
var everyFigure = map[string]float64{modeRequests: 1, modeConnects: 1}

// benchNodePorts measures an external client that asks a NodePort on the first node, with the backend there or on the other one, beside
// kube-proxy's. Where the backend is on the node that was asked, the ways back do not differ.
func benchNodePorts(ctx context.Context, b *bench) (err error) {
	tunnel := b.margay.with("tunnel", "Margay, tunnel", "--routing-mode", "direct")
	dsr := b.margay.with("dsr", "Margay, DSR", "--routing-mode", "direct", "--service-return", "dsr")
	nftables, iptables := b.proxy("nftables"), b.proxy("iptables")
	others := b.servingOthers()
	order := append([]*contender{tunnel, nftables, dsr, iptables}, others...)
	clusters, err := b.startClusters(ctx, "nodeports", cast(order...)...)
	defer func() { err = errors.Join(err, closeClusters(clusters)) }()
	if err != nil {
		return err
	}
	for _, f := range families {
		for _, w := range serviceWays {
			got := map[*contender]*runner{}
			var all []*runner
			for _, c := range order {
				k := clusters[casting{c, 0}]
				if got[c], err = k.runner(k.nodePort(w.service, f.v6), w.id); err != nil {
					return err
				}
				all = append(all, got[c])
			}
			if err := b.race(ctx, b.choose(40, 12, 1), clusterKinds, all); err != nil {
				return err
			}
			for _, ours := range []*contender{tunnel, dsr} {
				c := comparison{
					section: nodePortsSection, id: "nodeport." + ours.id + "." + w.id + "." + idOf(f.name),
					name: ours.Name + ", backend on the " + w.name + ", " + f.name, targets: everyFigure, tails: true, strict: true,
				}
				b.compare(c, got[ours], got[nftables])
				c.further = true
				b.compare(c, got[ours], got[iptables])
				c.targets = nil // those are for what is always compared
				for _, other := range others {
					b.compare(c, got[ours], got[other])
				}
			}
		}
	}
	return nil
}
