// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/endpoint"
)

// shippedForKubernetes is the conflist without ranges.
const shippedForKubernetes = "../conf/kubernetes/10-margay.conflist"

// agentSaw writes what an agent tells the plugin about a node with these pod CIDRs.
func (m *machine) agentSaw(cidrs ...string) {
	m.t.Helper()
	n := endpoint.NewNode("worker-1", "vxlan", 1450, nil)
	for _, c := range cidrs {
		n.PodCIDRs = append(n.PodCIDRs, netip.MustParsePrefix(c))
	}
	content, err := json.Marshal(n)
	m.must(err)
	m.must(os.MkdirAll(m.at("/run/margay"), 0o755))
	m.write(m.at("/run/margay/node.json"), string(content), 0o644)
}

// loadDatapath does what an agent does first.
func (m *machine) loadDatapath() {
	m.t.Helper()
	m.ns.Do(func() {
		d, err := datapath.Ensure(m.t.Context(), datapath.Config{BPFFS: m.at("/sys/fs/bpf/margay"), Run: m.at("/run/margay")})
		m.must(err)
		m.must(d.Close())
	})
}

// conflist returns the one that the runtime sees, empty without.
func (m *machine) conflist() string {
	m.t.Helper()
	content, err := os.ReadFile(m.at(conflistPath))
	if err != nil && !os.IsNotExist(err) {
		m.t.Fatal(err)
	}
	return string(content)
}

func TestConflistOnlyWhenPodsCanStart(t *testing.T) {
	for _, family := range []struct {
		name  string
		cidrs []string
	}{{"IPv4", []string{"10.244.1.0/24"}}, {"IPv6", []string{"fd00:244:1::/64"}}, {"dual stack", []string{"fd00:244:1::/64", "10.244.1.0/24"}}} {
		t.Run(family.name, func(t *testing.T) {
			m := newMachine(t)
			shipped, err := os.ReadFile(shippedForKubernetes)
			m.must(err)
			args := []string{"--conflist-only", "--conflist", shippedForKubernetes}
			refused := func(when, want string) {
				t.Helper()
				if code, out := m.run(args...); code != exitFailed || !strings.Contains(out, want) {
					t.Errorf("%s = exit code %d, want %d and %q:\n%s", when, code, exitFailed, want, out)
				}
				if got := m.conflist(); got != "" {
					t.Fatalf("%s: the runtime has a conflist:\n%s", when, got)
				}
			}
			refused("machine without an agent", "no agent has seen the cluster")
			m.agentSaw(family.cidrs...)
			refused("no programs loaded", "not loaded")
			m.loadDatapath()
			m.agentSaw()
			refused("node without pod CIDR", "node worker-1 has none in spec.podCIDRs")
			m.agentSaw(family.cidrs...)
			m.ok(args...)
			if got := m.conflist(); got != string(shipped) {
				t.Errorf("conflist = %s, want the shipped one", got)
			}
			if _, err := os.Stat(m.at("/opt/cni/bin/margay")); err == nil {
				t.Error("--conflist-only installed a binary")
			}

			// The machine starts again, or the agent does and the API server is away: what is in place needs nobody.
			m.must(os.RemoveAll(m.at("/run/margay")))
			if out := m.ok(args...); !strings.Contains(out, "unchanged     "+conflistPath) {
				t.Errorf("--conflist-only without an agent printed %q, want that nothing changed", out)
			}

			// An upgrade brings another one. The runtime keeps the old one until the new one serves.
			newer := filepath.Join(t.TempDir(), "newer")
			m.write(newer, strings.Replace(string(shipped), `"auto"`, `"deny"`, 1), 0o600)
			if code, out := m.run("--conflist-only", "--conflist", newer); code != exitFailed {
				t.Errorf("a newer conflist without an agent = exit code %d, want %d:\n%s", code, exitFailed, out)
			}
			if got := m.conflist(); got != string(shipped) {
				t.Errorf("conflist = %s, want the older one in place", got)
			}
			m.agentSaw(family.cidrs...)
			m.ok("--conflist-only", "--conflist", newer)
			if got := m.conflist(); !strings.Contains(got, `"deny"`) {
				t.Errorf("conflist = %s, want the newer one", got)
			}

			// What somebody edited stays, with or without an agent.
			m.put(`{"name":"mine","plugins":[{"type":"margay"}]}`)
			m.must(os.RemoveAll(m.at("/run/margay")))
			if out := m.ok(args...); !strings.Contains(out, "kept          "+conflistPath) {
				t.Errorf("--conflist-only over an edited one printed %q", out)
			}
		})
	}
}

