// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// What the manifests of conf/demo say.
var (
	webIPs        = []netip.Addr{netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("fd00:96::10")}
	webNodePort   = uint16(30080)
	stockNodePort = uint16(30081)
)

var families = []string{"IPv4", "IPv6"}

var networks = []string{"tcp", "udp"}

// demo counts what it has shown.
type demo struct {
	*cluster
	start          time.Time
	step           int
	passed, failed int
	servers        map[string]*server // by name
	running        map[string]*pod    // by name
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

// say prints what is being done.
func say(format string, args ...any) {
	fmt.Println(strings.TrimRight("        "+fmt.Sprintf(format, args...), " "))
}

// show prints what a command printed, indented.
func show(out string) {
	for line := range strings.SplitSeq(strings.TrimRight(out, "\n"), "\n") {
		say("%s", line)
	}
}

func because(err error) string {
	if err == nil {
		return ""
	}
	return fmt.Sprintf(" (%s)", oneLine(err))
}

// run takes the steps in order, up to the first that cannot be completed, and takes the cluster away.
func (d *demo) run(ctx context.Context) {
	fmt.Println("Margay: two nodes, some pods, a client outside behind a router. Everything in namespaces of its own.")
	for _, step := range []func(context.Context) error{
		d.startPods, d.podToPod, d.startAgents, d.betweenNodes, d.podToService, d.outsideToNodePort, d.throughOtherNode, d.large, d.straightBack,
		d.judgeClient, d.livePolicy, d.toOutside, d.withoutAgents, d.cleanUp,
	} {
		err := step(ctx)
		switch {
		case errors.Is(ctx.Err(), context.Canceled):
			err = errors.New("interrupted")
		case ctx.Err() != nil:
			err = fmt.Errorf("not done after %v", limit)
		}
		if err != nil {
			d.check(false, "%s", oneLine(err))
			break
		}
	}
	if d.failed > 0 && !errors.Is(ctx.Err(), context.Canceled) {
		d.showAgentLogs()
	}
	if err := d.remove(); err != nil {
		d.check(false, "%s", oneLine(err))
	}
}

func (d *demo) showAgentLogs() {
	for _, n := range d.nodes() {
		if log, err := os.ReadFile(filepath.Join(n.home, "agent.log")); err == nil {
			fmt.Printf("   the log of %s's agent:\n", n.name)
			show(string(log))
		}
	}
}

// logOf returns the newest line of a server's log, "" for a server that there is not.
func (d *demo) logOf(name string) string {
	if s := d.servers[name]; s != nil {
		return s.lastLine()
	}
	return ""
}
