// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/spf13/cobra"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/bpf/object"
	"github.com/margay-cni/margay/pkg/flow"
	"github.com/margay-cni/margay/pkg/state"
)

// backendInfo is one backend of a frontend. Scopes say for whom: "internal" (pods and processes of this node), "external" (clients from
// outside).
type backendInfo struct {
	Address netip.AddrPort `json:"address"`
	Pod     string         `json:"pod,omitempty"`
	Scopes  []string       `json:"scopes"`
	// Location is "local" or "remote", empty if not known; Node is a remote backend's node, by its address.
	Location string     `json:"location,omitempty"`
	Node     netip.Addr `json:"node,omitzero"`
}

// serviceInfo is one frontend of a service port.
type serviceInfo struct {
	ID       uint32         `json:"id"`
	Name     string         `json:"name,omitempty"`
	Protocol string         `json:"protocol"`
	Frontend netip.AddrPort `json:"frontend"`
	// NodePort: the frontend's address is the unspecified one and stands for every NodePort address of the family. That of a hostPort (flag
	// host_port) stands for every address of the node.
	NodePort bool          `json:"nodePort"`
	Backends []backendInfo `json:"backends"`
	// Missing backends are counted by the service, but not in their list.
	Missing int `json:"missing,omitempty"`
	// Balancing is how backends are chosen: "random" or "maglev".
	Balancing string `json:"balancing"`
	// AffinitySeconds is for how long after its last connection a client keeps its backend; 0: no affinity.
	AffinitySeconds uint32 `json:"affinitySeconds,omitempty"`
	// SourceRanges are the only sources that may use the frontend; absent: all may.
	SourceRanges []netip.Prefix `json:"sourceRanges,omitempty"`
	// Return is the way that the answers of remote backends take to clients outside: "tunnel" or "dsr".
	Return string   `json:"return"`
	Flags  []string `json:"flags,omitempty"`
}

type serviceList struct {
	Services []serviceInfo `json:"services"`

	numeric bool
}

func newServices(a *app) *cobra.Command {
	var numeric bool
	cmd := &cobra.Command{
		Use:   "services",
		Short: "List the service frontends and their backends",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			s := a.source()
			defer s.close()
			services, err := s.openMap("services")
			if err != nil {
				return err
			}
			backends, err := s.openMap("backends")
			if err != nil {
				return err
			}
			sources, err := openIfThere(s, "source_ranges")
			if err != nil {
				return err
			}
			names := a.names()
			at, err := openPlaces(s, names)
			if err != nil {
				return err
			}
			list, err := collectServices(services, backends, names, at)
			if err == nil {
				err = addSources(list, sources)
			}
			if err != nil {
				return err
			}
			return a.show(serviceList{list, numeric})
		},
	}
	cmd.Flags().BoolVarP(&numeric, "numeric", "n", false, "show addresses instead of pod names")
	return cmd
}

// collectServices reads every frontend with its backends, ordered by name and frontend.
func collectServices(services, backends *ebpf.Map, names *flow.Names, at *places) ([]serviceInfo, error) {
	slots := map[bpf.BackendKey]netip.AddrPort{}
	err := flow.Entries(backends, func(k bpf.BackendKey, b bpf.Backend) bool {
		slots[k] = b.AddrPort()
		return true
	})
	if err != nil {
		return nil, err
	}
	list := []serviceInfo{}
	err = flow.Entries(services, func(k bpf.FrontendKey, s bpf.Service) bool {
		list = append(list, newServiceInfo(k, s, slots, names))
		return true
	})
	for i := range list {
		err = errors.Join(err, list[i].locate(at))
	}
	slices.SortFunc(list, func(a, b serviceInfo) int {
		return cmp.Or(nameless(a)-nameless(b), strings.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID), a.Frontend.Compare(b.Frontend))
	})
	return list, err
}

// nameless puts what has no name last.
func nameless(s serviceInfo) int {
	if s.Name == "" {
		return 1
	}
	return 0
}

