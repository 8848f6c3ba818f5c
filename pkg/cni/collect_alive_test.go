// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/link"
)

func TestCollectorTouchesNothingAlive(t *testing.T) {
	for name, live := range map[string]func(t *testing.T, n *node, ranges []string){
		"namespace bound to a file": func(t *testing.T, n *node, ranges []string) {
			path, _ := bound(t, netnstest.New(t))
			n.mustAdd(cmdArgs("c1", path, n.conf(ranges)))
		},
		"namespace of a process": func(t *testing.T, n *node, ranges []string) {
			n.mustAdd(cmdArgs("c1", process(t, netnstest.New(t)), n.conf(ranges)))
		},
		"process that made the namespace is gone, another one is in it": func(t *testing.T, n *node, ranges []string) {
			pod := netnstest.New(t)
			path, unbind := bound(t, pod)
			n.mustAdd(cmdArgs("c1", path, n.conf(ranges)))
			process(t, pod)
			unbind()
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			pod.Delete()
		},
		"interface that the pod has set down": func(t *testing.T, n *node, ranges []string) {
			pod := netnstest.New(t)
			n.mustAdd(cmdArgs("c1", pod.Path(), n.conf(ranges)))
			pod.Do(func() {
				l, err := netlink.LinkByName("eth0")
				if err == nil {
					err = netlink.LinkSetDown(l)
				}
				if err != nil {
					t.Fatal(err)
				}
			})
		},
		"device that somebody has renamed": func(t *testing.T, n *node, ranges []string) {
			pod := netnstest.New(t)
			path, unbind := bound(t, pod)
			n.mustAdd(cmdArgs("c1", path, n.conf(ranges)))
			unbind()
			n.ns.Do(func() {
				l, err := netlink.LinkByName(link.HostName("c1", "eth0"))
				if err == nil {
					err = netlink.LinkSetDown(l)
				}
				if err == nil {
					err = netlink.LinkSetName(l, "renamed")
				}
				if err != nil {
					t.Fatal(err)
				}
			})
		},
		"interface that somebody has removed": func(t *testing.T, n *node, ranges []string) {
			pod := netnstest.New(t)
			n.mustAdd(cmdArgs("c1", pod.Path(), n.conf(ranges)))
			pod.Do(func() {
				l, err := netlink.LinkByName("eth0")
				if err == nil {
					err = netlink.LinkDel(l)
				}
				if err != nil {
					t.Fatal(err)
				}
			})
		},
		"record lost": func(t *testing.T, n *node, ranges []string) {
			n.mustAdd(cmdArgs("c1", netnstest.New(t).Path(), n.conf(ranges)))
			if err := n.records().Delete("c1", "eth0"); err != nil {
				t.Fatal(err)
			}
		},
		"killed once the result was out": func(t *testing.T, n *node, ranges []string) {
			n.kill("print result", cmdArgs("c1", netnstest.New(t).Path(), n.conf(ranges)))
		},
		"failed second ADD of a living attachment": func(t *testing.T, n *node, ranges []string) {
			args := cmdArgs("c1", netnstest.New(t).Path(), n.conf(ranges))
			n.mustAdd(args)
			n.kill("ensure datapath", args)
		},
		"killed second ADD of an adopted interface": func(t *testing.T, n *node, _ []string) {
			args := n.adopted(netnstest.New(t))
			n.mustAdd(args)
			n.kill("attach programs", args)
		},
		"lease of another main plugin": func(t *testing.T, n *node, ranges []string) {
			n.foreignLease("c1", netnstest.New(t).Path(), ranges)
		},
		"lease of another main plugin by process": func(t *testing.T, n *node, ranges []string) {
			n.foreignLease("c1", process(t, netnstest.New(t)), ranges)
		},
		"lease whose namespace looks like a file": func(t *testing.T, n *node, ranges []string) { // as where mounts are not passed on
			path, unbind := bound(t, netnstest.New(t))
			n.foreignLease("c1", path, ranges)
			unbind()
		},
		"lease whose directory is not there": func(t *testing.T, n *node, ranges []string) { // as where it is not mounted
			n.foreignLease("c1", "/run/of/the/machine/netns/c1", ranges)
		},
		"lease without namespace": func(t *testing.T, n *node, ranges []string) {
			n.foreignLease("c1", "", ranges)
		},
		"device of a like name that is up": func(t *testing.T, n *node, _ []string) {
			n.device("c1", netnstest.New(t), true)
		},
		"record of another network namespace": func(t *testing.T, n *node, ranges []string) { // the agent is in the wrong one
			r := endpoint.Record{ContainerID: "c1", IfName: "eth0", Netns: "/run/of/the/machine/netns/c1", Network: "net", HostIfindex: 4711,
				HostIfName: link.HostName("c1", "eth0"), HostNetnsID: "4:1"}
			if err := n.records().Save(&r); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			forFamilies(t, func(t *testing.T, ranges []string) {
				n := newNode(t)
				live(t, n, ranges)
				before := n.state()
				c := n.collector()
				for range 4 {
					n.ns.Do(func() {
						removed, _, err := c.Collect(context.Background())
						delete(removed, kindJournal) // an empty lock file may go
						if wrong := name == "record of another network namespace"; len(removed) > 0 || (err != nil) != wrong {
							t.Errorf("Collect removed %v with error %v, want nothing", removed, err)
						}
					})
					c.clock = c.clock.Add(c.grace)
				}
				after := n.state()
				if diff := cmp.Diff(before, after); diff != "" {
					t.Errorf("state (-want +got):\n%s", diff)
				}
			})
		})
	}
}

