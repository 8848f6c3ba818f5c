// SPDX-License-Identifier: Apache-2.0

// Command margay is the CNI plugin. Container runtimes run it with the command in the environment and the configuration on standard input,
// as the CNI specification has it; see pkg/cni.
package main

import (
	"context"
	"os"
	"os/signal"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/cni"
)

func main() {
	os.Exit(run())
}

func run() int {
	// One ADD is one thread's work from beginning to end; more processors would only wake each other.
	runtime.GOMAXPROCS(1)
	// A runtime that gives up sends SIGTERM first: the command then undoes what it did.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	return cni.New(os.Stdout).Run(ctx)
}
