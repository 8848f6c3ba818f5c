// SPDX-License-Identifier: Apache-2.0

package state

// HealthCheck is what a load balancer outside the cluster may ask of this node about one service in one address family (row H1).
type HealthCheck struct {
	Service Key
	IPv6    bool
	// Port is spec.healthCheckNodePort.
	Port uint16
	// LocalEndpoints are the addresses of ready endpoints on this node, each counted once. Terminating ones do not count: traffic that
	// still reaches them is served, but nobody should send more.
	LocalEndpoints int
}
