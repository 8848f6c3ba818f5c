// SPDX-License-Identifier: Apache-2.0

// Command bench measures Margay beside what it is compared with: its programs beside the least that a program could do, its ADD and DEL
// beside those of other CNI plugins, its pods' traffic beside that of two namespaces joined by a bare veth pair. Whatever is compared is
// measured alternately in the same run, because on a shared machine only ratios mean anything.
//
// It works in network and mount namespaces of its own, which end with it, on the binaries that it builds first. It asserts nothing: a
// missed target is a line of the report. It needs root.
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
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// options are the command line.
type options struct {
	smoke  bool   // everything once, nothing to quote
	write  bool   // write the results below docs
	only   string // regular expression of section names
	inside string // set in the child: directory of the built binaries
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) > 0 && args[0] == peerCommand {
		return exitCode(runPeer(args[1:], stdout), stderr)
	}
	var o options
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.BoolVar(&o.smoke, "smoke", false, "run everything once, briefly: shows that the benchmarks work, measures nothing")
	flags.BoolVar(&o.write, "write", false, "write docs/benchmarks/latest.json and the tables of docs/benchmarks.md")
	flags.StringVar(&o.only, "only", "", "`regexp` of the sections to run ("+sectionNames()+")")
	flags.StringVar(&o.inside, "inside", "", "used by bench itself")
	if err := flags.Parse(args); err != nil {
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
	{"nodes", benchNodes, true},
	{"services", benchServices, true},
	{"nodeports", benchNodePorts, true},
	{"endpoints", benchEndpoints, true},
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
}

// rounds returns how often something is measured, full or smoke.
func (b *bench) rounds(full, smoke int) int {
	if b.smoke {
		return smoke
	}
	return full
}

func measure(ctx context.Context, o options, stdout io.Writer, log *slog.Logger) (err error) {
	only, err := regexp.Compile(o.only)
	if err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	n, err := newNode(ctx, o.inside)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.close()) }()
	b := &bench{options: o, node: n, report: newReport(o.inside), log: log}
	for _, s := range sections {
		if !only.MatchString(s.name) {
			continue
		}
		log.Info("measuring", slog.String("section", s.name))
		if err := s.run(ctx, b); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	b.report.finish()
	if err := b.report.print(stdout); err != nil {
		return fmt.Errorf("print the report: %w", err)
	}
	if o.write && !o.smoke {
		return b.report.write(filepath.Join("docs", "benchmarks.md"), filepath.Join("docs", "benchmarks", "latest.json"))
	}
	return nil
}

// proxied says whether one of the sections that are run has kube-proxy in it.
func proxied(only string) bool {
	pattern, err := regexp.Compile(only)
	return err == nil && slices.ContainsFunc(sections, func(s section) bool { return s.proxied && pattern.MatchString(s.name) })
}
