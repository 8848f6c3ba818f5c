// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/privileged"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/ipam"
)

func TestDelIsIdempotentAndBestEffort(t *testing.T) {
	for name, c := range map[string]struct {
		never  bool // no ADD before
		damage func(t *testing.T, n *node, pod *netnstest.NS, args *Args)
	}{
		"never added":         {never: true},
		"plain":               {},
		"namespace gone":      {damage: func(_ *testing.T, _ *node, pod *netnstest.NS, _ *Args) { pod.Delete() }},
		"namespace not given": {damage: func(_ *testing.T, _ *node, _ *netnstest.NS, a *Args) { a.Netns = "" }},
		"record gone": {damage: func(t *testing.T, n *node, _ *netnstest.NS, _ *Args) {
			if err := os.RemoveAll(filepath.Join(n.run, "endpoints")); err != nil {
				t.Fatal(err)
			}
		}},
		"record damaged": {damage: func(t *testing.T, n *node, _ *netnstest.NS, _ *Args) {
			if err := os.WriteFile(filepath.Join(n.run, "endpoints", "c1-eth0.json"), []byte("{"), 0o644); err != nil {
				t.Fatal(err)
			}
		}},
		"lease gone": {damage: func(t *testing.T, n *node, _ *netnstest.NS, a *Args) {
			if err := ipam.Del(context.Background(), n.ipamConfig(), ipam.Attachment{ContainerID: "c1", IfName: "eth0"}); err != nil {
				t.Fatal(err)
			}
		}},
		"device gone": {damage: func(t *testing.T, _ *node, pod *netnstest.NS, _ *Args) {
			pod.Do(func() {
				l, err := netlink.LinkByName("eth0")
				if err == nil {
					err = netlink.LinkDel(l)
				}
				if err != nil {
					t.Fatal(err)
				}
			})
		}},
		"arguments unusable": {damage: func(_ *testing.T, _ *node, _ *netnstest.NS, a *Args) { a.Args = "X=1;Y" }},
		"configuration wrong": {damage: func(_ *testing.T, n *node, _ *netnstest.NS, a *Args) {
			a.StdinData = n.conf(nil, set("mtu", 1), set("mac", "x"))
		}},
		"ranges changed": {damage: func(_ *testing.T, n *node, _ *netnstest.NS, a *Args) {
			a.StdinData = n.conf([]string{"172.30.0.0/24"})
		}},
	} {
		t.Run(name, func(t *testing.T) {
			n, pod := newNode(t), netnstest.New(t)
			before := n.state()
			args := cmdArgs("c1", pod.Path(), n.conf(familyRanges["dual stack"]))
			if !c.never {
				args = n.withPrev(args, n.mustAdd(args))
			}
			if c.damage != nil {
				c.damage(t, n, pod, args)
			}
			for i := range 3 {
				if err := n.del(args); err != nil {
					t.Errorf("DEL number %d = %v, want nil", i+1, err)
				}
			}
			n.eventually(before)
		})
	}
}

func TestDelWithoutADatapath(t *testing.T) {
	n, pod := newNode(t), netnstest.New(t)
	before := n.state()
	args := cmdArgs("c1", pod.Path(), n.conf([]string{range4}))
	r := n.mustAdd(args)
	n.plane.absent = true
	clear(n.plane.entries)
	if err := n.del(n.withPrev(args, r)); err != nil {
		t.Errorf("DEL = %v, want nil", err)
	}
	if diff := cmp.Diff(before, n.state()); diff != "" {
		t.Errorf("state (-want +got):\n%s", diff)
	}
}

