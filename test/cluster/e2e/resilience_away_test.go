// SPDX-License-Identifier: Apache-2.0

//go:build cluster

package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/margay-cni/margay/test/cluster/lab"
)

// awayLabel keeps the agent off a node that has it, once letAgentsBeAway has run.
const awayLabel = "margay-e2e-agent-away"

// letAgentsBeAway gives Margay's DaemonSet a rule by which sendAgentAway works, and takes it back when the test ends.
func letAgentsBeAway(t *testing.T) {
	t.Helper()
	ctx := context.Background()
	set := func(affinity string) {
		t.Helper()
		patch := `{"spec":{"template":{"spec":{"affinity":` + affinity + `}}}}`
		if err := api.patch(ctx, "DaemonSet", "kube-system", "margay", patch); err != nil {
			t.Fatal(err)
		}
		rollout(t, "")
	}
	t.Cleanup(func() {
		for _, n := range cluster.Nodes() {
			bringAgentBack(t, n)
		}
		set("null")
	})
	set(`{"nodeAffinity":{"requiredDuringSchedulingIgnoredDuringExecution":{"nodeSelectorTerms":[{"matchExpressions":[{"key":"` +
		awayLabel + `","operator":"DoesNotExist"}]}]}}}`)
}

// sendAgentAway ends a node's agent, and it does not come back before bringAgentBack.
func sendAgentAway(t *testing.T, n *lab.Node) {
	t.Helper()
	if err := api.patch(context.Background(), "Node", "", n.Name, `{"metadata":{"labels":{"`+awayLabel+`":"yes"}}}`); err != nil {
		t.Fatal(err)
	}
	eventually(t, "end of the agent on "+n.Name, settleTime, func() error {
		all, err := processes(n)
		if err != nil {
			return err
		}
		for _, p := range all {
			if p.args[0] == "/usr/bin/margay-agent" {
				return errors.New("it still runs")
			}
		}
		return nil
	})
}

// bringAgentBack undoes sendAgentAway and waits for nothing.
func bringAgentBack(t *testing.T, n *lab.Node) {
	t.Helper()
	if err := api.patch(context.Background(), "Node", "", n.Name, `{"metadata":{"labels":{"`+awayLabel+`":null}}}`); err != nil {
		t.Fatal(err)
	}
}

// agentReady waits until a node's agent is ready.
func agentReady(t *testing.T, n *lab.Node) {
	t.Helper()
	eventually(t, "the agent on "+n.Name, settleTime, func() error { return probe(n, "readyz") })
}

// guarded is a Deployment on one node with a policy that lets friends in and nobody else.
type guarded struct {
	s               *space
	allowed, denied []place // one on each node
}

// newGuarded makes such a Deployment with one pod.
func newGuarded(t *testing.T, s *space, node int) (g *guarded, first pod) {
	t.Helper()
	g = &guarded{s: s}
	s.apply(networkPolicy("guard", `{podSelector: {matchLabels: {app: guarded}}, ingress: [{from: [{podSelector: {matchLabels: {role: friend}}}]}]}`))
	friend := labelled("role", "friend")
	s.create(idle("friend1", 1, friend), idle("friend2", 2, friend), idle("other1", 1), idle("other2", 2))
	g.findAskers()
	template := server("guarded", node)
	template.Name = ""
	template.Spec.NodeName = "" // a Deployment's pods pass the scheduler
	template.Spec.NodeSelector = map[string]string{corev1.LabelHostname: cluster.Nodes()[node-1].Name}
	s.must(api.create(s.ctx, "Deployment", s.name, appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "guarded"},
		Spec: appsv1.DeploymentSpec{
			Selector: &metav1.LabelSelector{MatchLabels: template.Labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: template.ObjectMeta, Spec: template.Spec},
		},
	}, nil))
	pods := g.pods(1)
	g.holds("a policy in force", pods)
	return g, pods[0]
}

// findAskers waits for the pods that ask, which a reboot makes anew.
func (g *guarded) findAskers() {
	g.s.t.Helper()
	askers := g.s.ready(settleTime, "friend1", "friend2", "other1", "other2")
	g.allowed = []place{askers[0].place, askers[1].place}
	g.denied = []place{askers[2].place, askers[3].place}
}

