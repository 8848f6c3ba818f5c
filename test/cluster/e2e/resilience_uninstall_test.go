// SPDX-License-Identifier: Apache-2.0

//go:build cluster

package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/margay-cni/margay/test/cluster/lab"
)

// TestUninstall removes Margay as docs/kubernetes.md says: nothing of it is left on the nodes. Then it is installed again. With pods on a
// node the removal waits. CoreDNS is such a pod, so it goes for a while.
func TestUninstall(t *testing.T) {
	needMargay(t, "uninstall")
	margay, uninstall := readManifest(t, "margay.yaml"), readManifest(t, "uninstall.yaml")
	s := newSpace(t, nil)
	p := s.start(server("staying", 2))[0]
	install := buildInstall(t)
	for _, n := range cluster.Nodes() {
		found := tracesOn(t, n, install)
		t.Logf("%s has %d traces", n.Name, len(found))
		if len(found) < 12 { // the look that is to find nothing afterwards
			t.Errorf("%s has only\n  %s", n.Name, strings.Join(found, "\n  "))
		}
	}
	replicas := dnsReplicas(t)
	setDNS(t, 0)
	t.Cleanup(func() { setDNS(t, replicas) })
	t.Cleanup(func() { // whatever has happened
		deleteCluster(t, uninstall)
		applyCluster(t, margay)
		rollout(t, "")
	})

	deleteCluster(t, margay)
	for _, f := range families() {
		reach(t, nodePlace(1), "tcp", f.at(p.place, httpPort), "hostname") // the agents' end changes nothing
	}
	applyCluster(t, uninstall)
	eventually(t, "node2 refuses, and names the pod", settleTime, func() error {
		logs, err := kubectl("--namespace=kube-system", "logs", "--selector=app.kubernetes.io/component=uninstall", "--container=uninstall", "--tail=-1")
		if err == nil && !strings.Contains(logs, p.name) {
			err = fmt.Errorf("it says: %.1000s", logs)
		}
		return err
	})
	for _, f := range families() {
		reach(t, nodePlace(1), "tcp", f.at(p.place, httpPort), "hostname")
	}
	s.delete(p.name)
	if out, err := kubectl("--namespace=kube-system", "rollout", "status", "daemonset/margay-uninstall", "--timeout=4m"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	deleteCluster(t, uninstall)
	for _, n := range cluster.Nodes() {
		if left := tracesOn(t, n, install); len(left) > 0 {
			t.Errorf("%s still has\n  %s", n.Name, strings.Join(left, "\n  "))
		}
	}

	applyCluster(t, margay)
	rollout(t, "")
	ctx, cancel := context.WithTimeout(context.Background(), settleTime)
	defer cancel()
	if err := cluster.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	pods := s.start(server("again1", 1), server("again2", 2), idle("asker", 1))
	askEach(t, pods[2], pods[:2])
	becomesTidy(t, "installing again")
}

// kubectl runs kubectl with a bound on its time.
func kubectl(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	return cluster.Kubectl(ctx, args...)
}

// deleteCluster runs kubectl delete with manifests; what is not there is no error. It waits until the objects are gone.
func deleteCluster(t *testing.T, manifests string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	cmd, err := cluster.KubectlCommand(ctx, "delete", "--ignore-not-found", "--filename=-")
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdin = strings.NewReader(manifests)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v: %s", cmd, err, out)
	}
}

// dnsReplicas returns how many pods the cluster's DNS is to have.
func dnsReplicas(t *testing.T) int {
	t.Helper()
	var dns appsv1.Deployment
	if err := api.get(context.Background(), "Deployment", "kube-system", "coredns", &dns); err != nil {
		t.Fatal(err)
	}
	return int(*dns.Spec.Replicas)
}

// setDNS sets how many pods the cluster's DNS has, and waits for them, or for their end.
func setDNS(t *testing.T, replicas int) {
	t.Helper()
	ctx := context.Background()
	if err := api.patch(ctx, "Deployment", "kube-system", "coredns", fmt.Sprintf(`{"spec":{"replicas":%d}}`, replicas)); err != nil {
		t.Fatal(err)
	}
	eventually(t, fmt.Sprintf("%d pods of CoreDNS", replicas), settleTime, func() error {
		var list corev1.PodList
		if err := api.do(ctx, "GET", kinds["Pod"].path("kube-system", "")+"?labelSelector=k8s-app=kube-dns", "", nil, &list); err != nil {
			return err
		}
		ready := 0
		for _, p := range list.Items {
			if _, err := asPod(&p); err == nil {
				ready++
			}
		}
		if len(list.Items) != replicas || ready != replicas {
			return fmt.Errorf("%d, and %d are ready", len(list.Items), ready)
		}
		return nil
	})
}

// buildInstall builds margay-install where the nodes see it.
func buildInstall(t *testing.T) string {
	t.Helper()
	path := filepath.Join(cluster.Dir, "bin", "margay-install")
	t.Cleanup(func() { _ = os.Remove(path) })
	command(t, repository(t), "go", "build", "-trimpath", "-buildvcs=false", "-o", path, "./install")
	return path
}

// tracesOn returns what a node has of Margay: what margay-install finds, and what we do.
func tracesOn(t *testing.T, n *lab.Node, install string) (all []string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	inventory, err := n.Output(ctx, install, "--uninstall", "--dry-run")
	if err != nil {
		t.Errorf("%s: %v", n.Name, err)
	}
	if inventory = strings.TrimSpace(inventory); inventory != "" {
		all = append(all, "margay-install --uninstall --dry-run: "+inventory)
	}
	for _, path := range []string{"/run/margay", "/sys/fs/bpf/margay", "/var/lib/margay", "/opt/cni/bin/margay", "/opt/cni/bin/margay-ipam",
		"/etc/cni/net.d/10-margay.conflist"} {
		if at, err := inNode(n, path); err != nil || exists(at) {
			all = append(all, fmt.Sprintf("%s (%v)", path, err))
		}
	}
	for _, list := range []string{"ip link", "ip -4 route show table all", "ip -6 route show table all", "nft list ruleset", "tc filter show dev eth0 ingress", "tc qdisc show dev eth0"} {
		out, err := n.Output(ctx, strings.Fields(list)...)
		if err != nil {
			t.Errorf("%s: %s: %v", n.Name, list, err)
		}
		for _, trace := range []string{"mgy", "margay", "clsact", "from_netdev", "proto 77", "proto 78"} {
			if strings.Contains(out, trace) {
				all = append(all, fmt.Sprintf("%q in %s", trace, list))
			}
		}
	}
	return all
}
