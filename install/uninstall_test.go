// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/privileged"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/netfilter"
)

// machine is a node with a kernel side: a network namespace with a NIC, somebody else's bridge and filter, and a bpffs.
type machine struct {
	*node
	ns *netnstest.NS
}

func newMachine(t *testing.T) *machine {
	privileged.Require(t)
	m := &machine{node: newNode(t), ns: netnstest.New(t)}
	for _, dir := range []string{"/sys/fs/bpf", "/run", "/var/lib", "/etc/cni/net.d", "/opt/cni/bin"} {
		m.must(os.MkdirAll(m.at(dir), 0o755))
	}
	m.must(unix.Mount("bpf", m.at("/sys/fs/bpf"), "bpf", 0, ""))
	t.Cleanup(func() {
		if err := unix.Unmount(m.at("/sys/fs/bpf"), unix.MNT_DETACH); err != nil {
			t.Errorf("unmount bpffs: %v", err)
		}
	})
	m.write(m.at("/opt/cni/bin/bridge"), "somebody else's plugin", 0o755)
	m.write(m.at("/etc/cni/net.d/20-other.conflist"), "{}", 0o644)
	m.ns.Do(func() {
		m.must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs("eth0"), PeerName: "wan0"}))
		m.must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs("eth1"), PeerName: "wan1"}))
		m.must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs("veth1234"), PeerName: "other"}))
		for _, name := range []string{"eth0", "eth1", "veth1234"} {
			m.must(netlink.LinkSetUp(m.device(name)))
		}
		m.ip("address", "add", "192.0.2.1/24", "dev", "eth0")
		m.nft("table inet others { chain input { type filter hook input priority 0; udp dport 8472 accept; }; }")
		m.nft("table ip margay {}") // of another family, so not ours
		m.ip("-6", "address", "add", "2001:db8::1/64", "dev", "eth0", "nodad")
		m.await("ip -6 route show table local", "local 2001:db8::1 ")
		m.clsact("eth1")
		m.filter("eth1", netlink.HANDLE_MIN_INGRESS, "others", m.program())
	})
	return m
}

func attrs(name string) netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	a.Name = name
	return a
}

func (m *machine) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) device(name string) netlink.Link {
	m.t.Helper()
	l, err := netlink.LinkByName(name)
	m.must(err)
	return l
}

func (m *machine) ip(args ...string) {
	m.t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		m.t.Fatalf("ip %v: %v: %s", args, err, out)
	}
}

func (m *machine) nft(rules string) {
	m.t.Helper()
	if out, err := exec.Command("nft", rules).CombinedOutput(); err != nil {
		m.t.Fatalf("nft %s: %v: %s", rules, err, out)
	}
}

// await runs a command until it prints want: the kernel adds the route of an IPv6 address from a work queue.
func (m *machine) await(command, want string) {
	m.t.Helper()
	words := strings.Fields(command)
	for deadline := time.Now().Add(10 * time.Second); ; {
		out, err := exec.Command(words[0], words[1:]...).CombinedOutput()
		m.must(err)
		if strings.Contains(string(out), want) {
			return
		}
		if time.Now().After(deadline) {
			m.t.Fatalf("%s = %s, want %q in it", command, out, want)
		}
	}
}

func (m *machine) clsact(device string) {
	m.t.Helper()
	m.must(netlink.QdiscAdd(&netlink.GenericQdisc{QdiscType: "clsact", QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: m.device(device).Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}))
}

func (m *machine) filter(device string, parent uint32, name string, program *ebpf.Program) {
	m.t.Helper()
	m.must(netlink.FilterAdd(&netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: m.device(device).Attrs().Index, Parent: parent, Protocol: unix.ETH_P_ALL, Priority: 7},
		Fd:          program.FD(), Name: name, DirectAction: true,
	}))
}

func (m *machine) program() *ebpf.Program {
	m.t.Helper()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "pass", Type: ebpf.SchedCLS, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	m.must(err)
	m.t.Cleanup(func() { program.Close() })
	return program
}

// run runs margay-install inside the node's network namespace.
func (m *machine) run(args ...string) (code int, out string) {
	m.t.Helper()
	m.ns.Do(func() { code, out = m.node.run(args...) })
	return code, out
}

func (m *machine) ok(args ...string) string {
	m.t.Helper()
	code, out := m.run(args...)
	if code != exitOK {
		m.t.Fatalf("margay-install %v = exit code %d, want %d:\n%s", args, code, exitOK, out)
	}
	return out
}

