// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/ipam"
	"github.com/margay-cni/margay/pkg/link"
	"github.com/margay-cni/margay/pkg/pins"
)

// collector is a Collector of the node with a clock of its own.
type collector struct {
	*Collector
	n     *node
	clock time.Time
}

func (n *node) collector() *collector {
	c := &collector{n: n, clock: time.Now()}
	c.Collector = NewCollector(pins.Config{BPFFS: n.bpffs, Run: n.run}, Loader{datapath.Load, datapath.RemoveUnusedPrograms}, slog.New(slog.NewTextHandler(n.t.Output(), nil)))
	c.Collector.plugin, c.programs, c.now = n.plugin, nil, func() time.Time { return c.clock }
	return c
}

// look collects once, and returns what was removed.
func (c *collector) look() map[string]int {
	c.n.t.Helper()
	var removed map[string]int
	var err error
	c.n.ns.Do(func() { removed, _, err = c.Collect(context.Background()) })
	if err != nil {
		c.n.t.Errorf("Collect = %v, want nil", err)
	}
	return removed
}

// twice collects, waits for the grace to pass, and collects again.
func (c *collector) twice() map[string]int {
	c.n.t.Helper()
	if first := c.look(); len(first) > 0 {
		c.n.t.Errorf("first look removed %v, want nothing", first)
	}
	c.clock = c.clock.Add(c.grace)
	return c.look()
}

// vanish waits until nothing of the record's device is left: the kernel dismantles a namespace in the background.
func (n *node) vanish(id string) {
	n.t.Helper()
	name := link.HostName(id, "eth0")
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		var err error
		n.ns.Do(func() { _, err = netlink.LinkByName(name) })
		if err != nil {
			return
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("device %s is there 20 s after its namespace ended", name)
		}
	}
}

// bound binds the namespace to another file, as a runtime does, which the test may take away.
func bound(t *testing.T, pod *netnstest.NS) (path string, unbind func()) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "cni-1234")
	if err := os.WriteFile(path, nil, 0o444); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(pod.Path(), path, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	done := false
	unbind = func() {
		if !done {
			done = true
			if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
				t.Errorf("unmount: %v", err)
			}
		}
	}
	t.Cleanup(unbind)
	return path, unbind
}

// foreignLease takes addresses as another main plugin's IPAM call does.
func (n *node) foreignLease(id, netns string, ranges []string) {
	n.t.Helper()
	c, err := ipam.LoadConfig(n.conf(ranges), "")
	if err != nil {
		n.t.Fatal(err)
	}
	if _, err := ipam.Add(context.Background(), c, ipam.Attachment{ContainerID: id, IfName: "eth0", Netns: netns}); err != nil {
		n.t.Fatal(err)
	}
}

// device makes a pair like that of an attachment, in pod's namespace.
func (n *node) device(id string, pod *netnstest.NS, up bool) {
	n.t.Helper()
	host, err := os.Open(n.ns.Path())
	if err != nil {
		n.t.Fatal(err)
	}
	defer host.Close()
	pod.Do(func() {
		c, err := link.Dial(-1)
		if err != nil {
			n.t.Fatal(err)
		}
		defer c.Close()
		podMAC, hostMAC := link.MACs(id, "eth0")
		if _, _, err := c.AddVeth(link.VethSpec{
			PodName: "eth0", HostName: link.HostName(id, "eth0"), PodMAC: podMAC, HostMAC: hostMAC, MTU: 1500, HostNS: int(host.Fd()),
		}); err != nil {
			n.t.Fatal(err)
		}
	})
	if !up {
		return
	}
	n.ns.Do(func() {
		l, err := netlink.LinkByName(link.HostName(id, "eth0"))
		if err == nil {
			err = netlink.LinkSetUp(l)
		}
		if err != nil {
			n.t.Fatal(err)
		}
	})
}

