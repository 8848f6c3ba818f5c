// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"errors"
	"net/netip"
	"slices"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/pins"
)

func (f *fakePlane) FreeHostPortID(_ bpf.FrontendKey, skip ...uint32) (uint32, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	id := bpf.HostPortFirst
	for ; ; id++ {
		if _, taken := f.targets[id]; !taken && !slices.Contains(skip, id) {
			return id, f.faults["FreeHostPortID"]
		}
	}
}

func (f *fakePlane) PutHostPort(p pins.HostPort) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.onPort != nil {
		f.onPort(false)
	}
	if to, taken := f.targets[p.ID]; taken && to != p.Backend {
		return pins.ErrHostPortID
	}
	f.targets[p.ID] = p.Backend
	if f.onPort != nil {
		f.onPort(true)
	}
	if err := f.faults["PutHostPort"]; err != nil {
		return err // half-way
	}
	if s, taken := f.ports[p.Frontend]; taken && s.Id != p.ID {
		return pins.ErrFrontendTaken
	}
	f.ports[p.Frontend] = p.Service()
	return nil
}

func (f *fakePlane) DeleteHostPort(p pins.HostPort) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	s, there := f.ports[p.Frontend]
	if p.ID == 0 && there {
		p.ID = s.Id
	}
	if f.targets[p.ID] != p.Backend {
		return nil
	}
	if there && s.Id == p.ID {
		delete(f.ports, p.Frontend)
	}
	delete(f.targets, p.ID)
	return f.faults["DeleteHostPort"]
}

func (f *fakePlane) CheckHostPort(p pins.HostPort) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ports[p.Frontend] != p.Service() || f.targets[p.ID] != p.Backend {
		return errors.New("not there")
	}
	return nil
}

func (f *fakePlane) LookupFrontend(k bpf.FrontendKey) (bpf.Service, bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s, ok := f.ports[k]
	return s, ok, nil
}

func (f *fakePlane) HostPortBackend(id uint32) (netip.AddrPort, bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	to, ok := f.targets[id]
	return to, ok, nil
}
