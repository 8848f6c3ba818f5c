// SPDX-License-Identifier: Apache-2.0

package pins

import (
	"crypto/sha256"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/bpf"
)

// PutEndpoint registers or changes the pod interface behind an address. The pod's flows are judged again, and those that lead to no pod of
// this node: some may have been under way to this address before the pod had it.
func (p *Pods) PutEndpoint(a netip.Addr, e bpf.Endpoint) error {
	changed := []int{int(e.Ifindex), int(bpf.EpochSlotOutside)}
	old, taken, err := p.LookupEndpoint(a)
	if err != nil {
		return err
	}
	if taken && old.Ifindex != e.Ifindex {
		changed = append(changed, int(old.Ifindex)) // its DEL never came: flows still lead to that device
	}
	if err := p.endpoints.update(bpf.NewAddr(a), e, updateAny); err != nil {
		return p.endpoints.fullError(fmt.Errorf("register endpoint %s: %w", a, err))
	}
	return p.RaiseEndpointEpochs(changed...)
}

// DeleteEndpoint removes an address, but only while it belongs to the device ifindex (0: to any): the address may have a new owner
// already. A missing entry is no error.
func (p *Pods) DeleteEndpoint(a netip.Addr, ifindex int) error {
	e, ok, err := p.LookupEndpoint(a)
	if err != nil {
		return err
	}
	if !ok || (ifindex != 0 && e.Ifindex != uint32(ifindex)) {
		return p.RaiseEndpointEpochs(ifindex) // flows may lead to that device all the same
	}
	if err := p.endpoints.remove(bpf.NewAddr(a)); err != nil {
		return fmt.Errorf("remove endpoint %s: %w", a, err)
	}
	return p.RaiseEndpointEpochs(int(e.Ifindex))
}

// LookupEndpoint returns the pod interface behind an address.
func (p *Pods) LookupEndpoint(a netip.Addr) (e bpf.Endpoint, ok bool, err error) {
	if e, ok, err = p.endpoints.lookup(bpf.NewAddr(a)); err != nil {
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
func (p *Pods) LookupPending(key bpf.PendingKey) (found bpf.Pending, ok bool, err error) {
	if found, ok, err = p.pending.lookup(key); err != nil {
		return found, false, fmt.Errorf("look pending policy up: %w", err)
	}
	return found, ok, nil
}

// RaiseEndpointEpochs sends every flow from or to the pods behind these devices through policy again.
func (p *Pods) RaiseEndpointEpochs(ifindexes ...int) error {
	for _, ifindex := range ifindexes {
		if err := raise(&p.epochs, uint32(ifindex)%p.epochs.entries); err != nil {
			return fmt.Errorf("raise the epoch of device %d: %w", ifindex, err)
		}
	}
	return nil
}

// RaiseServiceEpochs makes every flow through these services check that its backend still serves.
func (p *Pods) RaiseServiceEpochs(ids ...uint32) error {
	if err := p.openLate(); err != nil {
		return err
	}
	for _, id := range ids {
		if err := raise(&p.serviceEpochs, id); err != nil {
			return fmt.Errorf("raise the epoch of service %d: %w", id, err)
		}
	}
	return nil
}

// RaiseRouteEpoch makes every flow of the node look its route up again.
func (p *Pods) RaiseRouteEpoch() error {
	if err := raise(&p.epochs, bpf.EpochSlotRoutes); err != nil {
		return fmt.Errorf("raise the route epoch: %w", err)
	}
	return nil
}

func raise(t *table[uint32, uint32], slot uint32) error {
	return t.update(slot, newEpoch(), updateAny)
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
