// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	clusterbuild "github.com/margay-cni/margay/test/cluster/build"
)

// The reference plugins, and their module.
const referenceModule = "github.com/containernetworking/plugins"

var referencePlugins = []string{
	referenceModule + "/plugins/main/ptp", referenceModule + "/plugins/ipam/host-local", referenceModule + "/plugins/meta/portmap",
}

// versionFile says, beside the binaries, which version the reference plugins have.
const versionFile = "reference-version"

// grace is how long a run that is interrupted may take to end in good order.
const grace = 10 * time.Second

// enter builds the binaries and runs this command again in new network and mount namespaces. Whatever is made there, mounts, devices,
// pinned maps, ends with the last process in them, however it ends; and processes that it leaves are ended here.
func enter(ctx context.Context, o options, args []string, stdout, stderr io.Writer) (err error) {
	if err := endWithGoRun(); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "margay-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	fmt.Fprintln(stderr, "bench: builds what it measures")
	if err := build(ctx, dir); err != nil {
		return err
	}
	if o.proxied() {
		if err := linkKubeProxy(ctx, dir, slog.New(slog.NewTextHandler(stderr, nil))); err != nil {
			return err
		}
	}
	remove, err := makeMountPoints()
	defer remove()
	if err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become the parent of what loses its own: %w", err)
	}
	defer endChildren()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", append([]string{"-inside", dir}, args...)...)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	// The signal comes when the thread ends that starts the child.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: unix.SIGTERM}
	cmd.Cancel, cmd.WaitDelay = func() error { return cmd.Process.Signal(os.Interrupt) }, grace
	return cmd.Run()
}

// endWithGoRun has this process told to end when go run is, which does not tell it.
func endWithGoRun() error {
	parent, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", os.Getppid()))
	if err != nil || strings.TrimSpace(string(parent)) != "go" {
		return nil // somebody else's child may outlive its parent
	}
	return unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGTERM), 0, 0, 0)
}

// endChildren kills what runs below this process until nothing is left. Nobody else waits for children by then.
func endChildren() {
	for end := time.Now().Add(grace); time.Now().Before(end); time.Sleep(time.Millisecond) {
		lists, _ := filepath.Glob("/proc/self/task/*/children") // the pattern is right
		for _, list := range lists {
			text, _ := os.ReadFile(list) // a thread that has ended has none
			for _, child := range strings.Fields(string(text)) {
				if process, err := strconv.Atoi(child); err == nil {
					_ = unix.Kill(process, unix.SIGKILL)
				}
			}
		}
		if _, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); errors.Is(err, unix.ECHILD) {
			return
		}
	}
}

// build puts margay and the reference plugins into dir, all with the flags of a release.
func build(ctx context.Context, dir string) error {
	for name, pkg := range map[string]string{"margay": "./plugin", "margay-loader": "./plugin/loader", "margay-agent": "./agent"} {
		if err := goBuild(ctx, filepath.Join(dir, name), pkg); err != nil {
			return err
		}
	}
	version, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Version}}", referenceModule).Output()
	if err != nil {
		return fmt.Errorf("find the reference plugins: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, versionFile), bytes.TrimSpace(version), 0o644); err != nil {
		return err
	}
	return goBuild(ctx, dir+"/", referencePlugins...)
}

// linkKubeProxy puts a link to kube-proxy into dir. It is built where the test cluster has it, which takes minutes the first time.
func linkKubeProxy(ctx context.Context, dir string, log *slog.Logger) error {
	root, err := os.Getwd()
	if err != nil {
		return err
	}
	path, err := clusterbuild.Program(ctx, root, filepath.Join(root, "build", "cluster"), "kube-proxy", log)
	if err != nil {
		return err
	}
	return os.Symlink(path, filepath.Join(dir, "kube-proxy"))
}

func goBuild(ctx context.Context, out string, packages ...string) error {
	args := append([]string{"build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", out}, packages...)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, text)
	}
	return nil
}
