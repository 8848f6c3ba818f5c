// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/pins"
)

// pinnedHostPorts counts the entries of the real service maps, in which there is nothing but hostPorts here.
func (n *realNode) pinnedHostPorts() (frontends, lists, members int) {
	n.t.Helper()
	d, err := datapath.Open(pins.Config{BPFFS: n.bpffs, Run: n.run})
	if err != nil {
		n.t.Fatal(err)
	}
	defer d.Close()
	var (
		f bpf.FrontendKey
		s bpf.Service
		k bpf.BackendKey
		b bpf.Backend
		m bpf.ServiceBackend
		v uint32
	)
	for it := d.Maps.Services.Iterate(); it.Next(&f, &s); {
		frontends++
	}
	for it := d.Maps.Backends.Iterate(); it.Next(&k, &b); {
		lists++
	}
	for it := d.Maps.ServiceBackends.Iterate(); it.Next(&m, &v); {
		members++
	}
	return frontends, lists, members
}

func (n *realNode) wantHostPorts(when string, want int) {
	n.t.Helper()
	if frontends, lists, members := n.pinnedHostPorts(); frontends != want || lists != want || members != want {
		n.t.Errorf("%s: %d frontends, %d lists, %d members, want %d of each", when, frontends, lists, members, want)
	}
}

// Kill ADD at a random instant: ADD again has all of its hostPorts, and DEL leaves none, whether or not there was another ADD.
func TestM3_HostPortKilledAtARandomInstant(t *testing.T) {
	n := newRealNode(t, false)
	conf := n.conf(familyRanges["dual stack"], webPorts)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	before := n.state()
	for i := range 40 {
		pod := netnstest.New(t)
		id := fmt.Sprintf("k%d", i)
		cmd, _ := n.start("ADD", id, pod.Path(), conf)
		time.Sleep(time.Duration(random.IntN(12_000)) * time.Microsecond) // the instant, not synchronisation
		_ = cmd.Process.Kill()
		if killed := cmd.Wait() != nil; killed && i%2 == 0 {
			again, out := n.start("ADD", id, pod.Path(), conf)
			if err := again.Wait(); err == nil {
				n.wantHostPorts("after ADD was repeated", 7)
			} else {
				t.Logf("repeated ADD: %s", out) // it had come to its end
			}
		}
		n.mustRun("DEL", id, pod.Path(), conf)
		n.wantHostPorts(fmt.Sprintf("after kill number %d and DEL", i), 0)
		if diff := cmp.Diff(before, n.state()); diff != "" {
			t.Fatalf("state after kill number %d and DEL (-want +got):\n%s", i, diff)
		}
	}
}

// GC removes what belongs to attachments that are not valid, and to these alone.
func TestM3_HostPortGC(t *testing.T) {
	n := newRealNode(t, false)
	var pods []*netnstest.NS
	for i, id := range []string{"a", "b"} {
		pods = append(pods, netnstest.New(t))
		n.mustRun("ADD", id, pods[i].Path(), n.conf(familyRanges["dual stack"], withPorts(mapping("", 8080+i, 80, "tcp"))))
	}
	n.wantHostPorts("after two ADDs", 4)
	gc := n.conf(familyRanges["dual stack"], set("cni.dev/valid-attachments", []any{map[string]any{"containerID": "a", "ifname": "eth0"}}))
	n.mustRun("GC", "", "", gc)
	n.wantHostPorts("after GC", 2)
	n.mustRun("DEL", "a", pods[0].Path(), n.conf(familyRanges["dual stack"]))
	n.wantHostPorts("after DEL without portMappings", 0)
}
