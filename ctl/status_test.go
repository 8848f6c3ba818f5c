// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/datapath"
)

// agentAnswers is what an agent says that works, and one that has things to report.
const (
	healthyAgent = `{"version":"v0.1.0","pid":4711,"started":"2026-01-02T03:04:05Z","ready":true,
		"last":{"counts":{"pods":3,"services":2,"policies":1},"problems":[],"faults":[]},"source":[]}`
	troubledAgent = `{"version":"v0.1.0","pid":4711,"started":"2026-01-02T03:04:05Z","ready":false,
		"last":{"problems":["NetworkPolicy web/api: spec.podSelector is missing"],
			"faults":[{"map":"services","error":"write map services: no space left","cure":"raise its size"}],
			"devices":[{"name":"eth0"},{"name":"eth1","error":"attach from_netdev: no such device"}]},
		"source":[{"file":"svc.yaml","line":12,"object":"Service web/api","message":"port 70000 is outside 1 to 65535"}]}`
)

func TestStatusTable(t *testing.T) {
	now := time.Date(2026, 1, 2, 6, 9, 5, 0, time.UTC)
	entries, full := 1200, 63000
	for name, st := range map[string]*nodeStatus{
		"status-healthy": {
			Loaded: true, BPFFS: "/sys/fs/bpf/margay", now: now,
			Programs: []buildInfo{{"1a2b3c4d", []string{"from_netdev", "from_pod", "to_pod"}}},
			Agent:    agentInfo{Running: true, Status: []byte(healthyAgent)},
			Maps: []mapInfo{
				{Name: "counters", Type: "PerCPUArray", Capacity: 128, MemoryBytes: 8192},
				{Name: "flows", Type: "LRUHash", Entries: &entries, Capacity: 131072, MemoryBytes: 28 << 20},
				{Name: "services", Type: "Hash", Entries: &full, Capacity: 65536, MemoryBytes: 5 << 20},
			},
			Devices: []deviceInfo{
				{Device: "eth0", Ifindex: 2, Kind: "node", Attached: true, Programs: []string{"from_netdev", "to_netdev"}, TCX: true},
				{Device: "margay.vxlan", Ifindex: 9, Kind: "overlay", Attached: true, Programs: []string{"from_overlay", "to_overlay"}, TCX: true},
				{Device: "mgy12ab34cd", Ifindex: 7, Kind: "pod", Pod: "default/client", Attached: true, Programs: []string{"from_pod", "to_pod"}},
			},
		},
		"status-not-loaded": {BPFFS: "/sys/fs/bpf/margay", Problems: []string{"margay is not loaded on this node"}, now: now},
		"status-problems": {
			Loaded: true, BPFFS: "/sys/fs/bpf/margay", now: now, Agent: agentInfo{Running: true, Status: []byte(troubledAgent)},
			Problems: agentInfo{Running: true, Status: []byte(troubledAgent)}.problems(),
			Devices:  []deviceInfo{{Device: "gone(9)", Kind: "pod", Pod: "default/web-1", Fault: "the device is gone"}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			st.print(&out)
			compareGolden(t, name, out.String())
		})
	}
}

func TestFillProblem(t *testing.T) {
	for _, tc := range []struct {
		typ     string
		entries int
		want    string
	}{
		{"Hash", 899, ""},
		{"Hash", 900, "map services is 90 % full: its size is margay-agent's --map-size services=N, which takes effect when the maps are made anew"},
		{"LPMTrie", 1000, "map services is 100 % full: its size is margay-agent's --map-size services=N, which takes effect when the maps are made anew"},
		{"LRUHash", 1000, ""},
	} {
		if got := (mapInfo{Name: "services", Type: tc.typ, Entries: &tc.entries, Capacity: 1000}).fillProblem(); got != tc.want {
			t.Errorf("%s with %d of 1000: %q, want %q", tc.typ, tc.entries, got, tc.want)
		}
	}
}

// serveAgent answers on the agent's socket of a run directory.
func serveAgent(t *testing.T, run string, handler http.HandlerFunc) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(run, "agent.sock"))
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: handler}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l)
	}()
	t.Cleanup(func() {
		_ = s.Close()
		<-done
	})
}

func answer(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || r.URL.Path != "/status" {
			status = http.StatusNotFound
		}
		w.WriteHeader(status)
		_, _ = w.Write([]byte(body))
	}
}