// The lease goes back although the map refuses, and the next DEL still knows what to do.
func TestDelReleasesTheLeaseWhateverFails(t *testing.T) {
	n, pod := newNode(t), netnstest.New(t)
	before := n.state()
	args := cmdArgs("c1", pod.Path(), n.conf([]string{range4}))
	n.mustAdd(args)
	n.plane.faults["DeleteEndpoint"] = errInjected
	if err := n.del(args); code(err) != codeRegister {
		t.Errorf("DEL = %v, want code %d", err, codeRegister)
	}
	if leases, err := ipam.Leases(context.Background(), n.ipamConfig()); err != nil || len(leases) != 0 {
		t.Errorf("leases = %v, %v, want none", leases, err)
	}
	delete(n.plane.faults, "DeleteEndpoint")
	if err := n.del(args); err != nil {
		t.Errorf("second DEL = %v, want nil", err)
	}
	if diff := cmp.Diff(before, n.state()); diff != "" {
		t.Errorf("state (-want +got):\n%s", diff)
	}
}

// A late DEL of an old sandbox must not touch the new one, even when it has the same pod name and the same address.
func TestLateDelOfAnOldSandbox(t *testing.T) {
	n, podA, podB := newNode(t), netnstest.New(t), netnstest.New(t)
	old := cmdArgs("old", podA.Path(), n.conf([]string{range4}))
	r := n.mustAdd(old)
	address := resultAddresses(r)[0]

	// The lease of the old one is lost, and its device and namespace are gone: the new one gets the address.
	if err := ipam.Del(context.Background(), n.ipamConfig(), ipam.Attachment{ContainerID: "old", IfName: "eth0"}); err != nil {
		t.Fatal(err)
	}
	podA.Do(func() {
		l, err := netlink.LinkByName("eth0")
		if err == nil {
			err = netlink.LinkDel(l)
		}
		if err != nil {
			t.Fatal(err)
		}
	})
	fixed := set("runtimeConfig", map[string]any{"ips": []string{address.String()}})
	fresh := cmdArgs("new", podB.Path(), n.conf([]string{range4}, fixed))
	got := n.mustAdd(fresh)
	if resultAddresses(got)[0] != address {
		t.Fatalf("new sandbox has %v, want %s", resultAddresses(got), address)
	}
	if err := n.del(n.withPrev(old, r)); err != nil {
		t.Errorf("DEL of the old sandbox = %v, want nil", err)
	}
	if err := n.verb(n.plugin.Check, n.withPrev(fresh, got)); err != nil {
		t.Errorf("CHECK of the new sandbox = %v, want nil", err)
	}
}

func TestGC(t *testing.T) {
	n := newNode(t)
	pods := map[string]*netnstest.NS{}
	add := func(id, network string) {
		pods[id] = netnstest.New(t)
		n.mustAdd(cmdArgs(id, pods[id].Path(), n.conf([]string{range4}, set("name", network), set("ipam",
			map[string]any{"type": "margay-ipam", "subnet": map[string]string{"net": range4, "other": "10.43.0.0/24"}[network]}))))
	}
	gc := func(valid any) {
		t.Helper()
		tweak := set("cni.dev/valid-attachments", valid)
		if valid == "missing" {
			tweak = unset("cni.dev/valid-attachments")
		}
		if err := n.verb(n.plugin.GC, &Args{StdinData: n.conf([]string{range4}, tweak)}); err != nil {
			t.Fatalf("GC = %v, want nil", err)
		}
	}
	left := func() []string {
		records, err := endpoint.NewStore(n.run).List()
		if err != nil {
			t.Fatal(err)
		}
		var ids []string
		for _, r := range records {
			ids = append(ids, r.ContainerID)
		}
		leases, err := ipam.Leases(context.Background(), n.ipamConfig())
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range leases {
			if !slices.Contains(ids, l.ContainerID) {
				t.Errorf("lease of %s is left without a record", l.ContainerID)
			}
		}
		return ids
	}
	attachments := func(ids ...string) []any {
		var out []any
		for _, id := range ids {
			out = append(out, map[string]any{"containerID": id, "ifname": "eth0"})
		}
		return out
	}
	for _, id := range []string{"a", "b", "c"} {
		add(id, "net")
	}
	add("o", "other")

	for _, empty := range []any{"missing", nil, []any{}} {
		gc(empty)
		if diff := cmp.Diff([]string{"a", "b", "c", "o"}, left()); diff != "" {
			t.Errorf("after GC with %v and all namespaces there (-want +got):\n%s", empty, diff)
		}
	}
	pods["a"].Delete()
	gc("missing")
	if diff := cmp.Diff([]string{"b", "c", "o"}, left()); diff != "" {
		t.Errorf("after GC without a list and a's namespace gone (-want +got):\n%s", diff)
	}
	pods["c"].Delete()
	gc(attachments("c"))
	if diff := cmp.Diff([]string{"c", "o"}, left()); diff != "" {
		t.Errorf("after GC with c alone in the list (-want +got):\n%s", diff)
	}
	if len(n.plane.entries) != 2 {
		t.Errorf("endpoints = %v, want those of c and o", n.plane.entries)
	}
}