// scale sets how many pods the Deployment has and waits until they are ready.
func (g *guarded) scale(replicas int) []pod {
	g.s.t.Helper()
	g.s.must(api.patch(g.s.ctx, "Deployment", g.s.name, "guarded", fmt.Sprintf(`{"spec":{"replicas":%d}}`, replicas)))
	return g.pods(replicas)
}

// pods waits until the Deployment has so many pods, all ready.
func (g *guarded) pods(replicas int) []pod {
	g.s.t.Helper()
	var names []string
	eventually(g.s.t, fmt.Sprintf("%d pods of the Deployment", replicas), settleTime, func() error {
		var list corev1.PodList
		if err := api.do(g.s.ctx, "GET", kinds["Pod"].path(g.s.name, "")+"?labelSelector=app=guarded", "", nil, &list); err != nil {
			return err
		}
		names = nil
		for _, p := range list.Items {
			if p.DeletionTimestamp == nil {
				names = append(names, p.Name)
			}
		}
		if len(names) != replicas {
			return fmt.Errorf("there are %d: %v", len(names), names)
		}
		return nil
	})
	return g.s.ready(settleTime, names...)
}

// holds requires that the policy holds for pods: friends are answered, others are not.
func (g *guarded) holds(situation string, pods []pod) {
	g.s.t.Helper()
	judge(g.s.t, situation, g.expect(pods, true)...)
}

// shut requires that the policy is not weaker than it should be: others are not answered. Friends may wait.
func (g *guarded) shut(situation string, pods []pod) {
	g.s.t.Helper()
	judge(g.s.t, situation, g.expect(pods, false)...)
}

func (g *guarded) expect(pods []pod, friends bool) (all []expectation) {
	for _, p := range pods {
		all = append(all, table(g.denied, p.place, portOf)...)
		if friends {
			all = append(all, table(g.allowed, p.place, portOf, g.allowed[0].name, g.allowed[1].name)...)
		}
	}
	return all
}

// TestAgentAway starts and ends pods on a node whose agent is not there: that works, traffic goes on, and a policy keeps new pods shut for
// those whom it denies; when the agent is back they are open for those whom it allows.
func TestAgentAway(t *testing.T) {
	needMargay(t, "agent")
	letAgentsBeAway(t)
	s := newSpace(t, nil)
	g, first := newGuarded(t, s, 2)
	node := cluster.Nodes()[1]
	open := newSpace(t, nil) // where no policy is
	loaded, l := underLoad(t, open)
	old := sandboxOf(t, first)

	sendAgentAway(t, node)
	g.holds("without the agent", []pod{first})
	g.scale(3)
	s.delete(first.name)
	if err := sandboxGone(node, old); err != nil {
		t.Errorf("DEL without the agent: %v", err)
	}
	pods := g.pods(3)
	g.shut("new pods of a known Deployment without the agent", pods)
	for _, f := range families() { // but the node reaches them, for kubelet's probes
		for _, p := range pods {
			reach(t, nodePlace(2), "tcp", f.at(p.place, httpPort), "hostname")
		}
	}
	later := open.start(server("later", 2))
	askEach(t, loaded[2], later)
	l.passes(t, "without the agent")

	bringAgentBack(t, node)
	agentReady(t, node)
	g.holds("new pods once the agent is back", pods)
	askEach(t, loaded[2], later)
	l.finish(t, "an agent that was away")
	becomesTidy(t, "an agent that was away")
}

// sandboxGone requires that nothing is left of a pod's sandbox. A record is the last thing that DEL removes.
func sandboxGone(n *lab.Node, id string) error {
	run, err := inNode(n, "/run/margay/endpoints")
	if err != nil {
		return err
	}
	return until(settleTime, func() error {
		if exists(run + "/" + id + "-eth0.json") {
			return errors.New("its record is still there")
		}
		return nil
	})
}

