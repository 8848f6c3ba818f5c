// SPDX-License-Identifier: Apache-2.0

// Command margay is the CNI plugin. Container runtimes run it with the command in the environment and the configuration on standard input,
// as the CNI specification has it; see pkg/cni.
package main

import (
	"context"
	"os"
	"os/signal"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/cni"
)

func main() {
	os.Exit(run())
}

// patience is how long a command runs before it listens for signals, which takes two threads: longer than a DEL waits for the kernel, or an
// ADD for a hundred others. A runtime that gives up waits for tens of seconds; what an earlier signal ends is undone as after a kill, by the
// next command.
const patience = time.Second

func run() int {
	// One ADD is one thread's work from beginning to end; more processors would only wake each other.
	runtime.GOMAXPROCS(1)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	// A runtime that gives up sends SIGTERM first: the command then undoes what it did.
	time.AfterFunc(patience, func() {
		signals := make(chan os.Signal, 1)
		signal.Notify(signals, os.Interrupt, unix.SIGTERM)
		<-signals
		cancel()
	})
	return cni.New(os.Stdout).Run(ctx)
}
