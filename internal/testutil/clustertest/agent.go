// SPDX-License-Identifier: Apache-2.0

package clustertest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/margay-cni/margay/pkg/agent"
)

// process is an agent that runs.
type process struct {
	cmd    *exec.Cmd
	log    *logBuffer
	exited chan struct{} // closed when it has been waited for
	err    error         // how it ended; valid once exited is closed
}

// logBuffer keeps what an agent writes.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// StartAgent starts a node's agent, with the cluster's flags and more; WaitSettled waits for it.
func (c *Cluster) StartAgent(n *Node, flags ...string) {
	c.t.Helper()
	c.startAgent(n, flags...)
}

func (c *Cluster) startAgent(n *Node, flags ...string) {
	c.t.Helper()
	if n.agent != nil {
		c.t.Fatalf("the agent of %s runs already", n.Name)
	}
	args := []string{"--manifests", c.Manifests(), "--node", n.Name, "--bpffs", n.Config.BPFFS, "--run", n.Config.Run}
	if c.options.RoutingMode != "" {
		args = append(args, "--routing-mode", c.options.RoutingMode)
	}
	args = slices.Concat(args, c.options.AgentFlags, c.options.NodeFlags[n.Name], flags)
	p := &process{cmd: n.Command(c.binary("margay-agent"), args...), log: &logBuffer{}, exited: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	n.NS.Do(func() { c.must(p.cmd.Start()) })
	go func() {
		p.err = p.cmd.Wait()
		close(p.exited)
	}()
	n.agent = p
	c.t.Cleanup(func() {
		if c.t.Failed() {
			c.explain(n, p)
		}
		if n.agent == p {
			c.KillAgent(n)
		}
	})
}

// explain logs what a node has to say about a failed test.
func (c *Cluster) explain(n *Node, p *process) {
	if s, err := n.status(); err == nil && n.agent == p {
		c.t.Logf("%s: drops %v", n.Name, c.Drops(n))
		c.t.Logf("%s: faults %v, problems %q, source %v, devices %v", n.Name, s.Last.Faults, s.Last.Problems, s.Source, s.Last.Devices)
	}
	c.t.Logf("%s: agent's log:\n%s", n.Name, p.log)
}

// AgentLog returns what the node's running agent has logged.
func (c *Cluster) AgentLog(n *Node) string {
	c.t.Helper()
	return c.running(n).log.String()
}

// StopAgent ends a node's agent by SIGTERM, as a service manager does, and requires that it ends well.
func (c *Cluster) StopAgent(n *Node) {
	c.t.Helper()
	p := c.running(n)
	c.must(p.cmd.Process.Signal(syscall.SIGTERM))
	select {
	case <-p.exited:
	case <-time.After(patience):
		c.KillAgent(n)
		c.t.Fatalf("the agent of %s did not end %v after SIGTERM", n.Name, patience)
	}
	n.agent = nil
	if p.err != nil {
		c.t.Errorf("the agent of %s ended with %v after SIGTERM, want success; its log:\n%s", n.Name, p.err, p.log)
	}
}

// KillAgent ends a node's agent by SIGKILL, as a crash does. No agent is no error.
func (c *Cluster) KillAgent(n *Node) {
	c.t.Helper()
	if n.agent == nil {
		return
	}
	_ = n.agent.cmd.Process.Kill() // one that has ended by itself is what was wanted
	<-n.agent.exited
	n.agent = nil
}

func (c *Cluster) running(n *Node) *process {
	c.t.Helper()
	if n.agent == nil {
		c.t.Fatalf("no agent runs on %s", n.Name)
	}
	return n.agent
}

// Status asks a node's agent for its status.
func (c *Cluster) Status(n *Node) agent.Status {
	c.t.Helper()
	c.running(n)
	s, err := n.status()
	c.must(err)
	return s
}

// status asks over the agent's socket.
func (n *Node) status() (s agent.Status, err error) {
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(n.Config.Run, agent.SocketFile))
		},
	}}
	r, err := client.Get("http://agent/status")
	if err != nil {
		return s, err
	}
	defer r.Body.Close()
	return s, json.NewDecoder(r.Body).Decode(&s)
}

// quiet is how long an agent must have had nothing to do. It is more than the 50 ms for which agents let events of the network gather,
// so what a round itself set off, a new device or route, is over as well.
const quiet = 120 * time.Millisecond

// WaitSettled waits until every running agent has written the current manifest to its maps without a fault, has its program on all of the
// node's devices and a record of every pod, and has been idle since. It fails the test when an agent ends or does not settle.
//
// An agent does not say which manifest it works with. Therefore each has a service of another name with one and the same cluster
// address, which an agent refuses when it compiles the manifest, by name: "Service clustertest/marker-7: … already served by …". That
// is in the status of a round that has that manifest's results in force, and in no other.
func (c *Cluster) WaitSettled() {
	c.t.Helper()
	type observation struct {
		rounds uint64
		since  time.Time
	}
	last := map[*Node]observation{}
	missing := map[string]string{}
	settled := c.within(patience, func() bool {
		clear(missing)
		for _, n := range c.nodes {
			if n.agent == nil {
				continue
			}
			s, err := n.status()
			if why := c.unsettled(n, s, err); why != "" {
				missing[n.Name] = why
				delete(last, n)
				continue
			}
			seen, ok := last[n]
			if !ok || seen.rounds != s.Rounds {
				seen = observation{rounds: s.Rounds, since: time.Now()}
				last[n] = seen
			}
			if time.Since(seen.since) < quiet {
				missing[n.Name] = "still at work"
			}
		}
		return len(missing) == 0
	})
	if !settled {
		c.t.Fatalf("agents did not settle within %v: %v", patience, missing)
	}
}

// unsettled says what an agent has not done yet, "" if nothing.
func (c *Cluster) unsettled(n *Node, s agent.Status, err error) string {
	c.t.Helper()
	select {
	case <-n.agent.exited:
		c.t.Fatalf("the agent of %s has ended: %v\n%s", n.Name, n.agent.err, n.agent.log)
	default:
	}
	marker := fmt.Sprintf("Service %s/%s: ", markerNamespace, c.markerName())
	isMarker := func(p string) bool { return strings.HasPrefix(p, marker) }
	switch {
	case err != nil:
		return fmt.Sprintf("no status: %v", err)
	case !slices.ContainsFunc(s.Last.Problems, isMarker):
		return fmt.Sprintf("manifest %d is not in force; problems of the source: %v", c.generation, s.Source)
	case len(s.Last.Faults) > 0:
		return fmt.Sprintf("faults: %v", s.Last.Faults)
	case s.Last.Held:
		return fmt.Sprintf("deletions are held back: %v", s.Source)
	case s.Last.Counts.Endpoints != len(n.pods):
		return fmt.Sprintf("knows %d pods, want %d", s.Last.Counts.Endpoints, len(n.pods))
	}
	if slices.Contains(n.agent.cmd.Args, "--devices") {
		return "" // the test knows better which ones are to be attached to
	}
	for _, nic := range n.NICs {
		serves := func(d agent.DeviceStatus) bool { return d.Name == nic.Device && d.Error == "" }
		if !slices.ContainsFunc(s.Last.Devices, serves) {
			return fmt.Sprintf("no program on %s: %v", nic.Device, s.Last.Devices)
		}
	}
	return ""
}
