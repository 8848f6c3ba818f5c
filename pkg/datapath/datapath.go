// SPDX-License-Identifier: Apache-2.0

// Package datapath owns what is pinned in bpffs: it creates and pins the maps, loads and pins the programs, attaches them to devices,
// and offers the few map operations that need more than one step. It knows nothing of pods, policies or services as the API has
// them: those who fill the maps (pkg/agent, pkg/cni) bring map keys and values.
//
// Ensure is what everybody calls first. Whoever comes first, an agent or the first ADD after boot, does the work under a lock; everybody
// after that only opens pins. What an ADD does with them is in pkg/pins, which loads nothing and so starts faster: where nothing is loaded, it
// has margay-loader call Ensure. It leaves nothing half-made that a later call would trust: maps are pinned one by one and complete,
// programs appear all at once by the rename of a directory.
//
//	<bpffs>/maps, progs          the pins: pkg/pins
//	<run>/datapath.lock          flock around all of it
//	<run>/sysctls.json           what Ensure changed, for uninstall
//	<run>/hostports.json         ports that ReserveHostPorts has reserved, as long as there are any
//	<run>/mounts.json            what Ensure mounted, for uninstall
//
// Kernel floor: 6.1 is tested; the programs need 5.14.
package datapath

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"

	"github.com/margay-cni/margay/pkg/pins"
)

// ErrNotLoaded is wrapped by Open when nothing of the current build is pinned.
var ErrNotLoaded = pins.ErrNotLoaded

// Config says where one node's datapath lives.
type Config = pins.Config

// Datapath is an opened set of pins. Its methods may be called concurrently.
type Datapath struct {
	*pins.Pods
	// Maps are open until Close.
	Maps Maps

	cfg   Config
	progs map[string]*ebpf.Program
	links hookLinks
}

// Open opens what is pinned. The error wraps ErrNotLoaded when the current build is not there, or not completely.
func Open(cfg Config) (*Datapath, error) {
	d := &Datapath{cfg: cfg, progs: map[string]*ebpf.Program{}}
	if err := d.open(); err != nil {
		d.Close()
		if errors.Is(err, fs.ErrNotExist) && !errors.Is(err, ErrNotLoaded) {
			return nil, fmt.Errorf("%w: %w", ErrNotLoaded, err)
		}
		return nil, err
	}
	return d, nil
}

func (d *Datapath) open() (err error) {
	if d.Pods, err = pins.Open(d.cfg); err != nil {
		return err
	}
	for _, name := range programNames {
		p, err := ebpf.LoadPinnedProgram(filepath.Join(d.cfg.ProgramDir(), name), nil)
		if optionalPrograms[name] && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("open program %s: %w", name, err)
		}
		d.progs[name] = p
	}
	return d.Maps.open(d.cfg)
}

// Close closes file descriptors, and with them the links of LinkNodeDevices; what is pinned stays.
func (d *Datapath) Close() error {
	errs := []error{d.links.closeAll(), d.Maps.close()}
	if d.Pods != nil {
		errs = append(errs, d.Pods.Close())
	}
	for _, p := range d.progs {
		errs = append(errs, p.Close())
	}
	return errors.Join(errs...)
}

// Build names the programs that this Datapath attaches.
func (d *Datapath) Build() string {
	return filepath.Base(d.cfg.ProgramDir())
}

// Ensure opens the datapath, and makes it first where it is not there: bpffs, maps, programs, forwarding. Safe to call from any number
// of processes; a crash in the middle is repaired by the next call.
func Ensure(ctx context.Context, cfg Config) (*Datapath, error) {
	d, err := Open(cfg)
	if err == nil || !errors.Is(err, ErrNotLoaded) {
		return d, err
	}
	if err := os.MkdirAll(cfg.Run, 0o755); err != nil {
		return nil, fmt.Errorf("make the run directory: %w", err)
	}
	unlock, err := lock(ctx, filepath.Join(cfg.Run, "datapath.lock"))
	if err != nil {
		return nil, fmt.Errorf("lock the datapath: %w", err)
	}
	defer unlock()
	if d, err := Open(cfg); err == nil || !errors.Is(err, ErrNotLoaded) {
		return d, err
	}
	if err := load(cfg); err != nil {
		return nil, err
	}
	return Open(cfg)
}

// Load is Ensure for those who do not need what it opens.
func Load(ctx context.Context, cfg Config) error {
	d, err := Ensure(ctx, cfg)
	if err != nil {
		return err
	}
	return d.Close()
}

// load makes everything that Open wants to find. The caller holds the lock.
func load(cfg Config) error {
	if err := ensureBPFFS(cfg); err != nil {
		return err
	}
	if err := ensureForwarding(cfg); err != nil {
		return err
	}
	maps, err := ensureMaps(cfg)
	if err != nil {
		return err
	}
	defer closeMaps(maps)
	if err := fillNodeAddrs(maps["node_addrs"]); err != nil {
		return err
	}
	return ensurePrograms(cfg, maps)
}
