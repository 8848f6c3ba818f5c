// SPDX-License-Identifier: Apache-2.0

// Package pins works with what pkg/datapath has pinned in bpffs: it opens the few programs and maps that connecting a pod takes, attaches
// the programs to the pod's device and changes its entries. It calls bpf(2) itself. A library that can also load programs costs a plugin that
// runs for a few milliseconds a tenth of them before it has done anything.
//
//	<bpffs>/maps/<name>_v<N>     a changed layout is another N
//	<bpffs>/progs/<build>/<name> one directory for each build of the programs
package pins

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

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
	// BPFFS is the directory of our pins. datapath.Ensure mounts a bpffs if there is none.
	BPFFS string
	// Run is the directory of locks and records; on tmpfs, so that a reboot empties it.
	Run string
	// ProcSys is where kernel settings are written, for a container whose own /proc/sys is read-only; empty means /proc/sys. They are read,
	// and remembered for uninstall, by their usual names.
	ProcSys string
	// Sizes overrides max_entries by map name. It counts when the map is created.
	Sizes map[string]uint32
}

// DefaultConfig returns the configuration of a node that has its machine to itself.
func DefaultConfig() Config {
	return Config{BPFFS: DefaultBPFFS, Run: DefaultRun}
}

// MapDir is the directory of the maps.
func (c Config) MapDir() string { return filepath.Join(c.BPFFS, "maps") }

// ProgramDir is the directory of this build's programs.
func (c Config) ProgramDir() string { return filepath.Join(c.BPFFS, "progs", bpf.Build()) }

// mapVersion is the N of <name>_v<N>: raised when a map's key or value changes its layout, with a migration.
var mapVersion = map[string]string{
	"node_state": "2", // no migration: the agent writes its one entry whole
}

// MapPath is where the map of bpf/maps.h is pinned.
func MapPath(cfg Config, name string) string {
	version := mapVersion[name]
	if version == "" {
		version = "1"
	}
	return cfg.BPFFS + "/maps/" + name + "_v" + version
}

// Pods is the part of the datapath that connects pods. Its methods may be called concurrently. Open makes it.
type Pods struct {
	cfg            Config
	fromPod, toPod int // file descriptors of the programs

	endpoints table[bpf.Addr, bpf.Endpoint]
	epochs    table[uint32, uint32]
	pending   table[bpf.PendingKey, bpf.Pending]

	// late guards the maps that openLate opens.
	late            sync.Mutex
	services        table[bpf.FrontendKey, bpf.Service]
	backends        table[bpf.BackendKey, bpf.Backend]
	serviceBackends table[bpf.ServiceBackend, uint32]
	serviceEpochs   table[uint32, uint32]
}

// Open opens what is pinned. The error wraps ErrNotLoaded when the current build is not there, or not completely.
func Open(cfg Config) (*Pods, error) {
	p := &Pods{cfg: cfg, fromPod: -1, toPod: -1}
	if err := p.open(); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w: %w", ErrNotLoaded, err)
		}
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

func (p *Pods) open() (err error) {
	dir := p.cfg.ProgramDir() + "/"
	if p.fromPod, err = openProgram(dir + bpf.ProgFromPod); err != nil {
		return err
	}
	if p.toPod, err = openProgram(dir + bpf.ProgToPod); err != nil {
		return err
	}
	if err := p.endpoints.open(p.cfg, "endpoints"); err != nil {
		return err
	}
	if err := p.epochs.open(p.cfg, "endpoint_epochs"); err != nil {
		return err
	}
	return p.pending.open(p.cfg, "pending")
}

// openLate opens the maps that hostPorts need: few pods have any.
func (p *Pods) openLate() error {
	p.late.Lock()
	defer p.late.Unlock()
	if err := p.services.open(p.cfg, "services"); err != nil {
		return err
	}
	if err := p.backends.open(p.cfg, "backends"); err != nil {
		return err
	}
	if err := p.serviceBackends.open(p.cfg, "service_backends"); err != nil {
		return err
	}
	return p.serviceEpochs.open(p.cfg, "service_epochs")
}

// Close closes file descriptors; what is pinned stays.
func (p *Pods) Close() error {
	var errs []error
	for _, fd := range []*int{&p.fromPod, &p.toPod} {
		if *fd >= 0 {
			errs = append(errs, unix.Close(*fd))
		}
		*fd = -1
	}
	return errors.Join(append(errs, p.endpoints.close(), p.epochs.close(), p.pending.close(),
		p.services.close(), p.backends.close(), p.serviceBackends.close(), p.serviceEpochs.close())...)
}

// Check tells whether there can be a datapath here, without changing anything: either a program of the current build is pinned, or a bpffs can
// be had. It makes one cheap system call or two, because container runtimes ask every few seconds.
func Check(cfg Config) error {
	if _, err := os.Stat(filepath.Join(cfg.ProgramDir(), bpf.ProgFromPod)); err == nil {
		return nil
	}
	return checkBPFFS(cfg)
}
