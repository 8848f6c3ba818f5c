// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"io/fs"
	"net/netip"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/endpoint"
)

// host is what the pipeline asks the node about.
type host interface {
	// Devices returns the names of the host's network devices by index.
	Devices() (map[int]string, error)
	// ReservedPorts returns the ports that the kernel keeps from being chosen.
	ReservedPorts() ([]portRange, error)
	// ReserveHostPorts has the kernel keep these ports, and no other hostPorts, from being chosen.
	ReserveHostPorts(ports []uint16) error
}

// systemHost is the machine.
type systemHost struct {
	run, procSys string // as Config.Run, Config.ProcSys
}

// next is the entry that should follow have, which the plugin or a predecessor wrote: device and addresses as the record says, identity
// and policies as compiled. A pod that is isolated keeps its last good policy while the new one is not entirely in the map, and with
// hold whatever policy it has; an unisolated pod gets even an incomplete policy, because openness is no state to keep.
func (p *pipeline) next(have bpf.Endpoint, want wantedEndpoint, incomplete map[uint32]bool, hold bool) bpf.Endpoint {
	e := want.Endpoint
	if !want.classified {
		e.Identity, e.PolicyId = have.Identity, have.PolicyId
		e.Flags |= have.Flags & bpf.EndpointPending
		return e
	}
	for d, id := range e.PolicyId {
		if have.PolicyId[d] >= bpf.PolicyFirst && (hold || incomplete[id]) {
			e.PolicyId[d] = have.PolicyId[d]
		}
	}
	if hold && have.PolicyId == e.PolicyId {
		e.Identity = have.Identity
	}
	return e
}

// applyEndpoints classifies the entries that the plugin made. Making and deleting them is the plugin's work; the agent does it only in a
// full compare, for what no plugin will come back to: a map that was lost, a device that is gone.
func (p *pipeline) applyEndpoints(incomplete map[uint32]bool, hold bool) {
	var devices map[int]string
	if p.round.Whole {
		var err error
		if devices, err = p.host.Devices(); err != nil {
			p.log.Error("devices cannot be listed; endpoints are not repaired", "err", err)
		}
	}
	for a, want := range p.wantEndpoints {
		k := bpf.NewAddr(a)
		have, ok := p.m.endpoints.have[k]
		switch {
		case ok && have.Ifindex == want.Ifindex:
			if next := p.next(have, want, incomplete, hold); next != have && !p.m.endpoints.replace(k, next) {
				p.soon = true
			}
		case p.young(want.record):
			// Its ADD is at work, or the entry is of the address's last owner.
			p.soon = true
		case devices[want.record.HostIfindex] == want.record.HostIfName && want.record.HostIfName != "":
			p.rebuild(a, want)
		}
	}
}

// young reports whether the record's ADD may still be at work.
func (p *pipeline) young(r *endpoint.Record) bool {
	age := p.now().Sub(r.Created)
	return age >= 0 && age < settled
}

// rebuild makes the entry of a record whose device is there.
func (p *pipeline) rebuild(a netip.Addr, want wantedEndpoint) {
	k := bpf.NewAddr(a)
	if !p.m.endpoints.put(k, want.Endpoint) {
		return
	}
	p.round.Rebuilt++
	p.log.Warn("endpoint was missing and is rebuilt from its record", "address", a, "ifName", want.record.HostIfName,
		"containerID", want.record.ContainerID)
	p.raise.add(raise{Endpoints: []int{int(want.Ifindex), int(bpf.EpochSlotOutside)}})
	// A DEL may have removed entry and record while we wrote.
	if _, err := p.store.Load(want.record.ContainerID, want.record.IfName); errors.Is(err, fs.ErrNotExist) {
		p.m.endpoints.remove(k)
	}
}

// removeLeaks deletes, in a full compare, what is in the maps of pods that no record tells of. It waits for no source: a record is written
// before the entries and removed after them, so they are nobody's whatever the cluster says.
func (p *pipeline) removeLeaks() {
	if !p.round.Whole || !p.haveRecords {
		return
	}
	if devices, err := p.host.Devices(); err != nil {
		p.log.Error("devices cannot be listed; endpoints of pods that are gone stay", "err", err)
	} else {
		p.removeEndpointLeaks(devices)
	}
	p.removeHostPortLeaks()
}

// removeEndpointLeaks deletes entries that no record claims and whose device is gone: an ADD was killed before it wrote its record, or a DEL in
// the middle. Reading the entry again narrows the moment in which a new ADD could have taken the address.
func (p *pipeline) removeEndpointLeaks(devices map[int]string) {
	claimed := map[netip.Addr]int{}
	for _, r := range p.records {
		for _, a := range r.Addresses {
			claimed[a] = r.HostIfindex
		}
	}
	for k, have := range p.m.endpoints.have {
		if _, ok := devices[int(have.Ifindex)]; ok {
			continue
		}
		if index, ok := claimed[k.Netip()]; ok && index == int(have.Ifindex) {
			continue
		}
		if !p.m.endpoints.remove(k) {
			continue
		}
		p.round.Leaks++
		p.log.Warn("endpoint without device and record is removed", "address", k.Netip(), "ifindex", have.Ifindex)
		if err := p.epochs.RaiseEndpointEpochs(int(have.Ifindex)); err != nil {
			p.raise.add(raise{Endpoints: []int{int(have.Ifindex)}}) // with the source's next round
		}
	}
}
