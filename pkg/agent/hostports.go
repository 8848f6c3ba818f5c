// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"slices"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/flow"
	"github.com/margay-cni/margay/pkg/pins"
	"github.com/margay-cni/margay/pkg/service"
	"github.com/margay-cni/margay/pkg/state"
)

// HostPorts makes and removes frontends that lead to single pods (pkg/datapath implements it). They are the plugin's; the agent repairs them.
type HostPorts interface {
	PutHostPort(p pins.HostPort) error
	DeleteHostPort(p pins.HostPort) error
}

// leaveHostPorts keeps the mirrors of the services from what is the plugin's.
func (m *mirrors) leaveHostPorts() {
	m.services.pods = func(_ bpf.FrontendKey, s bpf.Service) bool { return pins.IsHostPort(s.Id) }
	m.backends.pods = func(k bpf.BackendKey, _ bpf.Backend) bool {
		return k.List >= bpf.HostPortList && pins.IsHostPort(k.List-bpf.HostPortList)
	}
	m.members.pods = func(k bpf.ServiceBackend, _ uint32) bool { return pins.IsHostPort(k.ServiceId) }
}

// wantedHostPort is a hostPort with the record that names it.
type wantedHostPort struct {
	endpoint.HostPort
	record *endpoint.Record
}

// wantedHostPorts gives the hostPorts of all records by frontend. Where two records claim one, the younger one has it: the other's DEL never
// came.
func wantedHostPorts(records []*endpoint.Record) map[bpf.FrontendKey]wantedHostPort {
	want := map[bpf.FrontendKey]wantedHostPort{}
	for _, r := range records {
		for _, p := range r.HostPorts {
			want[bpf.NewFrontendKey(p.ProtocolNumber(), p.Host.Addr(), p.Host.Port())] = wantedHostPort{p, r}
		}
	}
	return want
}

func (w wantedHostPort) mapForm() pins.HostPort {
	return pins.HostPort{
		ID: w.ID, Frontend: bpf.NewFrontendKey(w.ProtocolNumber(), w.Host.Addr(), w.Host.Port()), Backend: w.Pod,
	}
}

// yields says that a pod has the frontend of a service, and had it first: what works is not taken away.
func (p *pipeline) yields(k bpf.FrontendKey) bool {
	_, mine := p.m.services.have[k]
	_, theirs := p.wantHostPorts[k]
	return theirs && !mine
}

// hostPortProblems names the services that do not have a frontend because a pod has it.
func (p *pipeline) hostPortProblems() (out []string) {
	for k, w := range p.wantHostPorts {
		f := service.Frontend{Addr: w.Host.Addr(), Port: w.Host.Port(), Protocol: state.Protocol(w.ProtocolNumber())}
		if s, ok := p.serviceResult.Frontends[f]; ok && p.yields(k) {
			out = append(out, fmt.Sprintf("Service %s: %s is taken by a hostPort of pod %s", s.Name, f, flow.PodName(w.record)))
		}
	}
	slices.Sort(out)
	return out
}

// applyHostPorts repairs, in a full compare, what no plugin will come back to: hostPorts of a living pod that are not in the maps.
func (p *pipeline) applyHostPorts() {
	if p.round.Whole {
		p.rebuildHostPorts()
	}
}

// isThere says whether the maps had all of the hostPort when they were read.
func (p *pipeline) isThere(hp pins.HostPort) bool {
	slot := bpf.BackendKey{List: bpf.HostPortList + hp.ID}
	_, member := p.m.members.others[bpf.NewServiceBackend(hp.ID, hp.Backend)]
	return member && p.m.services.others[hp.Frontend] == hp.Service() && p.m.backends.others[slot] == bpf.NewBackend(hp.Backend)
}

func (p *pipeline) rebuildHostPorts() {
	var devices map[int]string
	for _, w := range p.wantHostPorts {
		hp := w.mapForm()
		if p.isThere(hp) {
			continue
		}
		if p.young(w.record) {
			p.soon = true // its ADD is at work
			continue
		}
		if devices == nil {
			var err error
			if devices, err = p.host.Devices(); err != nil {
				p.log.Error("devices cannot be listed; hostPorts are not repaired", "err", err)
				return
			}
		}
		if w.record.HostIfName == "" || devices[w.record.HostIfindex] != w.record.HostIfName {
			continue
		}
		if err := p.ports.PutHostPort(hp); err != nil {
			p.fault("services", fmt.Errorf("hostPort %s of pod %s: %w", w, flow.PodName(w.record), err))
			continue
		}
		p.round.Rebuilt++
		p.log.Warn("hostPort was missing and is rebuilt from its record", "hostPort", w.String(), "pod", flow.PodName(w.record))
		// A DEL may have removed entries and record while we wrote.
		if !p.claimed(w.ID) {
			if err := p.ports.DeleteHostPort(hp); err != nil {
				p.fault("services", err)
			}
		}
	}
}

// claimed says whether a record has the id at this moment. In doubt one does.
func (p *pipeline) claimed(id uint32) bool {
	records, err := p.store.List()
	if err != nil {
		return true
	}
	return slices.ContainsFunc(records, func(r *endpoint.Record) bool {
		return slices.ContainsFunc(r.HostPorts, func(hp endpoint.HostPort) bool { return hp.ID == id })
	})
}

// removeHostPortLeaks deletes what no record claims: an ADD writes its record first, and DEL removes it last.
func (p *pipeline) removeHostPortLeaks() {
	known := map[uint32]bool{}
	for _, r := range p.records {
		for _, hp := range r.HostPorts {
			known[hp.ID] = true
		}
	}
	leaks := map[uint32]pins.HostPort{}
	for k, v := range p.m.backends.others {
		id := k.List - bpf.HostPortList
		leaks[id] = pins.HostPort{ID: id, Backend: v.AddrPort()}
	}
	for k := range p.m.members.others {
		if leak, ok := leaks[k.ServiceId]; !ok || !leak.Backend.IsValid() {
			leaks[k.ServiceId] = pins.HostPort{ID: k.ServiceId, Backend: k.AddrPort()}
		}
	}
	for k, s := range p.m.services.others {
		leak := leaks[s.Id]
		leak.ID, leak.Frontend = s.Id, k
		leaks[s.Id] = leak
	}
	for id, hp := range leaks {
		if known[id] || p.claimed(id) {
			continue
		}
		if err := p.ports.DeleteHostPort(hp); err != nil {
			p.fault("services", err)
			continue
		}
		p.round.Leaks++
		p.log.Warn("hostPort that no record tells of is removed", "id", id, "backend", hp.Backend)
	}
}
