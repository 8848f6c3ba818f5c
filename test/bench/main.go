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
	"os/signal"
	"regexp"
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
		return exitCode(enter(ctx, o, args, stdout, stderr), stderr)
	}
	return exitCode(measure(ctx, o, stdout, slog.New(slog.NewTextHandler(stderr, nil))), stderr)
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
}

var sections = []section{
	{"packet", benchPackets, false},
	{"add", benchAdd, false},
	{"traffic", benchTraffic, false},
	{"big-tcp", benchBigTCP, false},
	{"nodes", benchNodes, true},
	{"services", benchServices, true},
	{"nodeports", benchNodePorts, true},
	{"endpoints", benchEndpoints, true},
	{"agent-start", benchAgentStart, false},
	{"agent-change", benchAgentChange, false},
	{"agent-memory", benchAgentMemory, false},
	{"agent-policy", benchPolicyChange, false},
	{"rules", benchRules, false},
	{"sweep", benchSweep, false},
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
	node   *node
	report *report
	log    *slog.Logger

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

func measure(ctx context.Context, o options, stdout io.Writer, log *slog.Logger) (err error) {
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
	b := &bench{options: o, report: newReport(o), log: log}
	if b.margay, err = ownContender("margay"); err != nil {
		return err
	}
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
	for _, s := range sections {
		if !only.MatchString(s.name) {
			continue
		}
		start := time.Now()
		if err := s.run(ctx, b); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		log.Info("measured", slog.String("section", s.name), slog.Duration("took", time.Since(start).Round(time.Millisecond)))
	}
	if err := b.report.finish(before); err != nil {
		return err
	}
	if err := b.report.print(stdout); err != nil {
		return fmt.Errorf("print the report: %w", err)
	}
	warn(log, b.report.regressions)
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

// proxied says whether kube-proxy is needed: by a section that is run or, perhaps, by another CNI.
func (o *options) proxied() bool {
	pattern, err := regexp.Compile(o.only)
	return err == nil && (len(o.cnis) > 0 || slices.ContainsFunc(sections, func(s section) bool { return s.proxied && pattern.MatchString(s.name) }))
}
