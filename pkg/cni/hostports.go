// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/link"
	"github.com/margay-cni/margay/pkg/pins"
)

// claims bounds how often ADD tries to get a hostPort's id and frontend, when others take ids at the same time or have left some behind.
const claims = 16

// registerHostPorts makes the frontends that lead to the pod. Ids are chosen first and written into the record, so that a killed ADD can leave
// no entry that no record tells of.
func (a *addition) registerHostPorts(context.Context) (err error) {
	ports, err := a.conf.hostPorts(a.record.Addresses)
	if err != nil {
		return fail(types.ErrInvalidNetworkConfig, err, "the pod's hostPorts cannot be served")
	}
	if len(ports) == 0 {
		return nil
	}
	for _, p := range ports {
		if err := a.checkHost(p); err != nil {
			return err
		}
	}
	a.record.HostPorts = ports
	a.rollback.add("delete hostPorts", func() error { return deleteHostPorts(a.datapath, a.record.HostPorts) })
	if err := a.numberHostPorts(); err != nil {
		return err
	}
	for i := range ports {
		if err := a.claim(i); err != nil {
			return err
		}
	}
	return nil
}

// nodeHasAddress asks for all addresses, which ADD has no socket for otherwise.
func nodeHasAddress(a netip.Addr) (bool, error) {
	node, err := link.Dial(-1)
	if err != nil {
		return false, err
	}
	defer node.Close()
	return node.HasAddress(a)
}

// checkHost refuses a hostPort at an address that is not the node's, because it might be a service's or another machine's, and one that would
// take an address away from a port that is served on all of them.
func (a *addition) checkHost(p endpoint.HostPort) error {
	host := p.Host.Addr()
	if host.IsUnspecified() {
		return nil
	}
	if !host.IsLoopback() {
		own, err := nodeHasAddress(host)
		if err != nil {
			return fail(codeDevice, err, "look for address %s on this node", host)
		}
		if !own {
			return fail(codeHostPort, nil, "hostPort %s: this node does not have the address", p)
		}
	}
	all := p
	all.Host = netip.AddrPortFrom(netip.IPv4Unspecified(), p.Host.Port())
	if host.Is6() {
		all.Host = netip.AddrPortFrom(netip.IPv6Unspecified(), p.Host.Port())
	}
	for range claims {
		_, taken, err := a.datapath.LookupFrontend(frontend(all))
		if err != nil {
			return fail(codeHostPort, err, "look for who else has hostPort %s", p)
		}
		if !taken {
			return nil
		}
		if err := a.freeFrontend(all); err != nil {
			return err
		}
	}
	return fail(types.ErrTryAgainLater, nil, "hostPort %s is taken again and again", p)
}

// numberHostPorts gives every hostPort without an id one that nobody has, and saves the record.
func (a *addition) numberHostPorts() error {
	ports := a.record.HostPorts
	var own []uint32
	for _, p := range ports {
		own = append(own, p.ID)
	}
	for i := range ports {
		if ports[i].ID != 0 {
			continue
		}
		id, err := a.datapath.FreeHostPortID(frontend(ports[i]), own...)
		if err != nil {
			return fail(codeHostPort, err, "find an id for hostPort %s", ports[i])
		}
		ports[i].ID = id
		own = append(own, id)
	}
	store := a.records()
	if err := store.Save(&a.record); err != nil {
		return fail(fileCode(err), err, "write the endpoint's record; is %s writable and not full?", store.Dir())
	}
	return nil
}

// claim makes one of the record's hostPorts.
func (a *addition) claim(i int) error {
	p := &a.record.HostPorts[i]
	for range claims {
		err := a.datapath.PutHostPort(mapForm(*p))
		switch {
		case errors.Is(err, pins.ErrHostPortID): // somebody was quicker
			p.ID = 0
			err = a.numberHostPorts()
		case errors.Is(err, pins.ErrFrontendTaken):
			err = a.freeFrontend(*p)
		case err == nil:
			return nil
		default:
			err = fail(codeHostPort, err, "register hostPort %s", *p)
		}
		if err != nil {
			return err
		}
	}
	return fail(types.ErrTryAgainLater, nil, "hostPort %s is taken again and again", *p)
}

