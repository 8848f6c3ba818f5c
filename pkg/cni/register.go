// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/link"
	"github.com/margay-cni/margay/pkg/netns"
)

// rereads bounds how often ADD follows a policy that keeps changing while it registers the pod. The agent reads the record and the
// endpoints map as well, so whatever happens later is its own to apply.
const rereads = 8

// registerEndpoint writes the record, then the endpoints map. In this order a killed ADD can leave no map entry that no record tells of.
func (a *addition) registerEndpoint(context.Context) error {
	a.fillRecord()
	store := a.records()
	a.rollback.add("delete record", func() error { return store.Delete(a.record.ContainerID, a.record.IfName) })
	if err := store.Save(&a.record); err != nil {
		return fail(fileCode(err), err, "write the endpoint's record; is %s writable and not full?", store.Dir())
	}
	a.rollback.add("delete endpoint entries", func() error {
		return deleteEndpoints(a.datapath, a.record.Addresses, a.record.HostIfindex)
	})
	for _, addr := range a.record.Addresses {
		if err := a.refuseTaken(addr); err != nil {
			return err
		}
		if err := a.datapath.PutEndpoint(addr, a.endpoint(a.start)); err != nil {
			return fail(codeRegister, err, "register %s in the endpoints map; when it is full, raise its size", addr)
		}
	}
	return a.followPolicy(store)
}

func (a *addition) fillRecord() {
	r := &a.record
	r.ContainerID, r.IfName, r.Netns, r.Network = a.args.ContainerID, a.args.IfName, a.args.Netns, a.conf.Name
	r.Namespace, r.Name, r.UID, r.Labels = a.pod.namespace, a.pod.name, a.pod.uid, a.conf.labels()
	r.MAC, r.HostMAC = a.podIf.MAC.String(), a.hostIf.MAC.String()
	r.HostIfName, r.HostIfindex = a.hostIf.Name, a.hostIf.Index
	r.Adopted = a.conf.PrevResult != nil
	r.IPAM, r.IPAMRun = a.conf.IPAM.Type, a.leaseRun()
	r.NetnsID, r.HostNetnsID = namespaceID(a.podNS), namespaceID(a.hostNS)
	r.Policy = a.start.how
	r.Created = time.Now().UTC()
}

// namespaceID is the form of records; empty, which says nothing, where the kernel does not tell.
func namespaceID(h *netns.Handle) string {
	id, err := h.ID()
	if err != nil {
		return ""
	}
	return id.String()
}

// endpoint returns the map's value, the same for each of the pod's addresses.
func (a *addition) endpoint(s start) bpf.Endpoint {
	e := bpf.Endpoint{
		Ifindex:  uint32(a.hostIf.Index),
		Identity: s.identity,
		PolicyId: s.policy,
		Flags:    s.flags,
		Mac:      mac6(a.podIf.MAC),
		HostMac:  mac6(a.hostIf.MAC),
	}
	if a.record.Adopted {
		e.Flags |= bpf.EndpointAdopted
	}
	return e
}

// refuseTaken fails if another interface that still exists has the address: taking it over would cut that pod off. An entry whose device is
// gone is what a DEL that never came has left, and is replaced.
func (a *addition) refuseTaken(addr netip.Addr) error {
	e, ok, err := a.datapath.LookupEndpoint(addr)
	if err != nil {
		return fail(codeRegister, err, "look up %s in the endpoints map", addr)
	}
	if !ok || int(e.Ifindex) == a.hostIf.Index {
		return nil
	}
	d, err := a.hostLink.DeviceByIndex(int(e.Ifindex))
	if errors.Is(err, link.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fail(codeDevice, err, "look for the device that %s is registered to", addr)
	}
	return fail(codeRegister, nil,
		"address %s belongs to the pod behind %s already: do two IPAM configurations give out the same range?", addr, d.Name)
}

// followPolicy looks at the pending map again: what the agent published between the first look and the registration would otherwise stay
// unseen, because the agent had no endpoint to apply it to. An entry that is no longer what we wrote is the agent's newer word.
func (a *addition) followPolicy(store *endpoint.Store) error {
	for range rereads {
		s, found, err := published(a.datapath, a.pod)
		if err != nil {
			return err
		}
		if !found || s == a.start {
			return nil
		}
		for _, addr := range a.record.Addresses {
			have, ok, err := a.datapath.LookupEndpoint(addr)
			if err != nil {
				return fail(codeRegister, err, "look up %s in the endpoints map", addr)
			}
			if !ok || have != a.endpoint(a.start) {
				continue
			}
			if err := a.datapath.PutEndpoint(addr, a.endpoint(s)); err != nil {
				return fail(codeRegister, err, "register %s in the endpoints map", addr)
			}
		}
		a.start, a.record.Policy = s, s.how
		if err := store.Save(&a.record); err != nil {
			return fail(fileCode(err), err, "write the endpoint's record; is %s writable and not full?", store.Dir())
		}
	}
	return nil
}

// deleteEndpoints removes the entries that still belong to the device with that ifindex. The addresses may be another pod's by now.
func deleteEndpoints(m endpoints, addresses []netip.Addr, ifindex int) error {
	var faults []error
	for _, a := range slices.Backward(addresses) {
		faults = append(faults, m.DeleteEndpoint(a, ifindex))
	}
	return errors.Join(faults...)
}
