// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/margay-cni/margay/pkg/netns"
)

// What conf/demo/shop.yaml says.
var (
	clusterIPs = []netip.Addr{netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("fd00:96::10")}
	nodePort   = uint16(30080)
)

// demo counts what it has shown.
type demo struct {
	*world
	start          time.Time
	step           int
	passed, failed int
	servers        map[string]*server
}

func (d *demo) title(format string, args ...any) {
	d.step++
	fmt.Printf("\n%d. %s\n", d.step, fmt.Sprintf(format, args...))
}

func (d *demo) check(ok bool, format string, args ...any) {
	mark := "ok  "
	if ok {
		d.passed++
	} else {
		d.failed++
		mark = "FAIL"
	}
	fmt.Printf("   %s %s\n", mark, fmt.Sprintf(format, args...))
}

// show prints the output of a command, indented.
func show(out []byte) {
	for line := range strings.SplitSeq(strings.TrimRight(string(out), "\n"), "\n") {
		fmt.Println("        " + line)
	}
}

func (d *demo) run(ctx context.Context) (err error) {
	fmt.Println("Margay: one node, some pods, a client outside. Everything in namespaces of its own.")
	if d.world, err = build(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.remove()) }()
	for _, step := range []func(context.Context) error{
		d.startPods, d.podToPod, d.podToService, d.outsideToNodePort, d.livePolicy, d.withoutAgent, d.cleanUp,
	} {
		if err := step(ctx); err != nil {
			d.showAgentLog()
			return err
		}
	}
	if d.failed > 0 {
		d.showAgentLog()
	}
	return nil
}

func (d *demo) showAgentLog() {
	if log, err := os.ReadFile(filepath.Join(work, "agent.log")); err == nil {
		fmt.Println("   the agent's log:")
		show(log)
	}
}