// occupy does to the machine what Margay at work does: pins, filters on a NIC and on an adopted interface, a pod's device and route, an
// nftables table, a record, leases, changed settings.
func (m *machine) occupy() {
	m.t.Helper()
	m.ok("--bin-dir", "/usr/local/bin")
	pinned := m.program()
	m.must(os.MkdirAll(m.at("/sys/fs/bpf/margay/progs/build1"), 0o700))
	m.must(os.MkdirAll(m.at("/sys/fs/bpf/margay/maps"), 0o700))
	m.must(pinned.Pin(m.at("/sys/fs/bpf/margay/progs/build1/from_netdev")))
	table, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	m.must(err)
	m.must(errors.Join(table.Pin(m.at("/sys/fs/bpf/margay/maps/node_state_v1")), table.Close()))

	settings := map[string]string{}
	m.ns.Do(func() {
		m.clsact("eth0")
		m.filter("eth0", netlink.HANDLE_MIN_INGRESS, "from_netdev", pinned)
		m.filter("eth1", netlink.HANDLE_MIN_EGRESS, "margay/to_netdev", m.program())
		m.clsact("veth1234")
		m.filter("veth1234", netlink.HANDLE_MIN_INGRESS, "margay/from_pod", m.program())
		m.filter("veth1234", netlink.HANDLE_MIN_EGRESS, "margay/to_pod", m.program())
		m.must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs("mgy0123"), PeerName: "pod"}))
		m.must(netlink.LinkSetUp(m.device("mgy0123")))
		m.ip("route", "add", "10.244.0.9/32", "dev", "mgy0123", "proto", "77")
		m.ip("-6", "route", "add", "fd00:244::9/128", "dev", "mgy0123", "proto", "77")
		m.ip("route", "add", "10.96.0.0/12", "dev", "eth0", "proto", "77")
		m.ip("-6", "route", "add", "fd00:96::/112", "dev", "eth0", "proto", "77", "table", "100")
		m.ip("link", "add", "vx0", "type", "vxlan", "external", "gbp", "dstport", "8472")
		m.ip("link", "set", "vx0", "alias", "margay overlay")
		m.ip("link", "set", "vx0", "up")
		m.ip("route", "add", "10.245.0.0/24", "dev", "vx0", "proto", "78", "metric", "1024")
		m.ip("route", "add", "10.246.0.0/24", "via", "192.0.2.2", "proto", "78", "metric", "1024")
		m.ip("-6", "route", "add", "fd00:246::/64", "via", "2001:db8::2", "proto", "78")
		m.ip("route", "add", "unreachable", "10.244.0.0/24", "proto", "78", "metric", "16777216")
		m.ip("-6", "route", "add", "unreachable", "fd00:244::/64", "proto", "78", "metric", "16777216")
		m.nft("table inet " + netfilter.Table + " { chain overlay-out { type filter hook output priority raw; udp dport 8472 notrack; }; }")
		for _, s := range []string{"net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding", "net/ipv4/conf/mgy0123/rp_filter", "net/ipv4/ip_local_reserved_ports"} {
			path := filepath.Join("/proc/sys", strings.TrimPrefix(s, "/proc/sys/"))
			before, err := os.ReadFile(path)
			m.must(err)
			settings[s] = string(before)
			m.must(os.WriteFile(path, []byte("1"), 0))
		}
	})
	m.must(os.MkdirAll(m.at("/run/margay/ipam/margay"), 0o755))
	m.write(m.at("/run/margay/ipam/margay/leases"), "10.244.0.9", 0o644)
	text, err := json.Marshal(settings)
	m.must(err)
	m.write(m.at("/run/margay/sysctls.json"), string(text), 0o644)
	m.write(m.at("/run/margay/node.json"), `{"version":1,"mtu":1450}`, 0o644)
	m.must(endpoint.NewStore(m.at("/run/margay")).Save(&endpoint.Record{
		ContainerID: "c1", IfName: "eth0", Namespace: "default", Name: "web", HostIfName: "mgy0123",
		Addresses: []netip.Addr{netip.MustParseAddr("10.244.0.9"), netip.MustParseAddr("fd00:244::9")},
	}))
}

