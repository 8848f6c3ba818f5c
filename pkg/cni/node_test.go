// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/privileged"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/ipam"
	"github.com/margay-cni/margay/pkg/pins"
)

// fakePlane is a datapath in memory. It forgets an attachment with its device only when told so, as a real device does it itself: see
// node.state.
type fakePlane struct {
	mu        sync.Mutex
	entries   map[netip.Addr]bpf.Endpoint
	pending   map[bpf.PendingKey]bpf.Pending
	attached  map[int]bool
	ports     map[bpf.FrontendKey]bpf.Service
	targets   map[uint32]netip.AddrPort // of hostPorts, by id
	absent    bool                      // nothing is pinned
	onPut     func(int)                 // called with the number of the put, before it
	onPort    func(half bool)           // called before a hostPort is made, and half-way
	onPending func(call int)            // called with the number of the look-up, before it
	puts      int
	lookups   int
	faults    map[string]error // by method
}

func newFakePlane() *fakePlane {
	return &fakePlane{entries: map[netip.Addr]bpf.Endpoint{}, pending: map[bpf.PendingKey]bpf.Pending{}, attached: map[int]bool{},
		ports: map[bpf.FrontendKey]bpf.Service{}, targets: map[uint32]netip.AddrPort{}, faults: map[string]error{}}
}

func (f *fakePlane) AttachPod(ifindex int) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.attached[ifindex] = true
	return f.faults["AttachPod"]
}

func (f *fakePlane) DetachPod(ifindex int) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.attached, ifindex)
	return f.faults["DetachPod"]
}

func (f *fakePlane) PodAttached(ifindex int) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.attached[ifindex] {
		return errors.New("no program")
	}
	return nil
}

func (f *fakePlane) PutEndpoint(a netip.Addr, e bpf.Endpoint) error {
	if f.onPut != nil {
		f.onPut(f.puts)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.puts++
	if err := f.faults["PutEndpoint"]; err != nil {
		return err
	}
	f.entries[a] = e
	return nil
}

func (f *fakePlane) DeleteEndpoint(a netip.Addr, ifindex int) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if e, ok := f.entries[a]; ok && (ifindex == 0 || int(e.Ifindex) == ifindex) {
		delete(f.entries, a)
	}
	return f.faults["DeleteEndpoint"]
}

func (f *fakePlane) LookupEndpoint(a netip.Addr) (bpf.Endpoint, bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	e, ok := f.entries[a]
	return e, ok, f.faults["LookupEndpoint"]
}

func (f *fakePlane) LookupPending(k bpf.PendingKey) (bpf.Pending, bool, error) {
	if f.onPending != nil {
		f.onPending(f.lookups)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lookups++
	e, ok := f.pending[k]
	return e, ok, f.faults["LookupPending"]
}

func (f *fakePlane) Close() error { return nil }

// publish sets a pending entry, as the agent does.
func (f *fakePlane) publish(namespace, name, uid string, p bpf.Pending) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pending[pins.PendingKeyOf(namespace, name, uid)] = p
}

// node is a machine of its own: a network namespace, a run directory, and a datapath that is the fake's unless the test replaces it.
type node struct {
	t      *testing.T
	ns     *netnstest.NS
	run    string
	bpffs  string
	plane  *fakePlane
	plugin *Plugin
	out    *bytes.Buffer
	// after is what the plugin calls after each step of ADD.
	after func(step string) error
}

// nodeAddresses are the node's own.
var nodeAddresses = []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("2001:db8:1::1/128")}

