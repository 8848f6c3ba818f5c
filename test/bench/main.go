// SPDX-License-Identifier: Apache-2.0

// Command bench measures Margay beside what it is compared with: its programs beside the least that a program could do, its ADD and DEL
// beside those of other CNI plugins, its pods' traffic beside that of two namespaces joined by a bare veth pair. Whatever is compared is
// measured alternately in the same run, because on a shared machine only ratios mean anything.
//
// It works in network and mount namespaces of its own, which end with it, on the binaries that it builds first. It asserts nothing: a
// missed target, and a figure that is worse than the committed one, is a line of the report; with -strict it is also a failed exit. It
// needs root.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	clusterbuild "github.com/margay-cni/margay/test/cluster/build"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// options are the command line.
type options struct {
	args   []string // as given
	smoke  bool     // everything once, nothing to quote
	full   bool     // more rounds, and what takes long
	write  bool     // write the results below docs
	strict bool     // fail on a missed target or a regression
	only   string   // regular expression of section names
	cnis   cnis     // further CNIs to compare with
	inside string   // set in the child: directory of the built binaries
}

// command returns what somebody types to make the same run.
func (o options) command() string {
	args := slices.Clone(o.args)
	if len(args) > 1 && args[0] == "-inside" {
		args = args[2:]
	}
	for i, arg := range args {
		if strings.ContainsAny(arg, " |&;()<>*?[]$'\"\\") {
			args[i] = "'" + strings.ReplaceAll(arg, "'", `'\''`) + "'"
		}
	}
	switch line := strings.Join(args, " "); line {
	case "-write":
		return "make bench"
	case "-full -write":
		return "make bench-full"
	default:
		return strings.TrimSpace("go run ./test/bench " + line)
	}
}

func parse(args []string, stderr io.Writer) (options, error) {
	o := options{args: args}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.BoolVar(&o.smoke, "smoke", false, "run everything once, briefly: shows that the benchmarks work, measures nothing")
	flags.BoolVar(&o.full, "full", false, "run more rounds, and what takes long")
	flags.BoolVar(&o.write, "write", false, "write docs/benchmarks/latest.json, the plots beside it and the tables of docs/benchmarks.md")
	flags.BoolVar(&o.strict, "strict", false, "fail if a target is missed or a figure is worse than the committed one")
	flags.StringVar(&o.only, "only", "", "`regexp` of the sections to run ("+sectionNames()+")")
	flags.Var(&o.cnis, "cni", "`[NAME=]DIR[,BINDIR]`: compare with the CNI that DIR/contender.yaml describes as well, with the programs in BINDIR;\n"+
		"NAME=CONFLIST,BINDIR: with the CNI of a conflist, on one node only; may be repeated")
	flags.StringVar(&o.inside, "inside", "", "used by bench itself")
	err := flags.Parse(args)
	switch {
	case err != nil:
	case flags.NArg() > 0:
		err = fmt.Errorf("not a flag: %s", flags.Arg(0))
	case o.smoke && (o.full || o.write || o.strict):
		err = errors.New("-smoke measures nothing: no -full, -write or -strict")
	case o.write && o.only != "":
		err = errors.New("-write writes all sections: no -only")
	}
	return o, err
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) > 0 && args[0] == peerCommand {
		return exitCode(runPeer(args[1:], os.Stdin, stdout), stderr)
	}
	o, err := parse(args, stderr)
	if err != nil {
		exitCode(err, stderr)
		return 2
	}
	if os.Geteuid() != 0 {
		return exitCode(errors.New("root is needed: namespaces, devices and BPF programs are made"), stderr)
	}
	if o.inside == "" {
		err := enter(ctx, o, args, stdout, stderr)
		if ended, ok := errors.AsType[*exec.ExitError](err); ok && ended.Exited() {
			return ended.ExitCode() // it has said why
		}
		return exitCode(err, stderr)
	}
	parent := os.Getppid()
	err = measure(ctx, o, stdout, stderr)
	if os.Getppid() != parent { // killed: it can clean up nothing
		err = errors.Join(err, unix.Unmount(stateDir(o.inside), unix.MNT_DETACH), os.RemoveAll(o.inside))
	}
	return exitCode(err, stderr)
}

func exitCode(err error, stderr io.Writer) int {
	if err == nil {
		return 0
	}
	fmt.Fprintf(stderr, "bench: %v\n", err)
	return 1
}

// section is a group of measurements.
type section struct {
	name string
	run  func(context.Context, *bench) error
	// proxied has kube-proxy among what Margay is compared with.
	proxied bool
	// What it takes on the machine that the committed results are from, in the short form and in the long one.
	short, long time.Duration
}

var sections = []section{
	{"packet", benchPackets, false, 10 * time.Second, 20 * time.Second},
	{"add", benchAdd, false, 35 * time.Second, 45 * time.Second},
	{"traffic", benchTraffic, false, 30 * time.Second, 105 * time.Second},
	{"big-tcp", benchBigTCP, false, 12 * time.Second, 30 * time.Second},
	{"nodes", benchNodes, true, 25 * time.Second, 75 * time.Second},
	{"services", benchServices, true, 45 * time.Second, 180 * time.Second},
	{"nodeports", benchNodePorts, true, 25 * time.Second, 70 * time.Second},
	{"endpoints", benchEndpoints, true, 28 * time.Second, 45 * time.Second},
	{"agent-start", benchAgentStart, false, 15 * time.Second, 20 * time.Second},
	{"agent-change", benchAgentChange, false, 12 * time.Second, 30 * time.Second},
	{"agent-memory", benchAgentMemory, false, 12 * time.Second, 75 * time.Second},
	{"agent-policy", benchPolicyChange, false, 8 * time.Second, 20 * time.Second},
	{"rules", benchRules, false, 20 * time.Second, 40 * time.Second},
	{"sweep", benchSweep, false, 30 * time.Second, 60 * time.Second},
}

