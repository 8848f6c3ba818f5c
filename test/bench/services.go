// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
)

const servicesSection = "ClusterIP"

// Issue: what a service must keep of the pod behind it, and many services of one.
var serviceTargets = map[string]float64{modeRequests: 0.99, modeConnects: 0.97}

// serviceLab is clusters with few and with many services.
type serviceLab struct {
	bench    *bench
	margay   *contender
	proxies  []*contender // what else serves services
	entries  []casting
	clusters map[casting]*cluster
}

// benchServices measures services beside the pods behind them, with more and more other services, and beside kube-proxy's.
func benchServices(ctx context.Context, b *bench) (err error) {
	l := &serviceLab{
		bench: b, margay: b.margay.with("margay", "Margay", "--routing-mode", "direct"),
		proxies: append([]*contender{b.proxy("nftables"), b.proxy("iptables")}, b.servingOthers()...),
	}
	l.choose()
	l.clusters, err = b.startClusters(ctx, "services", l.entries...)
	defer func() { err = errors.Join(err, closeClusters(l.clusters)) }()
	if err != nil {
		return err
	}
	for _, f := range families {
		for _, w := range serviceWays {
			if err := l.measure(ctx, f.name, f.v6, w); err != nil {
				return err
			}
		}
	}
	return nil
}

// choose says who takes part. kube-proxy takes half a minute to two minutes to install 10 000 services of two families with nftables: that is for
// the long form. With iptables it takes minutes.
func (l *serviceLab) choose() {
	nftables, iptables := l.proxies[0], l.proxies[1]
	l.entries = []casting{{l.margay, 1}, {nftables, 1000}, {l.margay, 10_000}, {l.margay, 1000}}
	if l.bench.full || l.bench.smoke {
		l.entries = append(l.entries, casting{iptables, 1000})
	}
	if l.bench.full {
		l.entries = append(l.entries, casting{nftables, 1}, casting{iptables, 1}, casting{nftables, 10_000})
	}
	for _, other := range l.proxies[2:] {
		for _, size := range []int{1, 1000, 10_000} {
			if size == 1 || size <= other.Services && (size == 1000 || l.bench.full) {
				l.entries = append(l.entries, casting{other, size})
			}
		}
	}
}

// measure has all clusters take turns on one way.
func (l *serviceLab) measure(ctx context.Context, family string, v6 bool, w way) error {
	first := l.clusters[casting{l.margay, 1}]
	pod, err := first.runner(w.pod(first, v6), w.id)
	if err != nil {
		return err
	}
	pod.name = "pod → pod"
	got, all := map[casting]*runner{}, []*runner{pod}
	for _, e := range l.entries {
		k := l.clusters[e]
		r, err := k.runner(k.clusterIP(w.service, v6), w.id)
		if err != nil {
			return err
		}
		r.name = e.Name + ", " + count(e.others)
		got[e], all = r, append(all, r)
	}
	if err := l.bench.race(ctx, l.bench.choose(30, 10, 1), clusterKinds, all); err != nil {
		return err
	}
	for _, size := range []int{1, 1000, 10_000} {
		ours := got[casting{l.margay, size}]
		c := comparison{
			section: servicesSection, id: fmt.Sprintf("service.%s.%s.%d", w.id, idOf(family), size), targets: serviceTargets,
			name: fmt.Sprintf("%s, %s, %s", count(size), w.name, family),
		}
		if size == 1 {
			c.tails = true
			l.bench.compare(c, ours, pod)
		} else { // flat: many services keep of one what one keeps of its pod
			l.bench.compare(c, ours, got[casting{l.margay, 1}])
		}
		c.targets, c.further, c.tails = everyFigure, true, true
		for i, proxy := range l.proxies {
			if i == 2 {
				c.targets = nil // those are for what is always compared
			}
			if theirs := got[casting{proxy, size}]; theirs != nil {
				l.bench.compare(c, ours, theirs)
			}
		}
	}
	return nil
}
