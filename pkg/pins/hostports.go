// SPDX-License-Identifier: Apache-2.0

package pins

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/bpf"
)

// A HostPort is a frontend with one backend, which belongs to a pod and not to a service. Three maps hold it: the list HostPortList + ID with
// the backend, the membership of the backend, and the frontend. Whoever makes the list has the id, until the list is deleted.
type HostPort struct {
	// ID is from HostPortFirst to HostPortLast; 0 where it is not known.
	ID       uint32
	Frontend bpf.FrontendKey
	Backend  netip.AddrPort
}

// Errors of PutHostPort.
var (
	// ErrFrontendTaken says that the frontend leads elsewhere; LookupFrontend tells whose it is.
	ErrFrontendTaken = errors.New("frontend is taken")
	// ErrHostPortID says that another hostPort has the id.
	ErrHostPortID = errors.New("id is taken")
)

// Service returns the frontend's entry, the same for every reader.
func (p HostPort) Service() bpf.Service {
	list := bpf.HostPortList + p.ID
	return bpf.Service{
		Id: p.ID, List: [2]uint32{list, list}, Count: [2]uint32{1, 1},
		// ExternalLocal: the port is this node's alone, pods that ask another node for it must go there.
		Flags: bpf.ServiceHostPort | bpf.ServiceExternalLocal,
	}
}

// slot is where the backend is.
func (p HostPort) slot() bpf.BackendKey {
	return bpf.BackendKey{List: bpf.HostPortList + p.ID}
}

func (p HostPort) member() bpf.ServiceBackend {
	return bpf.NewServiceBackend(p.ID, p.Backend)
}

// IsHostPort says whether the id is of the range that belongs to hostPorts.
func IsHostPort(id uint32) bool {
	return id >= bpf.HostPortFirst && id <= bpf.HostPortLast
}

// FreeHostPortID returns an id that no hostPort has and that is none of those to skip, the first one from a place on that depends on the
// frontend. Another process may take it before the caller does: PutHostPort then says ErrHostPortID.
func (d *Pods) FreeHostPortID(f bpf.FrontendKey, skip ...uint32) (uint32, error) {
	if err := d.openLate(); err != nil {
		return 0, err
	}
	const ids = bpf.HostPortLast - bpf.HostPortFirst + 1
	begin := bpf.BackendHash(netip.AddrPortFrom(f.Addr.Netip(), bpf.Port16(f.Port))) + uint32(f.Proto)
	for i := range ids {
		p := HostPort{ID: bpf.HostPortFirst + (begin+i)%ids}
		if slices.Contains(skip, p.ID) {
			continue
		}
		_, taken, err := d.backends.lookup(p.slot())
		if err != nil {
			return 0, fmt.Errorf("look up list %d: %w", p.slot().List, err)
		}
		if !taken {
			return p.ID, nil
		}
	}
	return 0, fmt.Errorf("all %d hostPorts of this node are in use", ids)
}

// PutHostPort makes the hostPort, backend first and frontend last; what is there of it already is left. After an error it may be there in
// part: DeleteHostPort removes that. The error wraps ErrFrontendTaken or ErrHostPortID when somebody else has what it needs.
func (d *Pods) PutHostPort(p HostPort) error {
	if err := d.openLate(); err != nil {
		return err
	}
	slot, backend := p.slot(), bpf.NewBackend(p.Backend)
	if err := insert(&d.backends, slot, backend, ErrHostPortID); err != nil {
		return d.backends.fullError(fmt.Errorf("make list %d: %w", slot.List, err))
	}
	if err := d.serviceBackends.update(p.member(), 1, updateAny); err != nil {
		return d.serviceBackends.fullError(fmt.Errorf("register backend %s: %w", p.Backend, err))
	}
	if err := insert(&d.services, p.Frontend, p.Service(), ErrFrontendTaken); err != nil {
		return d.services.fullError(fmt.Errorf("make the frontend: %w", err))
	}
	return nil
}

// insert makes an entry; another one under that key is the error taken, the same one is success.
func insert[K, V comparable](t *table[K, V], k K, v V, taken error) error {
	err := t.update(k, v, updateNoExist)
	if !errors.Is(err, unix.EEXIST) {
		return err
	}
	switch have, ok, err := t.lookup(k); {
	case err != nil:
		return err
	case ok && have == v:
		return nil
	}
	return taken
}

// DeleteHostPort removes what is there of the hostPort, as long as it is this one: without an id the frontend's, if that leads to the backend.
// What is missing or somebody else's is no error. Flows lose their translation.
func (d *Pods) DeleteHostPort(p HostPort) error {
	if err := d.openLate(); err != nil {
		return err
	}
	s, there, err := d.LookupFrontend(p.Frontend)
	if err != nil {
		return err
	}
	if p.ID == 0 && there && IsHostPort(s.Id) {
		p.ID = s.Id
	}
	if !IsHostPort(p.ID) {
		return nil
	}
	slot := p.slot()
	b, listed, err := d.backends.lookup(slot)
	if err != nil {
		return fmt.Errorf("look up list %d: %w", slot.List, err)
	}
	if listed && b != bpf.NewBackend(p.Backend) {
		return nil
	}
	if there && s.Id == p.ID {
		if err := d.services.remove(p.Frontend); err != nil {
			return fmt.Errorf("delete the frontend: %w", err)
		}
	}
	if err := d.serviceBackends.remove(p.member()); err != nil {
		return fmt.Errorf("delete backend %s: %w", p.Backend, err)
	}
	if err := d.RaiseServiceEpochs(p.ID); err != nil {
		return err
	}
	if !listed {
		return nil
	}
	// From here on the id may have another owner.
	if err := d.backends.remove(slot); err != nil {
		return fmt.Errorf("delete list %d: %w", slot.List, err)
	}
	return nil
}

// LookupFrontend returns what a frontend leads to.
func (d *Pods) LookupFrontend(f bpf.FrontendKey) (s bpf.Service, ok bool, err error) {
	if err := d.openLate(); err != nil {
		return s, false, err
	}
	if s, ok, err = d.services.lookup(f); err != nil {
		return s, false, fmt.Errorf("look frontend up: %w", err)
	}
	return s, ok, nil
}

// CheckHostPort tells what of the hostPort is not there.
func (d *Pods) CheckHostPort(p HostPort) error {
	s, ok, err := d.LookupFrontend(p.Frontend)
	switch {
	case err != nil:
		return err
	case !ok:
		return errors.New("services map lacks it")
	case s != p.Service():
		return fmt.Errorf("services map has it under id %d, want %d", s.Id, p.ID)
	}
	if b, ok, err := d.backends.lookup(p.slot()); err != nil {
		return fmt.Errorf("look up list %d: %w", p.slot().List, err)
	} else if !ok || b != bpf.NewBackend(p.Backend) {
		return fmt.Errorf("backends map does not lead to %s", p.Backend)
	}
	if _, ok, err := d.serviceBackends.lookup(p.member()); err != nil {
		return fmt.Errorf("look backend up: %w", err)
	} else if !ok {
		return fmt.Errorf("service_backends map lacks %s", p.Backend)
	}
	return nil
}

// HostPortBackend returns what the hostPort with that id leads to.
func (d *Pods) HostPortBackend(id uint32) (to netip.AddrPort, ok bool, err error) {
	if err := d.openLate(); err != nil {
		return to, false, err
	}
	slot := HostPort{ID: id}.slot()
	b, ok, err := d.backends.lookup(slot)
	if err != nil {
		return to, false, fmt.Errorf("look up list %d: %w", slot.List, err)
	}
	return b.AddrPort(), ok, nil
}
