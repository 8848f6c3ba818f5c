// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/ipam"
	"github.com/margay-cni/margay/pkg/link"
)

// holdings are the containers that have something of a kind.
type holdings map[string][]string

// holdings reads who has what on the node.
func (n *node) holdings(ids []string) holdings {
	n.t.Helper()
	out := holdings{}
	byDevice, byAddress := map[string]string{}, map[string]string{}
	for _, id := range ids {
		byDevice[link.HostName(id, "eth0")] = id
	}
	records, err := n.records().List()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, r := range records {
		out["records"] = append(out["records"], r.ContainerID)
		for _, a := range r.Addresses {
			byAddress[a.String()] = r.ContainerID
		}
	}
	leases, err := ipam.Leases(context.Background(), n.ipamConfig())
	if err != nil {
		n.t.Fatal(err)
	}
	for _, l := range leases {
		out["leases"] = append(out["leases"], l.ContainerID)
	}
	n.ns.Do(func() {
		links, err := netlink.LinkList()
		if err != nil {
			n.t.Fatal(err)
		}
		for _, l := range links {
			if link.IsHostName(l.Attrs().Name) {
				out["devices"] = append(out["devices"], byDevice[l.Attrs().Name])
			}
		}
	})
	addresses := n.pinnedEndpoints()
	n.plane.mu.Lock()
	addresses = slices.AppendSeq(addresses, maps.Keys(n.plane.entries))
	n.plane.mu.Unlock()
	for _, a := range addresses {
		if id := byAddress[a.String()]; !slices.Contains(out["endpoints"], id) {
			out["endpoints"] = append(out["endpoints"], id)
		}
	}
	for kind := range out {
		slices.Sort(out[kind])
	}
	return out
}

// all is what holdings are when these have everything, and nobody else anything.
func all(ids []string) holdings {
	if len(ids) == 0 {
		return holdings{}
	}
	ids = slices.Sorted(slices.Values(ids))
	return holdings{"records": ids, "leases": ids, "devices": ids, "endpoints": ids}
}

// Whatever happens to pods, in whatever order: after two looks the living ones have everything, the others nothing.
func TestCollectorLeavesExactlyTheLiving(t *testing.T) {
	forFamilies(t, func(t *testing.T, ranges []string) {
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		random := rand.New(rand.NewPCG(seed, 0))
		n := newNode(t)
		before := n.state()
		c := n.collector()
		var (
			ids   []string
			alive = map[string]*netnstest.NS{}
			args  = func(id string, pod *netnstest.NS) []byte {
				if random.IntN(2) == 0 {
					return n.conf(ranges)
				}
				return n.conf(ranges, withPorts(mapping("", 1000+len(ids), 80, "tcp")))
			}
		)
		for range 8 {
			for range 6 {
				id := fmt.Sprintf("c%d", len(ids))
				pod := netnstest.New(t)
				ids = append(ids, id)
				conf := args(id, pod)
				switch random.IntN(5) {
				case 0, 1:
					n.mustAdd(cmdArgs(id, pod.Path(), conf))
					alive[id] = pod
				case 2:
					n.kill(ownSteps[random.IntN(len(ownSteps)-1)], cmdArgs(id, pod.Path(), conf))
					if random.IntN(2) == 0 {
						pod.Delete()
					}
				case 3: // the namespace goes, and nobody calls DEL
					n.mustAdd(cmdArgs(id, pod.Path(), conf))
					pod.Delete()
				case 4: // DEL cannot, and nobody calls it again
					n.mustAdd(cmdArgs(id, pod.Path(), conf))
					n.plane.faults["DeleteEndpoint"] = errInjected
					if err := n.del(cmdArgs(id, pod.Path(), conf)); err == nil {
						t.Error("DEL = nil, want the injected fault")
					}
					delete(n.plane.faults, "DeleteEndpoint")
				}
				if old := ids[random.IntN(len(ids))]; alive[old] != nil && random.IntN(3) == 0 {
					alive[old].Delete()
					delete(alive, old)
				}
				if random.IntN(4) == 0 {
					c.look()
					c.clock = c.clock.Add(time.Duration(random.Int64N(int64(c.grace))))
				}
			}
			for _, id := range ids {
				if alive[id] == nil {
					n.vanishUnlessStopped(id)
				}
			}
			for range 2 {
				c.look()
				c.clock = c.clock.Add(c.grace)
			}
			c.look()
			if diff := cmp.Diff(all(slices.Collect(maps.Keys(alive))), n.holdings(ids)); diff != "" {
				t.Fatalf("who has what (-want +got):\n%s", diff)
			}
		}
		for id, pod := range alive {
			if err := n.del(cmdArgs(id, pod.Path(), n.conf(ranges))); err != nil {
				t.Errorf("DEL %s = %v, want nil", id, err)
			}
		}
		n.eventually(before)
	})
}