func newNode(t *testing.T) *node {
	t.Helper()
	privileged.Require(t)
	n := &node{t: t, ns: netnstest.New(t), run: t.TempDir(), bpffs: "/nowhere", plane: newFakePlane(), out: &bytes.Buffer{}}
	// As /run is: on a disk's filesystem, making and renaming small files would be a fifth of ADD.
	if err := unix.Mount("tmpfs", n.run, "tmpfs", 0, "mode=0755"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(n.run, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount run directory: %v", err)
		}
	})
	n.ns.Do(func() {
		for _, a := range nodeAddresses {
			ip := toIPNet(a)
			if err := netlink.AddrAdd(nil, &netlink.Addr{IPNet: &ip, LinkIndex: 1, Flags: unix.IFA_F_NODAD}); err != nil {
				t.Fatal(err)
			}
		}
	})
	n.awaitNodeAddresses()
	n.plugin = New(n.out)
	n.plugin.ensure = func(context.Context, pins.Config) (dataplane, error) { return n.plane, n.plane.faults["Ensure"] }
	n.plugin.open = func(pins.Config) (dataplane, error) {
		if n.plane.absent {
			return nil, fmt.Errorf("open pins: %w", fs.ErrNotExist)
		}
		return n.plane, nil
	}
	n.plugin.check = func(pins.Config) error { return n.plane.faults["Check"] }
	n.plugin.after = func(step string) error {
		if n.after != nil {
			return n.after(step)
		}
		return nil
	}
	return n
}

// awaitNodeAddresses waits for the kernel's local routes, which it makes in the background even for an address without duplicate address
// detection: they would count as changes of the node's state.
func (n *node) awaitNodeAddresses() {
	n.t.Helper()
	n.ns.Do(func() {
		for _, a := range nodeAddresses {
			for deadline := time.Now().Add(10 * time.Second); ; {
				r, err := netlink.RouteGet(a.Addr().AsSlice())
				if err == nil && len(r) == 1 && r[0].Type == unix.RTN_LOCAL {
					break
				}
				if time.Now().After(deadline) {
					n.t.Fatalf("node address %s is not local: %v, %v", a, r, err)
				}
			}
		}
	})
}

const (
	range4 = "10.42.0.0/24"
	range6 = "fd42::/64"
)

var familyRanges = map[string][]string{
	"IPv4":       {range4},
	"IPv6":       {range6},
	"dual stack": {range4, range6},
}

// conf returns a configuration that uses margay-ipam with the ranges, changed by the tweaks.
func (n *node) conf(ranges []string, tweaks ...func(map[string]any)) []byte {
	n.t.Helper()
	var sets []any
	for _, r := range ranges {
		sets = append(sets, []any{map[string]any{"subnet": r}})
	}
	c := map[string]any{
		"cniVersion": "1.1.0", "name": "net", "type": "margay", "runDir": n.run, "bpffs": n.bpffs, "logLevel": "error",
		"ipam": map[string]any{"type": "margay-ipam", "ranges": sets, "releaseCooldown": 0},
	}
	for _, tweak := range tweaks {
		tweak(c)
	}
	out, err := json.Marshal(c)
	if err != nil {
		n.t.Fatal(err)
	}
	return out
}

func set(key string, value any) func(map[string]any) {
	return func(c map[string]any) { c[key] = value }
}

func unset(key string) func(map[string]any) {
	return func(c map[string]any) { delete(c, key) }
}

const podArgsText = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=1f0c"

func cmdArgs(id, netns string, conf []byte) *Args {
	return &Args{ContainerID: id, Netns: netns, IfName: "eth0", Args: podArgsText, Path: os.Getenv("CNI_PATH"), StdinData: conf}
}

func (n *node) add(args *Args) (*types100.Result, error) {
	n.t.Helper()
	n.out.Reset()
	var err error
	n.ns.Do(func() { err = n.plugin.Add(context.Background(), args) })
	if err != nil {
		return nil, err
	}
	var head struct {
		CNIVersion string `json:"cniVersion"`
	}
	if err := json.Unmarshal(n.out.Bytes(), &head); err != nil {
		n.t.Fatalf("result %s: %v", n.out, err)
	}
	raw, err := create.Create(head.CNIVersion, n.out.Bytes())
	if err != nil {
		n.t.Fatalf("result %s: %v", n.out, err)
	}
	r, err := types100.NewResultFromResult(raw)
	if err != nil {
		n.t.Fatal(err)
	}
	return r, nil
}

func (n *node) mustAdd(args *Args) *types100.Result {
	n.t.Helper()
	r, err := n.add(args)
	if err != nil {
		n.t.Fatalf("ADD %s: %v", args.ContainerID, err)
	}
	return r
}