// state is everything that a person could find on the machine: files, devices, addresses, routes, filters, settings.
func (m *machine) state() map[string]string {
	m.t.Helper()
	found := m.tree()
	// The kernel's own comings and goings: indices, ports of multicast groups, and the age of things.
	volatile := regexp.MustCompile(`(?m)^\d+: | id \d+| tag [0-9a-f]+| expires \d+sec|(@if|@)\d+| jited`)
	m.ns.Do(func() {
		for _, command := range []string{
			"ip -details link", "ip address", "ip route show table all", "ip -6 route show table all", "ip rule", "ip neigh", "tc qdisc",
			"tc filter show dev eth0 ingress", "tc filter show dev eth0 egress", "tc filter show dev eth1 ingress", "tc filter show dev eth1 egress",
			"tc filter show dev veth1234 ingress", "tc filter show dev veth1234 egress", "nft list ruleset",
			"cat /proc/sys/net/ipv4/ip_forward", "cat /proc/sys/net/ipv4/ip_local_reserved_ports", "cat /proc/sys/net/ipv6/conf/all/forwarding",
		} {
			words := strings.Fields(command)
			out, err := exec.Command(words[0], words[1:]...).CombinedOutput()
			if err != nil {
				m.t.Fatalf("%s: %v: %s", command, err, out)
			}
			found[command] = volatile.ReplaceAllString(string(out), "")
		}
	})
	return found
}

func TestM3_UninstallLeavesNothing(t *testing.T) {
	m := newMachine(t)
	before := m.state()
	m.occupy()
	if cmp.Equal(before, m.state()) {
		t.Fatal("the comparison does not see what Margay did to the machine")
	}
	out := m.ok("--uninstall", "--force")
	if diff := cmp.Diff(before, m.state()); diff != "" {
		t.Errorf("machine before installing and after uninstalling (-before +after):\n%s\nprinted:\n%s", diff, out)
	}
	if out := m.ok("--uninstall"); out != "" {
		t.Errorf("the second --uninstall printed %q, want nothing", out)
	}
}

// TestUninstallInterrupted ends the process after each step, and lets a second run do the rest.
func TestUninstallInterrupted(t *testing.T) {
	for step := 0; ; step++ {
		m := newMachine(t)
		before := m.state()
		m.occupy()
		ctx, cancel := context.WithCancel(t.Context())
		var code int
		m.ns.Do(func() {
			code = run(ctx, []string{"--uninstall", "--force", "--root", m.root}, &cancelAfter{lines: step, cancel: cancel}, io.Discard)
		})
		cancel()
		m.ok("--uninstall", "--force")
		if diff := cmp.Diff(before, m.state()); diff != "" {
			t.Fatalf("interrupted after %d lines, then repeated (-before +after):\n%s", step, diff)
		}
		if code == exitOK {
			if step < 15 {
				t.Errorf("uninstalling had %d steps, want at least 15", step)
			}
			return
		}
	}
}

// cancelAfter cancels when that many lines were printed.
type cancelAfter struct {
	lines  int
	cancel context.CancelFunc
}

func (c *cancelAfter) Write(p []byte) (int, error) {
	if c.lines -= strings.Count(string(p), "\n"); c.lines <= 0 {
		c.cancel()
	}
	return len(p), nil
}

func TestUninstallDryRun(t *testing.T) {
	m := newMachine(t)
	m.occupy()
	before := m.state()
	out := m.ok("--uninstall", "--dry-run")
	if diff := cmp.Diff(before, m.state()); diff != "" {
		t.Errorf("--dry-run changed the machine (-before +after):\n%s", diff)
	}
	for _, want := range []string{
		"in use        pod default/web, eth0 on mgy0123: 10.244.0.9 fd00:244::9",
		"conflist " + conflistPath, "device mgy0123", "tc filters on eth0: ingress from_netdev", "tc filters on veth1234: ingress margay/from_pod, egress margay/to_pod",
		"route 10.96.0.0/12", "route fd00:96::/112", "nftables table inet margay", "maps/node_state_v1", "changed setting net/ipv4/ip_forward, back to 0",
		"changed setting net/ipv4/ip_local_reserved_ports, back to nothing",
		"run directory /run/margay", "binary /usr/local/bin/margayctl", "binary /opt/cni/bin/margay-ipam",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("inventory lacks %q:\n%s", want, out)
		}
	}
}

