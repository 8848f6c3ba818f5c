// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"os/exec"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/netns"
)

const trafficSection = "Traffic, both ends pinned to one CPU"

// Issues: what Margay must keep of a bare veth pair, and a ClusterIP of the pod behind it.
const (
	requestsTarget        = 0.95
	connectsTarget        = 0.95
	streamTarget          = 0.98
	serviceRequestsTarget = 0.99
	serviceConnectsTarget = 0.97
)

const (
	echoPort = 9000
	sinkPort = 9001
)

// course is a way that traffic takes: from a namespace to an address.
type course struct {
	name string
	from string
	to   netip.Addr
	port uint16 // 0: that of the server
}

// contest is one comparison: the same kind of traffic on two courses in turns.
type contest struct {
	id, name, mode string
	ours, theirs   course
	target         float64
}

// benchTraffic measures real sockets: pod to pod beside a bare veth pair, and a ClusterIP beside its pod.
func benchTraffic(ctx context.Context, b *bench) (err error) {
	bareA, bareB, err := b.node.barePair()
	if err != nil {
		return fmt.Errorf("make the bare pair: %w", err)
	}
	client, _, err := b.node.pod(ctx, "client")
	if err != nil {
		return err
	}
	server, _, err := b.node.pod(ctx, "server")
	if err != nil {
		return err
	}
	var contests []contest
	for i, f := range families {
		bare := course{"bare veth pair", bareA.path, bareB.addr(f.v6), 0}
		pod := course{"pod → pod", client.path, server.addr(f.v6), 0}
		service := course{"pod → ClusterIP", client.path, f.vip, 80}
		err := addService(b.node.dp, uint32(i+1), netip.AddrPortFrom(f.vip, 80), netip.AddrPortFrom(server.addr(f.v6), echoPort))
		if err != nil {
			return err
		}
		for _, p := range []place{bareB, server} {
			for mode, port := range map[string]uint16{modeServe: echoPort, modeSink: sinkPort} {
				stop, err := startServer(p, f.v6, mode, port)
				if err != nil {
					return err
				}
				defer stop()
			}
		}
		id := idOf(f.name)
		contests = append(contests,
			contest{"rr." + id, "TCP_RR, " + f.name, modeRequests, pod, bare, requestsTarget},
			contest{"rr.service." + id, "TCP_RR, " + f.name + ", ClusterIP", modeRequests, service, pod, serviceRequestsTarget},
			contest{"crr." + id, "TCP_CRR, " + f.name, modeConnects, pod, bare, connectsTarget},
			contest{"crr.service." + id, "TCP_CRR, " + f.name + ", ClusterIP", modeConnects, service, pod, serviceConnectsTarget},
			contest{"stream." + id, "one TCP stream, " + f.name, modeThroughput, pod, bare, streamTarget},
		)
	}
	for _, c := range contests {
		if err := b.contest(ctx, c); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
	}
	return b.live(ctx, course{"pod → pod", client.path, server.addr(false), 0})
}

func (b *bench) contest(ctx context.Context, c contest) error {
	unit, scale, length := "1000/s", 1e3, 400*time.Millisecond
	switch c.mode {
	case modeConnects:
		length = 150 * time.Millisecond
	case modeThroughput:
		unit, scale, length = "Gbit/s", 1e9, 500*time.Millisecond
	}
	if b.smoke {
		length = 20 * time.Millisecond
	}
	section := func(id, name, unit string, target float64, higher bool) *measurement {
		return &measurement{ID: id, Section: trafficSection, Name: name, Unit: unit, Reference: c.theirs.name, Target: target, Higher: higher}
	}
	rate := section(c.id, c.name, unit, c.target, true)
	// Other work on the CPU lowers the rate of both, at random; of the transactions' own time the p50 shows it least.
	p50 := section(c.id+".p50", c.name+", p50", "µs", math.Round(100/c.target)/100, false)
	p99 := section(c.id+".p99", c.name+", p99", "µs", 0, false)
	for i := range b.rounds(12, 1) {
		var got [2]outcome
		for turn := range 2 {
			side := (turn + i) % 2 // who goes first changes
			var err error
			if got[side], err = runClient(ctx, []course{c.ours, c.theirs}[side], c.mode, length); err != nil {
				return err
			}
		}
		rate.add(got[0].PerSecond/scale, got[1].PerSecond/scale)
		p50.add(got[0].P50, got[1].P50)
		p99.add(got[0].P99, got[1].P99)
	}
	b.report.add(rate)
	if c.mode != modeThroughput {
		b.report.add(p50)
		b.report.add(p99)
	}
	return nil
}

// live notes what from_pod costs on real packets, by the kernel's own statistics.
func (b *bench) live(ctx context.Context, c course) (err error) {
	prog, err := ebpf.LoadPinnedProgram(b.node.program("from_pod"), nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, prog.Close()) }()
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		return fmt.Errorf("switch program statistics on: %w", err)
	}
	defer func() { err = errors.Join(err, stats.Close()) }()
	before, err := prog.Stats()
	if err != nil {
		return err
	}
	if _, err := runClient(ctx, c, modeRequests, time.Duration(b.rounds(1000, 20))*time.Millisecond); err != nil {
		return err
	}
	after, err := prog.Stats()
	if err != nil {
		return err
	}
	packets := after.RunCount - before.RunCount
	if packets == 0 {
		return errors.New("no packet went through from_pod")
	}
	b.report.note("On live TCP_RR packets the kernel's statistics give from_pod %d ns a packet, their own cost included.",
		(after.Runtime-before.Runtime).Nanoseconds()/int64(packets))
	return nil
}

// peerIn prepares this binary as one end of the traffic in a namespace, and starts it.
func peerIn(path string, cmd *exec.Cmd) error {
	cmd.Stderr = os.Stderr
	cmd.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1") // its signals would interrupt system calls
	return netns.Do(path, cmd.Start)
}

func startServer(p place, v6 bool, mode string, port uint16) (stop func(), err error) {
	cmd := exec.Command("/proc/self/exe", peerCommand, "-mode", mode, "-address", netip.AddrPortFrom(p.addr(v6), port).String())
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := peerIn(p.path, cmd); err != nil {
		return nil, fmt.Errorf("start server: %w", err)
	}
	stop = func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // killed: says nothing
	}
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		stop()
		return nil, fmt.Errorf("server in %s does not get ready: %w", p.path, err)
	}
	return stop, nil
}

func runClient(ctx context.Context, c course, mode string, length time.Duration) (outcome, error) {
	port := c.port
	if port == 0 {
		port = map[string]uint16{modeRequests: echoPort, modeConnects: echoPort, modeThroughput: sinkPort}[mode]
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe", peerCommand, "-mode", mode, "-for", length.String(),
		"-address", netip.AddrPortFrom(c.to, port).String())
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := peerIn(c.from, cmd); err != nil {
		return outcome{}, fmt.Errorf("start client: %w", err)
	}
	if err := cmd.Wait(); err != nil {
		return outcome{}, fmt.Errorf("client on %s: %w", c.name, err)
	}
	var o outcome
	if err := json.Unmarshal(out.Bytes(), &o); err != nil {
		return outcome{}, fmt.Errorf("client on %s: %w", c.name, err)
	}
	return o, nil
}
