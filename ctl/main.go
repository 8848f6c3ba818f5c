// SPDX-License-Identifier: Apache-2.0

// margayctl shows what Margay does on this node, for people and for scripts. It owns the commands and their output; it reads the pinned
// maps and the files in the run directory itself, so everything but the agent's own state is shown with the agent stopped. It writes
// nothing but the lock that makes it the events' only reader.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/pins"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run is main without the process: it returns the exit status.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	cmd := newRoot(&app{out: stdout, errs: stderr})
	cmd.SetArgs(args)
	cmd.SetOut(stdout)
	cmd.SetErr(stderr)
	err := cmd.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	if !errors.Is(err, errShown) {
		fmt.Fprintf(stderr, "margayctl: %v\n", err)
	}
	return 1
}

// errShown ends the command with status 1 when its output has said why.
var errShown = errors.New("shown already")

// app is what the commands share: the global flags and where output goes.
type app struct {
	node   datapath.Config
	output string

	out  io.Writer
	errs io.Writer
}

func newRoot(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:           "margayctl",
		Short:         "Show what Margay does on this node",
		Long:          "Show what Margay does on this node: pods, services, flows, policies and drops, read from the kernel's maps.",
		SilenceUsage:  true,
		SilenceErrors: true,
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if a.output != "table" && a.output != "json" {
				return fmt.Errorf("output format %q is unknown: use -o table or -o json", a.output)
			}
			return nil
		},
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	flags := root.PersistentFlags()
	flags.StringVar(&a.node.BPFFS, "bpffs", pins.DefaultBPFFS, "directory of Margay's pins")
	flags.StringVar(&a.node.Run, "run", pins.DefaultRun, "directory of Margay's run time files")
	flags.StringVarP(&a.output, "output", "o", "table", "output format: table or json")
	root.AddCommand(
		newStatus(a), newNodes(a), newEndpoints(a), newServices(a), newFlows(a), newPolicy(a), newDrops(a),
	)
	return root
}