// expected is what a section takes in the form that is run.
func (o *options) expected(s section) time.Duration {
	switch {
	case o.smoke:
		return 8 * time.Second
	case o.full:
		return s.long
	default:
		return s.short
	}
}

func sectionNames() string {
	var names []string
	for _, s := range sections {
		names = append(names, s.name)
	}
	return strings.Join(names, ", ")
}

// bench is what the sections share.
type bench struct {
	options
	node     *node
	report   *report
	progress *progress

	margay, reference *contender // as they are described, see with
}

// proxy is the reference with kube-proxy in a mode.
func (b *bench) proxy(mode string) *contender {
	return b.reference.with(mode, "ptp + kube-proxy "+mode, "--proxy-mode", mode)
}

// others are the CNIs of -cni that can be compared on several nodes.
func (b *bench) others() []*contender {
	return slices.DeleteFunc(slices.Clone([]*contender(b.cnis)), func(c *contender) bool { return c.oneNode })
}

// servingOthers are those of them that serve services.
func (b *bench) servingOthers() []*contender {
	return slices.DeleteFunc(b.others(), func(c *contender) bool { return c.Services == 0 })
}

// rounds returns how often something is measured, or smoke times where nothing is.
func (b *bench) rounds(times, smoke int) int {
	if b.smoke {
		return smoke
	}
	return times
}

// choose returns how often something is measured in the long form, in the short one, and where nothing is.
func (b *bench) choose(full, short, smoke int) int {
	if b.full {
		return full
	}
	return b.rounds(short, smoke)
}

func measure(ctx context.Context, o options, stdout, stderr io.Writer) (err error) {
	only, err := regexp.Compile(o.only)
	if err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	var before baseline
	if !o.smoke {
		if before, err = readBaseline(ctx); err != nil {
			return err
		}
	}
	b := &bench{options: o, report: newReport(o)}
	if b.margay, err = ownContender("margay"); err != nil {
		return err
	}
	b.margay.settled = margaySettled
	if b.reference, err = ownContender("ptp-kube-proxy"); err != nil {
		return err
	}
	if b.node, err = newNode(ctx, o.inside); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.node.close()) }()
	if o.proxied() {
		b.report.version("kube-proxy " + clusterbuild.KubernetesVersion)
	}
	failed, err := b.runSections(ctx, slices.DeleteFunc(slices.Clone(sections), func(s section) bool { return !only.MatchString(s.name) }), stderr)
	if err != nil {
		return err
	}
	if err := b.report.finish(before); err != nil {
		return err
	}
	if err := b.report.print(stdout); err != nil {
		return fmt.Errorf("print the report: %w", err)
	}
	warn(slog.New(slog.NewTextHandler(stderr, nil)), b.report.regressions)
	if len(failed) > 0 {
		return fmt.Errorf("nothing is written, and the report lacks what has failed: %s", strings.Join(failed, ", "))
	}
	if o.write {
		if err := b.report.write("."); err != nil {
			return err
		}
	}
	if missed := len(b.report.missed()); o.strict && missed+len(b.report.regressions) > 0 {
		return fmt.Errorf("%d targets missed, %d figures worse than the committed ones", missed, len(b.report.regressions))
	}
	return nil
}

// runSections runs one section after the other and returns the names of those that have failed, of which the report has nothing. Only an
// interruption is an error.
func (b *bench) runSections(ctx context.Context, chosen []section, stderr io.Writer) (failed []string, err error) {
	all := time.Duration(0)
	for _, s := range chosen {
		all += b.expected(s)
	}
	b.progress = newProgress(stderr, all)
	for i, s := range chosen {
		end := b.progress.section(i+1, len(chosen), s.name, b.expected(s))
		before := *b.report
		err := attempt(func() error { return s.run(ctx, b) })
		for _, m := range b.report.measurements[len(before.measurements):] {
			if err == nil {
				_, err = m.result() // of a figure that is none: not at the end of the run
			}
		}
		if ctx.Err() != nil {
			err = ctx.Err() // whatever else has come of it
		}
		end(err)
		if ctx.Err() != nil {
			return nil, errors.New("interrupted: nothing is written")
		}
		if err != nil {
			failed, *b.report = append(failed, s.name), before
		}
	}
	return failed, nil
}

// attempt makes an error of a panic, which is how fixture fails.
func attempt(f func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("panic: %v\n%s", v, debug.Stack())
		}
	}()
	return f()
}

// proxied says whether kube-proxy is needed: by a section that is run or, perhaps, by another CNI.
func (o *options) proxied() bool {
	pattern, err := regexp.Compile(o.only)
	return err == nil && (len(o.cnis) > 0 || slices.ContainsFunc(sections, func(s section) bool { return s.proxied && pattern.MatchString(s.name) }))
}
