// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// The reference plugins, and their module.
const referenceModule = "github.com/containernetworking/plugins"

var referencePlugins = []string{referenceModule + "/plugins/main/ptp", referenceModule + "/plugins/ipam/host-local"}

// versionFile says, beside the binaries, which version the reference plugins have.
const versionFile = "reference-version"

// enter builds the binaries and runs this command again in new network and mount namespaces. Whatever is made there, mounts, devices,
// pinned maps, ends with the last process in them, however it ends.
func enter(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	dir, err := os.MkdirTemp("", "margay-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := build(ctx, dir); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe", append([]string{"-inside", dir}, args...)...)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS}
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	return cmd.Run()
}

// build puts margay and the reference plugins into dir, all with the flags of a release.
func build(ctx context.Context, dir string) error {
	for name, main := range map[string]string{"margay": "./plugin", "margay-loader": "./loader"} {
		if err := goBuild(ctx, filepath.Join(dir, name), main); err != nil {
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

func goBuild(ctx context.Context, out string, packages ...string) error {
	args := append([]string{"build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", out}, packages...)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, text)
	}
	return nil
}
