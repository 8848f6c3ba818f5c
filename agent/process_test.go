// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/pkg/agent"
	"github.com/margay-cni/margay/pkg/endpoint"
)

// asAgent makes the test binary be margay-agent.
const asAgent = "MARGAY_TEST_AS_AGENT"

func TestMain(m *testing.M) {
	if os.Getenv(asAgent) != "" {
		main()
	}
	os.Exit(m.Run())
}

// process is an agent in a node's namespace.
type process struct {
	t   *testing.T
	cmd *exec.Cmd
	run string
	log *lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// start runs an agent on the node until the test ends, and waits until the first snapshot is in the maps.
func start(t *testing.T, n *nodetest.Node, manifests string, flags ...string) *process {
	t.Helper()
	p := command(t, n, manifests, flags...)
	n.NS.Do(func() {
		if err := p.cmd.Start(); err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("agent's log:\n%s", p.log)
		}
	})
	eventually(t, "agent to be ready", func() bool {
		r, err := p.get("/healthz")
		return err == nil && r == "ok\n"
	})
	return p
}

func command(t *testing.T, n *nodetest.Node, manifests string, flags ...string) *process {
	t.Helper()
	return commandFrom(t, n, []string{"--manifests", manifests}, flags...)
}

// commandFrom is an agent with a source of another kind.
func commandFrom(t *testing.T, n *nodetest.Node, source []string, flags ...string) *process {
	t.Helper()
	p := &process{t: t, run: n.Config.Run, log: &lockedBuffer{}}
	p.cmd = exec.Command("/proc/self/exe", append([]string{"--node", "n1", "--bpffs", n.Config.BPFFS, "--run", n.Config.Run,
		"--resync", "200ms", "--log-level", "debug"}, append(source, flags...)...)...)
	p.cmd.Env = append(os.Environ(), asAgent+"=1")
	p.cmd.Stderr = p.log
	return p
}

// kill ends the agent as hard as it gets.
func (p *process) kill() {
	if p.cmd.ProcessState == nil {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
	}
}

func (p *process) get(path string) (string, error) {
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(p.run, agent.SocketFile))
		}}}
	r, err := client.Get("http://agent" + path)
	if err != nil {
		return "", err
	}
	defer func() { _ = r.Body.Close() }()
	body, err := io.ReadAll(r.Body)
	return string(body), err
}

func (p *process) status() agent.Status {
	p.t.Helper()
	body, err := p.get("/status")
	if err != nil {
		p.t.Fatal(err)
	}
	var s agent.Status
	if err := json.Unmarshal([]byte(body), &s); err != nil {
		p.t.Fatal(err)
	}
	return s
}

// writes is how many map entries this agent has written or deleted.
func (p *process) writes() (n uint64) {
	p.t.Helper()
	for _, m := range p.status().Last.Maps {
		n += m.Writes
	}
	return n
}

// eventually asks again and again, for at most 10 s.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("waited 10 s for %s", what)
}

// put writes a manifest as an editor that renames does.
func put(t *testing.T, dir, name, content string) {
	t.Helper()
	tmp := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(tmp, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
}

// record gives the node's pod the record that the plugin would have written.
func record(t *testing.T, n *nodetest.Node, p *nodetest.Pod, labels map[string]string) {
	t.Helper()
	err := endpoint.NewStore(n.Config.Run).Save(&endpoint.Record{
		ContainerID: "c-" + p.Name, IfName: "eth0", Netns: p.NS.Path(), Network: "margay", Namespace: "default", Name: p.Name,
		Labels: labels, Addresses: p.Addrs, MAC: p.MAC.String(), HostMAC: p.HostMAC.String(), HostIfName: "mgy" + p.Name,
		HostIfindex: p.Ifindex, Created: time.Now(),
	})
	if err != nil {
		t.Fatal(err)
	}
}
