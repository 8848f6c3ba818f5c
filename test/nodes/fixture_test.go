// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/margay-cni/margay/internal/testutil/clustertest"
)

func TestMain(m *testing.M) {
	os.Exit(clustertest.Main(m))
}

// TestFixtureNetworks: the underlay routes between all nodes and the client, in every family that it has and no other, and only with
// PodRoutes does it know pods.
func TestFixtureNetworks(t *testing.T) {
	for name, tt := range map[string]struct {
		underlay clustertest.Underlay
		families []bool
	}{
		"dual stack": {clustertest.DualStack, []bool{false, true}},
		"IPv4 only":  {clustertest.IPv4Only, []bool{false}},
		"IPv6 only":  {clustertest.IPv6Only, []bool{true}},
	} {
		t.Run(name, func(t *testing.T) {
			c := clustertest.New(t, clustertest.Options{Underlay: tt.underlay, SecondNIC: []string{"n2"}})
			hosts := []*clustertest.Host{c.Client}
			for _, n := range c.Nodes() {
				hosts = append(hosts, n.Host)
				if len(n.Addrs) != len(tt.families) {
					t.Errorf("%s has the addresses %v, want %d", n.Name, n.Addrs, len(tt.families))
				}
			}
			for _, v6 := range tt.families {
				for _, from := range hosts {
					for _, to := range hosts {
						if err := from.Ping(to.Addr(v6)); err != nil {
							t.Error(err)
						}
					}
				}
			}
			for _, a := range c.Node("n2").NICs[1].Addrs {
				if err := c.Client.Ping(a); err != nil {
					t.Errorf("the second NIC of n2: %v", err)
				}
			}
			one, two := c.AddPod(c.Node("n3"), "one", nil), c.AddPod(c.Node("n3"), "two", nil)
			one.Serve(8080)
			c.WaitSettled()
			for _, v6 := range []bool{false, true} {
				if got, err := two.Ask("tcp", one.AddrPort(v6, 8080)); err != nil || got != "one "+two.Addr(v6).String() {
					t.Errorf("%s between pods of one node: %q, %v", clustertest.FamilyName(v6), got, err)
				}
				if out, err := c.Router.Output("ip", "route", "get", one.Addr(v6).String()); err == nil {
					t.Errorf("the router knows a way to a pod without PodRoutes: %s", out)
				}
				if err := c.Client.Ping(one.Addr(v6)); err == nil {
					t.Errorf("the client reaches the pod's %s without a route", one.Addr(v6))
				}
			}
			last := c.Status(c.Node("n2")).Last
			if len(last.Devices) != 2 || last.Overlay == nil || last.Overlay.Error != "" {
				t.Errorf("n2's agent serves %v and %v, want two NICs and the overlay device", last.Devices, last.Overlay)
			}
		})
	}
}

