// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"maps"
	"slices"
	"time"

	"github.com/margay-cni/margay/pkg/datapath"
)

// portRange is from first to last, both included.
type portRange struct {
	first, last uint16
}

// ReservedPorts returns the ports that the kernel keeps from being chosen.
func (systemHost) ReservedPorts() ([]portRange, error) {
	ranges, err := datapath.ReservedPorts()
	var out []portRange
	for _, r := range ranges {
		out = append(out, portRange{r.First, r.Last})
	}
	return out, err
}

// reserveTimeout bounds the wait for the datapath's lock, which is held for longer only while programs are loaded.
const reserveTimeout = 5 * time.Second

// ReserveHostPorts has the kernel keep these ports, and no other hostPorts, from being chosen.
func (h systemHost) ReserveHostPorts(ports []uint16) error {
	ctx, cancel := context.WithTimeout(context.Background(), reserveTimeout)
	defer cancel()
	var ranges []datapath.PortRange
	for _, port := range ports {
		ranges = append(ranges, datapath.PortRange{First: port, Last: port})
	}
	return datapath.ReserveHostPorts(ctx, datapath.Config{Run: h.run, ProcSys: h.procSys}, ranges)
}

// reserveHostPorts keeps the node's own connections off the pods' hostPorts: what comes to those goes to the pods. It looks at the kernel's
// list when the hostPorts have changed, and in a full compare.
func (p *pipeline) reserveHostPorts() {
	ports := map[uint16]bool{}
	for _, hp := range p.wantHostPorts {
		ports[hp.Host.Port()] = true
	}
	if !p.round.Whole && p.hostPortErr == nil && maps.Equal(ports, p.hostPortsReserved) {
		return
	}
	was := p.hostPortErr
	p.hostPortErr = p.host.ReserveHostPorts(slices.Sorted(maps.Keys(ports)))
	if p.hostPortErr == nil {
		p.hostPortsReserved = ports
	} else if was == nil {
		p.log.Error("hostPorts cannot be kept from the node's own connections; trying again", "err", p.hostPortErr)
	}
}

// bits sets the ports of the ranges in the map's form: one word for each 64 ports.
func bits(ranges []portRange) map[uint32]uint64 {
	out := map[uint32]uint64{}
	for _, r := range ranges {
		for port := uint32(r.first); port <= uint32(r.last); port++ {
			out[port/64] |= 1 << (port % 64)
		}
	}
	return out
}

// applyReserved writes the ports that masquerade must not take: the kernel's list, every NodePort and hostPort, and the overlay's own port, because what
// comes to that one from outside is the kernel's. With hold no port is taken off.
func (p *pipeline) applyReserved(hold bool) {
	p.reserveHostPorts()
	if p.round.Whole || p.sysctlPorts == nil {
		ports, err := p.host.ReservedPorts()
		if err != nil {
			p.log.Error("reserved ports are not known; those in the map stay reserved", "err", err)
			hold = true
		} else {
			p.sysctlPorts = append([]portRange{}, ports...)
		}
	}
	ranges := append([]portRange{{p.reach.VXLANPort, p.reach.VXLANPort}}, p.sysctlPorts...)
	ranges = append(ranges, p.nodePortRanges()...)
	for _, hp := range p.wantHostPorts {
		ranges = append(ranges, portRange{hp.Host.Port(), hp.Host.Port()})
	}
	want := bits(ranges)
	if hold {
		for word, have := range p.m.reserved.have {
			want[word] |= have
		}
	}
	for word, v := range want {
		p.m.reserved.put(word, v)
	}
	for _, word := range p.m.reserved.surplus(want) {
		p.m.reserved.remove(word)
	}
}

// nodePortRanges are the NodePorts of all services.
func (p *pipeline) nodePortRanges() []portRange {
	journal := p.merged.Journals.Services
	if journal.Same(p.portsOf) {
		return p.servicePorts
	}
	p.portsOf, p.servicePorts = journal, nil
	for _, s := range p.merged.Services {
		for _, port := range s.Ports {
			if port.NodePort != 0 {
				p.servicePorts = append(p.servicePorts, portRange{port.NodePort, port.NodePort})
			}
		}
	}
	return p.servicePorts
}
