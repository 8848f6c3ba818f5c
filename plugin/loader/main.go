// SPDX-License-Identifier: Apache-2.0

// Command margay-loader makes the datapath where there is none: it verifies, loads and pins the programs and their maps. The plugin margay
// runs it, from its own directory, when it finds nothing of its build pinned, which is the first ADD after a boot or an upgrade unless the
// agent was quicker. It is a program of its own because every ADD pays for what the plugin links. Any number may run at once.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/pins"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:]))
}

func run(ctx context.Context, args []string) int {
	cfg := pins.DefaultConfig()
	flags := flag.NewFlagSet("margay-loader", flag.ContinueOnError)
	flags.StringVar(&cfg.BPFFS, "bpffs", cfg.BPFFS, "`directory` of the pins")
	flags.StringVar(&cfg.Run, "run", cfg.Run, "`directory` of locks and records")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	if err := datapath.Load(ctx, cfg); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}
