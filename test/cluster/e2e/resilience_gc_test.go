// SPDX-License-Identifier: Apache-2.0

//go:build cluster

package e2e

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/margay-cni/margay/test/cluster/lab"
)

// TestKilledServices kills a node's containerd and kubelet while pods start, end and talk. What talks goes on, and nothing is left behind.
func TestKilledServices(t *testing.T) {
	needMargay(t, "garbage collection")
	node := cluster.Nodes()[1]
	for _, service := range []string{lab.Containerd, lab.Kubelet} {
		t.Run(service, func(t *testing.T) {
			s := newSpace(t, nil)
			_, l := underLoad(t, s)
			leaving := s.start(idle("leaving1", 2), idle("leaving2", 2))
			s.create(idle("coming1", 2), idle("coming2", 2), idle("coming3", 2))
			for _, p := range leaving {
				s.must(api.remove(s.ctx, "Pod", s.name, p.name))
			}
			if err := node.Kill(service); err != nil {
				t.Fatal(err)
			}
			l.passes(t, "without "+service)
			if err := node.Start(service); err != nil {
				t.Fatal(err)
			}
			s.ready(settleTime, "coming1", "coming2", "coming3")
			gone(t, s, "leaving1", "leaving2")
			l.finish(t, "kill of "+service)
			becomesTidy(t, "kill of "+service)
		})
	}
}

// gone waits until pods are no more.
func gone(t *testing.T, s *space, names ...string) {
	t.Helper()
	eventually(t, fmt.Sprintf("end of pods %v", names), settleTime, func() error {
		var list corev1.PodList
		if err := api.get(s.ctx, "Pod", s.name, "", &list); err != nil {
			return err
		}
		for _, p := range list.Items {
			if slices.Contains(names, p.Name) {
				return fmt.Errorf("%s is still there", p.Name)
			}
		}
		return nil
	})
}

// TestKilledSandbox kills a pod's shim, and a pod's pause process. kubelet makes the pods anew, others go on, and nothing is left behind.
func TestKilledSandbox(t *testing.T) {
	needMargay(t, "garbage collection")
	for _, victim := range []string{"shim", "pause"} {
		t.Run(victim, func(t *testing.T) {
			s := newSpace(t, nil)
			_, l := underLoad(t, s)
			p := s.start(server("victim", 2))[0]
			node, old := cluster.Nodes()[p.node-1], sandboxOf(t, p)
			target := processIn(t, p, "/pause")
			if victim == "shim" {
				target = find(t, node, "shim of pod victim", func(c process) bool {
					return strings.HasSuffix(c.args[0], "containerd-shim-runc-v2") && slices.Contains(c.args, old)
				})
			}
			target.kill(t)
			eventually(t, "another sandbox", settleTime, func() error {
				again, err := recordOf(p)
				if err == nil && again.ContainerID == old {
					err = fmt.Errorf("it is still the old one")
				}
				return err
			})
			again := s.ready(settleTime, p.name)
			for _, f := range families() {
				reach(t, nodePlace(1), "tcp", f.at(again[0].place, httpPort), "hostname")
			}
			l.finish(t, "kill of a pod's "+victim)
			becomesTidy(t, "kill of a pod's "+victim)
		})
	}
}

// killer is put in the place of the plugin. It kills the plugin's ADD after some time, which is another each time, and its DEL at
// once: what ADD leaves is for nobody but Margay's own garbage collection. STATUS and what is not about a pod of the test passes.
const killer = `#!/bin/sh
case "$CNI_COMMAND $CNI_ARGS" in
"ADD "*K8S_POD_NAMESPACE=%[1]s*) ;;
"DEL "*K8S_POD_NAMESPACE=%[1]s*) exit 1 ;;
*) exec %[2]s ;;
esac
exec 3<&0
%[2]s <&3 >/dev/null &
pid=$!
n=$(($(cat /run/killed.count 2>/dev/null || echo 0) + 1))
echo $n >/run/killed.count
[ $((n %% 2)) = 0 ] && sleep 0.0$((n / 2 %% 10))5 || sleep 0.00$((n / 2 %% 10))5
kill -9 $pid
wait $pid
[ $? = 137 ] && echo "ADD $n" >>/run/killed.log
exit 1
`

