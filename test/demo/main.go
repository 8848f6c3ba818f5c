// SPDX-License-Identifier: Apache-2.0

// demo shows Margay at work: two nodes that are network namespaces of one machine, real pods made by libcni with the shipped conflist, an
// agent on each node that follows the manifests of conf/demo, real packets, and a client outside, behind a router. Everything is in
// namespaces of its own, so the demo neither sees nor touches a Margay that the machine runs already, and it leaves nothing behind. Run it
// from the repository after make build: make demo.
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
	c, err := newCluster()
	if err != nil {
		fmt.Println("demo cannot run here:", oneLine(errors.Join(err, c.remove())))
		return 1
	}
	d := &demo{cluster: c, start: time.Now(), servers: map[string]*server{}, running: map[string]*pod{}}
	d.run(ctx)
	fmt.Printf("\ndemo: %d checks passed, %d failed\n", d.passed, d.failed)
	if d.failed > 0 || d.passed == 0 {
		return 1
	}
	return 0
}

// again runs the demo in a mount namespace of its own, where /run can be private.
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
	if _, err := os.Stat("/proc/net/if_inet6"); err != nil {
		return errors.New("IPv6 is switched off on this machine, and the demo shows both families (ipv6.disable=1 on the kernel's command line?)")
	}
	for _, path := range []string{"bin/margay", "bin/margay-ipam", "bin/margay-agent", "bin/margayctl", "bin/margay-install", conflist, shipped} {
		if _, err := os.Stat(path); err != nil {
			return fmt.Errorf("%s is not here: run make demo in the repository", path)
		}
	}
	return nil
}

// oneLine puts a joined error on one line.
func oneLine(err error) string {
	return strings.ReplaceAll(err.Error(), "\n", "; ")
}