func TestStatus(t *testing.T) {
	for name, c := range map[string]struct {
		fault  error
		conf   func(n *node) []byte
		code   uint
		before func(t *testing.T, n *node)
	}{
		"works":               {conf: func(n *node) []byte { return n.conf([]string{range4}) }},
		"datapath impossible": {fault: errInjected, conf: func(n *node) []byte { return n.conf([]string{range4}) }, code: 50},
		"chained":             {conf: func(n *node) []byte { return n.conf(nil, unset("ipam")) }},
		"invalid":             {conf: func(n *node) []byte { return n.conf([]string{range4}, set("mtu", 1)) }, code: 7},
		"addresses exhausted is no failure": {conf: func(n *node) []byte { return n.conf([]string{"10.42.0.0/30"}) },
			before: func(t *testing.T, n *node) {
				n.mustAdd(cmdArgs("a", netnstest.New(t).Path(), n.conf([]string{"10.42.0.0/30"})))
				if _, err := n.add(cmdArgs("b", netnstest.New(t).Path(), n.conf([]string{"10.42.0.0/30"}))); code(err) != 11 {
					t.Errorf("ADD with no address left = %v, want code 11", err)
				}
			}},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			if c.before != nil {
				c.before(t, n)
			}
			if c.fault != nil {
				n.plane.faults["Check"] = c.fault
			}
			before := n.state()
			if err := n.verb(n.plugin.Status, &Args{StdinData: c.conf(n)}); code(err) != c.code {
				t.Errorf("STATUS = %v, want code %d", err, c.code)
			}
			if diff := cmp.Diff(before, n.state()); diff != "" {
				t.Errorf("STATUS changed something (-before +after):\n%s", diff)
			}
		})
	}
}

