// SPDX-License-Identifier: Apache-2.0

package service

import (
	"net/netip"

	"github.com/margay-cni/margay/pkg/state"
)

// addHealthChecks adds what load balancers may ask about a service: one answer for each family that the service takes part in. Only
// where the external traffic policy is Local does a node without endpoints have to be avoided.
func (r *run) addHealthChecks(svc *state.Service) {
	if svc.Type != state.LoadBalancer || !svc.ExternalLocal || svc.HealthCheckNodePort == 0 {
		return
	}
	for _, ipv6 := range []bool{false, true} {
		if len(ofFamily(svc.ClusterIPs, ipv6)) == 0 {
			continue
		}
		r.result.HealthChecks = append(r.result.HealthChecks, state.HealthCheck{
			Service: svc.Key, IPv6: ipv6, Port: svc.HealthCheckNodePort, LocalEndpoints: r.localReady(svc, ipv6),
		})
	}
}

// localReady counts the ready endpoints on this node by address, whatever port they serve.
func (r *run) localReady(svc *state.Service, ipv6 bool) int {
	ready := map[netip.Addr]bool{}
	for _, port := range svc.Ports {
		for _, e := range mergeEndpoints(r.slices[svc.Key], port, ipv6, r.compiler.node) {
			if e.local && e.Ready {
				ready[e.backend.Addr()] = true
			}
		}
	}
	return len(ready)
}