func (d *demo) startPods(ctx context.Context) error {
	d.title("Pods start without a daemon: libcni runs the plugin with %s, no agent is running", conflist)
	d.servers = map[string]*server{}
	for _, name := range []string{"web-1", "web-2", "client"} {
		p, err := d.addPod(ctx, name)
		if err != nil {
			return err
		}
		d.check(len(p.addrs) == 2, "%-7s has %s and %s after %.1f ms", name, p.addrs[0], p.addrs[1], float64(p.took.Microseconds())/1000)
		if name == "client" {
			continue
		}
		if d.servers[name], err = serve(p); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) podToPod(ctx context.Context) error {
	d.title("Pod to pod")
	web, client := d.pods[0], d.pods[2]
	for i, a := range web.addrs {
		for _, network := range []string{"tcp", "udp"} {
			got, err := askOnce(ctx, client.ns, network, netip.AddrPortFrom(a, 8080))
			d.check(err == nil && got.server == web.name && got.client == client.addrs[i].String(),
				"client → %s %s: answered by %s, which saw %s%s", network, netip.AddrPortFrom(a, 8080), got.server, got.client, because(err))
		}
	}
	return nil
}

func because(err error) string {
	if err == nil {
		return ""
	}
	return fmt.Sprintf(" (%v)", err)
}

func (d *demo) podToService(ctx context.Context) error {
	d.title("The agent reads %s: a Service spreads a pod's requests over two backends", manifests)
	if err := d.startAgent(); err != nil {
		return err
	}
	client := d.pods[2]
	start := time.Now()
	ok := eventually(ctx, func() bool {
		_, err := askOnce(ctx, client.ns, "tcp", netip.AddrPortFrom(clusterIPs[1], 80))
		return err == nil
	})
	d.check(ok, "the service works %d ms after the agent was started", time.Since(start).Milliseconds())
	for i, vip := range clusterIPs {
		seen := map[string]int{}
		for range 40 {
			got, err := askOnce(ctx, client.ns, "tcp", netip.AddrPortFrom(vip, 80))
			if err == nil && got.client == client.addrs[i].String() {
				seen[got.server]++
			}
		}
		d.check(seen["web-1"]+seen["web-2"] == 40 && seen["web-1"] > 0 && seen["web-2"] > 0,
			"client → %s, 40 times: web-1 answered %d, web-2 %d; they saw the pod's own address", netip.AddrPortFrom(vip, 80), seen["web-1"], seen["web-2"])
	}
	return nil
}

func (d *demo) outsideToNodePort(ctx context.Context) error {
	d.title("A client outside comes in at the NodePort and keeps its address")
	for i, a := range nodeAddrs {
		to := netip.AddrPortFrom(a.Addr(), nodePort)
		for _, network := range []string{"tcp", "udp"} {
			got, err := askOnce(ctx, d.client, network, to)
			line := ""
			if s := d.servers[got.server]; s != nil {
				line = s.lastLine()
			}
			d.check(err == nil && strings.HasSuffix(line, "client "+clientAddrs[i].Addr().String()),
				"outside → %s %s; log of %s: %q%s", network, to, got.server, line, because(err))
		}
	}
	return nil
}

// livePolicy cuts an open connection off and lets it go on.
func (d *demo) livePolicy(ctx context.Context) error {
	d.title("A NetworkPolicy cuts the client off while its connection is open")
	var open []*talk
	for _, a := range nodeAddrs {
		t, err := dial(ctx, d.client, "tcp", netip.AddrPortFrom(a.Addr(), nodePort))
		if err != nil {
			return fmt.Errorf("connect to the NodePort: %w", err)
		}
		defer t.conn.Close()
		_, err = t.ask()
		d.check(err == nil, "connection %s → %s is open and answers%s", t.conn.LocalAddr(), t.conn.RemoteAddr(), because(err))
		open = append(open, t)
	}
	var live bytes.Buffer
	drops := d.ctl(ctx, "drops", "--follow", "--reason", "policy", "--count", "1", "--timeout", "10s")
	drops.Stdout, drops.Stderr = &live, &live
	if err := netns.Do(d.node, drops.Start); err != nil {
		return err
	}
	fmt.Printf("        applying %s/later/cut-off.yaml: only pods of the namespace may reach app=web\n", manifests)
	if err := copyFiles(filepath.Join(manifests, "later", "*.yaml"), d.manifests); err != nil {
		return err
	}
	for _, t := range open {
		d.check(eventually(ctx, func() bool { _, err := t.ask(); return err != nil }), "%s gets no answer any more", t.conn.LocalAddr())
	}
	got, err := askOnce(ctx, d.pods[2].ns, "tcp", netip.AddrPortFrom(clusterIPs[0], 80))
	d.check(err == nil, "the pod client still does: %s answered%s", got.server, because(err))
	err = drops.Wait()
	d.check(err == nil && strings.Contains(live.String(), "policy") && strings.Contains(live.String(), "shop-only"), "margayctl drops says why:")
	show(live.Bytes())
	return d.policyRemoved(ctx, open)
}

func (d *demo) policyRemoved(ctx context.Context, open []*talk) error {
	fmt.Println("        removing the policy")
	if err := os.Remove(filepath.Join(d.manifests, "cut-off.yaml")); err != nil {
		return err
	}
	for _, t := range open {
		d.check(eventually(ctx, func() bool { _, err := t.ask(); return err == nil }), "%s, the same connection, goes on", t.conn.LocalAddr())
	}
	var out bytes.Buffer
	totals := d.ctl(ctx, "drops")
	totals.Stdout, totals.Stderr = &out, &out
	err := netns.Do(d.node, totals.Run)
	d.check(err == nil && strings.Contains(out.String(), "policy"), "margayctl drops, the totals:")
	show(out.Bytes())
	return nil
}

func (d *demo) withoutAgent(ctx context.Context) error {
	d.title("The agent is killed; a further pod starts and works")
	if err := d.killAgent(); err != nil {
		return err
	}
	p, err := d.addPod(ctx, "late")
	if err != nil {
		return err
	}
	d.check(len(p.addrs) == 2, "late has %s and %s after %.1f ms", p.addrs[0], p.addrs[1], float64(p.took.Microseconds())/1000)
	for _, vip := range clusterIPs {
		got, err := askOnce(ctx, p.ns, "tcp", netip.AddrPortFrom(vip, 80))
		d.check(err == nil && got.server != "", "late → %s: answered by %s%s", netip.AddrPortFrom(vip, 80), got.server, because(err))
	}
	got, err := askOnce(ctx, d.client, "tcp", netip.AddrPortFrom(nodeAddrs[0].Addr(), nodePort))
	d.check(err == nil, "outside → NodePort: answered by %s, which saw %s%s", got.server, got.client, because(err))
	var out bytes.Buffer
	list := d.ctl(ctx, "endpoints", "-o", "json")
	list.Stdout = &out
	err = netns.Do(d.node, list.Run)
	n, jsonErr := count(out.Bytes(), "endpoints")
	d.check(err == nil && jsonErr == nil && n == 4, "margayctl, which needs no agent, lists %d endpoints%s", n, because(errors.Join(err, jsonErr)))
	return nil
}

func (d *demo) cleanUp(ctx context.Context) error {
	d.title("Everything goes away again")
	err := d.delPods(ctx)
	d.check(err == nil, "DEL of every pod%s", because(err))
	left, err := d.leftovers()
	d.check(err == nil && len(left) == 0, "no device and no record is left %s%s", strings.Join(left, ", "), because(err))
	fmt.Printf("        after %.1f s\n", time.Since(d.start).Seconds())
	return nil
}
