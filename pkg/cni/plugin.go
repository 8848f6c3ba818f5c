// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/pins"
)

// cniTimeout bounds a whole command: shorter than the kubelet's patience with a sandbox (2 minutes), longer than anything that works.
const cniTimeout = 60 * time.Second

// Versions are the versions of the CNI specification that the plugin speaks, oldest first.
var versions = []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}

const about = "margay: CNI plugin that connects a pod through eBPF"

// programs attaches a pod's tc programs. pkg/pins implements this and the interfaces below; tests have a fake.
type programs interface {
	AttachPod(ifindex int) error
	DetachPod(ifindex int) error
	PodAttached(ifindex int) error
}

// endpoints is the endpoints map.
type endpoints interface {
	PutEndpoint(a netip.Addr, e bpf.Endpoint) error
	DeleteEndpoint(a netip.Addr, ifindex int) error
	LookupEndpoint(a netip.Addr) (bpf.Endpoint, bool, error)
}

// pendings is the pending map, which the agent fills.
type pendings interface {
	LookupPending(k bpf.PendingKey) (bpf.Pending, bool, error)
}

// hostPorts are the frontends that lead to single pods.
type hostPorts interface {
	FreeHostPortID(f bpf.FrontendKey, skip ...uint32) (uint32, error)
	PutHostPort(p pins.HostPort) error
	DeleteHostPort(p pins.HostPort) error
	CheckHostPort(p pins.HostPort) error
	LookupFrontend(f bpf.FrontendKey) (bpf.Service, bool, error)
	HostPortBackend(id uint32) (netip.AddrPort, bool, error)
}

// dataplane is an opened datapath.
type dataplane interface {
	programs
	endpoints
	pendings
	hostPorts
	io.Closer
}

// Plugin runs CNI commands.
type Plugin struct {
	stdout io.Writer
	ensure func(context.Context, pins.Config) (dataplane, error)
	open   func(pins.Config) (dataplane, error)
	check  func(pins.Config) error
	// after is called after each step of ADD: tests inject faults here.
	after func(step string) error
	// speaks is the configuration's version, for error messages.
	speaks string
}

// New returns the plugin that prints results and errors to stdout.
func New(stdout io.Writer) *Plugin {
	return &Plugin{
		stdout: stdout,
		ensure: ensureWith(runLoader),
		open:   openDatapath,
		check:  checkDatapath,
		after:  func(string) error { return nil },
		speaks: versions[len(versions)-1],
	}
}

// Run does what the environment (CNI_COMMAND and its fellows) and standard input ask for, and returns the exit status. Results and errors
// go to stdout as the specification has it, everything else to standard error or the log file.
func (p *Plugin) Run(ctx context.Context) int {
	ctx, cancel := context.WithTimeout(ctx, cniTimeout)
	defer cancel()
	err := p.command(ctx, os.Getenv, os.Stdin)
	if err == nil {
		return 0
	}
	p.printError(asError(err))
	return 1
}

// printError writes the specification's error object.
func (p *Plugin) printError(e *types.Error) {
	out, err := json.MarshalIndent(struct {
		CNIVersion string `json:"cniVersion"`
		*types.Error
	}{p.speaks, e}, "", "    ")
	if err != nil {
		out = []byte(err.Error())
	}
	fmt.Fprintf(p.stdout, "%s\n", out)
}

// attachment is one command's subject.
type attachment struct {
	conf *NetConf
	args *Args
	pod  podArgs
	log  *slog.Logger
	// pollLocks is for a process that outlives the command.
	pollLocks bool
	// leases is what leaseRun returns, once it was asked.
	leases *string
	// closeLog ends the log file.
	closeLog func() error
}

// load reads what a command was given. It judges nothing: what is invalid for ADD must not keep DEL from working.
func (p *Plugin) load(args *Args) (*attachment, error) {
	conf, err := decodeNetConf(args.StdinData)
	if err != nil {
		return nil, err
	}
	p.speaks = conf.CNIVersion
	log, closeLog := newLogger(conf)
	pod, err := parseArgs(args.Args)
	at := &attachment{conf: conf, args: args, pod: pod, closeLog: closeLog, log: log.With(
		slog.String("containerID", args.ContainerID), slog.String("ifName", args.IfName), slog.String("network", conf.Name))}
	if err != nil {
		return at, fail(types.ErrInvalidEnvironmentVariables, err, "CNI_ARGS cannot be read")
	}
	if pod.name != "" {
		at.log = at.log.With(slog.String("pod", pod.namespace+"/"+pod.name))
	}
	return at, nil
}

// newLogger returns the configured logger. A log file that cannot be written is reported on standard error, where logging goes on: it is
// no reason to leave a pod without a network.
func newLogger(conf *NetConf) (*slog.Logger, func() error) {
	level, _ := conf.logLevel() // validate reports the fault
	var out io.Writer = os.Stderr
	closeLog := func() error { return nil }
	var fault error
	if conf.LogFile != "" {
		if fault = os.MkdirAll(filepath.Dir(conf.LogFile), 0o755); fault == nil {
			var f *os.File
			if f, fault = os.OpenFile(conf.LogFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640); fault == nil {
				out, closeLog = f, f.Close
			}
		}
	}
	log := slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: level}))
	if fault != nil {
		log.Warn("log file cannot be used", slog.String("logFile", conf.LogFile), slog.Any("error", fault))
	}
	return log, closeLog
}

// records returns the node's record files.
func (at *attachment) records() *endpoint.Store {
	return endpoint.NewStore(at.conf.RunDir)
}

// done logs the outcome of a command, and ends its log.
func (at *attachment) done(command string, start time.Time, err *error) {
	if *err != nil {
		at.log.Error(command+" failed", slog.Any("error", *err), slog.Duration("took", time.Since(start)))
	} else {
		at.log.Info(command+" done", slog.Duration("took", time.Since(start)))
	}
	_ = at.closeLog() // there is no log left to say it in
}

// tidy gives something back at a command's end. A failure changes nothing about the outcome, which may be printed already.
func (at *attachment) tidy(what string, do func() error) {
	if err := do(); err != nil {
		at.log.Warn(what, slog.Any("error", err))
	}
}