// TestAPIServerAway takes the API server away for a minute. What was goes on, also when an agent starts or a container dies in this time,
// and what is changed afterwards arrives.
func TestAPIServerAway(t *testing.T) {
	needMargay(t, "agent")
	s := newSpace(t, nil)
	g, first := newGuarded(t, s, 2)
	open := newSpace(t, nil)
	pods, l := underLoad(t, open)
	restarted := open.start(server("restarted", 1))[0]
	t.Cleanup(func() { startAPI(t) })

	start := time.Now()
	if err := cluster.StopAPI(); err != nil {
		t.Fatal(err)
	}
	g.holds("without the API server", []pod{first})
	for _, n := range cluster.Nodes() {
		restartAgent(t, n, "livez")
	}
	g.holds("with agents that have not seen the API server", []pod{first})
	restartContainer(t, restarted)
	for _, n := range cluster.Nodes() {
		if err := probe(n, "livez"); err != nil {
			t.Errorf("%s without the API server: /livez: %v", n.Name, err)
		}
	}
	time.Sleep(time.Until(start.Add(time.Minute)))
	g.holds("a minute without the API server", []pod{first})
	for _, n := range cluster.Nodes() {
		if err := probe(n, "readyz"); err == nil || !strings.Contains(err.Error(), "503") {
			t.Errorf("%s without the API server: /readyz: %v, want 503", n.Name, err)
		}
	}
	startAPI(t)
	for _, n := range cluster.Nodes() {
		agentReady(t, n)
	}
	s.apply(networkPolicy("guard", `{podSelector: {matchLabels: {app: guarded}}, ingress: [{from: [{podSelector: {matchLabels: {app: other1}}}]}]}`))
	judge(t, "a policy that was changed afterwards", append(table(g.denied, first.place, portOf, "other1"), table(g.allowed, first.place, portOf)...)...)
	svc := open.service("later", "web")
	hasEndpoints(t, open, "later") // the controller manager waits for up to a minute before it asks the API server again
	for _, f := range families() {
		for _, network := range networks {
			reach(t, pods[2].place, network, f.at(svc.place, 80), "hostname")
		}
	}
	l.finish(t, "an API server that was away")
	becomesTidy(t, "an API server that was away")
}

// startAPI brings the API server back, if it is away.
func startAPI(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), settleTime)
	defer cancel()
	running, err := cluster.Control().Services()
	if err == nil && running[lab.APIServer] == 0 {
		err = cluster.StartAPI(ctx)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// hasEndpoints waits until the API server has ready endpoints of a service in every family.
func hasEndpoints(t *testing.T, s *space, name string) {
	t.Helper()
	eventually(t, "endpoints of service "+name, settleTime, func() error {
		var list discoveryv1.EndpointSliceList
		path := kinds["EndpointSlice"].path(s.name, "") + "?labelSelector=" + discoveryv1.LabelServiceName + "=" + name
		if err := api.do(s.ctx, "GET", path, "", nil, &list); err != nil {
			return err
		}
		ready := 0
		for _, slice := range list.Items {
			if slices.ContainsFunc(slice.Endpoints, func(e discoveryv1.Endpoint) bool { return *e.Conditions.Ready }) {
				ready++
			}
		}
		if ready != len(families()) {
			return fmt.Errorf("%d slices of %d have ready ones", ready, len(list.Items))
		}
		return nil
	})
}

// processIn returns the process of a pod with a program's path: the processes of a pod are those in its network.
func processIn(t *testing.T, p pod, program string) process {
	t.Helper()
	return find(t, cluster.Nodes()[p.node-1], program+" of pod "+p.name, func(candidate process) bool {
		return candidate.args[0] == program && inNetwork(candidate, p)
	})
}

// inNetwork reports whether a process is in a pod's network.
func inNetwork(candidate process, p pod) bool {
	path, err := p.netns()
	if err != nil {
		return false
	}
	want, err := os.Stat(path)
	if err != nil {
		return false
	}
	got, err := os.Stat(fmt.Sprintf("/proc/%d/ns/net", candidate.pid))
	return err == nil && os.SameFile(want, got)
}

// restartContainer kills a server pod's process. kubelet starts it again, in the same network.
func restartContainer(t *testing.T, p pod) {
	t.Helper()
	killed := processIn(t, p, "/agnhost")
	killed.kill(t)
	eventually(t, "another container of "+p.name, settleTime, func() error {
		all, err := processes(cluster.Nodes()[p.node-1])
		for _, candidate := range all {
			if candidate.args[0] == "/agnhost" && candidate.pid != killed.pid && inNetwork(candidate, p) {
				return nil
			}
		}
		return errors.Join(errors.New("there is none"), err)
	})
	for _, f := range families() {
		reach(t, nodePlace(3-p.node), "tcp", f.at(p.place, httpPort), "hostname")
	}
}
