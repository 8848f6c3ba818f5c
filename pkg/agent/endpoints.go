// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/endpoint"
)

// host is what the pipeline asks the node about.
type host interface {
	// Devices returns the names of the host's network devices by index.
	Devices() (map[int]string, error)
	// NetnsGone reports whether nothing is at the path of a network namespace any more.
	NetnsGone(path string) bool
	// ReservedPorts returns the ports that the kernel keeps from being chosen.
	ReservedPorts() ([]portRange, error)
}

type systemHost struct{}

func (systemHost) NetnsGone(path string) bool {
	_, err := os.Stat(path)
	return path == "" || errors.Is(err, fs.ErrNotExist)
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
	if devices != nil && !hold {
		p.removeLeaks(devices)
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

// removeLeaks deletes entries that no record claims and whose device is gone: an ADD was killed before it wrote its record, or a DEL in the
// middle. Reading the entry again narrows the moment in which a new ADD could have taken the address.
func (p *pipeline) removeLeaks(devices map[int]string) {
	for k, have := range p.m.endpoints.have {
		if _, ok := devices[int(have.Ifindex)]; ok {
			continue
		}
		if want, ok := p.wantEndpoints[k.Netip()]; ok && want.Ifindex == have.Ifindex {
			continue
		}
		if !p.m.endpoints.remove(k) {
			continue
		}
		p.round.Leaks++
		p.log.Warn("endpoint without device and record is removed", "address", k.Netip(), "ifindex", have.Ifindex)
		p.raise.add(raise{Endpoints: []int{int(have.Ifindex)}})
	}
}

// goneTwice is in how many full compares in a row a record must be found without device and namespace before it goes.
const goneTwice = 2

// collectRecords removes the records of pods that ended without a DEL that got through: namespace and device are both gone. Their map
// entries follow as leaks; their address lease stays with the IPAM plugin, whose GC knows the valid attachments.
func (p *pipeline) collectRecords() {
	devices, err := p.host.Devices()
	if err != nil {
		p.log.Error("devices cannot be listed; records are not collected", "err", err)
		return
	}
	absent := map[string]int{}
	for _, r := range p.records {
		if devices[r.HostIfindex] == r.HostIfName || !p.host.NetnsGone(r.Netns) || p.young(r) {
			continue
		}
		key := filepath.Join(r.ContainerID, r.IfName)
		absent[key] = p.absent[key] + 1
		if absent[key] < goneTwice {
			continue
		}
		if err := p.store.Delete(r.ContainerID, r.IfName); err != nil {
			p.log.Error("record of a pod that is gone cannot be removed", "containerID", r.ContainerID, "err", err)
			continue
		}
		p.round.Collected++
		p.log.Warn("pod is gone without a DEL; its record is removed, its address lease is left to IPAM garbage collection",
			"containerID", r.ContainerID, "ifName", r.IfName, "pod", r.Namespace+"/"+r.Name, "addresses", r.Addresses)
	}
	p.absent = absent
}
