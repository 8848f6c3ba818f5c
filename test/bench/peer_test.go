// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/privileged"
)

// TestMain is a peer where a test starts one, as the benchmark's own binary is.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == peerCommand {
		os.Exit(exitCode(runPeer(os.Args[2:], os.Stdin, os.Stdout), os.Stderr))
	}
	os.Exit(m.Run())
}

// Every mode, over the loopback device of a namespace.
func TestTraffic(t *testing.T) {
	privileged.Require(t)
	at := place{path: netnstest.New(t).Path(), addrs: []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::1")}}
	server, err := startServers(at)
	if err != nil {
		t.Fatal(err)
	}
	defer server.stop()
	client, err := startPeer(at.path)
	if err != nil {
		t.Fatal(err)
	}
	defer client.stop()
	cpu, err := newCPUMeter()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		r := &runner{course: course{"loopback", at.path, at.addr(f.v6), 0}, client: client, server: server}
		for _, k := range kinds {
			t.Run(f.name+" "+k.name, func(t *testing.T) {
				const length = 30 * time.Millisecond
				if err := r.lap(t.Context(), k, length, cpu); err != nil {
					t.Fatal(err)
				}
				got := r.laps[k.id][0]
				if got.rate <= 0 || got.cpu <= 0 {
					t.Errorf("lap %+v", got)
				}
				// Both ends are on one CPU, so that all the CPU time there is limits the rate; the processes' start-up counts as well.
				if used := got.rate * k.scale * got.cpu / k.cpuScale / 1e9; used > 1.3 {
					t.Errorf("%v of a CPU was used at %v %s", used, got.rate, k.unit)
				}
				if k.times && (got.p50 <= 0 || got.p99 < got.p50) {
					t.Errorf("p50 %v, p99 %v", got.p50, got.p99)
				}
			})
		}
	}
	checkPinned(t, server)
	checkPinned(t, client)
	wrong := course{"closed port", at.path, at.addr(false), 1}
	if _, err := client.burst(t.Context(), wrong, modeRequests, time.Millisecond); err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("without server: %v, want connection refused", err)
	}
	if _, err := client.burst(t.Context(), wrong, "other", time.Millisecond); err == nil || !strings.Contains(err.Error(), `no mode "other"`) {
		t.Errorf("without mode: %v", err)
	}
	if _, err := client.burst(t.Context(), course{"again", at.path, at.addr(false), 0}, modeRequests, time.Millisecond); err != nil {
		t.Errorf("after errors: %v", err)
	}
}

// checkPinned requires that the threads of a peer that carry traffic may run on one CPU, the same for all of them. The runtime's own, which
// may run anywhere, do little.
func checkPinned(t *testing.T, p *peer) {
	t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	used := map[string]int{} // list of CPUs → nanoseconds of the threads that may run there
	for _, thread := range threads {
		text, err := os.ReadFile(filepath.Join(thread, "schedstat"))
		if err != nil {
			t.Fatal(err)
		}
		ns, err := strconv.Atoi(strings.Fields(string(text))[0])
		if err != nil {
			t.Fatal(err)
		}
		used[field(filepath.Join(thread, "status"), "Cpus_allowed_list", ":")] += ns
	}
	most, all := 0, 0
	for list, ns := range used {
		if !strings.ContainsAny(list, ",-") {
			most = max(most, ns)
		}
		all += ns
	}
	if most < all*3/4 {
		t.Errorf("CPU time in nanoseconds by where the threads may run: %v, want most of it on one CPU", used)
	}
}

func TestServeFlagErrors(t *testing.T) {
	for _, text := range []string{"", "serve", "serve=1.2.3.4", "serve=somewhere:1"} {
		var s serving
		if err := s.Set(text); err == nil {
			t.Errorf("-serve %q: no error", text)
		}
	}
}

func TestPairing(t *testing.T) {
	ours, theirs := &runner{course: course{name: "pod → pod"}}, &runner{course: course{name: "bare"}}
	k := kinds[0]
	p := pairing{"section", "ipv4", "IPv4", ours, theirs, true, false}
	if err := p.compare(newTestReport(), []kind{k}); err == nil {
		t.Error("without laps: no error")
	}
	ours.laps = map[string][]lap{k.id: {{rate: 9, p50: 11, p99: 30, cpu: 2}}}
	theirs.laps = map[string][]lap{k.id: {{rate: 10, p50: 10, p99: 10, cpu: 1}}}
	r := newTestReport()
	if err := p.compare(r, []kind{k}); err != nil {
		t.Fatal(err)
	}
	p.targets, p.further = false, true
	if err := (pairing{ours: ours, theirs: &runner{streams: true}}).compare(r, []kind{k}); err != nil {
		t.Errorf("a runner of streams only, beside requests: %v", err)
	}
	if err := p.compare(r, []kind{k}); err != nil {
		t.Fatal(err)
	}
	if err := r.finish(baseline{}); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"rr.ipv4 TCP_RR, IPv4 0.9 true ≥ 0.97 no, 1 round", "rr.ipv4.p50 TCP_RR, IPv4, p50 1.1 false ≤ 1.03 no, 1 round",
		"rr.ipv4.p99 TCP_RR, IPv4, p99 3 false  ", "rr.ipv4.CPU TCP_RR, IPv4, CPU per 1000 transactions 2 false  ",
	}
	if len(r.results) != 2*len(want) {
		t.Fatalf("%d results, want %d", len(r.results), 2*len(want))
	}
	for i, w := range want {
		first, second := r.results[i], r.results[i+len(want)]
		if got := describe(first); got != w {
			t.Errorf("result %d: %q, want %q", i, got, w)
		}
		if second.ID != first.ID+"~bare" || second.Target != nil || second.Name != first.Name || *second.Ratio != *first.Ratio {
			t.Errorf("beside a further reference: %+v, first %+v", second, first)
		}
	}
}

func describe(r result) string {
	return fmt.Sprint(r.ID, " ", r.Name, " ", *r.Ratio, " ", r.Higher, " ", r.target(), " ", r.verdict())
}