func TestAskAgent(t *testing.T) {
	now := time.Date(2026, 1, 2, 6, 9, 5, 0, time.UTC)
	for _, tc := range []struct {
		name     string
		prepare  func(t *testing.T, run string)
		running  bool
		text     string
		problems int
	}{
		{"no socket", func(*testing.T, string) {}, false, "not running", 0},
		{"left-over socket", func(t *testing.T, run string) {
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(run, "agent.sock")})
			if err != nil {
				t.Fatal(err)
			}
			l.SetUnlinkOnClose(false)
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
		}, false, "not running", 0},
		{"healthy", func(t *testing.T, run string) { serveAgent(t, run, answer(200, healthyAgent)) }, true,
			"running, version v0.1.0, pid 4711, for 3h5m; pods 3, services 2, policies 1", 0},
		{"troubled", func(t *testing.T, run string) { serveAgent(t, run, answer(200, troubledAgent)) }, true, "running", 5},
		{"error", func(t *testing.T, run string) { serveAgent(t, run, answer(500, "oops")) }, true, "gave no status: 500", 1},
		{"no JSON", func(t *testing.T, run string) { serveAgent(t, run, answer(200, "<html>")) }, true, "gave no status", 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			run := t.TempDir()
			tc.prepare(t, run)
			got := askAgent(t.Context(), run)
			if got.Running != tc.running || !strings.HasPrefix(got.text(now), tc.text) || len(got.problems()) != tc.problems {
				t.Errorf("askAgent() = running %v, %q, problems %q; want %v, %q, %d problems",
					got.Running, got.text(now), got.problems(), tc.running, tc.text, tc.problems)
			}
		})
	}
}

// TestAskAgentHangs: an agent that accepts and says nothing costs no more than the caller's patience.
func TestAskAgentHangs(t *testing.T) {
	run := t.TempDir()
	serveAgent(t, run, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if got := askAgent(ctx, run); !got.Running || !strings.Contains(got.Fault, "does not answer") {
		t.Errorf("askAgent() = %+v, want running, but does not answer", got)
	}
}

// fakeAttachments has programs on some devices.
type fakeAttachments struct{ pods, netdevs, overlays, linked []int }

var errNone = errors.New("program is not attached")

func (f fakeAttachments) PodAttached(i int) error     { return attachedIn(f.pods, i) }
func (f fakeAttachments) NetdevAttached(i int) error  { return attachedIn(f.netdevs, i) }
func (f fakeAttachments) OverlayAttached(i int) error { return attachedIn(f.overlays, i) }

func (f fakeAttachments) Linked(i int, _ ...string) bool { return slices.Contains(f.linked, i) }
func (f fakeAttachments) NetdevPrograms(int) []string    { return []string{"from_netdev", "to_netdev"} }

func attachedIn(list []int, i int) error {
	if slices.Contains(list, i) {
		return nil
	}
	return errNone
}

func TestDevices(t *testing.T) {
	at := []endpointAddress{{Address: netip.MustParseAddr("10.1.0.5")}}
	st := &nodeStatus{}
	st.addDevices([]endpointInfo{
		{Pod: "a/fine", Addresses: at, Ifindex: 5, Device: "veth5"},
		{Pod: "a/bare", Addresses: at, Ifindex: 6, Device: "veth6"},
		{Pod: "a/lost", Addresses: at, Ifindex: 7, Device: "gone(7)"},
		{Pod: "a/early", Addresses: at, Ifindex: 8, Device: "veth8", Flags: []string{markUnregistered}},
		{Addresses: at, Ifindex: 9, Device: "veth9", Flags: []string{markNoRecord}},
	}, devices{1: "lo", 2: "eth0", 3: "margay.vxlan", 4: "eth1", 5: "veth5", 6: "veth6", 8: "veth8", 9: "veth9"}, fakeAttachments{pods: []int{5, 9}, netdevs: []int{2, 4}, overlays: []int{3}, linked: []int{2}})
	wantDevices := []deviceInfo{
		{Device: "eth0", Ifindex: 2, Kind: "node", Attached: true, Programs: []string{"from_netdev", "to_netdev"}, TCX: true},
		{Device: "eth1", Ifindex: 4, Kind: "node", Attached: true, Programs: []string{"from_netdev", "to_netdev"}},
		{Device: "margay.vxlan", Ifindex: 3, Kind: "overlay", Attached: true, Programs: []string{"from_overlay", "to_overlay"}},
		{Device: "gone(7)", Ifindex: 7, Kind: "pod", Pod: "a/lost", Fault: "the device is gone"},
		{Device: "veth5", Ifindex: 5, Kind: "pod", Pod: "a/fine", Attached: true, Programs: []string{"from_pod", "to_pod"}},
		{Device: "veth6", Ifindex: 6, Kind: "pod", Pod: "a/bare", Fault: "program is not attached"},
		{Device: "veth8", Ifindex: 8, Kind: "pod", Pod: "a/early", Fault: "not registered"},
		{Device: "veth9", Ifindex: 9, Kind: "pod", Attached: true, Programs: []string{"from_pod", "to_pod"}},
	}
	if diff := cmp.Diff(wantDevices, st.Devices); diff != "" {
		t.Errorf("devices (-want +got):\n%s", diff)
	}
	wantProblems := []string{
		"a/bare: program is not attached; start margay-agent, which attaches it again",
		"a/lost: its device is gone; the runtime has not called DEL, margay-agent removes what is left of it",
		"a/early: has a record but is not in the map endpoints; start margay-agent",
		"10.1.0.5: in the map endpoints without a record; start margay-agent, which removes it",
	}
	if diff := cmp.Diff(wantProblems, st.Problems); diff != "" {
		t.Errorf("problems (-want +got):\n%s", diff)
	}
}

// TestStatusOfDatapath looks at the shipped programs and maps, loaded and attached in a network namespace of the test's own.
func TestStatusOfDatapath(t *testing.T) {
	for _, f := range families() {
		t.Run(f.name, func(t *testing.T) {
			n := newNode(t, f)
			n.bpffs += "-real"
			ns := netnstest.New(t)
			ns.Do(func() { testStatusOfDatapath(t, n) })
		})
	}
}

func testStatusOfDatapath(t *testing.T, n *testNode) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	d, err := datapath.Ensure(ctx, datapath.Config{BPFFS: n.bpffs, Run: n.run})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	pod, nic, overlay := addDevice(t, "pod0"), addDevice(t, "nic0"), addDevice(t, "overlay0")
	n.addPod(t, "client", n.client, bpf.Endpoint{})
	e := bpf.Endpoint{Ifindex: uint32(pod), Identity: 17}
	if err := d.PutEndpoint(n.client, e); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{d.AttachNetdev(nic), d.AttachOverlay(overlay)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	var bare, attached nodeStatus
	n.decode(t, &bare, "status")
	if len(bare.Problems) != 1 || !strings.Contains(bare.Problems[0], "default/client: program is not attached") {
		t.Errorf("problems = %q, want that the pod's device has no program", bare.Problems)
	}
	if err := d.AttachPod(pod); err != nil {
		t.Fatal(err)
	}
	links, err := d.LinkNodeDevices(datapath.NodeDevices{Netdevs: []int{nic}}) // none where the kernel has no tcx
	if err != nil {
		t.Fatal(err)
	}
	n.decode(t, &attached, "status")
	want := []deviceInfo{
		{Device: "nic0", Ifindex: nic, Kind: "node", Attached: true, Programs: []string{"from_netdev", "to_netdev"}, TCX: len(links) > 0},
		{Device: "overlay0", Ifindex: overlay, Kind: "overlay", Attached: true, Programs: []string{"from_overlay", "to_overlay"}},
		{Device: "pod0", Ifindex: pod, Kind: "pod", Pod: "default/client", Attached: true, Programs: []string{"from_pod", "to_pod"}},
	}
	if diff := cmp.Diff(want, attached.Devices); diff != "" {
		t.Errorf("devices (-want +got):\n%s", diff)
	}
	if !attached.Loaded || attached.Agent.Running || len(attached.Problems) != 0 {
		t.Errorf("status = %+v, want loaded, no agent, no problems", attached)
	}
	if len(attached.Programs) != 1 || attached.Programs[0].Build != d.Build() || !slices.Contains(attached.Programs[0].Programs, "from_pod") {
		t.Errorf("programs = %+v, want from_pod and others of build %s", attached.Programs, d.Build())
	}
	i := slices.IndexFunc(attached.Maps, func(m mapInfo) bool { return m.Name == "endpoints" })
	if i < 0 || attached.Maps[i].Entries == nil || *attached.Maps[i].Entries != 1 || attached.Maps[i].MemoryBytes == 0 {
		t.Errorf("maps = %+v, want endpoints with one entry and its memory", attached.Maps)
	}
	for _, args := range [][]string{{"status"}, {"nodes"}, {"endpoints"}, {"services"}, {"flows"}, {"policy"}, {"drops"}} {
		if _, errs, code := n.ctl(t, args...); code != 0 || errs != "" {
			t.Errorf("margayctl %v = %d, %q; want 0, nothing", args, code, errs)
		}
	}
}

func addDevice(t *testing.T, name string) int {
	t.Helper()
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name + "peer"}); err != nil {
		t.Fatal(err)
	}
	l, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return l.Attrs().Index
}

