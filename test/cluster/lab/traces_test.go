// SPDX-License-Identifier: Apache-2.0

//go:build cluster

package lab_test

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/test/cluster/lab"
)

// traces is everything in the real machine that a cluster could leave behind or change, one line each. What others do at the same time
// is not in it: of processes, mounts and cgroups only those that belong to this cluster count.
func traces(t *testing.T, dir, name string) []string {
	t.Helper()
	state, cgroup := filepath.Join(dir, "state", name), "margay-cluster-"+lab.ID(dir, name)
	var found []string
	add := func(format string, args ...any) { found = append(found, fmt.Sprintf(format, args...)) }
	processes, err := filepath.Glob("/proc/[0-9]*")
	must(t, err)
	for _, p := range processes {
		exe, _ := os.Readlink(filepath.Join(p, "exe")) // a kernel thread has none
		command, _ := os.ReadFile(filepath.Join(p, "cmdline"))
		cgroups, err := os.ReadFile(filepath.Join(p, "cgroup"))
		if err == nil && (strings.Contains(string(cgroups), cgroup) || strings.Contains(string(command), state+"/")) {
			add("process %s %s", filepath.Base(p), exe)
		}
	}
	mounts, err := os.Open("/proc/self/mountinfo")
	must(t, err)
	defer mounts.Close()
	for s := bufio.NewScanner(mounts); s.Scan(); {
		if strings.Contains(s.Text(), state) {
			add("mount %s", s.Text())
		}
	}
	for _, pattern := range []string{"/sys/fs/cgroup/*/" + cgroup, state, state + "/*", "/run/netns/*", "/run/containerd*", "/run/runc*", "/var/lib/kubelet", "/var/lib/containerd", "/etc/cni/net.d/*"} {
		paths, err := filepath.Glob(pattern)
		must(t, err)
		for _, path := range paths {
			add("path %s", path)
		}
	}
	links, err := netlink.LinkList()
	must(t, err)
	for _, l := range links {
		add("link %d %s %s", l.Attrs().Index, l.Type(), l.Attrs().Name)
	}
	routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	must(t, err)
	for _, r := range routes {
		add("route %s", r)
	}
	for _, name := range []string{
		"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
		"kernel/hostname", "net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", "net/netfilter/nf_conntrack_max",
	} {
		value, err := os.ReadFile(filepath.Join("/proc/sys", name))
		if err == nil {
			add("sysctl %s %s", name, value)
		}
	}
	// One setting is raised while there is a cluster, be it another one.
	if others, err := filepath.Glob("/sys/fs/cgroup/memory/margay-cluster-*"); err == nil && len(others) == 0 {
		value, err := os.ReadFile("/proc/sys/fs/inotify/max_user_instances")
		must(t, err)
		add("sysctl max_user_instances %s", value)
	}
	slices.Sort(found)
	return found
}

// unchanged requires that there is nothing but what was there before. The kernel takes namespaces down a little after their last process.
func unchanged(t *testing.T, dir, name string, before []string) {
	t.Helper()
	var diff string
	for deadline := time.Now().Add(15 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if diff = cmp.Diff(before, traces(t, dir, name)); diff == "" {
			return
		}
	}
	t.Errorf("the machine is not as it was before (-before +now):\n%s", diff)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