func TestUninstallRefusesWhileInUse(t *testing.T) {
	tests := []struct {
		name   string
		use    func(m *machine) // on top of a machine without pods
		refuse bool
		text   string
	}{
		{"nothing", func(*machine) {}, false, ""},
		{"attached pod", func(m *machine) { m.record("eth0") }, true, "pod default/web"},
		{"record of a pod that is gone", func(m *machine) { m.record("mgygone") }, false, ""},
		{"damaged record", func(m *machine) {
			m.record("mgygone")
			m.write(m.at("/run/margay/endpoints/c2-eth0.json"), "{", 0o644)
		}, true, "c2-eth0.json"},
		{"agent", func(m *machine) {
			m.must(os.MkdirAll(m.at("/run/margay"), 0o755))
			l, err := net.Listen("unix", m.at("/run/margay/agent.sock"))
			m.must(err)
			m.t.Cleanup(func() { l.Close() })
		}, true, "agent listening"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t)
			m.ok()
			tt.use(m)
			before := m.tree()
			code, out := m.run("--uninstall")
			if want := map[bool]int{true: exitFailed, false: exitOK}[tt.refuse]; code != want || !strings.Contains(out, tt.text) {
				t.Fatalf("--uninstall = exit code %d, want %d and %q in:\n%s", code, want, tt.text, out)
			}
			if diff := cmp.Diff(before, m.tree()); tt.refuse && diff != "" {
				t.Errorf("a refused --uninstall changed the machine (-before +after):\n%s", diff)
			}
			m.ok("--uninstall", "--force")
			if _, err := os.Stat(m.at("/run/margay")); err == nil {
				t.Error("--uninstall --force left /run/margay")
			}
		})
	}
}

// record writes the record of a pod whose host-side device has that name.
func (m *machine) record(device string) {
	m.t.Helper()
	m.must(endpoint.NewStore(m.at("/run/margay")).Save(&endpoint.Record{
		ContainerID: "c1", IfName: "eth0", Namespace: "default", Name: "web", HostIfName: device,
		Addresses: []netip.Addr{netip.MustParseAddr("10.244.0.9")},
	}))
}

// TestUninstallAfterKilledInstall: temporary files of a run that was killed go too.
func TestUninstallAfterKilledInstall(t *testing.T) {
	m := newMachine(t)
	before := m.state()
	m.ok()
	m.must(os.Remove(m.at(conflistPath)))
	m.write(m.at("/opt/cni/bin/"+tempPrefix+"1"+tempSuffix), "half a bin", 0o600)
	m.write(m.at("/etc/cni/net.d/"+tempPrefix+"2"+tempSuffix), "half a con", 0o600)
	m.ok("--uninstall")
	if diff := cmp.Diff(before, m.state()); diff != "" {
		t.Errorf("machine before installing and after uninstalling (-before +after):\n%s", diff)
	}
}

// TestUninstallKeepsOthersFiles: a directory that we made stays when somebody else has put a file there.
func TestUninstallKeepsOthersFiles(t *testing.T) {
	m := newMachine(t)
	m.ok("--bin-dir", "/usr/local/bin")
	m.write(m.at("/usr/local/bin/other"), "", 0o755)
	out := m.ok("--uninstall")
	if _, err := os.Stat(m.at("/usr/local/bin/other")); err != nil {
		t.Error(err)
	}
	if want := "kept          directory /usr/local/bin"; !strings.Contains(out, want) {
		t.Errorf("--uninstall printed\n%s\nwant %q in it", out, want)
	}
}

// TestUninstallGoesOnAfterErrors: damaged files hinder nothing but themselves, and the exit code says so.
func TestUninstallGoesOnAfterErrors(t *testing.T) {
	m := newMachine(t)
	m.occupy()
	m.write(m.at("/run/margay/sysctls.json"), `{"../../etc/shadow": "1", "net/ipv4/ip_forward": "0"}`, 0o644)
	code, out := m.run("--uninstall", "--force")
	if code != exitFailed || !strings.Contains(out, "no kernel setting") {
		t.Errorf("--uninstall = exit code %d, want %d and the bad setting named:\n%s", code, exitFailed, out)
	}
	for _, gone := range []string{conflistPath, "/opt/cni/bin/margay", "/sys/fs/bpf/margay"} {
		if _, err := os.Lstat(m.at(gone)); err == nil {
			t.Errorf("%s is still there", gone)
		}
	}
}