func TestCheckSeesEachDamage(t *testing.T) {
	inPod := func(f func(l netlink.Link) error) func(*node, *netnstest.NS, *types100.Result) error {
		return func(_ *node, pod *netnstest.NS, _ *types100.Result) (err error) {
			pod.Do(func() {
				var l netlink.Link
				if l, err = netlink.LinkByName("eth0"); err == nil {
					err = f(l)
				}
			})
			return err
		}
	}
	onNode := func(f func(l netlink.Link, r *types100.Result) error) func(*node, *netnstest.NS, *types100.Result) error {
		return func(n *node, _ *netnstest.NS, r *types100.Result) (err error) {
			n.ns.Do(func() {
				var l netlink.Link
				if l, err = netlink.LinkByName(r.Interfaces[0].Name); err == nil {
					err = f(l, r)
				}
			})
			return err
		}
	}
	for name, c := range map[string]struct {
		damage func(n *node, pod *netnstest.NS, r *types100.Result) error
		want   string
		code   uint
	}{
		"pod interface gone": {inPod(netlink.LinkDel), "pod interface", codeCheckMismatch},
		"pod interface down": {inPod(netlink.LinkSetDown), "eth0 is down", codeCheckMismatch},
		"pod MAC":            {inPod(func(l netlink.Link) error { return netlink.LinkSetHardwareAddr(l, []byte{2, 0, 0, 0, 0, 9}) }), "eth0 has MAC 02:00:00:00:00:09", codeCheckMismatch},
		"pod address": {inPod(func(l netlink.Link) error {
			list, err := netlink.AddrList(l, netlink.FAMILY_V4)
			if err != nil || len(list) == 0 {
				return errors.Join(err, errors.New("no address"))
			}
			return netlink.AddrDel(l, &list[0])
		}), "pod address", codeCheckMismatch},
		"pod route": {inPod(func(l netlink.Link) error {
			return netlink.RouteDel(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: nil, Gw: []byte{169, 254, 1, 1}})
		}), "route 0.0.0.0/0 via 169.254.1.1 is missing", codeCheckMismatch},
		"pod neighbour": {inPod(func(l netlink.Link) error {
			return netlink.NeighDel(&netlink.Neigh{LinkIndex: l.Attrs().Index, IP: []byte{169, 254, 1, 1}, Family: unix.AF_INET})
		}), "neighbour 169.254.1.1", codeCheckMismatch},
		"host device down": {onNode(func(l netlink.Link, _ *types100.Result) error { return netlink.LinkSetDown(l) }), "is down", codeCheckMismatch},
		"host route": {onNode(func(l netlink.Link, r *types100.Result) error {
			return netlink.RouteDel(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: &r.IPs[0].Address, Scope: netlink.SCOPE_LINK})
		}), "is missing", codeCheckMismatch},
		"host neighbour": {onNode(func(l netlink.Link, r *types100.Result) error {
			return netlink.NeighDel(&netlink.Neigh{LinkIndex: l.Attrs().Index, IP: r.IPs[0].Address.IP, Family: unix.AF_INET})
		}), "neighbour 10.42.0", codeCheckMismatch},
		"programs": {onNode(func(l netlink.Link, _ *types100.Result) error { return nil }), "no program", codeCheckMismatch},
		"map entry gone": {func(n *node, _ *netnstest.NS, r *types100.Result) error {
			return n.plane.DeleteEndpoint(resultAddresses(r)[1], 0)
		}, "endpoints map lacks fd42::", codeCheckMismatch},
		"map entry of another": {func(n *node, _ *netnstest.NS, r *types100.Result) error {
			return n.plane.PutEndpoint(resultAddresses(r)[0], bpf.Endpoint{Ifindex: 9999})
		}, "behind device 9999", codeCheckMismatch},
		"record gone": {func(n *node, _ *netnstest.NS, _ *types100.Result) error {
			return endpoint.NewStore(n.run).Delete("c1", "eth0")
		}, "record", codeCheckMismatch},
		"lease gone": {func(n *node, _ *netnstest.NS, _ *types100.Result) error {
			return ipam.Del(context.Background(), n.ipamConfig(), ipam.Attachment{ContainerID: "c1", IfName: "eth0"})
		}, "margay-ipam", 100},
		"address not in prevResult": {func(_ *node, _ *netnstest.NS, r *types100.Result) error {
			r.IPs = r.IPs[:1]
			return nil
		}, "prevResult lacks address fd42::", codeCheckMismatch},
		"address only in prevResult": {func(_ *node, _ *netnstest.NS, r *types100.Result) error {
			extra := *r.IPs[0]
			extra.Address = toIPNet(netip.MustParsePrefix("10.42.0.99/32"))
			r.IPs = append(r.IPs, &extra)
			return nil
		}, "prevResult has address 10.42.0.99", codeCheckMismatch},
	} {
		t.Run(name, func(t *testing.T) {
			n, pod := newNode(t), netnstest.New(t)
			args := cmdArgs("c1", pod.Path(), n.conf(familyRanges["dual stack"]))
			r := n.mustAdd(args)
			if err := n.verb(n.plugin.Check, n.withPrev(args, r)); err != nil {
				t.Fatalf("CHECK before the damage = %v, want nil", err)
			}
			if err := c.damage(n, pod, r); err != nil {
				t.Fatal(err)
			}
			if name == "programs" {
				clear(n.plane.attached)
			}
			err := n.verb(n.plugin.Check, n.withPrev(args, r))
			if code(err) != c.code || !strings.Contains(err.Error(), c.want) {
				t.Errorf("CHECK = %v with code %d, want %q with code %d", err, code(err), c.want, c.code)
			}
		})
	}
}

