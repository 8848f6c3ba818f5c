// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/flow"
	"github.com/margay-cni/margay/pkg/pins"
)

// source opens pinned maps for one command and closes them after it.
type source struct {
	node datapath.Config
	open []*ebpf.Map
}

func (a *app) source() *source {
	return &source{node: a.node}
}

// openMap opens a pinned map by its name. A missing pin is explained: nothing there at all, or only this one.
func (s *source) openMap(name string) (*ebpf.Map, error) {
	m, err := ebpf.LoadPinnedMap(pins.MapPath(s.node, name), nil)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !s.loaded():
		return nil, s.notLoaded()
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("map %s is not pinned under %s: the datapath was loaded only in part; start margay-agent", name, s.node.BPFFS)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("map %s cannot be opened: %w; margayctl must run as root", name, err)
	case err != nil:
		return nil, fmt.Errorf("open map %s: %w", name, err)
	}
	s.open = append(s.open, m)
	return m, nil
}

func (s *source) mapDir() string {
	return filepath.Join(s.node.BPFFS, "maps")
}

// loaded reports whether any map is pinned.
func (s *source) loaded() bool {
	files, err := os.ReadDir(s.mapDir())
	return err == nil && len(files) > 0
}

func (s *source) notLoaded() error {
	return fmt.Errorf("margay is not loaded on this node: no pins under %s; run a pod or start margay-agent", s.node.BPFFS)
}

func (s *source) close() error {
	var errs []error
	for _, m := range s.open {
		errs = append(errs, m.Close())
	}
	return errors.Join(errs...)
}

// names loads the names of pods, services and rules. What cannot be read is a warning: numbers are shown instead.
func (a *app) names() *flow.Names {
	names, err := flow.LoadNames(a.node.Run)
	if err != nil {
		fmt.Fprintf(a.errs, "margayctl: some names are not known: %s\n", strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return names
}

// devices names this node's network devices by index.
type devices map[int]string

func listDevices() (devices, error) {
	list, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("list network devices: %w", err)
	}
	d := make(devices, len(list))
	for _, i := range list {
		d[i.Index] = i.Name
	}
	return d, nil
}

// name returns the device's name, or its index when it is gone.
func (d devices) name(ifindex int) string {
	if n, ok := d[ifindex]; ok {
		return n
	}
	return fmt.Sprintf("gone(%d)", ifindex)
}
