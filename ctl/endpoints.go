// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/spf13/cobra"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/bpf/object"
	"github.com/margay-cni/margay/pkg/flow"
)

// Marks beside the flags of the map, for what only the comparison with the records shows.
const (
	markNoRecord     = "no_record"    // in the map, but no record file: nobody will delete it
	markUnregistered = "unregistered" // a record, but not in the map: the pod's packets are dropped
)

// endpointAddress is one address of a pod interface. Identity 0 with an unregistered address.
type endpointAddress struct {
	Address  netip.Addr `json:"address"`
	Identity uint32     `json:"identity"`
}

// endpointInfo is one pod interface.
type endpointInfo struct {
	Pod         string            `json:"pod,omitempty"`
	ContainerID string            `json:"containerID,omitempty"`
	IfName      string            `json:"ifName,omitempty"`
	Addresses   []endpointAddress `json:"addresses"`
	Device      string            `json:"device"`
	Ifindex     int               `json:"ifindex"`
	MAC         string            `json:"mac,omitempty"`
	HostMAC     string            `json:"hostMAC,omitempty"`
	// IngressPolicy and EgressPolicy are policy ids; 0 = not isolated.
	IngressPolicy uint32   `json:"ingressPolicy"`
	EgressPolicy  uint32   `json:"egressPolicy"`
	Flags         []string `json:"flags,omitempty"`
}

type endpointList struct {
	Endpoints []endpointInfo `json:"endpoints"`
}

func newEndpoints(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "endpoints",
		Short: "List the pod interfaces that Margay serves",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			s := a.source()
			defer s.close()
			m, err := s.openMap("endpoints")
			if err != nil {
				return err
			}
			devs, err := listDevices()
			if err != nil {
				return err
			}
			list, err := collectEndpoints(m, a.names(), devs)
			if err != nil {
				return err
			}
			return a.show(endpointList{list})
		},
	}
}

// collectEndpoints joins the map's entries with the records: one element for each interface, and for each record that has no entry.
func collectEndpoints(m *ebpf.Map, names *flow.Names, devs devices) ([]endpointInfo, error) {
	type group struct {
		ifindex, ingress, egress, flags uint32
		mac, hostMAC                    [6]uint8
	}
	groups := map[group]*endpointInfo{}
	registered := map[netip.Addr]bool{}
	err := flow.Entries(m, func(k bpf.Addr, e bpf.Endpoint) bool {
		g := group{e.Ifindex, e.PolicyId[bpf.Ingress], e.PolicyId[bpf.Egress], e.Flags, e.Mac, e.HostMac}
		if groups[g] == nil {
			groups[g] = &endpointInfo{
				Device: devs.name(int(e.Ifindex)), Ifindex: int(e.Ifindex),
				MAC: net.HardwareAddr(e.Mac[:]).String(), HostMAC: net.HardwareAddr(e.HostMac[:]).String(),
				IngressPolicy: g.ingress, EgressPolicy: g.egress, Flags: object.EndpointFlagNames(e.Flags),
			}
		}
		a := k.Netip()
		registered[a] = true
		groups[g].Addresses = append(groups[g].Addresses, endpointAddress{Address: a, Identity: e.Identity})
		return true
	})
	if err != nil {
		return nil, err
	}
	list := []endpointInfo{}
	for _, e := range groups {
		slices.SortFunc(e.Addresses, func(a, b endpointAddress) int { return a.Address.Compare(b.Address) })
		e.name(names)
		list = append(list, *e)
	}
	list = append(list, unregistered(names, registered, devs)...)
	slices.SortFunc(list, func(a, b endpointInfo) int {
		return cmp.Or(strings.Compare(a.Pod, b.Pod), cmp.Compare(a.Ifindex, b.Ifindex))
	})
	return list, nil
}

// name finds the interface's record by its addresses.
func (e *endpointInfo) name(names *flow.Names) {
	for _, r := range names.Records() {
		for _, a := range e.Addresses {
			if slices.Contains(r.Addresses, a.Address) {
				e.Pod, e.ContainerID, e.IfName = flow.PodName(r), r.ContainerID, r.IfName
				return
			}
		}
	}
	e.Flags = append(e.Flags, markNoRecord)
}

// unregistered returns the records of which no address is in the map.
func unregistered(names *flow.Names, registered map[netip.Addr]bool, devs devices) []endpointInfo {
	var list []endpointInfo
	for _, r := range names.Records() {
		if slices.ContainsFunc(r.Addresses, func(a netip.Addr) bool { return registered[a] }) {
			continue
		}
		e := endpointInfo{
			Pod: flow.PodName(r), ContainerID: r.ContainerID, IfName: r.IfName, MAC: r.MAC, HostMAC: r.HostMAC,
			Device: devs.name(r.HostIfindex), Ifindex: r.HostIfindex, Flags: []string{markUnregistered},
		}
		for _, a := range r.Addresses {
			e.Addresses = append(e.Addresses, endpointAddress{Address: a})
		}
		list = append(list, e)
	}
	return list
}

func (l endpointList) print(w io.Writer) {
	if len(l.Endpoints) == 0 {
		fmt.Fprintln(w, "no endpoints: no pod of this node is connected by margay")
		return
	}
	t := newTable("POD", "ADDRESSES", "DEVICE", "IDENTITY", "INGRESS", "EGRESS", "FLAGS")
	for _, e := range l.Endpoints {
		var addresses, identities []string
		for _, a := range e.Addresses {
			addresses = append(addresses, a.Address.String())
			if id := identityText(a.Identity); !slices.Contains(identities, id) {
				identities = append(identities, id)
			}
		}
		identity, ingress, egress := shorten(identities, 2), policyText(e.IngressPolicy), policyText(e.EgressPolicy)
		if slices.Contains(e.Flags, markUnregistered) {
			identity, ingress, egress = "-", "-", "-"
		}
		t.add(dash(e.Pod), shorten(addresses, 4), e.Device, identity, ingress, egress, dash(strings.Join(e.Flags, ",")))
	}
	t.print(w)
}

// identityText shows a fixed identity by its name, another by its number.
func identityText(id uint32) string {
	if id < bpf.IdentityFirst || id == bpf.IdentityAny {
		return object.IdentityName(id)
	}
	return fmt.Sprint(id)
}

// policyText shows a fixed policy id by its name, another by its number.
func policyText(id uint32) string {
	if id < bpf.PolicyFirst {
		return object.PolicyIDName(id)
	}
	return fmt.Sprint(id)
}
