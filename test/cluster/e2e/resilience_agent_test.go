// SPDX-License-Identifier: Apache-2.0

//go:build cluster

package e2e

import (
	"context"
	"crypto/sha256"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/margay-cni/margay/test/cluster/lab"
)

// TestAgentRestart replaces the agents as `kubectl rollout restart` does, and then kills them, while traffic goes on: nothing of it is lost.
func TestAgentRestart(t *testing.T) {
	needMargay(t, "agent")
	s := newSpace(t, nil)
	_, l := underLoad(t, s)
	rollout(t, "restart")
	l.passes(t, "after the rollout")
	for range 2 { // the second time an agent meets what a killed one has left
		for _, n := range cluster.Nodes() {
			restartAgent(t, n, "readyz")
		}
	}
	l.finish(t, "agent restarts")
	becomesTidy(t, "agent restarts")
}

// underLoad starts a server on each node, a service for them and a pod that asks them, and all traffic of loadRoutes.
func underLoad(t *testing.T, s *space) ([]pod, *load) {
	t.Helper()
	app := labelled("app", "web")
	pods := s.start(server("web1", 1, app), server("web2", 2, app), idle("asker", 1))
	svc := s.service("web", "web", nodePort)
	routes := loadRoutes(pods[2], pods[:2], svc)
	for _, r := range routes {
		for _, network := range networks {
			reach(t, r.from, network, r.at(network), "hostname")
		}
	}
	return pods, startLoad(t, routes...)
}

// rollout runs `kubectl rollout VERB` on the agents' DaemonSet, unless the verb is "", and waits until every node runs the new ones.
func rollout(t *testing.T, verb string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), settleTime)
	defer cancel()
	for _, v := range []string{verb, "status"} {
		if v == "" {
			continue
		}
		args := []string{"--namespace=kube-system", "rollout", v, "daemonset/margay"}
		if out, err := cluster.Kubectl(ctx, args...); err != nil {
			logs, _ := cluster.Kubectl(context.Background(), "--namespace=kube-system", "logs", "daemonset/margay", "--all-containers", "--tail=20")
			t.Fatalf("rollout %s: %v: %s\n%s", v, err, out, logs)
		}
	}
}

// restartAgent kills a node's agent and waits until the next one answers a probe.
func restartAgent(t *testing.T, n *lab.Node, path string) {
	t.Helper()
	killed := agentProcess(t, n)
	killed.kill(t)
	eventually(t, "another agent on "+n.Name, settleTime, func() error {
		all, err := processes(n)
		if err != nil {
			return err
		}
		for _, p := range all {
			if p.args[0] == killed.args[0] && p.pid != killed.pid {
				return probe(n, path)
			}
		}
		return fmt.Errorf("there is none")
	})
}

// probe asks a node's agent for /livez or /readyz. The error is the answer if that is not 200.
func probe(n *lab.Node, path string) error {
	p := nodePlace(n.Number)
	_, err := p.ask("tcp", netip.AddrPortFrom(p.addrs[0], 10256), path, answerTime)
	return err
}

// TestUpgrade replaces Margay by another build and goes back, while traffic goes on.
func TestUpgrade(t *testing.T) {
	needMargay(t, "upgrade")
	next := buildNext(t)
	eachNode(t, func(ctx context.Context, n *lab.Node) error { return n.ImportImages(ctx, next.image) })
	s := newSpace(t, nil)
	pods, l := underLoad(t, s)
	manifest := readManifest(t, "margay.yaml")
	old := map[string]build{}
	for _, n := range cluster.Nodes() {
		old[n.Name] = running(t, n)
	}
	t.Cleanup(func() {
		if t.Failed() {
			applyCluster(t, manifest)
		}
	})
	applyCluster(t, strings.ReplaceAll(manifest, ":latest", ":next"))
	rollout(t, "")
	for _, n := range cluster.Nodes() {
		got := running(t, n)
		if got.version != "next" || got.programs == old[n.Name].programs || got.plugin != next.plugin {
			t.Errorf("%s runs %v after the upgrade, and %v before it; want another build, version next, with the plugin %.12s", n.Name, got, old[n.Name], next.plugin)
		}
	}
	l.passes(t, "after the upgrade")
	later := s.start(server("later1", 1), server("later2", 2))
	askEach(t, pods[2], later)
	applyCluster(t, manifest)
	rollout(t, "")
	for _, n := range cluster.Nodes() {
		if got := running(t, n); got != old[n.Name] {
			t.Errorf("%s runs %v after going back, want %v", n.Name, got, old[n.Name])
		}
	}
	l.finish(t, "an upgrade and going back")
	askEach(t, pods[2], later)
	becomesTidy(t, "an upgrade and going back")
}