// TestStatusNotLoaded: the document is complete for scripts, and the exit status says it too.
func TestStatusNotLoaded(t *testing.T) {
	bpffs := t.TempDir()
	var out, errs bytes.Buffer
	code := run(t.Context(), []string{"status", "--bpffs", bpffs, "--run", t.TempDir(), "-o", "json"}, &out, &errs)
	if code != 1 || errs.Len() != 0 || !strings.Contains(out.String(), `"loaded": false`) || !strings.Contains(out.String(), "no pins under "+bpffs) {
		t.Errorf("status = %d, %q, %q; want 1 and the reason in the document", code, out.String(), errs.String())
	}
}

// TestStatusForeignBuild: programs of another build are named, and the rest is still shown.
func TestStatusForeignBuild(t *testing.T) {
	n := newNode(t, families()[0])
	n.addPods(t)
	var st nodeStatus
	n.decode(t, &st, "status")
	if !slices.ContainsFunc(st.Problems, func(p string) bool { return strings.Contains(p, "no programs are pinned") }) {
		t.Errorf("problems = %q, want that no programs are pinned", st.Problems)
	}
	if len(st.Devices) != 3 || st.Devices[2].Fault != "not known" {
		t.Errorf("devices = %+v, want the three pods' with nothing known of programs", st.Devices)
	}
}
