// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

const trafficSection = "Pod to pod on one node"

// benchTraffic measures real sockets: pod to pod, beside a bare veth pair and pods of others.
func benchTraffic(ctx context.Context, b *bench) (err error) {
	t := &trafficLab{bench: b}
	defer func() { err = errors.Join(err, t.stop()) }()
	if err := t.prepare(ctx); err != nil {
		return err
	}
	for i, f := range families {
		if err := t.family(ctx, i); err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
	}
	return b.live(ctx, course{"pod → pod", t.margay.client.path, t.margay.server.addr(false), 0})
}

// trafficLab is the namespaces that traffic goes between, and the processes in them.
type trafficLab struct {
	bench        *bench
	margay, bare ends
	others       []ends // pods of other CNIs
	clusters     map[casting]*cluster
}

// ends is two places that traffic goes between.
type ends struct {
	name           string
	client, server place
	clientProcess  *peer
	serverProcess  *peer
}

func (t *trafficLab) prepare(ctx context.Context) (err error) {
	n := t.bench.node
	t.bare.name = "bare veth pair"
	if t.bare.client, t.bare.server, err = n.barePair(0); err != nil {
		return fmt.Errorf("make the bare pair: %w", err)
	}
	t.margay.name = "pod → pod"
	if t.margay.client, _, err = n.pod(ctx, "client"); err != nil {
		return err
	}
	if t.margay.server, _, err = n.pod(ctx, "server"); err != nil {
		return err
	}
	if err := t.addOthers(ctx); err != nil {
		return err
	}
	all := []*ends{&t.margay, &t.bare}
	for i := range t.others {
		all = append(all, &t.others[i])
	}
	for _, e := range all {
		if err := e.start(); err != nil {
			return err
		}
	}
	return nil
}

// start starts the processes at both ends, the server unless it runs.
func (e *ends) start() (err error) {
	if e.serverProcess == nil {
		if e.serverProcess, err = startServers(e.server); err != nil {
			return err
		}
	}
	e.clientProcess, err = startPeer(e.client.path)
	return err
}

func (t *trafficLab) stop() error {
	for _, e := range append([]ends{t.margay, t.bare}, t.others...) {
		e.stop()
	}
	return closeClusters(t.clusters)
}

func (e *ends) stop() {
	for _, p := range []*peer{e.clientProcess, e.serverProcess} {
		if p != nil {
			p.stop()
		}
	}
}

func (e *ends) runner(v6 bool) *runner {
	return &runner{course: course{e.name, e.client.path, e.server.addr(v6), 0}, client: e.clientProcess, server: e.serverProcess}
}

// family measures everything in one family.
func (t *trafficLab) family(ctx context.Context, i int) error {
	f := families[i]
	ours, bare := t.margay.runner(f.v6), t.bare.runner(f.v6)
	runners := []*runner{ours, bare}
	pairings := []pairing{{trafficSection, idOf(f.name), f.name, ours, bare, true, false}}
	for k := range t.others {
		if !t.others[k].server.addr(f.v6).IsValid() || !t.others[k].client.addr(f.v6).IsValid() {
			continue // a CNI of one family
		}
		theirs := t.others[k].runner(f.v6)
		runners = append(runners, theirs)
		pairings = append(pairings, pairing{trafficSection, idOf(f.name), f.name, ours, theirs, false, true})
	}
	if err := t.bench.race(ctx, t.bench.choose(50, 12, 1), kinds, runners); err != nil {
		return err
	}
	for _, p := range pairings {
		if err := p.compare(t.bench.report, kinds); err != nil {
			return err
		}
	}
	return nil
}

// addOthers makes a client and a server pod of ptp, where the node's own programs are at its own pods' devices only, and of every other CNI
// on a node of its own.
func (t *trafficLab) addOthers(ctx context.Context) error {
	n := t.bench.node
	ptp, e := newChain(n.ptp("traffic", "10.246.0.0/16", "fd00:246::/64")), ends{name: ptpName}
	for _, side := range []struct {
		*place
		name string
	}{{&e.client, "client"}, {&e.server, "server"}} {
		id := "ptp-" + side.name
		path, err := n.namespace(id)
		if err != nil {
			return err
		}
		_, printed, err := ptp.run(ctx, "ADD", id, path)
		if err != nil {
			return err
		}
		a, err := parseAdded(printed)
		if err != nil {
			return err
		}
		*side.place = place{path: path, addrs: a.addrs}
	}
	t.others, t.clusters = []ends{e}, map[casting]*cluster{}
	for _, c := range t.bench.cnis {
		k, err := t.bench.startNode(ctx, "traffic-"+c.id, c)
		if err != nil {
			return err
		}
		t.clusters[casting{c, 0}] = k
		t.others = append(t.others, ends{name: c.Name, client: k.pods["client"], server: k.pods["local"], serverProcess: k.servers["local"]})
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
