// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
)

// start runs the plugin in the node's namespace.
func (n *realNode) start(command, id, netns string, conf []byte) (*exec.Cmd, *bytes.Buffer) {
	n.t.Helper()
	cmd := exec.Command(filepath.Join(n.bin, "margay"))
	cmd.Env = append(os.Environ(), "CNI_COMMAND="+command, "CNI_CONTAINERID="+id, "CNI_NETNS="+netns, "CNI_IFNAME=eth0",
		"CNI_PATH="+n.bin, "CNI_ARGS="+podArgsText)
	var out bytes.Buffer
	cmd.Stdin, cmd.Stdout = bytes.NewReader(conf), &out
	n.ns.Do(func() {
		if err := cmd.Start(); err != nil {
			n.t.Fatal(err)
		}
	})
	return cmd, &out
}

func (n *realNode) mustRun(command, id, netns string, conf []byte) {
	n.t.Helper()
	cmd, out := n.start(command, id, netns, conf)
	if err := cmd.Wait(); err != nil {
		n.t.Errorf("%s %s: %v: %s", command, id, err, out)
	}
}

// Kill ADD at a random instant; DEL leaves nothing, and an ADD that had not come to its end can be repeated.
func TestKilledAtARandomInstant(t *testing.T) {
	n := newRealNode(t, false)
	conf := n.conf(familyRanges["dual stack"])
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	before := n.state()
	for i := range 60 {
		pod := netnstest.New(t)
		id := fmt.Sprintf("k%d", i)
		cmd, out := n.start("ADD", id, pod.Path(), conf)
		time.Sleep(time.Duration(random.IntN(12_000)) * time.Microsecond) // the instant, not synchronisation
		_ = cmd.Process.Kill()
		killed := cmd.Wait() != nil
		if i%2 == 0 && killed && out.Len() == 0 {
			again, text := n.start("ADD", id, pod.Path(), conf)
			if err := again.Wait(); err != nil && !strings.Contains(text.String(), fmt.Sprintf(`"code": %d`, codeInterface)) {
				t.Errorf("repeated ADD %s: %v: %s", id, err, text)
			}
		}
		n.mustRun("DEL", id, pod.Path(), conf)
		if diff := cmp.Diff(before, n.state()); diff != "" {
			t.Fatalf("state after kill number %d and DEL (-want +got):\n%s", i, diff)
		}
	}
}

func TestTwoHundredProcesses(t *testing.T) {
	n := newRealNode(t, false)
	conf := n.conf(familyRanges["dual stack"])
	before := n.state()
	const pods = 200
	namespaces := make([]*netnstest.NS, pods)
	for i := range namespaces {
		namespaces[i] = netnstest.New(t)
	}
	for _, command := range []string{"ADD", "DEL"} {
		start := time.Now()
		var running []*exec.Cmd
		var outs []*bytes.Buffer
		for i := range pods {
			cmd, out := n.start(command, fmt.Sprintf("c%d", i), namespaces[i].Path(), conf)
			running, outs = append(running, cmd), append(outs, out)
		}
		for i, cmd := range running {
			if err := cmd.Wait(); err != nil {
				t.Errorf("%s c%d: %v: %s", command, i, err, outs[i])
			}
		}
		t.Logf("%d %s in %s", pods, command, time.Since(start))
		if command == "ADD" {
			if got := len(n.pinnedEndpoints()); got != 2*pods {
				t.Errorf("%d endpoints, want %d", got, 2*pods)
			}
			talk(t, namespaces[0], namespaces[pods-1], n.addressOf(fmt.Sprintf("c%d", pods-1)))
		}
	}
	if diff := cmp.Diff(before, n.state()); diff != "" {
		t.Errorf("state (-want +got):\n%s", diff)
	}
}

func (n *realNode) addressOf(id string) netip.Addr {
	n.t.Helper()
	r, err := n.records().Load(id, "eth0")
	if err != nil {
		n.t.Fatal(err)
	}
	return r.Addresses[0]
}