// vanishUnlessStopped waits for the devices of namespaces that are gone; those of interrupted commands are the collector's to remove.
func (n *node) vanishUnlessStopped(id string) {
	n.t.Helper()
	if _, err := os.Stat(lockPath(n.run, id, "eth0")); err != nil {
		n.vanish(id)
	}
}

// Real processes, killed at random instants, and nobody calls DEL; some of their namespaces end as well.
func TestCollectorAfterKillsAtRandomInstants(t *testing.T) {
	n := newRealNode(t, false)
	n.plugin.ensure, n.plugin.open = ensureWith(datapath.Load), openDatapath
	conf := n.conf(familyRanges["dual stack"])
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	before := n.state()
	c := n.collector()
	const pods = 40
	var (
		ids   []string
		alive = map[string]*netnstest.NS{}
		ended int
	)
	for i := range pods {
		pod, id := netnstest.New(t), fmt.Sprintf("k%d", i)
		ids = append(ids, id)
		cmd, out := n.start("ADD", id, pod.Path(), conf)
		time.Sleep(time.Duration(random.IntN(14_000)) * time.Microsecond) // the instant, not synchronisation
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if random.IntN(3) == 0 {
			pod.Delete()
			continue
		}
		if out.Len() > 0 || !n.interrupted(id) { // it was quicker
			if _, err := n.records().Load(id, "eth0"); err == nil {
				alive[id] = pod
			}
		}
	}
	for id, pod := range alive { // some end by a DEL that is killed
		if random.IntN(2) == 0 {
			cmd, _ := n.start("DEL", id, pod.Path(), conf)
			time.Sleep(time.Duration(random.IntN(14_000)) * time.Microsecond)
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			if _, err := n.records().Load(id, "eth0"); err != nil || n.interrupted(id) {
				delete(alive, id)
				ended++
			}
		}
	}
	for _, id := range ids {
		if alive[id] == nil {
			n.vanishUnlessStopped(id)
		}
	}
	removed := c.twice()
	t.Logf("%d ADDs: %d complete and alive, %d ended by a DEL that was killed; removed %v", pods, len(alive), ended, removed)
	if diff := cmp.Diff(all(slices.Collect(maps.Keys(alive))), n.holdings(ids)); diff != "" {
		t.Errorf("who has what (-want +got):\n%s", diff)
	}
	for id, pod := range alive {
		n.mustRun("DEL", id, pod.Path(), conf)
	}
	n.eventually(before)
}

// interrupted says whether a command of the attachment was killed before it came to its end.
func (n *node) interrupted(id string) bool {
	data, err := os.ReadFile(lockPath(n.run, id, "eth0"))
	return err == nil && parseJournal(data) != nil
}

