// SPDX-License-Identifier: Apache-2.0

//go:build cluster

package e2e

import (
	"fmt"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
)

// TestSmoke is a bit of everything in a minute, for every change: what was installed with the shipped manifest connects pods, serves
// services and keeps a client's address, and a policy holds.
func TestSmoke(t *testing.T) {
	s := newSpace(t, nil)
	if onMargay() {
		installed(t, s)
	}
	app := labelled("app", "web")
	pods := s.start(server("web1", 1, app), server("web2", 2, app), idle("idle1", 1), idle("idle2", 2))
	web := s.service("web", "web", nodePort)
	webs, idles := pods[:2], pods[2:]
	eachFamily(t, func(t *testing.T, f family) {
		for _, from := range idles {
			for _, to := range webs {
				askPod(t, f, from, to)
			}
			for _, network := range networks {
				everyBackend(t, from.place, network, f.at(web.place, 80), names(webs))
				lookup(t, from, network, resolver(from.place, network, f.at(dnsService(t), 53)), "web."+s.name+".svc.cluster.local.", web.addrs)
			}
		}
		for _, network := range networks {
			everyBackend(t, nodePlace(1), network, f.at(web.place, 80), names(webs))
			for i := 1; i <= 2; i++ {
				at := f.at(nodePlace(i), web.nodePort(network))
				everyBackend(t, clientPlace(), network, at, names(webs))
				seesClient(t, f, network, at, onMargay())
			}
		}
	})
	if onMargay() {
		s.apply(networkPolicy("one", `{podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {matchLabels: {app: idle1}}}]}]}`))
		from := []place{idles[0].place, idles[1].place}
		for _, to := range webs {
			judge(t, "one pod is allowed", table(from, to.place, portOf, "idle1")...)
		}
	}
}

// installed requires that Margay's DaemonSet is ready on all nodes, that nothing on them is kube-proxy, and that all nodes are Ready.
func installed(t *testing.T, s *space) {
	t.Helper()
	eventually(t, "Margay is ready on every node", 2*time.Minute, func() error {
		var set appsv1.DaemonSet
		if err := api.get(s.ctx, "DaemonSet", "kube-system", "margay", &set); err != nil {
			return err
		}
		if n := int(set.Status.NumberReady); n != len(cluster.Nodes()) {
			return fmt.Errorf("on %d of %d", n, len(cluster.Nodes()))
		}
		return nil
	})
	for _, n := range cluster.Nodes() {
		running, err := n.Services()
		if err != nil || running["kube-proxy"] != 0 {
			t.Errorf("%s runs %v (%v): want no kube-proxy", n.Name, running, err)
		}
		var object corev1.Node
		s.must(api.get(s.ctx, "Node", "", n.Name, &object))
		for _, c := range object.Status.Conditions {
			if c.Type == corev1.NodeReady && c.Status != corev1.ConditionTrue {
				t.Errorf("%s is not Ready: %s", n.Name, c.Message)
			}
		}
	}
}
