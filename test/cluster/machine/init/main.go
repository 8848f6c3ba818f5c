// SPDX-License-Identifier: Apache-2.0

// Init is the first process of a fake machine (package machine). Its parent made it in fresh network, mount, UTS and PID namespaces and
// put it into the machine's cgroups. It makes the machine's file systems, starts and ends services as it is asked to, and reaps whatever
// is orphaned in the machine. When it dies, by any signal, the kernel ends every process of the machine, and with them go its
// namespaces and mounts: that is how a machine is switched off.
package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/test/cluster/machine"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "init:", err)
		os.Exit(1)
	}
}

// run has two stages, because a cgroup namespace belongs to a thread: only what that thread executes next is in it as a whole.
func run(args []string) error {
	switch {
	case len(args) == 1:
		return firstStage(args[0])
	case len(args) == 2 && args[0] == "second":
		return secondStage(args[1])
	}
	return fmt.Errorf("want the machine's directory, got %q", args)
}

func firstStage(dir string) error {
	if line, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil || line != machine.Go {
		return fmt.Errorf("the harness ended before the machine was ready (%q, %v)", line, err)
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("make a cgroup namespace: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return syscall.Exec(self, []string{self, "second", dir}, os.Environ())
}

func secondStage(dir string) error {
	spec, err := machine.ReadSpec(dir)
	if err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(spec.Hostname)); err != nil {
		return fmt.Errorf("set the host name: %w", err)
	}
	if err := makeFileSystems(dir, spec); err != nil {
		return fmt.Errorf("make the file systems: %w", err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	if err := unix.Dup2(int(null.Fd()), 0); err != nil {
		return err
	}
	l, err := machine.Listen(dir)
	if err != nil {
		return fmt.Errorf("listen for requests: %w", err)
	}
	s := &supervisor{dir: dir, running: map[string]*service{}}
	go s.serve(l)
	return s.reap()
}

// logFile opens the log of a service for appending.
func logFile(dir, name string) (*os.File, error) {
	return os.OpenFile(filepath.Join(dir, machine.LogDir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
}

// lookPath finds a program as a shell with these variables would.
func lookPath(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return "", err
	}
	return filepath.Abs(path)
}