// TestFixturePods: pods of one node talk, a NodePort keeps the client's address on a node that the real agent drives, and policy from the
// manifest is in force once the agents have settled.
func TestFixturePods(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{})
	n := c.Node("n2")
	web, peer := c.AddPod(n, "web", map[string]string{"app": "web"}), c.AddPod(n, "peer", nil)
	web.Serve(8080)
	c.Apply(clustertest.NodePortService("web", 10, map[string]string{"app": "web"}, 80, 8080, 30080))
	c.WaitSettled()

	type try struct {
		from    *clustertest.Host
		network string
		to      netip.AddrPort
		v6      bool
	}
	var tries []try
	for _, v6 := range c.Families() {
		for _, network := range []string{"tcp", "udp"} {
			tries = append(tries,
				try{peer.Host, network, web.AddrPort(v6, 8080), v6},
				try{peer.Host, network, clusterIP(10, v6), v6},
				try{c.Client, network, n.AddrPort(v6, 30080), v6})
		}
	}
	for _, tr := range tries {
		want := "web " + tr.from.Addr(tr.v6).String()
		if got, err := tr.from.Ask(tr.network, tr.to); err != nil || got != want {
			t.Errorf("%s from %s to %s = %q, %v; want %q", tr.network, tr.from.Name, tr.to, got, err, want)
		}
	}
	if got := c.FlowEntries(n); got != 2*len(tries) {
		t.Errorf("entries in the flow table = %d, want 2 for each of %d flows", got, len(tries))
	}
	if got := len(c.Flows(n)); got != len(tries) {
		t.Errorf("flows = %d, want %d", got, len(tries))
	}

	deny := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: "deny"}}
	deny.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
	before := c.Drops(n)["policy"]
	c.Apply(deny)
	c.WaitSettled()
	denied := tries[:3] // IPv4 and TCP: each costs its client's whole patience
	for _, tr := range denied {
		if got, err := tr.from.Ask(tr.network, tr.to); err == nil {
			t.Errorf("%s from %s to %s under a policy that allows nothing = %q, want no answer", tr.network, tr.from.Name, tr.to, got)
		}
	}
	if got := c.Drops(n)["policy"] - before; got < uint64(len(denied)) {
		t.Errorf("packets dropped by policy = %d, want at least %d", got, len(denied))
	}
	c.Delete(deny)
	c.WaitSettled()
	if _, err := peer.Ask("tcp", web.AddrPort(false, 8080)); err != nil {
		t.Errorf("after the policy was deleted: %v", err)
	}
	if out := c.Ctl(n, "endpoints"); !strings.Contains(out, "default/web") {
		t.Errorf("margayctl endpoints names no pod default/web:\n%s", out)
	}

	c.DeletePod(web)
	c.WaitSettled()
	if got := c.Status(n).Last.Counts.Endpoints; got != 1 {
		t.Errorf("pods that the agent knows after one was deleted = %d, want 1", got)
	}
}

// TestFixtureChanges: agents end and come back, nodes come and go, MTUs change.
func TestFixtureChanges(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{Nodes: 2, PodRoutes: true})
	n1 := c.Node("n1")
	pid := c.Status(n1).PID
	c.StopAgent(n1)
	c.Apply(clustertest.NodePortService("late", 11, nil, 80, 80, 0)) // told to the one agent that runs
	c.WaitSettled()
	c.StartAgent(n1)
	c.WaitSettled()
	if again := c.Status(n1).PID; again == pid {
		t.Errorf("the agent's process is %d before and after it was stopped and started", pid)
	}
	c.KillAgent(n1)
	c.StartAgent(n1)
	c.WaitSettled()

	n3 := c.AddNode(c.Network("segment2"))
	c.WaitSettled()
	for _, v6 := range c.Families() {
		if err := c.Client.Ping(n3.Addr(v6)); err != nil {
			t.Errorf("a node that was added: %v", err)
		}
		for _, p := range n3.PodCIDRs {
			out, _ := c.Router.Output("ip", "route", "get", p.Addr().Next().String())
			if p.Addr().Is6() == v6 && !strings.Contains(out, "via "+n3.Addr(v6).String()) {
				t.Errorf("the router's way to a pod of n3:\n%swant it by %s", out, n3.Addr(v6))
			}
		}
	}
	c.RemoveNode(n3)
	c.WaitSettled()
	if err := c.Client.Ping(n3.Addr(false)); err == nil {
		t.Errorf("%s answers after the node was removed", n3.Addr(false))
	}

	before := n1.Addr(false)
	c.Readdress(n1, 99)
	c.SetPodCIDRs(n1, netip.MustParsePrefix("10.244.99.0/24"), netip.MustParsePrefix("fd00:244:99::/64"))
	c.WaitSettled()
	moved := c.AddPod(n1, "moved", nil)
	for _, v6 := range c.Families() {
		if err := c.Client.Ping(n1.Addr(v6)); err != nil {
			t.Errorf("a node that has other addresses: %v", err)
		}
		if out, _ := c.Router.Output("ip", "route", "get", moved.Addr(v6).String()); !strings.Contains(out, "via "+n1.Addr(v6).String()) {
			t.Errorf("the router's way to a pod with another range:\n%swant it by %s", out, n1.Addr(v6))
		}
	}
	if err := c.Client.Ping(before); err == nil {
		t.Errorf("n1 still answers at %s", before)
	}

	// A packet that just fits passes, and with a smaller MTU on either side of the cable it does not.
	const payload = 1500 - 20 - 8
	big := func() error { return c.Client.Ping(n1.Addr(false), "-M", "do", "-s", fmt.Sprint(payload)) }
	if err := big(); err != nil {
		t.Errorf("1500 bytes: %v", err)
	}
	c.SetMTU(n1.Host, "eth0", 1400)
	if err := n1.Ping(c.Client.Addr(false), "-M", "do", "-s", fmt.Sprint(payload)); err == nil {
		t.Error("n1 sends 1500 bytes by a device with MTU 1400")
	}
	c.SetMTU(n1.Host, "eth0", 1500)
	c.SetNetworkMTU(c.Network("segment1"), 1400)
	if err := big(); err == nil || !strings.Contains(err.Error(), "1400") {
		t.Errorf("1500 bytes to a network with MTU 1400: %v, want an error that names it", err)
	}
}