// askEach proves that a pod reaches others, in every family.
func askEach(t *testing.T, from pod, to []pod) {
	t.Helper()
	for _, f := range families() {
		for _, p := range to {
			for _, network := range networks {
				reach(t, from.place, network, f.at(p.place, portOf(network)), "hostname")
			}
		}
	}
}

// build is what of Margay a node runs.
type build struct {
	version, programs string // as the agent says
	plugin            string // the checksum of the plugin
}

// running returns what a node runs.
func running(t *testing.T, n *lab.Node) build {
	t.Helper()
	metrics := ""
	eventually(t, "metrics of the agent on "+n.Name, time.Minute, func() (err error) {
		metrics, err = nodePlace(n.Number).ask("tcp", netip.MustParseAddrPort("127.0.0.1:10249"), "metrics", answerTime)
		return err
	})
	value := func(label string) string {
		_, line, _ := strings.Cut(metrics, "\nmargay_build_info{")
		line, _, _ = strings.Cut(line, "}")
		_, rest, _ := strings.Cut(line, label+`="`)
		v, _, _ := strings.Cut(rest, `"`)
		return v
	}
	plugin, err := inNode(n, "/opt/cni/bin/margay")
	if err != nil {
		t.Fatal(err)
	}
	return build{value("version"), value("programs"), checksumOf(t, plugin)}
}

func checksumOf(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", sha256.Sum256(b))
}

// nextBuild is an image margay-cni/margay:next of another build of the same source.
type nextBuild struct{ image, plugin string }

// buildNext builds Margay once more. Its programs do the same, but have another build's number, and so are loaded and attached anew.
func buildNext(t *testing.T) nextBuild {
	t.Helper()
	top, dir := repository(t), t.TempDir()
	const number = "0123456789abcdef01234567"
	source := filepath.Join(top, "pkg", "bpf", "build.go")
	overlay := filepath.Join(dir, "overlay.json")
	changed := "package bpf\n\nconst build = \"" + number + "\"\n"
	writeFile(t, filepath.Join(dir, "build.go"), changed)
	writeFile(t, overlay, fmt.Sprintf(`{"Replace": {%q: %q}}`, source, filepath.Join(dir, "build.go")))
	for name, main := range map[string]string{"margay": "plugin", "margay-loader": "plugin/loader", "margay-ipam": "ipam", "margay-agent": "agent", "margayctl": "ctl", "margay-install": "install"} {
		command(t, top, "go", "build", "-trimpath", "-buildvcs=false", "-overlay", overlay, "-ldflags", "-s -w -X main.version=next",
			"-o", filepath.Join(dir, "bin", name), "./"+main)
	}
	image := filepath.Join(dir, "margay-next.tar")
	command(t, filepath.Join(top, "hack", "image"), "go", "run", ".", "--bin", filepath.Join(dir, "bin"), "--source", top,
		"--output", image, "--version", "next", "--tag", "margay-cni/margay:next")
	return nextBuild{image: image, plugin: checksumOf(t, filepath.Join(dir, "bin", "margay"))}
}

// repository is the top directory of the source.
func repository(t *testing.T) string {
	t.Helper()
	top, err := filepath.Abs("../../..")
	if err != nil {
		t.Fatal(err)
	}
	return top
}

// readManifest returns a file of install/kubernetes.
func readManifest(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(repository(t), "install", "kubernetes", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// applyCluster applies manifests with kubectl, as users do.
func applyCluster(t *testing.T, manifests string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := cluster.Apply(ctx, manifests); err != nil {
		t.Fatal(err)
	}
}

func writeFile(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// command runs a program of the real machine, without cgo.
func command(t *testing.T, dir string, argv ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v: %s", cmd, err, out)
	}
}

// eachNode does something on all nodes at once.
func eachNode(t *testing.T, do func(context.Context, *lab.Node) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), settleTime)
	defer cancel()
	var g errgroup.Group
	for _, n := range cluster.Nodes() {
		g.Go(func() error { return do(ctx, n) })
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
}
