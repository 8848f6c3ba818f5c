// SPDX-License-Identifier: Apache-2.0

// demo shows Margay at work on one machine: real pods made by libcni with the shipped conflist, the agent on the manifests of conf/demo,
// real packets, and a client outside. It runs in namespaces of its own, so it neither sees nor touches a Margay that the machine runs
// already, and it leaves nothing behind. Run it from the repository after make build: make demo.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// limit is how long the demo may take.
const limit = 55 * time.Second

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	code := run(ctx, os.Args[1:])
	stop()
	os.Exit(code)
}

func run(ctx context.Context, args []string) int {
	if err := preflight(); err != nil {
		fmt.Println("demo cannot run here:", err)
		return 1
	}
	if len(args) == 0 {
		return again(ctx)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	d := &demo{start: time.Now()}
	if err := d.run(ctx); err != nil {
		d.check(false, "%v", err)
	}
	fmt.Printf("\ndemo: %d checks passed, %d failed\n", d.passed, d.failed)
	if d.failed > 0 || d.passed == 0 {
		return 1
	}
	return 0
}

// again runs the demo in a mount namespace of its own, where /run and /sys/fs/bpf can be private.
func again(ctx context.Context) int {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "inside")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return max(exit.ExitCode(), 1)
	}
	if err != nil {
		fmt.Println("demo cannot run here:", err)
		return 1
	}
	return 0
}

// preflight says in one line what is missing.
func preflight() error {
	if os.Geteuid() != 0 {
		return errors.New("it makes network namespaces and loads BPF programs: run it as root")
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	release := unix.ByteSliceToString(u.Release[:])
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err == nil && (major < 6 || major == 6 && minor < 1) {
		return fmt.Errorf("kernel %s is too old: 6.1 is the oldest that Margay is tested on", release)
	}
	if known, err := os.ReadFile("/proc/filesystems"); err != nil || !strings.Contains(string(known), "\tbpf\n") {
		return fmt.Errorf("kernel %s has no bpffs (CONFIG_BPF_SYSCALL)", release)
	}
	for _, path := range []string{"bin/margay", "bin/margay-ipam", "bin/margay-agent", "bin/margayctl", conflist, manifests} {
		if _, err := os.Stat(path); err != nil {
			return fmt.Errorf("%s is not here: run make demo in the repository", path)
		}
	}
	return nil
}
