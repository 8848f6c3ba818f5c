// SPDX-License-Identifier: Apache-2.0

// Images packs the container images of the test cluster, without a registry and without a container engine: static binaries that were built
// before, and tools of Debian packages with the shared libraries that they link, become docker-archive files that
// `ctr -n k8s.io images import` takes. The same inputs give the same bytes.
//
// It owns what is in the images and how they are called; who imports them, and what is tested with them, is decided elsewhere.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

func main() {
	var from inputs
	flag.StringVar(&from.binaries, "bin", "build/cluster/bin", "directory of the built agnhost, coredns and regression-issue-74839")
	flag.StringVar(&from.kubernetes, "kubernetes", "test/cluster/tools/kubernetes", "directory of the Go module that requires k8s.io/kubernetes")
	out := flag.String("out", "build/cluster/images", "directory that the archives are written to")
	flag.Parse()
	if err := run(from, *out); err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1)
	}
}

// inputs says where the parts of the images come from.
type inputs struct {
	binaries   string
	kubernetes string
}

// run packs every archive into the directory out, and names each on standard output.
func run(from inputs, out string) (err error) {
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}
	scratch, err := os.MkdirTemp(out, ".scratch-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(scratch)) }()

	archives, err := catalog(from, scratch)
	if err != nil {
		return err
	}
	for _, a := range archives {
		path := filepath.Join(out, a.file)
		if err := a.write(path); err != nil {
			return fmt.Errorf("pack %s: %w", path, err)
		}
		fmt.Printf("%s: %s\n", path, strings.Join(a.names(), ", "))
	}
	return nil
}

// output runs a command and returns what it wrote to standard output. What it wrote to standard error becomes part of the error.
func output(name string, args ...string) (string, error) {
	var stderr strings.Builder
	cmd := exec.Command(name, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%v: %w: %s", cmd, err, strings.TrimSpace(stderr.String()))
	}
	return string(out), nil
}
