// SPDX-License-Identifier: Apache-2.0

package state

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// WithSelectorSlices returns s with the EndpointSlices that a cluster's controller would have made: for every service with a selector
// and without a slice of its own, one slice for each family of its cluster addresses and each outcome of resolving its target ports
// (a name may stand for different numbers in different pods). A service that has any slice, of either family, is left to its author.
//
// The names of these slices contain a slash, which no object's name does. s is not written to.
func WithSelectorSlices(s *Snapshot) *Snapshot {
	if !anySelector(s) {
		return s
	}
	written := make(map[Key]bool, len(s.EndpointSlices))
	for _, slice := range s.EndpointSlices {
		written[slice.Service] = true
	}
	var pods map[string][]*Pod
	added := map[Key]*EndpointSlice{}
	for key, service := range s.Services {
		if len(service.Selector) == 0 || written[key] {
			continue
		}
		if pods == nil {
			pods = podsByNamespace(s)
		}
		for _, ipv6 := range []bool{false, true} {
			if _, ok := addrOf(service.ClusterIPs, ipv6); ok {
				for _, slice := range selectorSlices(s, service, pods[key.Namespace], ipv6) {
					added[slice.Key] = slice
				}
			}
		}
	}
	if len(added) == 0 {
		return s
	}
	out := *s
	out.Journals.EndpointSlices = Journal[Key]{}
	out.EndpointSlices = maps.Clone(s.EndpointSlices)
	maps.Copy(out.EndpointSlices, added)
	return &out
}

func anySelector(s *Snapshot) bool {
	for _, service := range s.Services {
		if len(service.Selector) > 0 {
			return true
		}
	}
	return false
}

// podsByNamespace lists the pods that could be endpoints, by name.
func podsByNamespace(s *Snapshot) map[string][]*Pod {
	out := map[string][]*Pod{}
	for key, p := range s.Pods {
		if !p.Finished {
			out[key.Namespace] = append(out[key.Namespace], p)
		}
	}
	for _, pods := range out {
		slices.SortFunc(pods, func(a, b *Pod) int { return cmp.Compare(a.Name, b.Name) })
	}
	return out
}

func selectorSlices(s *Snapshot, service *Service, pods []*Pod, ipv6 bool) []*EndpointSlice {
	family := "ipv4"
	if ipv6 {
		family = "ipv6"
	}
	byPorts := map[string]*EndpointSlice{}
	for _, p := range pods {
		if !selects(service.Selector, p.Labels) {
			continue
		}
		a, ok := podAddr(s, p, ipv6)
		if !ok {
			continue
		}
		ports, id := resolvePorts(service.Ports, p)
		slice := byPorts[id]
		if slice == nil {
			name := fmt.Sprintf("%s/%s/%s", service.Name, family, id)
			slice = &EndpointSlice{
				Key:     Key{Namespace: service.Namespace, Name: name},
				Service: service.Key,
				IPv6:    ipv6,
				Ports:   ports,
			}
			byPorts[id] = slice
		}
		slice.Endpoints = append(slice.Endpoints, podEndpoint(s, service, p, a))
	}
	return slices.Collect(maps.Values(byPorts))
}

func selects(selector, labels map[string]string) bool {
	for k, v := range selector {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// podAddr returns the pod's address of a family. Pods on the host's network without a status have their node's.
func podAddr(s *Snapshot, p *Pod, ipv6 bool) (netip.Addr, bool) {
	if len(p.IPs) == 0 && p.HostNetwork {
		if node := s.Nodes[p.Node]; node != nil {
			return addrOf(node.Addresses, ipv6)
		}
	}
	return addrOf(p.IPs, ipv6)
}

// resolvePorts returns the service's ports as p serves them, and a text that is the same for pods that serve the same. A port whose
// name p does not declare is left out.
func resolvePorts(ports []ServicePort, p *Pod) ([]SlicePort, string) {
	var out []SlicePort
	var id strings.Builder
	for _, sp := range ports {
		number := sp.TargetPort
		if sp.TargetName != "" {
			number = namedPort(p, sp.TargetName, sp.Protocol)
		} else if number == 0 {
			number = sp.Port
		}
		if id.Len() > 0 {
			id.WriteByte('-')
		}
		fmt.Fprint(&id, number)
		if number != 0 {
			out = append(out, SlicePort{Name: sp.Name, Protocol: sp.Protocol, Port: number})
		}
	}
	return out, id.String()
}

func namedPort(p *Pod, name string, proto Protocol) uint16 {
	for _, c := range p.Ports {
		if c.Name == name && c.Protocol == proto {
			return c.Port
		}
	}
	return 0
}

func podEndpoint(s *Snapshot, service *Service, p *Pod, a netip.Addr) Endpoint {
	e := Endpoint{
		Addr:        a,
		Node:        p.Node,
		Ready:       service.PublishNotReady || (p.Ready && !p.Terminating),
		Serving:     p.Ready,
		Terminating: p.Terminating,
	}
	if node := s.Nodes[p.Node]; node != nil {
		e.Zone = node.Labels[corev1.LabelTopologyZone]
	}
	return e
}