// TestFixtureLeavesNothing: after a test no namespace, mount, process, cgroup or file of its cluster is left, nor a pod.
func TestFixtureLeavesNothing(t *testing.T) {
	var (
		spaces = map[string]string{} // by "net:[inode]": whose it is
		pids   []int
		paths  []string
		mounts []string
	)
	ok := t.Run("cluster", func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{})
		hosts := []*clustertest.Host{c.Router, c.Client}
		for _, n := range c.Nodes() {
			hosts = append(hosts, n.Host, c.AddPod(n, "pod-"+n.Name, nil).Host)
			pids = append(pids, c.Status(n).PID)
			paths = append(paths, n.Config.Run, n.Cgroup)
			mounts = append(mounts, n.Config.BPFFS)
		}
		for _, h := range hosts {
			mounts = append(mounts, h.NS.Path())
			h.NS.Do(func() {
				name, err := os.Readlink("/proc/thread-self/ns/net")
				if err != nil {
					t.Fatal(err)
				}
				spaces[name] = h.Name
			})
		}
		// What is looked for below is there now.
		if table := mountTable(t); !containsAll(table, mounts) {
			t.Errorf("mounts of the cluster: want %q in\n%s", mounts, table)
		}
		if users := usersOf(t, spaces); len(users) < len(pids) {
			t.Errorf("processes and threads in the cluster's namespaces = %q, want at least its %d agents", users, len(pids))
		}
	})
	if !ok {
		return // and left what it had when it failed, perhaps nothing
	}
	for _, pid := range pids {
		if err := unix.Kill(pid, 0); err == nil {
			t.Errorf("agent %d still runs", pid)
		}
	}
	for _, path := range append(paths, mounts...) {
		if _, err := os.Lstat(path); path != "" && err == nil {
			t.Errorf("%s is still there", path)
		}
	}
	table := mountTable(t)
	for _, m := range mounts {
		if strings.Contains(table, m) {
			t.Errorf("%s is still mounted", m)
		}
	}
	if users := usersOf(t, spaces); len(users) > 0 {
		t.Errorf("still in a namespace of the cluster: %q", users)
	}
}

func mountTable(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func containsAll(s string, all []string) bool {
	for _, one := range all {
		if !strings.Contains(s, one) {
			return false
		}
	}
	return true
}

// usersOf lists what keeps one of the namespaces alive: threads of any process, and open files of this one.
func usersOf(t *testing.T, spaces map[string]string) (users []string) {
	t.Helper()
	for _, pattern := range []string{"/proc/[0-9]*/task/[0-9]*/ns/net", "/proc/self/fd/*"} {
		links, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, link := range links {
			target, err := os.Readlink(link)
			if whose, ours := spaces[target]; err == nil && ours {
				users = append(users, whose+": "+link)
			}
		}
	}
	return users
}

// clusterIP is where clustertest.NodePortService puts the service of a number, on port 80.
func clusterIP(number int, v6 bool) netip.AddrPort {
	if v6 {
		return netip.MustParseAddrPort(fmt.Sprintf("[fd00:96::%d]:80", number))
	}
	return netip.MustParseAddrPort(fmt.Sprintf("10.96.0.%d:80", number))
}
