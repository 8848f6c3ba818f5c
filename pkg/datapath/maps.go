// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/bpf/object"
	"github.com/margay-cni/margay/pkg/dump"
	"github.com/margay-cni/margay/pkg/pins"
)

// Maps are the pinned maps of bpf/maps.h, which says who writes what.
type Maps struct {
	Flows           *ebpf.Map
	Endpoints       *ebpf.Map
	EndpointEpochs  *ebpf.Map
	Pending         *ebpf.Map
	IPCache         *ebpf.Map
	NodeAddrs       *ebpf.Map
	Services        *ebpf.Map
	Backends        *ebpf.Map
	ServiceBackends *ebpf.Map
	ServiceEpochs   *ebpf.Map
	Affinity        *ebpf.Map
	Maglev          *ebpf.Map
	SourceRanges    *ebpf.Map
	ServiceAddrs    *ebpf.Map
	Policy          *ebpf.Map
	Nodes           *ebpf.Map
	Routes          *ebpf.Map
	EgressAddrs     *ebpf.Map
	ReservedPorts   *ebpf.Map
	NodeState       *ebpf.Map
	Counters        *ebpf.Map
	Events          *ebpf.Map
}

// fields pairs each field with the map's name in bpf/maps.h.
func (m *Maps) fields() map[string]**ebpf.Map {
	return map[string]**ebpf.Map{
		"flows": &m.Flows, "endpoints": &m.Endpoints, "endpoint_epochs": &m.EndpointEpochs, "pending": &m.Pending,
		"ipcache": &m.IPCache, "node_addrs": &m.NodeAddrs, "services": &m.Services, "backends": &m.Backends,
		"service_backends": &m.ServiceBackends, "service_epochs": &m.ServiceEpochs, "policy": &m.Policy,
		"affinity": &m.Affinity, "maglev": &m.Maglev, "source_ranges": &m.SourceRanges, "service_addrs": &m.ServiceAddrs,
		"nodes": &m.Nodes, "routes": &m.Routes, "egress_addrs": &m.EgressAddrs, "reserved_ports": &m.ReservedPorts,
		"node_state": &m.NodeState, "counters": &m.Counters, "events": &m.Events,
	}
}

func (m *Maps) open(cfg Config) error {
	for name, field := range m.fields() {
		pinned, err := ebpf.LoadPinnedMap(pins.MapPath(cfg, name), nil)
		if err != nil {
			return fmt.Errorf("open map %s: %w", name, err)
		}
		*field = pinned
	}
	return nil
}

func (m *Maps) close() error {
	var errs []error
	for _, field := range m.fields() {
		errs = append(errs, (*field).Close())
	}
	return errors.Join(errs...)
}

// ensureMaps opens or creates every map. An existing one is kept with its content; if its layout differs from ours, that is an error,
// because a changed layout has another name.
func ensureMaps(cfg Config) (map[string]*ebpf.Map, error) {
	specs, err := object.MapSpecs()
	if err != nil {
		return nil, fmt.Errorf("read the map definitions: %w", err)
	}
	if err := os.MkdirAll(cfg.MapDir(), 0o700); err != nil {
		return nil, fmt.Errorf("make the map directory: %w", err)
	}
	maps := map[string]*ebpf.Map{}
	for name, spec := range specs {
		m, err := ensureMap(cfg, name, spec)
		if err != nil {
			closeMaps(maps)
			return nil, fmt.Errorf("map %s: %w", name, err)
		}
		maps[name] = m
	}
	return maps, nil
}

func ensureMap(cfg Config, name string, spec *ebpf.MapSpec) (*ebpf.Map, error) {
	if n := cfg.Sizes[name]; n != 0 {
		spec.MaxEntries = n
	}
	path := pins.MapPath(cfg, name)
	m, err := ebpf.LoadPinnedMap(path, nil)
	if err == nil {
		// A size differs when the configuration has changed since: the running map wins, its content is worth more.
		spec.MaxEntries = m.MaxEntries()
		if err := spec.Compatible(m); err != nil {
			m.Close()
			return nil, fmt.Errorf("%s has another layout than this build of Margay (%w): detach all pods and remove it", path, err)
		}
		return m, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	if m, err = ebpf.NewMap(spec); err != nil {
		return nil, fmt.Errorf("create with %d entries: %w", spec.MaxEntries, err)
	}
	if err := m.Pin(path); err != nil {
		m.Close()
		return nil, fmt.Errorf("pin: %w", err)
	}
	return m, nil
}

func closeMaps(maps map[string]*ebpf.Map) {
	for _, m := range maps {
		m.Close()
	}
}

// fillNodeAddrs writes this node's addresses, so that policy knows the node's own traffic before an agent has ever run.
func fillNodeAddrs(m *ebpf.Map) error {
	addrs, err := dump.Whole(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list the node's addresses: %w", err)
	}
	for _, a := range addrs {
		if !a.IP.IsGlobalUnicast() {
			continue
		}
		key := bpf.NewAddr(fromIP(a.IP))
		if err := m.Update(&key, bpf.NodeAddrLocal, ebpf.UpdateNoExist); err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
			return fmt.Errorf("write node address %s: %w", a.IP, err)
		}
	}
	return nil
}