// A plugin that is stopped in the middle of an ADD is at work; killed, it is not.
func TestCollectorAndAStoppedPlugin(t *testing.T) {
	n := newRealNode(t, false)
	n.plugin.ensure, n.plugin.open = ensureWith(datapath.Load), openDatapath
	conf := n.conf(familyRanges["dual stack"])
	before := n.state()
	stopped := 0
	for i := 0; stopped < 5 && i < 300; i++ {
		pod, id := netnstest.New(t), fmt.Sprintf("s%d", i)
		cmd, _ := n.start("ADD", id, pod.Path(), conf)
		if n.stopInside(cmd, id) {
			stopped++
			state := n.state()
			c := n.collector()
			c.twice()
			c.twice()
			if diff := cmp.Diff(state, n.state()); diff != "" {
				t.Errorf("state beside a stopped ADD (-want +got):\n%s", diff)
			}
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			c.clock = c.clock.Add(c.grace)
			c.twice()
		} else {
			_ = cmd.Wait()
			n.mustRun("DEL", id, pod.Path(), conf)
		}
		n.eventually(before)
	}
	if stopped == 0 {
		t.Error("no ADD could be stopped in the middle")
	}
}

// stopInside stops the process when its journal is there, and says whether it was in time. One that has the lock of the leases goes on: nobody
// could read those.
func (n *node) stopInside(cmd *exec.Cmd, id string) bool {
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); {
		if n.interrupted(id) {
			_ = cmd.Process.Signal(unix.SIGSTOP)
			time.Sleep(5 * time.Millisecond) // until it has stopped
			if n.interrupted(id) && n.leasesAreFree() {
				return true
			}
			_ = cmd.Process.Signal(unix.SIGCONT)
			return false
		}
		if _, err := n.records().Load(id, "eth0"); err == nil {
			return false
		}
	}
	return false
}

func (n *node) leasesAreFree() bool {
	n.t.Helper()
	unlock, free := n.lockLeases()
	if free {
		unlock()
	}
	return free
}

// lockLeases takes the lock of the leases, if nobody has it.
func (n *node) lockLeases() (unlock func(), ok bool) {
	n.t.Helper()
	f, err := os.OpenFile(filepath.Join(n.run, "ipam", "net", "lock"), os.O_RDWR, 0)
	if os.IsNotExist(err) {
		return func() {}, true // nobody has leased anything yet
	}
	if err != nil {
		n.t.Fatal(err)
	}
	unlock = func() {
		if err := f.Close(); err != nil {
			n.t.Error(err)
		}
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		unlock()
		return nil, false
	}
	return unlock, true
}

// A plugin that hangs with the lock of the leases holds nothing up but what needs them, and not that for good.
func TestCollectorBesideALockThatIsHeld(t *testing.T) {
	n, pod := newNode(t), netnstest.New(t)
	before := n.state()
	conf := n.conf(familyRanges["dual stack"])
	n.mustAdd(cmdArgs("c1", pod.Path(), conf))
	n.kill("attach programs", cmdArgs("c2", netnstest.New(t).Path(), conf))
	pod.Delete()
	n.vanish("c1")
	n.device("c3", netnstest.New(t), false) // its lease, if it had one, could not be known
	c := n.collector()
	unlock, ok := n.lockLeases()
	if !ok {
		t.Fatal("somebody has the lock of the leases")
	}
	start := time.Now()
	for range 2 {
		n.ns.Do(func() {
			if removed, _, err := c.Collect(context.Background()); err == nil || len(removed) > 0 {
				t.Errorf("Collect = %v, %v beside a held lock, want nothing and an error", removed, err)
			}
		})
		c.clock = c.clock.Add(c.grace)
	}
	// Two attachments, each of which waits for as long as it may, and reading twice.
	if took, most := time.Since(start), 2*readTimeout+2*removeTimeout+10*time.Second; took > most {
		t.Errorf("two looks took %v beside a held lock, want at most %v", took, most)
	}
	if len(n.plane.entries) != 0 {
		t.Errorf("endpoints = %v, want none: they need no lease", n.plane.entries)
	}
	unlock()
	c.look()
	c.clock = c.clock.Add(c.grace)
	c.look()
	n.eventually(before)
}
