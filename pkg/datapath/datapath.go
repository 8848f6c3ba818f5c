// SPDX-License-Identifier: Apache-2.0

// Package datapath owns what is pinned in bpffs: it creates and pins the maps, loads and pins the programs, attaches them to devices,
// and offers the few map operations that need more than one step. It knows nothing of pods, policies or services as the API has
// them: those who fill the maps (pkg/agent, pkg/cni) bring map keys and values.
//
// Ensure is what everybody calls first. Whoever comes first, an agent or the first ADD after boot, does the work under a lock; everybody
// after that only opens pins. It leaves nothing half-made that a later call would trust: maps are pinned one by one and complete,
// programs appear all at once by the rename of a directory.
//
//	<bpffs>/maps/<name>_v<N>     a changed layout is another N
//	<bpffs>/progs/<build>/<name> one directory for each build of the programs
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
	"sync"

	"github.com/cilium/ebpf"

	"github.com/margay-cni/margay/pkg/bpf"
)

// Defaults of Config.
const (
	DefaultBPFFS = "/sys/fs/bpf/margay"
	DefaultRun   = "/run/margay"
)

// ErrNotLoaded is wrapped by Open when nothing of the current build is pinned.
var ErrNotLoaded = errors.New("datapath is not loaded")

// Config says where one node's datapath lives. Several nodes can share a machine when their directories differ.
type Config struct {
	// BPFFS is the directory of our pins. Ensure mounts a bpffs if there is none.
	BPFFS string
	// Run is the directory of locks and records; on tmpfs, so that a reboot empties it.
	Run string
	// ProcSys is where kernel settings are written, for a container whose own /proc/sys is read-only; empty means /proc/sys. They are read,
	// and remembered for uninstall, by their usual names.
	ProcSys string
	// Sizes overrides max_entries by map name. It counts when the map is created.
	Sizes map[string]uint32
	// ForPods opens only what attaching and registering pods needs, which is what ADD and DEL do: 5 pins instead of 22.
	ForPods bool
}

// DefaultConfig returns the configuration of a node that has its machine to itself.
func DefaultConfig() Config {
	return Config{BPFFS: DefaultBPFFS, Run: DefaultRun}
}

func (c Config) mapDir() string { return filepath.Join(c.BPFFS, "maps") }

// progDir is the directory of this build's programs.
func (c Config) progDir() string { return filepath.Join(c.BPFFS, "progs", bpf.Build()) }

// Datapath is an opened set of pins. Its methods may be called concurrently.
type Datapath struct {
	// Maps are open until Close.
	Maps Maps

	cfg   Config
	progs map[string]*ebpf.Program
	// late guards the maps that openLate opens.
	late sync.Mutex
}

// Open opens what is pinned. The error wraps ErrNotLoaded when the current build is not there, or not completely.
func Open(cfg Config) (*Datapath, error) {
	d := &Datapath{cfg: cfg, progs: map[string]*ebpf.Program{}}
	if err := d.open(); err != nil {
		d.Close()
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%w: %w", ErrNotLoaded, err)
		}
		return nil, err
	}
	return d, nil
}

func (d *Datapath) open() error {
	names := programNames
	if d.cfg.ForPods {
		names = podPrograms
	}
	for _, name := range names {
		p, err := ebpf.LoadPinnedProgram(filepath.Join(d.cfg.progDir(), name), nil)
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

// Close closes file descriptors; what is pinned stays.
func (d *Datapath) Close() error {
	errs := []error{d.Maps.close()}
	for _, p := range d.progs {
		errs = append(errs, p.Close())
	}
	return errors.Join(errs...)
}

// Build names the programs that this Datapath attaches.
func (d *Datapath) Build() string {
	return filepath.Base(d.cfg.progDir())
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

// Check tells whether ADD could work here, without changing anything: either the datapath is loaded, or a bpffs can be had and the
// caller may use BPF. It makes one cheap system call or two, because container runtimes ask every few seconds.
func Check(cfg Config) error {
	if _, err := os.Stat(filepath.Join(cfg.progDir(), bpf.ProgFromPod)); err == nil {
		return nil
	}
	return checkBPFFS(cfg)
}
