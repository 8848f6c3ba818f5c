// SPDX-License-Identifier: Apache-2.0

//go:build cluster

package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/test/cluster/lab"
)

// TestNodeReboot switches a node off and on again. No pod starts on it before its agent has been there, then all come back, with services
// and policy, and nothing of their former life is left. The other node's traffic goes on all the time.
func TestNodeReboot(t *testing.T) {
	needMargay(t, "agent")
	letAgentsBeAway(t)
	s := newSpace(t, nil)
	g, _ := newGuarded(t, s, 2)
	open := newSpace(t, nil)
	app := labelled("app", "web")
	pods := open.start(server("web1", 1, app), server("web2", 2, app), idle("asker", 1), server("steady", 1))
	svc := open.service("web", "web", nodePort)
	steady := open.service("steady", "steady", nodePort)
	node := cluster.Nodes()[1]
	var routes []route
	for _, r := range loadRoutes(pods[2], pods[3:], steady) {
		if strings.HasSuffix(r.name, "NodePort of "+node.Name) {
			continue
		}
		routes = append(routes, r)
		for _, network := range networks {
			reach(t, r.from, network, r.at(network), "hostname")
		}
	}
	l := startLoad(t, routes...)
	old, err := owned(node)
	s.must(err)

	sendAgentAway(t, node)
	if err := node.PowerOff(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { powerOn(t, node) })
	l.passes(t, "while node2 is off")
	on := time.Now()
	powerOn(t, node)
	withoutAgent(t, node)
	bringAgentBack(t, node)
	agentReady(t, node)
	ctx, cancel := context.WithTimeout(context.Background(), settleTime)
	defer cancel()
	if err := cluster.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("%s was Ready %v after it was switched on", node.Name, time.Since(on).Round(time.Second))
	eventually(t, "all pods are back, and nothing else is there", settleTime, func() error { return tidy(node) })
	t.Logf("its pods were back %v after that", time.Since(on).Round(time.Second))
	g.findAskers()
	guardedPods := g.pods(1)
	web := open.ready(settleTime, "web1", "web2")
	now, err := owned(node)
	s.must(err)
	for id, name := range now.sandboxes {
		if old.sandboxes[id] != "" {
			t.Errorf("there is something of sandbox %s of %s, which the reboot ended", id, name)
		}
	}
	g.holds("after the reboot", guardedPods)
	askEach(t, pods[2], web)
	for _, f := range families() {
		for _, network := range networks {
			everyBackend(t, pods[2].place, network, f.at(svc.place, 80), names(web))
			for i := range cluster.Nodes() {
				everyBackend(t, clientPlace(), network, f.at(nodePlace(i+1), svc.nodePort(network)), names(web))
			}
		}
	}
	l.finish(t, "a reboot of the other node")
}

// powerOn switches a node on, if it is off.
func powerOn(t *testing.T, n *lab.Node) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), settleTime)
	defer cancel()
	if n.Running() {
		return
	}
	if err := n.PowerOn(ctx); err != nil {
		t.Fatal(err)
	}
}

// withoutAgent requires that a node that has started without its agent starts no pods: the conflist is there, and STATUS says 50.
func withoutAgent(t *testing.T, n *lab.Node) {
	t.Helper()
	conflist, err := inNode(n, "/etc/cni/net.d/10-margay.conflist")
	if err != nil {
		t.Fatal(err)
	}
	if !exists(conflist) {
		t.Errorf("%s has no conflist after a reboot, and STATUS is not asked", n.Name)
	}
	eventually(t, n.Name+" is not Ready, for what the plugin answers", settleTime, func() error {
		message, err := networkUnready(n)
		if err == nil && !strings.Contains(message, "margay") {
			err = errors.New(message)
		}
		return err
	})
	for start := time.Now(); time.Since(start) < 10*time.Second; time.Sleep(200 * time.Millisecond) {
		if _, err := networkUnready(n); err != nil {
			t.Fatalf("without its agent: %v", err)
		}
		run, err := inNode(n, "/run/margay")
		if err != nil {
			t.Fatal(err)
		}
		if records, err := endpoint.NewStore(run).List(); err != nil || len(records) > 0 {
			t.Fatalf("%s has %d records of pods although no agent has been there: an ADD was served (%v)", n.Name, len(records), err)
		}
	}
}

// networkUnready returns an error unless kubelet says that its node is not ready, and why. What it said before the node was switched off is
// no such word: the node was ready.
func networkUnready(n *lab.Node) (why string, err error) {
	var object corev1.Node
	if err := api.get(context.Background(), "Node", "", n.Name, &object); err != nil {
		return "", err
	}
	for _, c := range object.Status.Conditions {
		if c.Type != corev1.NodeReady {
			continue
		}
		if c.Status == corev1.ConditionFalse && c.Reason == "KubeletNotReady" {
			return c.Message, nil
		}
		return "", fmt.Errorf("%s has Ready=%s: %s", n.Name, c.Status, c.Message)
	}
	return "", errors.New(n.Name + " has no condition Ready")
}
