// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/margay-cni/margay/pkg/endpoint"
)

// portMapping is one entry of the portMappings capability.
type portMapping struct {
	HostPort      int    `json:"hostPort"`
	ContainerPort int    `json:"containerPort"`
	Protocol      string `json:"protocol"`
	HostIP        string `json:"hostIP"`
}

// portMappings returns what the runtime asked for, or everything that is wrong in it.
func (c *NetConf) portMappings() ([]portMapping, error) {
	if len(c.RuntimeConfig.PortMappings) == 0 {
		return nil, nil
	}
	var mappings []portMapping
	if err := json.Unmarshal(c.RuntimeConfig.PortMappings, &mappings); err != nil {
		return nil, fmt.Errorf("runtimeConfig.portMappings: %w", err)
	}
	var faults []error
	for i, m := range mappings {
		if _, err := m.hosts(nil); err != nil {
			faults = append(faults, fmt.Errorf("runtimeConfig.portMappings[%d]: %w", i, err))
		}
	}
	return mappings, errors.Join(faults...)
}

// protocol returns the name that records use.
func (m portMapping) protocol() string {
	if m.Protocol == "" {
		return "tcp"
	}
	return strings.ToLower(m.Protocol)
}

// hosts returns where on the node the mapping is reached: at the given address, or, in each family that the pod has, at all of them.
func (m portMapping) hosts(pod []netip.Addr) ([]netip.Addr, error) {
	for what, port := range map[string]int{"hostPort": m.HostPort, "containerPort": m.ContainerPort} {
		if port < 1 || port > 65535 {
			return nil, fmt.Errorf("%s %d is no port", what, port)
		}
	}
	if (endpoint.HostPort{Protocol: m.protocol()}).ProtocolNumber() == 0 {
		return nil, fmt.Errorf("protocol %q is none of tcp, udp, sctp", m.Protocol)
	}
	if m.HostIP != "" {
		a, err := netip.ParseAddr(m.HostIP)
		if err != nil || a.Zone() != "" || a.IsMulticast() || a.IsLinkLocalUnicast() {
			return nil, fmt.Errorf("hostIP %q is no address that a port can be served on", m.HostIP)
		}
		return []netip.Addr{a.Unmap()}, nil
	}
	var hosts []netip.Addr
	for _, all := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		if ofFamily(pod, all).IsValid() {
			hosts = append(hosts, all)
		}
	}
	return hosts, nil
}

// ofFamily returns the first of the addresses that is of the same family as a, or the zero Addr.
func ofFamily(addresses []netip.Addr, a netip.Addr) netip.Addr {
	for _, b := range addresses {
		if b.Unmap().Is4() == a.Is4() {
			return b.Unmap()
		}
	}
	return netip.Addr{}
}

// hostPorts turns the mappings into frontends of a pod with these addresses, without ids.
func (c *NetConf) hostPorts(pod []netip.Addr) ([]endpoint.HostPort, error) {
	mappings, err := c.portMappings()
	if err != nil {
		return nil, err
	}
	var out []endpoint.HostPort
	for _, m := range mappings {
		hosts, err := m.hosts(pod)
		if err != nil {
			return nil, err
		}
		for _, a := range hosts {
			to := ofFamily(pod, a)
			if !to.IsValid() {
				return nil, fmt.Errorf("hostIP %s: the pod has no address of that family", a)
			}
			p := endpoint.HostPort{
				Protocol: m.protocol(),
				Host:     netip.AddrPortFrom(a, uint16(m.HostPort)),
				Pod:      netip.AddrPortFrom(to, uint16(m.ContainerPort)),
			}
			switch i := slices.IndexFunc(out, p.SameFrontend); {
			case i < 0:
				out = append(out, p)
			case out[i] != p:
				return nil, fmt.Errorf("hostPort %s leads to two ports of the pod: %d and %d", p, out[i].Pod.Port(), p.Pod.Port())
			}
		}
	}
	return out, nil
}