func TestCollectorRemovesEachResidue(t *testing.T) {
	ports := withPorts(mapping("", 8080, 80, "tcp"))
	for name, c := range map[string]struct {
		leave func(t *testing.T, n *node, ranges []string)
		want  map[string]int
	}{
		"namespace gone": {func(t *testing.T, n *node, ranges []string) {
			pod := netnstest.New(t)
			n.mustAdd(cmdArgs("c1", pod.Path(), n.conf(ranges, ports)))
			pod.Delete()
			n.vanish("c1")
		}, map[string]int{kindRecord: 1, kindLease: 1}},
		"namespace unmounted, its file left": {func(t *testing.T, n *node, ranges []string) {
			pod := netnstest.New(t)
			path, unbind := bound(t, pod)
			n.mustAdd(cmdArgs("c1", path, n.conf(ranges)))
			unbind()
			pod.Delete()
			n.vanish("c1")
		}, map[string]int{kindRecord: 1, kindLease: 1}},
		"another namespace has the path": {func(t *testing.T, n *node, ranges []string) {
			pod, other := netnstest.New(t), netnstest.New(t)
			path, unbind := bound(t, pod)
			n.mustAdd(cmdArgs("c1", path, n.conf(ranges)))
			unbind()
			pod.Delete()
			n.vanish("c1")
			if err := unix.Mount(other.Path(), path, "", unix.MS_BIND, ""); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = unix.Unmount(path, unix.MNT_DETACH) })
		}, map[string]int{kindRecord: 1, kindLease: 1}},
		"record alone": {func(t *testing.T, n *node, _ []string) {
			if err := n.records().Save(&endpoint.Record{ContainerID: "c1", IfName: "eth0", Netns: filepath.Join(t.TempDir(), "none"), Network: "net",
				HostIfindex: 4711, HostIfName: link.HostName("c1", "eth0"), Addresses: []netip.Addr{netip.MustParseAddr("10.42.0.7")}}); err != nil {
				t.Fatal(err)
			}
		}, map[string]int{kindRecord: 1}},
		"lease alone": {func(t *testing.T, n *node, ranges []string) {
			pod := netnstest.New(t)
			n.foreignLease("c1", pod.Path(), ranges)
			pod.Delete()
		}, map[string]int{kindLease: 1}},
		"device alone": {func(t *testing.T, n *node, _ []string) {
			n.device("c1", netnstest.New(t), false)
		}, map[string]int{kindDevice: 1}},
		"device and lease": {func(t *testing.T, n *node, ranges []string) {
			pod := netnstest.New(t)
			n.foreignLease("c1", pod.Path(), ranges)
			n.device("c1", pod, false)
		}, map[string]int{kindDevice: 1, kindLease: 1}},
		"lock file alone": {func(t *testing.T, n *node, _ []string) {
			if err := os.MkdirAll(filepath.Join(n.run, lockDir), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(lockPath(n.run, "c1", "eth0"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, map[string]int{kindJournal: 1}},
		"DEL that could not": {func(t *testing.T, n *node, ranges []string) {
			args := cmdArgs("c1", netnstest.New(t).Path(), n.conf(ranges, ports))
			n.mustAdd(args)
			n.plane.faults["DeleteEndpoint"] = errInjected
			if err := n.del(args); err == nil {
				t.Fatal("DEL = nil, want the injected fault")
			}
			delete(n.plane.faults, "DeleteEndpoint")
		}, map[string]int{kindJournal: 1, kindRecord: 1}},
		"ADD that could not undo": {func(t *testing.T, n *node, ranges []string) {
			n.plane.faults["DeleteEndpoint"] = errInjected
			n.after = func(step string) error {
				if step == "print result" {
					return errInjected
				}
				return nil
			}
			if _, err := n.add(cmdArgs("c1", netnstest.New(t).Path(), n.conf(ranges, ports))); err == nil {
				t.Fatal("ADD = nil, want the injected fault")
			}
			n.after = nil
			delete(n.plane.faults, "DeleteEndpoint")
		}, map[string]int{kindJournal: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			forFamilies(t, func(t *testing.T, ranges []string) {
				n := newNode(t)
				before := n.state()
				c.leave(t, n, ranges)
				if diff := cmp.Diff(c.want, n.collector().twice()); diff != "" {
					t.Errorf("removed (-want +got):\n%s", diff)
				}
				n.eventually(before)
			})
		})
	}
}

// Whatever step an ADD was killed after, and whether or not its namespace is still there: if it had not begun to print its result, everything
// of it goes, with nobody calling DEL.
func TestCollectorUndoesKilledAdd(t *testing.T) {
	for _, step := range ownSteps {
		for name, netnsGone := range map[string]bool{"": false, ", namespace gone": true} {
			if step == "print result" && !netnsGone {
				continue // the runtime knows of it: TestCollectorTouchesNothingAlive
			}
			t.Run(step+name, func(t *testing.T) {
				n, pod := newNode(t), netnstest.New(t)
				before := n.state()
				n.kill(step, cmdArgs("c1", pod.Path(), n.conf(familyRanges["dual stack"], withPorts(mapping("", 8080, 80, "udp")))))
				if netnsGone {
					pod.Delete()
					n.vanish("c1")
				}
				n.collector().twice()
				n.eventually(before)
				if !netnsGone {
					n.mustAdd(cmdArgs("c2", pod.Path(), n.conf(familyRanges["dual stack"]))) // the namespace is free for another attempt
				}
			})
		}
	}
}

func TestCollectorUndoesKilledAdoption(t *testing.T) {
	for _, step := range adoptSteps[:len(adoptSteps)-1] {
		t.Run(step, func(t *testing.T) {
			n, pod := newNode(t), netnstest.New(t)
			args := n.adopted(pod)
			before := n.state()
			n.kill(step, args)
			n.collector().twice()
			if diff := cmp.Diff(before, n.state()); diff != "" {
				t.Errorf("state, with the other plugin's interface in it (-want +got):\n%s", diff)
			}
		})
	}
}

// What cannot be removed is tried again, and reported.
func TestCollectorTriesAgain(t *testing.T) {
	n, pod := newNode(t), netnstest.New(t)
	before := n.state()
	n.mustAdd(cmdArgs("c1", pod.Path(), n.conf(familyRanges["dual stack"])))
	pod.Delete()
	n.vanish("c1")
	n.plane.faults["DeleteEndpoint"] = errInjected
	c := n.collector()
	c.look()
	for range 3 {
		c.clock = c.clock.Add(c.grace)
		n.ns.Do(func() {
			if _, suspects, err := c.Collect(context.Background()); err == nil && suspects == 0 {
				t.Error("Collect = nil without suspects, want the injected fault or a suspect")
			}
		})
	}
	delete(n.plane.faults, "DeleteEndpoint")
	c.clock = c.clock.Add(c.grace)
	c.look()
	c.clock = c.clock.Add(c.grace)
	c.look()
	n.eventually(before)
	n.ns.Do(func() {
		if removed, suspects, err := c.Collect(context.Background()); len(removed) > 0 || suspects > 0 || err != nil {
			t.Errorf("Collect with nothing left = %v, %d, %v, want nothing", removed, suspects, err)
		}
	})
}

// The runtime's GC verb undoes interrupted commands as well.
func TestGCUndoesInterruptedCommands(t *testing.T) {
	n := newNode(t)
	before := n.state()
	conf := n.conf(familyRanges["dual stack"], withPorts(mapping("", 8080, 80, "tcp")))
	for _, step := range ownSteps[:len(ownSteps)-1] {
		n.kill(step, cmdArgs("c1", netnstest.New(t).Path(), conf))
		if err := n.verb(n.plugin.GC, &Args{StdinData: conf}); err != nil {
			t.Fatalf("GC after an ADD killed after %q = %v, want nil", step, err)
		}
		if diff := cmp.Diff(before, n.state()); diff != "" {
			t.Errorf("state after an ADD killed after %q, and GC (-want +got):\n%s", step, diff)
		}
	}
}
