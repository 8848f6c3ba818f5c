// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/privileged"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/flow"
	"github.com/margay-cni/margay/pkg/pins"
)

var update = flag.Bool("update", false, "write the golden files anew")

const (
	tcp, udp = 6, 17
	// gone is a device index that no device has; 1 is the loopback device of every network namespace.
	gone, loopback = 999999, 1
)

// family is one address family's cast.
type family struct {
	name                                  string
	client, web1, web2, service, external netip.Addr
	cidr                                  netip.Prefix
	otherNode, otherPod                   netip.Addr
	otherRange                            netip.Prefix
}

func families() []family {
	a := netip.MustParseAddr
	return []family{
		{"ipv4", a("10.1.0.5"), a("10.1.0.7"), a("10.1.0.8"), a("10.96.0.10"), a("192.0.2.9"), netip.MustParsePrefix("192.0.2.0/24"),
			a("198.51.100.2"), a("10.2.0.7"), netip.MustParsePrefix("10.2.0.0/16")},
		{"ipv6", a("fd00:1::5"), a("fd00:1::7"), a("fd00:1::8"), a("fd00:96::10"), a("2001:db8::9"), netip.MustParsePrefix("2001:db8::/32"),
			a("fd00:f::2"), a("fd00:2::7"), netip.MustParsePrefix("fd00:2::/48")},
	}
}

// testNode is a node as the datapath, the plugin and the agent leave it: pinned maps in a bpffs of its own, and a run directory.
type testNode struct {
	family
	bpffs, run string
	maps       map[string]*ebpf.Map
}

func newNode(t *testing.T, f family) *testNode {
	t.Helper()
	privileged.Require(t)
	n := &testNode{family: f, run: t.TempDir(), maps: map[string]*ebpf.Map{}}
	mount := t.TempDir()
	if err := unix.Mount("bpf", mount, "bpf", 0, ""); err != nil {
		t.Fatalf("mount a bpffs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mount, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount the bpffs: %v", err)
		}
	})
	n.bpffs = filepath.Join(mount, "margay")
	if err := os.MkdirAll(filepath.Join(n.bpffs, "maps"), 0o700); err != nil {
		t.Fatal(err)
	}
	const noPrealloc = 1
	pin[bpf.FlowKey, bpf.Flow](t, n, "flows", ebpf.LRUHash, 1024, 0)
	pin[bpf.Addr, bpf.Endpoint](t, n, "endpoints", ebpf.Hash, 64, noPrealloc)
	pin[bpf.IPCacheKey, bpf.IPCacheEntry](t, n, "ipcache", ebpf.LPMTrie, 64, noPrealloc)
	pin[bpf.FrontendKey, bpf.Service](t, n, "services", ebpf.Hash, 64, noPrealloc)
	pin[bpf.BackendKey, bpf.Backend](t, n, "backends", ebpf.Hash, 64, noPrealloc)
	pin[bpf.PolicyKey, bpf.PolicyEntry](t, n, "policy", ebpf.LPMTrie, 64, noPrealloc)
	pin[uint32, bpf.Counter](t, n, "counters", ebpf.PerCPUArray, 128, 0)
	pinSpec(t, n, "events", &ebpf.MapSpec{Type: ebpf.RingBuf, MaxEntries: 1 << 16})
	return n
}

func pin[K, V any](t *testing.T, n *testNode, name string, typ ebpf.MapType, entries, flags uint32) {
	t.Helper()
	var (
		k K
		v V
	)
	pinSpec(t, n, name, &ebpf.MapSpec{
		Name: name, Type: typ, KeySize: uint32(unsafe.Sizeof(k)), ValueSize: uint32(unsafe.Sizeof(v)), MaxEntries: entries, Flags: flags,
	})
}

func pinSpec(t *testing.T, n *testNode, name string, spec *ebpf.MapSpec) {
	t.Helper()
	m, err := ebpf.NewMap(spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	if err := m.Pin(pins.MapPath(datapath.Config{BPFFS: n.bpffs}, name)); err != nil {
		t.Fatal(err)
	}
	n.maps[name] = m
}

func (n *testNode) put(t *testing.T, name string, k, v any) {
	t.Helper()
	if err := n.maps[name].Put(k, v); err != nil {
		t.Fatal(err)
	}
}

// addPod writes a record and, with an ifindex, the endpoint.
func (n *testNode) addPod(t *testing.T, name string, a netip.Addr, e bpf.Endpoint) {
	t.Helper()
	r := &endpoint.Record{
		ContainerID: "c-" + name, IfName: "eth0", Namespace: "default", Name: name, Addresses: []netip.Addr{a},
		MAC: "02:00:00:00:00:01", HostMAC: "02:00:00:00:00:02", HostIfName: "veth" + name, HostIfindex: gone,
	}
	if err := endpoint.NewStore(n.run).Save(r); err != nil {
		t.Fatal(err)
	}
	if e.Ifindex != 0 {
		n.put(t, "endpoints", bpf.NewAddr(a), e)
	}
}

// addPods connects the cast: client is isolated for egress, web-1 for ingress, web-2 has a record only.
func (n *testNode) addPods(t *testing.T) {
	t.Helper()
	n.addPod(t, "client", n.client, bpf.Endpoint{Ifindex: loopback, Identity: 17, PolicyId: [2]uint32{bpf.Egress: 18}, Mac: [6]uint8{2, 5: 1}})
	n.addPod(t, "web-1", n.web1, bpf.Endpoint{
		Ifindex: gone, Identity: 20, PolicyId: [2]uint32{bpf.Egress: bpf.PolicyNodeOnly, bpf.Ingress: 19}, Flags: bpf.EndpointPending,
	})
	n.addPod(t, "web-2", n.web2, bpf.Endpoint{})
}

func (n *testNode) write(t *testing.T, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(n.run, name), []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (n *testNode) addNames(t *testing.T) {
	t.Helper()
	n.write(t, flow.ServicesFile, `{"4":"default/web:http"}`)
	n.write(t, flow.RulesFile, `{"30":"default/allow-web egress[0]","31":"default/allow-client ingress[0]"}`)
}

// ctl runs the command line against the node and returns what it printed.
func (n *testNode) ctl(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var out, errs bytes.Buffer
	code = run(ctx, append([]string{"--bpffs", n.bpffs, "--run", n.run}, args...), &out, &errs)
	return out.String(), errs.String(), code
}

// golden compares the output of a successful command with testdata/<name>.golden.
func (n *testNode) golden(t *testing.T, name string, args ...string) {
	t.Helper()
	out, errs, code := n.ctl(t, args...)
	if code != 0 || errs != "" {
		t.Fatalf("margayctl %v = %d, stderr %q; want 0, nothing", args, code, errs)
	}
	compareGolden(t, name+"-"+n.name, out)
}

func compareGolden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("output differs from %s (-want +got):\n%s", file, diff)
	}
	for line := range strings.Lines(got) {
		if strings.TrimRight(line, " \n") != strings.TrimRight(line, "\n") {
			t.Errorf("line %q ends in spaces", line)
		}
	}
}

// decode runs the command with -o json and decodes its document; unknown fields are a test that fell behind.
func (n *testNode) decode(t *testing.T, v any, args ...string) {
	t.Helper()
	out, errs, code := n.ctl(t, append(args, "-o", "json")...)
	if code != 0 || errs != "" {
		t.Fatalf("margayctl %v = %d, stderr %q; want 0, nothing", args, code, errs)
	}
	d := json.NewDecoder(strings.NewReader(out))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		t.Fatalf("margayctl %v: decode %q: %v", args, out, err)
	}
}
