// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/bpf"
)

// PutEndpoint registers or changes the pod interface behind an address. The pod's flows are judged again, and those that lead to no pod of
// this node: some may have been under way to this address before the pod had it.
func (d *Datapath) PutEndpoint(a netip.Addr, e bpf.Endpoint) error {
	key := bpf.NewAddr(a)
	changed := []int{int(e.Ifindex), int(bpf.EpochSlotOutside)}
	old, taken, err := d.LookupEndpoint(a)
	if err != nil {
		return err
	}
	if taken && old.Ifindex != e.Ifindex {
		changed = append(changed, int(old.Ifindex)) // its DEL never came: flows still lead to that device
	}
	if err := d.Maps.Endpoints.Update(&key, &e, ebpf.UpdateAny); err != nil {
		return fullError("endpoints", d.Maps.Endpoints, fmt.Errorf("register endpoint %s: %w", a, err))
	}
	return d.RaiseEndpointEpochs(changed...)
}

// DeleteEndpoint removes an address, but only while it belongs to the device ifindex (0: to any): the address may have a new owner
// already. A missing entry is no error.
func (d *Datapath) DeleteEndpoint(a netip.Addr, ifindex int) error {
	e, ok, err := d.LookupEndpoint(a)
	if err != nil {
		return err
	}
	if !ok || (ifindex != 0 && e.Ifindex != uint32(ifindex)) {
		return d.RaiseEndpointEpochs(ifindex) // flows may lead to that device all the same
	}
	key := bpf.NewAddr(a)
	if err := d.Maps.Endpoints.Delete(&key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("remove endpoint %s: %w", a, err)
	}
	return d.RaiseEndpointEpochs(int(e.Ifindex))
}

// LookupEndpoint returns the pod interface behind an address.
func (d *Datapath) LookupEndpoint(a netip.Addr) (e bpf.Endpoint, ok bool, err error) {
	key := bpf.NewAddr(a)
	ok, err = found(d.Maps.Endpoints.Lookup(&key, &e))
	if err != nil {
		return e, false, fmt.Errorf("look endpoint %s up: %w", a, err)
	}
	return e, ok, nil
}

// PendingKeyOf returns the key of a pod's entry in the pending map. A namespace's summary has no name and no UID, the node's has
// nothing at all. uid may be empty for a pod whose source knows none.
func PendingKeyOf(namespace, name, uid string) bpf.PendingKey {
	sum := sha256.Sum256([]byte(namespace + "\x00" + name + "\x00" + uid))
	return bpf.PendingKey{Hash: [16]uint8(sum[:16])}
}

// LookupPending returns what the agent published.
func (d *Datapath) LookupPending(key bpf.PendingKey) (p bpf.Pending, ok bool, err error) {
	ok, err = found(d.Maps.Pending.Lookup(&key, &p))
	if err != nil {
		return p, false, fmt.Errorf("look pending policy up: %w", err)
	}
	return p, ok, nil
}

// RaiseEndpointEpochs sends every flow from or to the pods behind these devices through policy again.
func (d *Datapath) RaiseEndpointEpochs(ifindexes ...int) error {
	for _, ifindex := range ifindexes {
		if err := raise(d.Maps.EndpointEpochs, uint32(ifindex)%d.Maps.EndpointEpochs.MaxEntries()); err != nil {
			return fmt.Errorf("raise the epoch of device %d: %w", ifindex, err)
		}
	}
	return nil
}

// RaiseServiceEpochs makes every flow through these services check that its backend still serves.
func (d *Datapath) RaiseServiceEpochs(ids ...uint32) error {
	for _, id := range ids {
		if err := raise(d.Maps.ServiceEpochs, id); err != nil {
			return fmt.Errorf("raise the epoch of service %d: %w", id, err)
		}
	}
	return nil
}

// RaiseRouteEpoch makes every flow of the node look its route up again.
func (d *Datapath) RaiseRouteEpoch() error {
	if err := raise(d.Maps.EndpointEpochs, bpf.EpochSlotRoutes); err != nil {
		return fmt.Errorf("raise the route epoch: %w", err)
	}
	return nil
}

// SetVerdictEvents makes the programs write an event for every new flow that policy lets pass, or no longer. Where an agent runs, it
// writes the whole entry, and this with it.
func (d *Datapath) SetVerdictEvents(on bool) error {
	var zero uint32
	var state bpf.NodeState
	if err := d.Maps.NodeState.Lookup(&zero, &state); err != nil {
		return fmt.Errorf("read what is switched on: %w", err)
	}
	state.Flags &^= bpf.NodeVerdictEvents
	if on {
		state.Flags |= bpf.NodeVerdictEvents
	}
	if err := d.Maps.NodeState.Update(&zero, &state, ebpf.UpdateAny); err != nil {
		return fmt.Errorf("switch verdict events: %w", err)
	}
	return nil
}

func raise(m *ebpf.Map, slot uint32) error {
	return m.Update(slot, newEpoch(), ebpf.UpdateAny)
}

// newEpoch is the monotonic clock in nanoseconds, cut to 32 bits: plugin and agent raise the same slots without a lock, and a counter
// that both read and write back would lose a step.
func newEpoch() uint32 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0
	}
	return uint32(ts.Nano())
}

func found(err error) (bool, error) {
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return false, nil
	}
	return err == nil, err
}

// fullError names the map and the knob when err says that there is no room.
func fullError(name string, m *ebpf.Map, err error) error {
	if errors.Is(err, unix.E2BIG) || errors.Is(err, unix.ENOSPC) {
		return fmt.Errorf("map %s is full with %d entries; raise its size in the agent's configuration: %w", name, m.MaxEntries(), err)
	}
	return err
}