// process starts one in the namespace, until the test ends, and returns the path that it gives the namespace.
func process(t *testing.T, pod *netnstest.NS) string {
	t.Helper()
	cmd := exec.Command("sleep", "600")
	pod.Do(func() {
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid)
}

// A process's namespace is known to be gone with the process where all of the machine's are seen.
func TestCollectorSeesThatAProcessIsGone(t *testing.T) {
	if !seesProcesses() {
		t.Skip("not in the machine's PID namespace: then such leases stay")
	}
	n := newNode(t)
	before := n.state()
	cmd := exec.Command("sleep", "600")
	netnstest.New(t).Do(func() {
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
	})
	n.foreignLease("c1", fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid), familyRanges["dual stack"])
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	n.collector().twice()
	n.eventually(before)
}

// A lease's namespace that this Collector has seen itself is gone when its file is none any more.
func TestCollectorBelievesItsOwnEyes(t *testing.T) {
	n := newNode(t)
	before := n.state()
	path, unbind := bound(t, netnstest.New(t))
	n.foreignLease("c1", path, familyRanges["dual stack"])
	c := n.collector()
	c.look()
	unbind()
	if diff := cmp.Diff(map[string]int{kindLease: 1}, c.twice()); diff != "" {
		t.Errorf("removed (-want +got):\n%s", diff)
	}
	n.eventually(before)
}

// An ADD that takes its time, or is stopped, has the lock: it is at work, however long.
func TestCollectorLeavesACommandAtWork(t *testing.T) {
	for _, step := range ownSteps[:len(ownSteps)-1] {
		t.Run(step, func(t *testing.T) {
			n, pod := newNode(t), netnstest.New(t)
			c := n.collector()
			args := cmdArgs("c1", pod.Path(), n.conf(familyRanges["dual stack"], withPorts(mapping("", 8080, 80, "tcp"))))
			n.after = func(s string) error {
				if s == step {
					before := n.state()
					for range 3 {
						if removed := c.look(); len(removed) > 0 {
							t.Errorf("removed %v, want nothing", removed)
						}
						c.clock = c.clock.Add(c.grace)
					}
					if diff := cmp.Diff(before, n.state()); diff != "" {
						t.Errorf("state while ADD is at work (-want +got):\n%s", diff)
					}
				}
				return nil
			}
			r := n.mustAdd(args)
			n.after = nil
			c.twice()
			if err := n.verb(n.plugin.Check, n.withPrev(args, r)); err != nil {
				t.Errorf("CHECK = %v, want nil", err)
			}
		})
	}
}

// What looks dead once, or is another one by the time, is not removed.
func TestCollectorWaits(t *testing.T) {
	n, first, second := newNode(t), netnstest.New(t), netnstest.New(t)
	conf := n.conf(familyRanges["dual stack"])
	n.mustAdd(cmdArgs("c1", first.Path(), conf))
	first.Delete()
	n.vanish("c1")
	c := n.collector()
	for range 3 { // less than the grace in all
		if removed := c.look(); len(removed) > 0 {
			t.Errorf("removed %v before the grace has passed", removed)
		}
		c.clock = c.clock.Add(c.grace / 4)
	}
	args := cmdArgs("c1", second.Path(), conf) // the same attachment again
	r := n.mustAdd(args)
	c.clock = c.clock.Add(c.grace)
	c.twice()
	if err := n.verb(n.plugin.Check, n.withPrev(args, r)); err != nil {
		t.Errorf("CHECK of the attachment's second life = %v, want nil", err)
	}
}
