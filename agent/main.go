// SPDX-License-Identifier: Apache-2.0

// margay-agent is the node agent: it fills the pinned maps from the Kubernetes API, or a directory of manifests, and keeps them right. Pods
// start and stop without it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/margay-cni/margay/pkg/agent"
	"github.com/margay-cni/margay/pkg/cni"
	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/pins"
	"github.com/margay-cni/margay/pkg/state"
)

// version is set by the linker; a build from a checkout says what Go knows of it.
var version = ""

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stderr)
	stop()
	os.Exit(code)
}

// options are the command line.
type options struct {
	source    sourceOptions
	node      string
	devices   string
	level     slog.Level
	resync    time.Duration
	datapath  datapath.Config
	verdicts  bool
	tcx       bool
	balancing state.LoadBalancing
	nodePorts agent.NodePortAddresses
	cidrs     []netip.Prefix
	version   bool
	reach     agent.Reach
	// serviceReturn is how answers to clients outside travel that another node forwarded.
	serviceReturn state.ServiceReturn
	serve         agent.Serve
	nodePortRange datapath.PortRange
	flags         *flag.FlagSet
}

func parse(args []string, stderr io.Writer) (options, error) {
	o := options{datapath: pins.DefaultConfig()}
	o.datapath.Sizes = map[string]uint32{}
	hostname, _ := os.Hostname() // an empty name is refused below, with the flag that cures it

	f := flag.NewFlagSet("margay-agent", flag.ContinueOnError)
	f.SetOutput(stderr)
	sourceFlags(f, &o.source)
	f.StringVar(&o.node, "node", hostname, "name of this node")
	f.StringVar(&o.datapath.BPFFS, "bpffs", o.datapath.BPFFS, "directory of the pinned maps and programs")
	f.StringVar(&o.datapath.Run, "run", o.datapath.Run, "run directory: records, names, local API")
	f.StringVar(&o.datapath.ProcSys, "proc-sys", "/proc/sys", "where kernel settings are written, for a container whose own /proc/sys is read-only")
	f.StringVar(&o.devices, "devices", "", "comma-separated name patterns of the node's network devices (default: those with a global address or the default route)")
	f.DurationVar(&o.resync, "resync", 10*time.Second, "how often everything is compared with the kernel")
	f.TextVar(&o.level, "log-level", slog.LevelInfo, "debug, info, warn or error")
	f.BoolVar(&o.verdicts, "verdict-events", false, "have an event written for every new flow that policy lets pass (margayctl drops --follow --verdicts)")
	f.BoolVar(&o.tcx, "tcx", true, "attach the programs of the node's devices by tcx links too, above their filters, where the kernel has them (6.6)")
	reachFlags(f, &o)
	serveFlags(f, &o)
	f.BoolVar(&o.version, "version", false, "print the version and exit")
	f.Func("load-balancing", "random or maglev: how backends are chosen for services without the annotation "+state.AnnotationLoadBalancing+
		" (default random)", func(s string) error {
		if o.balancing = state.LoadBalancing(s); !o.balancing.Known() {
			return errors.New("want random or maglev")
		}
		return nil
	})
	f.Func("nodeport-addresses", "comma-separated prefixes, or primary, localhost, all: addresses that NodePorts are served on (default primary)",
		func(s string) (err error) {
			o.nodePorts, err = agent.ParseNodePortAddresses(s)
			return err
		})
	f.Func("service-cidrs", "comma-separated prefixes that cluster addresses are taken from: what no service has there is dropped", func(s string) error {
		return prefixes(s, &o.cidrs)
	})
	f.Func("map-size", "NAME=ENTRIES: size of a map when it is made; may be repeated", func(s string) error {
		name, entries, ok := strings.Cut(s, "=")
		n, err := strconv.ParseUint(entries, 10, 32)
		if !ok || err != nil || n == 0 {
			return errors.New("want NAME=ENTRIES")
		}
		o.datapath.Sizes[name] = uint32(n)
		return nil
	})
	if err := f.Parse(args); err != nil {
		return o, err
	}
	switch {
	case o.version:
		return o, nil
	case f.NArg() > 0:
		return o, fmt.Errorf("argument %q is not understood", f.Arg(0))
	case o.node == "":
		return o, errors.New("the host has no name: --node NAME is required")
	case o.resync <= 0:
		return o, fmt.Errorf("--resync %v: want a positive duration", o.resync)
	}
	return o, errors.Join(o.source.validate(), o.serve.Validate())
}

// run is the whole program; it returns the exit status: 0 after a signal, 1 after a failure, 2 for a wrong command line.
func run(ctx context.Context, args []string, stderr io.Writer) int {
	o, err := parse(args, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		_, _ = fmt.Fprintln(stderr, "margay-agent:", err)
		return 2
	}
	if o.version {
		_, _ = fmt.Fprintln(stderr, "margay-agent", buildVersion())
		return 0
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(collectAfter)
	}
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: o.level}))
	if err := work(ctx, o, log); err != nil {
		log.Error("agent ends", "err", err)
		return 1
	}
	return 0
}

// collectAfter is by how many percent the heap grows between two garbage collections, where GOGC does not say otherwise. Go's own 100 makes the
// agent a third larger (TestMemoryWithManyPods), to save collections of a few milliseconds each.
const collectAfter = 50

func work(ctx context.Context, o options, log *slog.Logger) (err error) {
	d, err := datapath.Ensure(ctx, o.datapath)
	if err != nil {
		return fmt.Errorf("prepare the datapath: %w", err)
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if err := datapath.ReservePorts(ctx, o.datapath, o.nodePortRange); err != nil {
		return fmt.Errorf("reserve the ports of NodePorts: %w", err)
	}
	var devices []string
	if o.devices != "" {
		devices = strings.Split(o.devices, ",")
	}
	source, err := o.source.open(ctx, o.node, log)
	if err != nil {
		return fmt.Errorf("source: %w", err)
	}
	log.Info("agent starts", "version", buildVersion(), "node", o.node, "source", o.source.String())
	cfg := agent.Config{
		Version:           buildVersion(),
		Node:              o.node,
		Run:               o.datapath.Run,
		ProcSys:           o.datapath.ProcSys,
		Source:            source,
		SelectorSlices:    source.selectorSlices,
		Tables:            agent.KernelTables(&d.Maps),
		MaxEntries:        agent.MapSizes(&d.Maps),
		Epochs:            d,
		HostPorts:         d,
		Attach:            d,
		Sweep:             d,
		Collect:           cni.NewCollector(o.datapath, cni.Loader{Load: datapath.Load, RemoveUnusedPrograms: datapath.RemoveUnusedPrograms}, log),
		Devices:           devices,
		Reach:             o.reach,
		ServiceReturn:     o.serviceReturn,
		LoadBalancing:     o.balancing,
		ServiceCIDRs:      o.cidrs,
		NodePortAddresses: o.nodePorts,
		VerdictEvents:     o.verdicts,
		Serve:             served(o, d),
		Resync:            o.resync,
		Log:               log,
	}
	if o.tcx {
		cfg.Links = d
	}
	source.tell(&cfg)
	return agent.Run(ctx, cfg)
}

func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		return info.Main.Version
	}
	return "unknown"
}
