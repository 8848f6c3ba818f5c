// SPDX-License-Identifier: Apache-2.0

// Conformance runs the upstream tests of Kubernetes' SIG Network on a running test cluster, and writes what became of each into
// docs/conformance.md. Its last line on standard output is "N passed, N failed, N skipped"; it exits with an error if any test failed, if
// none passed, or if the run itself did not end well.
//
// It owns which tests can run and the reasons for those that cannot (categories.go). The cluster is package lab's.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/margay-cni/margay/test/cluster/lab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	got, err := run(ctx, os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
	}
	fmt.Println(got)
	if err != nil {
		os.Exit(1)
	}
}

// options are the flags.
type options struct {
	dir     string
	name    string
	groups  string
	focus   string
	procs   int
	timeout time.Duration
	reports string
	write   string
	up      bool
}

// focuses are short names for expressions that -focus takes.
var focuses = map[string]string{
	"conformance": `\[Conformance\]`,
	"smoke":       `Granular Checks: (Pods|Services).*(http|udp)|hairpin|should be rejected when no endpoints|HealthCheckNodePort correctly`,
}

func parseOptions(args []string) (options, error) {
	var o options
	flags := flag.NewFlagSet("conformance", flag.ContinueOnError)
	flags.StringVar(&o.dir, "dir", "build/cluster", "directory of the test cluster: its binaries, images and state")
	flags.StringVar(&o.name, "name", "default", "name of the cluster, which must be up")
	flags.StringVar(&o.groups, "groups", strings.Join(groups(), ","), "groups of tests to run")
	flags.StringVar(&o.focus, "focus", "", "run only tests whose names match: conformance, smoke, or a regular expression")
	flags.IntVar(&o.procs, "procs", 10, "tests at the same time; they wait more than they compute")
	flags.DurationVar(&o.timeout, "timeout", 2*time.Hour, "end the run after this time")
	flags.StringVar(&o.reports, "reports", "build/cluster/conformance", "directory for the reports and logs of the run")
	flags.StringVar(&o.write, "write", "", "write the results to this document; the cluster must run Margay, and the group base be run without a focus")
	flags.BoolVar(&o.up, "up", false, "if the cluster is not up, start one with three dual-stack nodes and Margay, and end it afterwards (as root)")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	if flags.NArg() > 0 {
		return o, fmt.Errorf("unknown arguments %q", flags.Args())
	}
	if o.procs < 1 {
		return o, fmt.Errorf("-procs %d: want at least 1", o.procs)
	}
	if named, ok := focuses[o.focus]; ok {
		o.focus = named
	}
	var err error
	if o.reports, err = filepath.Abs(o.reports); err != nil {
		return o, err
	}
	return o, nil
}

// run returns the summary of what was run, which is empty when nothing was, and an error unless all of it passed.
func run(ctx context.Context, args []string) (got count, err error) {
	o, err := parseOptions(args)
	if err != nil {
		return count{}, err
	}
	selected, err := parseSelection(o.groups)
	if err != nil {
		return count{}, err
	}
	cluster, down, err := o.cluster(ctx)
	defer func() { err = errors.Join(err, down()) }()
	if err != nil {
		return count{}, err
	}
	if err := o.mayWrite(selected, cluster.CNI); err != nil {
		return count{}, err
	}
	r := runner{cluster: cluster, options: o, selected: selected}
	if err := r.checkImages(ctx); err != nil {
		return count{}, err
	}
	return r.report(ctx)
}

// cluster opens the cluster, and starts one before if that was asked for. down ends what was started here, and is never nil.
func (o options) cluster(ctx context.Context) (c *lab.Cluster, down func() error, err error) {
	down = func() error { return nil }
	c, err = lab.Open(o.dir, o.name)
	if err == nil || !o.up || !errors.Is(err, fs.ErrNotExist) {
		return c, down, err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	dir, err := filepath.Abs(o.dir)
	if err != nil {
		return nil, down, err
	}
	down = func() error { return lab.Down(o.dir, o.name) }
	c, err = lab.Up(ctx, lab.Options{Dir: dir, Name: o.name, Nodes: 3, Family: lab.Dual, CNI: "margay"}, log)
	return c, down, err
}

// report runs the tests, prints those that failed, and writes the document if that was asked for.
func (r runner) report(ctx context.Context) (count, error) {
	f, err := r.facts(ctx)
	if err != nil {
		return count{}, err
	}
	started := time.Now()
	suites, err := r.suites(ctx, f.nodes)
	f.took = time.Since(started)
	faults := []error{err}
	var total count
	for _, s := range suites {
		faults = append(faults, s.verdict())
		if r.options.focus == "" {
			faults = append(faults, s.unaccounted())
		}
		for _, t := range append(s.faults, s.tests...) {
			if t.outcome == failed {
				fmt.Printf("failed: %s: %s\n", t.name, t.note)
			}
		}
		total.add(s.count())
	}
	if r.options.write != "" && len(suites) > 0 {
		faults = append(faults, os.WriteFile(r.options.write, []byte(render(f, suites)), 0o644))
	}
	return total, errors.Join(faults...)
}

// suites runs the test programs that the selection needs. Of one that gave no report there is only the error.
func (r runner) suites(ctx context.Context, nodes int) ([]suite, error) {
	var suites []suite
	var faults []error
	if r.selected.e2e() {
		got, err := r.e2e(ctx, nodes)
		faults = append(faults, err)
		if got.tests != nil {
			suites = append(suites, suite{title: "Tests of Kubernetes", report: got, group: group, whyNot: r.selected.whyNot})
		}
	}
	if r.selected[clusterPolicy] {
		got, err := r.policy(ctx)
		faults = append(faults, err)
		if got.tests != nil {
			always := func(string) string { return clusterPolicy }
			suites = append(suites, suite{title: "Tests of network-policy-api", report: got, group: always, whyNot: policyWhyNot})
		}
	}
	return suites, errors.Join(faults...)
}

// mayWrite refuses to document what is no statement about Margay, or only a part of it. Asked before the run: it takes its time.
func (o options) mayWrite(selected selection, network string) error {
	if o.write == "" {
		return nil
	}
	var faults []error
	if network != "margay" {
		faults = append(faults, fmt.Errorf("the cluster's network is %q", network))
	}
	if o.focus != "" {
		faults = append(faults, errors.New("-focus leaves out tests"))
	}
	if !selected[base] {
		faults = append(faults, fmt.Errorf("-groups leaves out %s", base))
	}
	if err := errors.Join(faults...); err != nil {
		return fmt.Errorf("-write %s: %w", o.write, err)
	}
	return nil
}
