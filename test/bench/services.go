// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
)

const servicesSection = "ClusterIP, both ends pinned to one CPU"

// Issue: what a service must keep of the pod behind it, and 1 000 and 10 000 services of one.
const (
	serviceRequests = 0.99
	serviceConnects = 0.97
)

// serviceSizes are the numbers of services of Margay's clusters; proxySizes those of kube-proxy's, which takes a minute for 10 000 of two
// families.
var (
	serviceSizes = []int{1, 1000, 10_000}
	proxySizes   = []int{1, 1000}
)

// serviceLab is clusters with few and with many services.
type serviceLab struct {
	bench *bench
	// margay and proxies are by the number of services.
	margay, nftables, iptables map[int]*cluster
}

// benchServices measures services beside the pods behind them, with more and more other services, and beside kube-proxy's.
func benchServices(ctx context.Context, b *bench) (err error) {
	l := &serviceLab{bench: b, margay: map[int]*cluster{}, nftables: map[int]*cluster{}, iptables: map[int]*cluster{}}
	defer func() { err = errors.Join(err, l.close()) }()
	for _, side := range []struct {
		contender *contender
		sizes     []int
		clusters  map[int]*cluster
	}{
		{b.node.margayCluster("margay", "Margay", "--routing-mode", "direct"), serviceSizes, l.margay},
		{b.node.referenceCluster("nftables"), proxySizes, l.nftables},
		{b.node.referenceCluster("iptables"), proxySizes, l.iptables},
	} {
		for _, size := range side.sizes {
			others := size
			if b.smoke {
				others = min(size, 50)
			}
			k, err := b.startCluster(ctx, fmt.Sprintf("services-%s-%d", side.contender.id, size), side.contender, others)
			if err != nil {
				return err
			}
			side.clusters[size] = k
		}
	}
	for _, f := range families {
		for _, mode := range []string{modeRequests, modeConnects} {
			for _, w := range serviceWays {
				if err := l.measure(ctx, f.name, f.v6, mode, w); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func (l *serviceLab) close() error {
	var errs []error
	for _, clusters := range []map[int]*cluster{l.margay, l.nftables, l.iptables} {
		for _, k := range clusters {
			errs = append(errs, k.close())
		}
	}
	return errors.Join(errs...)
}

// way is where a service's backend is, seen from the client.
type way struct {
	id, name string
	service  clusterService
	pod      func(k *cluster, v6 bool) course
}

var serviceWays = []way{
	{"local", "same node", serviceLocal, (*cluster).within},
	{"remote", "other node", serviceRemote, (*cluster).between},
}

// measure has all clusters take turns on one way.
func (l *serviceLab) measure(ctx context.Context, family string, v6 bool, mode string, w way) error {
	pod := &lane{course: w.pod(l.margay[serviceSizes[0]], v6)}
	pod.name = "pod → pod"
	lanes := []*lane{pod}
	enter := func(clusters map[int]*cluster, sizes []int) map[int]*lane {
		got := map[int]*lane{}
		for _, size := range sizes {
			k := clusters[size]
			got[size] = &lane{course: k.clusterIP(w.service, v6)}
			got[size].name = fmt.Sprintf("%s, %d", k.contender.name, size)
			lanes = append(lanes, got[size])
		}
		return got
	}
	margay, nftables, iptables := enter(l.margay, serviceSizes), enter(l.nftables, proxySizes), enter(l.iptables, proxySizes)
	if err := l.bench.inTurns(ctx, mode, lanes...); err != nil {
		return err
	}
	target := map[string]float64{modeRequests: serviceRequests, modeConnects: serviceConnects}[mode]
	for _, size := range serviceSizes {
		c := comparison{section: servicesSection, rate: target,
			id:   fmt.Sprintf("service.%s.%s.%s.%d", mode, idOf(family), w.id, size),
			name: fmt.Sprintf("%s, %s, %s, %d services", modeNames[mode], family, w.name, size)}
		reference := pod
		if size != serviceSizes[0] { // flat: what many services keep of one
			reference = margay[serviceSizes[0]]
		}
		l.bench.compare(c, margay[size], reference)
		for _, proxy := range []map[int]*lane{nftables, iptables} {
			if proxy[size] != nil {
				c := c
				c.rate, c.id = 1, c.id+"."+idOf(proxy[size].name)
				l.bench.compare(c, margay[size], proxy[size])
			}
		}
	}
	return nil
}
