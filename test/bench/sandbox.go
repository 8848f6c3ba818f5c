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
	"strings"
	"syscall"

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

// enter builds the binaries and runs this command again in new network and mount namespaces. Whatever is made there, mounts, devices,
// pinned maps, ends with the last process in them, however it ends.
func enter(ctx context.Context, o options, args []string, stdout, stderr io.Writer) (err error) {
	dir, err := os.MkdirTemp("", "margay-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := build(ctx, dir); err != nil {
		return err
	}
	if o.proxied() {
		if err := linkKubeProxy(ctx, dir, slog.New(slog.NewTextHandler(stderr, nil))); err != nil {
			return err
		}
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe", append([]string{"-inside", dir}, args...)...)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS}
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	return cmd.Run()
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
