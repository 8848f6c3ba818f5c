// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/margay-cni/margay/pkg/pins"
)

// loaderName is the program that loads what the plugin only opens (plugin/loader/main.go). It is where the plugin is.
const loaderName = "margay-loader"

// openDatapath turns *pins.Pods into the interface that the verbs use. A nil pointer must not become a non-nil interface.
func openDatapath(cfg pins.Config) (dataplane, error) {
	p, err := pins.Open(cfg)
	if err != nil {
		return nil, err
	}
	return p, nil
}

// checkDatapath tells whether ADD could have the datapath, without changing anything: what is pinned opens, or it can be loaded.
func checkDatapath(cfg pins.Config) error {
	d, err := openDatapath(cfg)
	if err == nil {
		return d.Close()
	}
	if !errors.Is(err, pins.ErrNotLoaded) {
		return err
	}
	if err := pins.Check(cfg); err != nil {
		return err
	}
	_, err = findLoader()
	return err
}

// findLoader returns the loader's path.
func findLoader() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find %s beside the plugin: %w", loaderName, err)
	}
	path, err := exec.LookPath(filepath.Join(filepath.Dir(self), loaderName))
	if err != nil {
		return "", fmt.Errorf("find %s, which belongs beside the plugin: %w", loaderName, err)
	}
	return path, nil
}

// ensureWith opens the datapath, and has it loaded first where it is not there.
func ensureWith(load func(context.Context, pins.Config) error) func(context.Context, pins.Config) (dataplane, error) {
	return func(ctx context.Context, cfg pins.Config) (dataplane, error) {
		d, err := openDatapath(cfg)
		if !errors.Is(err, pins.ErrNotLoaded) {
			return d, err
		}
		if err := load(ctx, cfg); err != nil {
			return nil, err
		}
		return openDatapath(cfg)
	}
}

// runLoader waits for the loader. Killing it is harmless: the next one repairs.
func runLoader(ctx context.Context, cfg pins.Config) error {
	loader, err := findLoader()
	if err != nil {
		return err
	}
	var said bytes.Buffer
	cmd := exec.CommandContext(ctx, loader, "--bpffs", cfg.BPFFS, "--run", cfg.Run)
	cmd.Stderr = &said
	err = cmd.Run()
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("%s was stopped: %w", loaderName, ctx.Err())
	case said.Len() > 0:
		return errors.New(string(bytes.TrimSpace(said.Bytes())))
	}
	return fmt.Errorf("run %s: %w", loaderName, err)
}