func newServiceInfo(k bpf.FrontendKey, s bpf.Service, slots map[bpf.BackendKey]netip.AddrPort, names *flow.Names) serviceInfo {
	frontend := netip.AddrPortFrom(k.Addr.Netip(), bpf.Port16(k.Port))
	balancing := state.BalanceRandom
	if s.Maglev[bpf.ScopeExternal] != 0 || s.Maglev[bpf.ScopeInternal] != 0 {
		balancing = state.BalanceMaglev
	}
	info := serviceInfo{
		Balancing: string(balancing), AffinitySeconds: s.Affinity,
		ID: s.Id, Name: names.Service(s.Id), Protocol: flow.ProtocolName(k.Proto), Frontend: frontend,
		NodePort: frontend.Addr().IsUnspecified() && s.Flags&bpf.ServiceHostPort == 0, Backends: []backendInfo{},
		Return: string(state.ReturnTunnel),
	}
	hidden := bpf.ServiceDSR
	if s.Flags&bpf.ServiceHostPort != 0 {
		hidden |= bpf.ServiceExternalLocal // no traffic policy: a hostPort is of one node
	}
	info.Flags = object.ServiceFlagNames(s.Flags &^ hidden)
	if s.Flags&bpf.ServiceDSR != 0 {
		info.Return = string(state.ReturnDSR)
	}
	scopes := map[netip.AddrPort][]string{}
	for scope, name := range []string{bpf.ScopeExternal: "external", bpf.ScopeInternal: "internal"} {
		missing := 0
		for slot := range s.Count[scope] {
			b, ok := slots[bpf.BackendKey{List: s.List[scope], Slot: slot}]
			if !ok {
				missing++
			} else if !slices.Contains(scopes[b], name) {
				scopes[b] = append(scopes[b], name)
			}
		}
		info.Missing = max(info.Missing, missing)
	}
	for b, in := range scopes {
		info.Backends = append(info.Backends, backendInfo{Address: b, Pod: names.Pod(b.Addr()), Scopes: in})
	}
	slices.SortFunc(info.Backends, func(a, b backendInfo) int { return a.Address.Compare(b.Address) })
	return info
}

// addSources fills in the source ranges of the frontends that have SERVICE_SOURCE_RANGES. sources may be nil.
func addSources(list []serviceInfo, sources *ebpf.Map) error {
	if sources == nil {
		return nil
	}
	ranges := map[uint32][]netip.Prefix{}
	err := flow.Entries(sources, func(k bpf.SourceRangeKey, _ uint32) bool {
		if p, err := k.Prefix(); err == nil {
			ranges[k.ServiceId] = append(ranges[k.ServiceId], p)
		}
		return true
	})
	for i := range list {
		if slices.Contains(list[i].Flags, sourceRangesFlag) {
			list[i].SourceRanges = slices.SortedFunc(slices.Values(ranges[list[i].ID]), netip.Prefix.Compare)
		}
	}
	return err
}

// sourceRangesFlag is the name of SERVICE_SOURCE_RANGES.
const sourceRangesFlag = "source_ranges"

// balance is how backends are chosen, in a table.
func (s serviceInfo) balance() string {
	if s.AffinitySeconds == 0 {
		return s.Balancing
	}
	return fmt.Sprintf("%s, affinity %ds", s.Balancing, s.AffinitySeconds)
}

// locate fills in where the backends are.
func (s *serviceInfo) locate(at *places) error {
	for i := range s.Backends {
		b := &s.Backends[i]
		where, err := at.of(b.Address.Addr())
		if err != nil {
			return err
		}
		b.Location, b.Node = where.location, where.node
	}
	return nil
}

// text is the backend in a table: pod and port or the address, and of a remote one its node.
func (b backendInfo) text(protocol string) string {
	name := end(protocol, b.Address, b.Pod)
	switch {
	case b.Node.IsValid():
		return name + "@" + b.Node.String()
	case b.Location == placeRemote:
		return name + "@" + placeRemote
	}
	return name
}

func (l serviceList) print(w io.Writer) {
	if len(l.Services) == 0 {
		fmt.Fprintln(w, "no services: margay-agent has not written any")
		return
	}
	t := newTable("NAME", "PROTO", "FRONTEND", "COUNT", "BACKENDS", "BALANCING", "RETURN", "FLAGS")
	for _, s := range l.Services {
		var ends []string
		for _, b := range s.Backends {
			if l.numeric {
				b.Pod = ""
			}
			ends = append(ends, b.text(s.Protocol))
		}
		flags := slices.Clone(s.Flags)
		if i := slices.Index(flags, sourceRangesFlag); i >= 0 {
			flags[i] = "only from " + s.sources()
		}
		if s.NodePort {
			flags = append([]string{"nodeport"}, flags...)
		}
		if s.Missing > 0 {
			flags = append(flags, fmt.Sprintf("%d missing", s.Missing))
		}
		name := cmp.Or(s.Name, fmt.Sprintf("service %d", s.ID))
		t.add(name, s.Protocol, s.Frontend.String(), s.counts(), dash(shorten(ends, 3)), s.balance(), s.Return, dash(strings.Join(flags, ",")))
	}
	t.print(w)
}

// sources names the source ranges in a table.
func (s serviceInfo) sources() string {
	var text []string
	for _, p := range s.SourceRanges {
		text = append(text, p.String())
	}
	return cmp.Or(shorten(text, 3), "nowhere")
}

// counts says how many backends there are, by scope where the scopes differ.
func (s serviceInfo) counts() string {
	var internal, external int
	same := true
	for _, b := range s.Backends {
		in, out := slices.Contains(b.Scopes, "internal"), slices.Contains(b.Scopes, "external")
		if in {
			internal++
		}
		if out {
			external++
		}
		same = same && in == out
	}
	if same {
		return fmt.Sprint(internal)
	}
	return fmt.Sprintf("%d internal, %d external", internal, external)
}