// freeFrontend takes a frontend from a pod that is gone, and fails, with the name of who has it, if that is anybody else.
func (a *addition) freeFrontend(p endpoint.HostPort) error {
	s, ok, err := a.datapath.LookupFrontend(frontend(p))
	if err != nil {
		return fail(codeHostPort, err, "look for who has hostPort %s", p)
	}
	if !ok {
		return nil
	}
	if !pins.IsHostPort(s.Id) {
		return fail(codeHostPort, nil, "hostPort %s is taken by service %s: choose another port", p, a.serviceName(s.Id))
	}
	records, err := a.records().List()
	if err != nil {
		a.log.Warn("unreadable records", "error", err)
	}
	for _, r := range records {
		i := slices.IndexFunc(r.HostPorts, p.SameFrontend)
		if i < 0 || r.ContainerID == a.record.ContainerID && r.IfName == a.record.IfName {
			continue
		}
		gone, err := a.isGone(r)
		if err != nil {
			return err
		}
		if !gone && r.HostPorts[i].ID == s.Id {
			return fail(codeHostPort, nil, "hostPort %s is taken by pod %s: choose another port", p, podName(r))
		}
	}
	// Nobody who is alive: what a DEL that never came has left.
	to, _, err := a.datapath.HostPortBackend(s.Id)
	if err == nil {
		a.log.Warn("hostPort of a pod that is gone is taken over", "hostPort", p.String(), "was", to.String())
		err = a.datapath.DeleteHostPort(pins.HostPort{ID: s.Id, Frontend: frontend(p), Backend: to})
	}
	if err != nil {
		return fail(codeHostPort, err, "take hostPort %s over from a pod that is gone", p)
	}
	return nil
}

// isGone says whether the record's device does not exist any more.
func (a *addition) isGone(r *endpoint.Record) (bool, error) {
	d, err := a.hostLink.DeviceByIndex(r.HostIfindex)
	if errors.Is(err, link.ErrNotFound) {
		return true, nil
	}
	if err != nil {
		return false, fail(codeDevice, err, "look for the device of pod %s", podName(r))
	}
	return d.Name != r.HostIfName, nil
}

func podName(r *endpoint.Record) string {
	if r.Name == "" {
		return r.ContainerID
	}
	return r.Namespace + "/" + r.Name
}

// serviceName is what the agent calls the service id.
func (a *addition) serviceName(id uint32) string {
	var names map[uint32]string
	data, err := os.ReadFile(filepath.Join(a.conf.RunDir, endpoint.ServicesFile))
	if err == nil {
		err = json.Unmarshal(data, &names)
	}
	if name := names[id]; err == nil && name != "" {
		return name
	}
	return strconv.Itoa(int(id))
}

// frontend is the map's key of a hostPort.
func frontend(p endpoint.HostPort) bpf.FrontendKey {
	return bpf.NewFrontendKey(p.ProtocolNumber(), p.Host.Addr(), p.Host.Port())
}

func mapForm(p endpoint.HostPort) pins.HostPort {
	return pins.HostPort{ID: p.ID, Frontend: frontend(p), Backend: p.Pod}
}

// deleteHostPorts removes what is there of them; without an id, what leads to the same pod.
func deleteHostPorts(m hostPorts, ports []endpoint.HostPort) error {
	var faults []error
	for _, p := range slices.Backward(ports) {
		if err := m.DeleteHostPort(mapForm(p)); err != nil {
			faults = append(faults, fmt.Errorf("hostPort %s: %w", p, err))
		}
	}
	return errors.Join(faults...)
}

// removeHostPorts removes the frontends that lead to the pod: without a record those that the configuration names.
func (r *removal) removeHostPorts() error {
	var ports []endpoint.HostPort
	if r.record != nil {
		ports = r.record.HostPorts
	} else {
		ports, _ = r.conf.hostPorts(r.addresses()) // DEL goes on whatever the configuration says
	}
	if len(ports) == 0 {
		return nil
	}
	if err := deleteHostPorts(r.datapath, ports); err != nil {
		return fail(codeHostPort, err, "delete the pod's hostPorts")
	}
	return nil
}

// compareHostPorts wants every hostPort of the record in the maps.
func (i *inspection) compareHostPorts() error {
	var faults []error
	for _, p := range i.record.HostPorts {
		if err := i.datapath.CheckHostPort(mapForm(p)); err != nil {
			faults = append(faults, fmt.Errorf("hostPort %s: %w", p, err))
		}
	}
	return errors.Join(faults...)
}