// hostPorts is the first of the hostPorts of TestKilledPlugin's pods.
const hostPorts = 27000

// TestKilledPlugin kills the plugin during ADDs. Pods start once it is left alone, and nothing of the ADDs that were killed is left.
func TestKilledPlugin(t *testing.T) {
	needMargay(t, "garbage collection")
	node := cluster.Nodes()[1]
	s := newSpace(t, nil)
	loaded, l := underLoad(t, s)
	killing := newSpace(t, nil)
	before := pinned(t, node)
	plugin, err := inNode(node, "/opt/cni/bin/margay")
	if err != nil {
		t.Fatal(err)
	}
	real := plugin + ".real"
	if err := os.Rename(plugin, real); err != nil {
		t.Fatal(err)
	}
	leave := func() {
		if exists(real) {
			if err := os.Rename(real, plugin); err != nil {
				t.Error(err)
			}
		}
	}
	t.Cleanup(leave)
	if err := os.WriteFile(plugin, fmt.Appendf(nil, killer, killing.name, "/opt/cni/bin/margay.real"), 0o755); err != nil {
		t.Fatal(err)
	}
	var names []string
	for i := range 10 {
		names = append(names, fmt.Sprintf("pod%d", i))
		killing.create(server(names[i], 2, func(p *corev1.Pod) { p.Spec.Containers[0].Ports[0].HostPort = int32(hostPorts + i) }))
	}
	log, err := inNode(node, "/run/killed.log")
	if err != nil {
		t.Fatal(err)
	}
	kills, left := 0, 0
	eventually(t, "ADDs that were killed and left something", settleTime, func() error {
		b, err := os.ReadFile(log)
		kills = strings.Count(string(b), "\n")
		if tidy(node) != nil {
			left++
		}
		if kills < 10 || left < 5 {
			return fmt.Errorf("%d ADDs were killed (%v), and %d looks found something left", kills, err, left)
		}
		return nil
	})
	t.Logf("%d ADDs were killed; for example: %v", kills, tidy(node))
	dead := sandboxesOf(t, node, killing.name)
	leave()
	start := time.Now()
	eventually(t, fmt.Sprintf("nothing of %d sandboxes whose ADD was killed", len(dead)), leftoverTime, func() error {
		for id := range sandboxesOf(t, node, killing.name) {
			if dead[id] {
				return fmt.Errorf("there is still something of %s", id)
			}
		}
		return nil
	})
	t.Logf("nothing of %d sandboxes whose ADD was killed was left after %v", len(dead), time.Since(start).Round(time.Second))
	again := killing.ready(settleTime, names...)
	askEach(t, loaded[2], again[:2])
	for _, f := range families() {
		for i, name := range names {
			if got := reach(t, clientPlace(), "tcp", f.at(nodePlace(2), uint16(hostPorts+i)), "hostname"); got != name {
				t.Errorf("hostPort %d is answered by %s, want %s", hostPorts+i, got, name)
			}
		}
	}
	l.finish(t, "kills of the plugin")
	becomesTidy(t, "kills of the plugin")
	for _, name := range names {
		s.must(api.remove(s.ctx, "Pod", killing.name, name))
	}
	gone(t, killing, names...)
	becomesTidy(t, "the pods' end")
	if now := pinned(t, node); !slices.Equal(now, before) {
		t.Errorf("pinned are %v, and before %v", now, before)
	}
}

// sandboxesOf returns the sandboxes of a namespace of the cluster that a node has a record or a lease of.
func sandboxesOf(t *testing.T, n *lab.Node, namespace string) map[string]bool {
	t.Helper()
	all, err := owned(n)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for id, name := range all.sandboxes {
		if strings.HasPrefix(name, namespace+"/") {
			found[id] = true
		}
	}
	return found
}