func TestCommandsOfOneAttachmentExcludeEachOther(t *testing.T) {
	dir := t.TempDir()
	lock, err := lockAttachment(context.Background(), dir, "c1", "eth0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := lockAttachment(ctx, dir, "c1", "eth0"); code(err) != 11 {
		t.Errorf("second lock = %v, want code 11", err)
	}
	if other, err := lockAttachment(context.Background(), dir, "c2", "eth0"); err != nil {
		t.Errorf("lock of another attachment = %v, want nil", err)
	} else if err := other.release(); err != nil {
		t.Error(err)
	}
	if err := lock.release(); err != nil {
		t.Error(err)
	}
	if left, _ := os.ReadDir(filepath.Join(dir, "locks")); len(left) != 0 {
		t.Errorf("lock files %v are left, want none", left)
	}
}

// The lock file is removed by each holder: nobody may get in with a file that is no longer the one at the path.
func TestLockIsExclusiveWhileFilesComeAndGo(t *testing.T) {
	dir := t.TempDir()
	var (
		wg     sync.WaitGroup
		mu     sync.Mutex
		inside int
	)
	for range 8 {
		wg.Go(func() {
			for range 50 {
				lock, err := lockAttachment(context.Background(), dir, "c1", "eth0")
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				inside++
				if inside != 1 {
					t.Errorf("%d holders at once", inside)
				}
				mu.Unlock()
				mu.Lock()
				inside--
				mu.Unlock()
				if err := lock.release(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

// Two hundred pods come and go at once; nothing of them stays.
func TestConcurrentAddAndDel(t *testing.T) {
	privileged.Require(t)
	n := newNode(t)
	before := n.state()
	const pods = 200
	namespaces := make([]*netnstest.NS, pods)
	for i := range namespaces {
		namespaces[i] = netnstest.New(t)
	}
	conf := n.conf(familyRanges["dual stack"], set("name", "net"))
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		seen = map[netip.Addr]string{}
	)
	for i := range pods {
		wg.Go(func() {
			p := *n.plugin // results of its own
			var out strings.Builder
			p.stdout = &out
			id := fmt.Sprintf("c%d", i)
			args := cmdArgs(id, namespaces[i].Path(), conf)
			n.ns.Do(func() {
				if err := p.Add(context.Background(), args); err != nil {
					t.Errorf("ADD %s: %v", id, err)
				}
			})
			rec, err := endpoint.NewStore(n.run).Load(id, "eth0")
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			for _, a := range rec.Addresses {
				if other, ok := seen[a]; ok {
					t.Errorf("%s and %s both have %s", other, id, a)
				}
				seen[a] = id
			}
			mu.Unlock()
		})
	}
	wg.Wait()
	for i := range pods {
		wg.Go(func() {
			p := *n.plugin
			id := fmt.Sprintf("c%d", i)
			n.ns.Do(func() {
				if err := p.Del(context.Background(), cmdArgs(id, namespaces[i].Path(), conf)); err != nil {
					t.Errorf("DEL %s: %v", id, err)
				}
			})
		})
	}
	wg.Wait()
	if diff := cmp.Diff(before, n.state()); diff != "" {
		t.Errorf("state (-want +got):\n%s", diff)
	}
}