func (n *node) verb(f func(context.Context, *Args) error, args *Args) (err error) {
	n.ns.Do(func() { err = f(context.Background(), args) })
	return err
}

func (n *node) del(args *Args) error { return n.verb(n.plugin.Del, args) }

// withPrev returns args with the result as prevResult, as DEL and CHECK get it.
func (n *node) withPrev(args *Args, r *types100.Result) *Args {
	n.t.Helper()
	var c map[string]any
	if err := json.Unmarshal(args.StdinData, &c); err != nil {
		n.t.Fatal(err)
	}
	v, err := r.GetAsVersion(c["cniVersion"].(string))
	if err != nil {
		n.t.Fatal(err)
	}
	c["prevResult"] = v
	out := *args
	if out.StdinData, err = json.Marshal(c); err != nil {
		n.t.Fatal(err)
	}
	return &out
}

// state lists everything on the node that an ADD could leave: devices, addresses, routes, neighbours, files, leases, map entries, programs.
func (n *node) state() []string {
	n.t.Helper()
	var out []string
	note := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	n.ns.Do(func() {
		links, err := netlink.LinkList()
		if err != nil {
			n.t.Fatal(err)
		}
		present := map[int]bool{}
		for _, l := range links {
			note("device %s", l.Attrs().Name)
			present[l.Attrs().Index] = true
		}
		n.plane.mu.Lock()
		for _, i := range slices.Sorted(maps.Keys(n.plane.attached)) {
			if present[i] { // a program goes with its device
				note("programs on %d", i)
			}
		}
		for a := range n.plane.entries {
			note("endpoint %s", a)
		}
		for f, s := range n.plane.ports {
			note("frontend %s %d", netip.AddrPortFrom(f.Addr.Netip(), bpf.Port16(f.Port)), s.Id)
		}
		for id, to := range n.plane.targets {
			note("hostPort %d to %s", id, to)
		}
		n.plane.mu.Unlock()
		for _, a := range n.pinnedEndpoints() {
			note("endpoint %s", a)
		}
		for _, f := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			routes, err := netlink.RouteListFiltered(f, &netlink.Route{}, netlink.RT_FILTER_TABLE)
			if err != nil {
				n.t.Fatal(err)
			}
			for _, r := range routes {
				note("route %s", r)
			}
			neighs, err := netlink.NeighList(0, f)
			if err != nil {
				n.t.Fatal(err)
			}
			for _, e := range neighs {
				note("neighbour %s on %d", e.IP, e.LinkIndex)
			}
		}
	})
	leases, err := ipam.Leases(context.Background(), n.ipamConfig())
	if err != nil {
		n.t.Fatal(err)
	}
	for _, l := range leases {
		note("lease %s %v", l.ContainerID, l.Addresses)
	}
	_ = filepath.WalkDir(n.run, func(path string, d fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(n.run, path)
		if err == nil && !d.IsDir() && !strings.HasPrefix(rel, "ipam/") && strings.Contains(rel, "/") {
			note("file %s", rel)
		}
		return nil
	})
	sort.Strings(out)
	return out
}

// pinnedEndpoints returns the keys of the real endpoints map, where there is one.
func (n *node) pinnedEndpoints() []netip.Addr {
	n.t.Helper()
	d, err := datapath.Open(pins.Config{BPFFS: n.bpffs, Run: n.run})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		n.t.Fatal(err)
	}
	defer d.Close()
	var (
		out []netip.Addr
		k   bpf.Addr
		e   bpf.Endpoint
	)
	entries := d.Maps.Endpoints.Iterate()
	for entries.Next(&k, &e) {
		out = append(out, k.Netip())
	}
	if err := entries.Err(); err != nil {
		n.t.Fatal(err)
	}
	return out
}

func (n *node) records() *endpoint.Store { return endpoint.NewStore(n.run) }

func (n *node) ipamConfig() *ipam.Config {
	n.t.Helper()
	c, err := ipam.LoadConfig(n.conf(familyRanges["dual stack"]), "")
	if err != nil {
		n.t.Fatal(err)
	}
	return c
}

func code(err error) uint {
	var e *types.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return 0
}
