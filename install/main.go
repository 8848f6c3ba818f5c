// SPDX-License-Identifier: Apache-2.0

// Margay-install puts Margay's binaries and its conflist where the container runtime looks for them, and takes every trace of Margay off
// a node again: files, pins, filters, devices, routes and changed kernel settings.
//
// It needs no agent, no API server and no configuration file, and may be killed and repeated at any point. It starts and stops nothing:
// with an agent running, or with pods still attached, uninstalling is refused.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/margay-cni/margay/conf"
)

// version is set by the linker.
var version = "dev"

// Exit codes.
const (
	exitOK = iota
	exitFailed
	exitUsage
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run is main without the process: it reads args, acts and returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o, err := parseOptions(args, stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return exitOK
	case err != nil:
		fmt.Fprintln(stderr, "margay-install:", err)
		return exitUsage
	case o.version:
		fmt.Fprintln(stdout, "margay-install", version)
		return exitOK
	}
	act := install
	if o.uninstall {
		act = uninstall
	}
	if err := act(ctx, o, stdout); err != nil {
		fmt.Fprintln(stderr, "margay-install:", err)
		return exitFailed
	}
	if o.stay {
		<-ctx.Done()
	}
	return exitOK
}

// options is what the flags say. Every directory of the node is a path as the node sees it: at() puts root before it.
type options struct {
	uninstall, force, dryRun, version bool

	binariesOnly, conflistOnly bool
	requireBPFFS               bool
	wait                       time.Duration // for ADD to be able to serve, with conflistOnly
	stay                       bool          // after uninstalling

	root       string // the node's root directory, as this process sees it
	cniBinDir  string
	cniConfDir string
	binDir     string // for what people run; empty: not installed
	stateDir   string
	runDir     string
	bpffs      string

	sourceDir string // where the binaries are now; not under root
	conflist  string // file to install instead of the embedded one; not under root
	sysctlDir string // procfs: belongs to the process's network namespace, not to root
}

func parseOptions(args []string, stderr io.Writer) (*options, error) {
	o := &options{sysctlDir: "/proc/sys"}
	fs := flag.NewFlagSet("margay-install", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.BoolVar(&o.uninstall, "uninstall", false, "remove every trace of Margay from this node")
	fs.BoolVar(&o.force, "force", false, "replace an edited conflist; uninstall although pods are attached or an agent runs")
	fs.BoolVar(&o.dryRun, "dry-run", false, "print what would be done, and do nothing")
	fs.BoolVar(&o.binariesOnly, "binaries-only", false, "install everything but the conflist")
	fs.BoolVar(&o.conflistOnly, "conflist-only", false, "install the conflist only, and only if pods can start: an agent has seen the cluster, and there are addresses")
	fs.DurationVar(&o.wait, "wait", 0, "how long --conflist-only waits until pods can start; 0: look once")
	fs.BoolVar(&o.requireBPFFS, "require-bpffs", false, "refuse a node that has no BPF file system at /sys/fs/bpf")
	fs.BoolVar(&o.stay, "stay", false, "after --uninstall, stay until a signal comes: for a DaemonSet, whose containers are not to end")
	fs.BoolVar(&o.version, "version", false, "print the version")
	fs.StringVar(&o.root, "root", "/", "root `directory` of the node; goes before every directory of the node below")
	fs.StringVar(&o.cniBinDir, "cni-bin-dir", "/opt/cni/bin", "`directory` where the runtime looks for plugins")
	fs.StringVar(&o.cniConfDir, "cni-conf-dir", "/etc/cni/net.d", "`directory` where the runtime looks for configuration")
	fs.StringVar(&o.binDir, "bin-dir", "", "`directory` for margay-agent, margayctl and margay-install; empty: they are not installed")
	fs.StringVar(&o.stateDir, "state-dir", "/var/lib/margay", "`directory` for the list of what was installed")
	fs.StringVar(&o.runDir, "run-dir", "/run/margay", "`directory` of Margay's state that a reboot ends")
	fs.StringVar(&o.bpffs, "bpffs", "/sys/fs/bpf/margay", "`directory` of Margay's pins")
	fs.StringVar(&o.sourceDir, "source-dir", "", "`directory` that holds the binaries; default: where margay-install itself is")
	fs.StringVar(&o.conflist, "conflist", "", "conflist `file` to install; default: the shipped one, with example address ranges")
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	if fs.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	if err := o.complete(); err != nil {
		return nil, err
	}
	return o, nil
}

// complete fills in what depends on the process, and refuses directories that cannot be meant.
func (o *options) complete() error {
	if o.sourceDir == "" {
		self, err := os.Executable()
		if err != nil {
			return fmt.Errorf("find the directory of margay-install: %w", err)
		}
		o.sourceDir = filepath.Dir(self)
	}
	var errs []error
	switch {
	case o.binariesOnly && o.conflistOnly:
		errs = append(errs, errors.New("--binaries-only and --conflist-only leave nothing to install"))
	case o.uninstall && (o.binariesOnly || o.conflistOnly):
		errs = append(errs, errors.New("--uninstall removes everything: --binaries-only and --conflist-only are for installing"))
	case o.wait != 0 && !o.conflistOnly:
		errs = append(errs, errors.New("--wait is for --conflist-only"))
	case o.stay && !o.uninstall:
		errs = append(errs, errors.New("--stay is for --uninstall"))
	}
	for flag, dir := range map[string]string{
		"root": o.root, "cni-bin-dir": o.cniBinDir, "cni-conf-dir": o.cniConfDir, "state-dir": o.stateDir, "run-dir": o.runDir, "bpffs": o.bpffs,
	} {
		if !filepath.IsAbs(dir) {
			errs = append(errs, fmt.Errorf("--%s %q is no absolute path", flag, dir))
		}
	}
	if o.binDir != "" && !filepath.IsAbs(o.binDir) {
		errs = append(errs, fmt.Errorf("--bin-dir %q is no absolute path", o.binDir))
	}
	// These are removed with everything below them, so a slip of the pen must not name something that is not ours alone.
	for flag, dir := range map[string]string{"run-dir": o.runDir, "state-dir": o.stateDir, "bpffs": o.bpffs} {
		if parent := filepath.Dir(filepath.Clean(dir)); parent == "/" || filepath.Base(dir) == "bpf" {
			errs = append(errs, fmt.Errorf("--%s %q is removed whole by --uninstall: give Margay a directory of its own, at least two levels deep", flag, dir))
		}
	}
	return errors.Join(errs...)
}

// at returns where this process finds a path of the node.
func (o *options) at(path string) string {
	return filepath.Join(o.root, path)
}

func (o *options) conflistPath() string {
	return filepath.Join(o.cniConfDir, conf.ConflistName)
}