// TestConflistOfOtherShapes: ranges of its own, other directories, and another IPAM plugin, which is not run here.
func TestConflistOfOtherShapes(t *testing.T) {
	m := newMachine(t)
	m.agentSaw()
	m.loadDatapath()
	for _, list := range []string{
		`{"name":"n","plugins":[{"type":"margay","ipam":{"type":"margay-ipam","ranges":[[{"subnet":"10.1.0.0/24"}]]}}]}`,
		`{"name":"n","plugins":[{"type":"margay","ipam":{"type":"host-local"},"logFile":"/nonexistent/log"}]}`,
		`{"name":"n","plugins":[{"type":"bridge","ipam":{"type":"host-local"}},{"type":"margay"}]}`,
		`{"name":"n","plugins":[{"type":"margay","runDir":"/run/margay","bpffs":"/sys/fs/bpf/margay","ipam":{"type":"host-local"}}]}`,
	} {
		file := filepath.Join(t.TempDir(), "list")
		m.write(file, list, 0o600)
		m.ok("--conflist-only", "--conflist", file, "--force")
		if got := m.conflist(); got != list {
			t.Errorf("conflist = %s, want %s", got, list)
		}
	}
	for list, want := range map[string]string{
		`{"name":"n","plugins":[{"type":"margay","runDir":"/run/elsewhere","ipam":{"type":"margay-ipam"}}]}`:      "no agent has seen the cluster",
		`{"name":"n","plugins":[{"type":"margay","bpffs":"/sys/fs/bpf/elsewhere","ipam":{"type":"host-local"}}]}`: "not loaded",
		`{"name":"n","plugins":[{"type":"margay","policyPending":"perhaps","ipam":{"type":"host-local"}}]}`:       "policyPending",
	} {
		file := filepath.Join(t.TempDir(), "list")
		m.write(file, list, 0o600)
		if code, out := m.run("--conflist-only", "--conflist", file, "--force"); code != exitFailed || !strings.Contains(out, want) {
			t.Errorf("%s = exit code %d, want %d and %q:\n%s", list, code, exitFailed, want, out)
		}
	}
}

func TestConflistOnlyWaits(t *testing.T) {
	m := newMachine(t)
	m.loadDatapath()
	args := []string{"--conflist-only", "--conflist", shippedForKubernetes}
	if code, out := m.run(append(args, "--wait", "1s")...); code != exitFailed || !strings.Contains(out, "waiting       no agent has seen") {
		t.Errorf("--wait 1s without an agent = exit code %d, want %d:\n%s", code, exitFailed, out)
	}
	time.AfterFunc(700*time.Millisecond, func() { m.agentSaw("10.244.1.0/24") })
	m.ok(append(args, "--wait", "60s")...)
	if m.conflist() == "" {
		t.Error("no conflist")
	}

	m.must(os.RemoveAll(m.at("/run/margay")))
	m.must(os.Remove(m.at(conflistPath)))
	ctx, cancel := context.WithTimeout(t.Context(), 700*time.Millisecond)
	defer cancel()
	began := time.Now()
	var out strings.Builder
	if code := run(ctx, append(args, "--root", m.root, "--wait", "60s"), &out, &out); code != exitFailed || time.Since(began) > 30*time.Second {
		t.Errorf("--wait 60s, ended by a signal = exit code %d after %v:\n%s", code, time.Since(began), &out)
	}
}

