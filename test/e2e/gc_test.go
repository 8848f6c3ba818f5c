// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/ipam"
	"github.com/margay-cni/margay/pkg/link"
)

// left counts what there is of pods on the machine.
type left struct {
	Records, Leases, Devices, Endpoints, Locks int
}

func (m *machine) left() (l left) {
	m.t.Helper()
	records, err := m.records().List()
	m.must(err)
	leases, err := ipam.Leases(m.t.Context(), ipam.Existing(m.config.Run, m.network.Name))
	m.must(err)
	l.Records, l.Leases = len(records), len(leases)
	m.node.Do(func() {
		devices, err := netlink.LinkList()
		m.must(err)
		for _, d := range devices {
			if link.IsHostName(d.Attrs().Name) {
				l.Devices++
			}
		}
	})
	d, err := datapath.Open(m.config)
	m.must(err)
	defer d.Close()
	var k bpf.Addr
	var e bpf.Endpoint
	entries := d.Maps.Endpoints.Iterate()
	for entries.Next(&k, &e) {
		l.Endpoints++
	}
	m.must(entries.Err())
	locks, err := os.ReadDir(filepath.Join(m.config.Run, "locks"))
	if !os.IsNotExist(err) {
		m.must(err)
	}
	l.Locks = len(locks)
	return l
}

// killAdd kills the plugin in the middle of an ADD for the pod.
func (m *machine) killAdd(p *pod) {
	m.t.Helper()
	journal := filepath.Join(m.config.Run, "locks", "e2e-"+p.name+"-eth0")
	begun := func() bool {
		data, err := os.ReadFile(journal)
		return err == nil && len(data) > 0
	}
	for range 100 {
		cmd := m.plugin("ADD", p)
		for deadline := time.Now().Add(100 * time.Millisecond); !begun() && time.Now().Before(deadline); {
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if begun() {
			return
		}
		m.must(m.plugin("DEL", p).Wait()) // it was quicker
	}
	m.t.Fatal("no ADD could be killed in the middle")
}

// plugin starts the plugin as a runtime does.
func (m *machine) plugin(command string, p *pod) *exec.Cmd {
	m.t.Helper()
	var conf map[string]any
	m.must(json.Unmarshal(m.network.Plugins[0].Bytes, &conf))
	conf["name"], conf["cniVersion"] = m.network.Name, "1.0.0"
	stdin, err := json.Marshal(conf)
	m.must(err)
	cmd := exec.Command(filepath.Join(bin, "margay"))
	cmd.Stdin = bytes.NewReader(stdin)
	cmd.Env = append(os.Environ(), "CNI_COMMAND="+command, "CNI_CONTAINERID=e2e-"+p.name, "CNI_IFNAME=eth0", "CNI_NETNS="+p.ns.Path(), "CNI_PATH="+bin)
	m.node.Do(func() { m.must(cmd.Start()) })
	return cmd
}

// TestWhatPodsLeaveIsGoneWithinAMinute: runtime and plugin are killed and never come back to what they had begun. The agent has no source: the
// directory of its manifests is not there.
func TestWhatPodsLeaveIsGoneWithinAMinute(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	living := m.startPod("living")
	talks := func() bool {
		return !slices.ContainsFunc(living.addrs, func(a netip.Addr) bool {
			answer, err := nodetest.Ask(t, m.node, "tcp", netip.AddrPortFrom(a, 8080))
			return err != nil || answer == ""
		})
	}
	m.eventually("the living pod answers", talks)

	abandon := func(names ...string) {
		for i, name := range names {
			p := m.newPod(name)
			if i%2 == 0 {
				m.add(p)
				p.ns.Delete() // and no DEL
			} else {
				m.killAdd(p) // its namespace stays
			}
		}
	}
	abandon("a", "b", "c", "d")
	if l := m.left(); l.Records < 3 || l.Leases < 3 {
		t.Fatalf("%+v are there before the agent starts, want more than those of one pod", l)
	}
	m.manifests = filepath.Join(t.TempDir(), "none")
	m.runAgent()
	want := left{Records: 1, Leases: 1, Devices: 1, Endpoints: len(living.addrs)}
	clean := func(what string) {
		t.Helper()
		start := time.Now()
		for m.left() != want {
			if time.Since(start) > time.Minute {
				t.Fatalf("%s: %+v are left after a minute, want %+v", what, m.left(), want)
			}
			time.Sleep(200 * time.Millisecond)
		}
		t.Logf("%s: gone after %s", what, time.Since(start).Round(time.Second))
		if !talks() {
			t.Errorf("%s: the living pod does not answer any more", what)
		}
	}
	clean("what was there when the agent started")
	abandon("e", "f")
	clean("what was left beside a running agent")

	text, err := m.agentStatus()
	m.must(err)
	if !strings.Contains(text, `"lease": `) || strings.Contains(text, `"ready": true`) {
		t.Errorf("the agent's status does not say what was removed, or that it is not ready:\n%s", text)
	}
}
