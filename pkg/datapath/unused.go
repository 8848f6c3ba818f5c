// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/dump"
	"github.com/margay-cni/margay/pkg/pins"
)

// RemoveUnusedPrograms removes the pins of other builds' programs that are on no device of the calling thread's network namespace any more,
// and that were pinned longer ago than age. It returns the names of the builds. A build that comes back loads its programs again.
func RemoveUnusedPrograms(ctx context.Context, cfg Config, age time.Duration) (removed []string, err error) {
	old, err := otherBuilds(cfg, age)
	if len(old) == 0 || err != nil {
		return nil, err
	}
	unlock, err := lock(ctx, filepath.Join(cfg.Run, "datapath.lock"))
	if err != nil {
		return nil, fmt.Errorf("lock the datapath: %w", err)
	}
	defer unlock()
	used, err := attachedPrograms()
	if err != nil {
		return nil, err
	}
	var faults []error
	for _, build := range old {
		dir := filepath.Join(cfg.BPFFS, "progs", build)
		inUse, err := anyPinned(dir, used)
		if err == nil && !inUse {
			err = os.RemoveAll(dir)
		}
		switch {
		case err != nil:
			faults = append(faults, fmt.Errorf("remove the programs of build %s: %w", build, err))
		case !inUse:
			removed = append(removed, build)
		}
	}
	return removed, errors.Join(faults...)
}

// otherBuilds names the directories of programs that are not this build's and have not changed for that long.
func otherBuilds(cfg Config, age time.Duration) (out []string, err error) {
	dirs, err := os.ReadDir(filepath.Join(cfg.BPFFS, "progs"))
	if err != nil {
		return nil, ignoreMissing(err)
	}
	for _, d := range dirs {
		if !d.IsDir() || strings.HasPrefix(d.Name(), bpf.Build()) {
			continue
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if time.Since(info.ModTime()) >= age {
			out = append(out, d.Name())
		}
	}
	return out, nil
}

// attachedPrograms are the ids of the programs in all tc filters.
func attachedPrograms() (map[ebpf.ProgramID]bool, error) {
	links, err := dump.Whole(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	used := map[ebpf.ProgramID]bool{}
	for _, l := range links {
		for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
			filters, err := dump.Whole(func() ([]netlink.Filter, error) { return netlink.FilterList(l, parent) })
			if err != nil && !pins.Gone(err) {
				return nil, fmt.Errorf("list filters of %s: %w", l.Attrs().Name, err)
			}
			for _, f := range filters {
				if b, ok := f.(*netlink.BpfFilter); ok {
					used[ebpf.ProgramID(b.Id)] = true
				}
			}
		}
	}
	return used, nil
}

// anyPinned says whether one of the programs pinned in dir is among those.
func anyPinned(dir string, ids map[ebpf.ProgramID]bool) (bool, error) {
	pins, err := os.ReadDir(dir)
	if err != nil {
		return false, err
	}
	for _, pin := range pins {
		p, err := ebpf.LoadPinnedProgram(filepath.Join(dir, pin.Name()), nil)
		if err != nil {
			return false, err
		}
		info, err := p.Info()
		if err := errors.Join(err, p.Close()); err != nil {
			return false, err
		}
		if id, ok := info.ID(); !ok || ids[id] {
			return true, nil
		}
	}
	return false, nil
}