func TestBinariesOnly(t *testing.T) {
	n := newNode(t)
	n.ok("--binaries-only", "--bin-dir", "/usr/local/bin")
	for path, want := range map[string]bool{"/opt/cni/bin/margay": true, "/opt/cni/bin/margay-ipam": true, "/usr/local/bin/margayctl": true, conflistPath: false} {
		if _, err := os.Stat(n.at(path)); (err == nil) != want {
			t.Errorf("%s is there: %v, want %v", path, err == nil, want)
		}
	}
	// An upgrade leaves the conflist alone: a runtime without one cannot even end pods.
	n.put("mine")
	n.ok("--binaries-only")
	if got := n.content(conflistPath); got != "mine" {
		t.Errorf("conflist = %q, want it untouched", got)
	}
}

// TestOthersConfiguration: another plugin's file that the runtime takes first is named, and stays.
func TestOthersConfiguration(t *testing.T) {
	n := newNode(t)
	others := []string{"00-multus.conf", "05-cilium.conflist", "10-calico.conflist", "10-flannel.json"}
	harmless := []string{"05-cilium.conflist.bak", "10-margay.conflist.old", "20-other.conflist", "99-loopback.conf"}
	if err := os.MkdirAll(n.at("/etc/cni/net.d"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range append(others, harmless...) {
		n.write(n.at("/etc/cni/net.d/"+name), name, 0o600)
	}
	for _, args := range [][]string{{"--binaries-only"}, {}, {"--dry-run"}} {
		out := n.ok(args...)
		if got := strings.Count(out, "warning "); got != len(others) {
			t.Errorf("%v printed %d warnings, want %d:\n%s", args, got, len(others), out)
		}
		for _, name := range others {
			if !strings.Contains(out, "warning       /etc/cni/net.d/"+name+" sorts before") {
				t.Errorf("%v does not warn of %s:\n%s", args, name, out)
			}
		}
	}
	for _, name := range append(others, harmless...) {
		if got := n.content("/etc/cni/net.d/" + name); got != name {
			t.Errorf("%s holds %q, want it untouched", name, got)
		}
	}
}

func TestRequireBPFFS(t *testing.T) {
	m := newMachine(t)
	m.ok("--binaries-only", "--require-bpffs")
	n := newNode(t)
	if code, out := n.run("--binaries-only", "--require-bpffs"); code != exitFailed || !strings.Contains(out, "/sys/fs/bpf") {
		t.Errorf("--require-bpffs without the directory = exit code %d, want %d:\n%s", code, exitFailed, out)
	}
	if err := os.MkdirAll(n.at("/sys/fs/bpf"), 0o755); err != nil {
		t.Fatal(err)
	}
	before := n.tree()
	if code, out := n.run("--binaries-only", "--require-bpffs"); code != exitFailed || !strings.Contains(out, "mount -t bpf bpf /sys/fs/bpf") {
		t.Errorf("--require-bpffs without one mounted = exit code %d, want %d and the cure:\n%s", code, exitFailed, out)
	}
	if len(before) != len(n.tree()) {
		t.Error("a refused run changed the node")
	}
}

// TestUninstallStays: a DaemonSet's container must not end, else it is started over and over.
func TestUninstallStays(t *testing.T) {
	m := newMachine(t)
	m.ok()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan int)
	var out strings.Builder
	go func() {
		m.ns.Do(func() { done <- run(ctx, []string{"--uninstall", "--stay", "--root", m.root}, &out, &out) })
	}()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(m.at("/var/lib/margay")); os.IsNotExist(err) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("nothing was uninstalled")
		}
	}
	select {
	case code := <-done:
		t.Fatalf("--stay ended with %d", code)
	case <-time.After(300 * time.Millisecond):
	}
	cancel()
	if code := <-done; code != exitOK {
		t.Errorf("exit code %d after the signal, want %d:\n%s", code, exitOK, &out)
	}
}

func TestOptionsThatContradict(t *testing.T) {
	n := newNode(t)
	for _, args := range [][]string{
		{"--binaries-only", "--conflist-only"}, {"--uninstall", "--conflist-only"}, {"--uninstall", "--binaries-only"}, {"--wait", "5s"}, {"--stay"},
	} {
		if code, out := n.run(args...); code != exitUsage {
			t.Errorf("%v = exit code %d, want %d:\n%s", args, code, exitUsage, out)
		}
	}
}
