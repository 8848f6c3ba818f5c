// SPDX-License-Identifier: Apache-2.0

// Package service compiles services and endpoint slices into what the dataplane's maps hold: frontends, lists of backends, and the set of
// endpoints that still serve. It owns the choice of endpoints (traffic policies, topology hints, the fallback to terminating
// endpoints) and the numbers of service ports and lists, which stay the same from one compilation to the next so that a change
// writes little and a restart writes nothing.
//
// Rows named I, S, V and U are those of the kube-proxy contract in the design documents. The package knows no map, no kernel and no
// clock; one node's view is all it computes.
package service

import (
	"net/netip"

	"github.com/margay-cni/margay/pkg/state"
)

// MaxServiceID is the largest service id. The ids above, up to the end of the array of service epochs, belong to hostPorts, which the CNI
// plugin numbers (HOST_PORT_FIRST in bpf/types.h).
const MaxServiceID = 57343

// MaxList is the largest number of a list. The numbers above name the lists of hostPorts (HOST_PORT_LIST in bpf/types.h) and those that are
// found by service id (BACKEND_BY_HASH).
const MaxList = 0x7fff0000 - 1

// Scope says who asks; it indexes Service's two-element arrays as enum service_scope in bpf/types.h does.
type Scope int

// The scopes: packets from outside the node, and packets from a local pod or the node itself.
const (
	External Scope = 0
	Internal Scope = 1
)

// Frontend is where a service port is reached. Addr is never in IPv4-mapped form; the unspecified address of a family is a NodePort, on
// every NodePort address of the node in that family.
type Frontend struct {
	Addr     netip.Addr
	Port     uint16
	Protocol state.Protocol
}

// Service is what a frontend leads to. Arrays are indexed by Scope.
type Service struct {
	// ID belongs to one port of a service in one address family; all its frontends share it. From 1 to MaxServiceID.
	ID uint32
	// Lists are keys of Result.Lists, never 0, and Counts their lengths.
	Lists  [2]uint32
	Counts [2]uint32
	// DropEmpty says what an empty list means: true if the service has endpoints that this traffic may not use, so it is
	// dropped; false if it has none at all, so it is refused (row S5).
	DropEmpty [2]bool
	// ExternalLocal says that the frontend is an outside one under external traffic policy Local: no other node's backends for
	// clients outside.
	ExternalLocal bool
	// InternalLocal says that the frontend is a cluster address under internal traffic policy Local.
	InternalLocal bool
	// SourceRanges says that only sources in Result.SourceRanges may use the frontend.
	SourceRanges bool
	// Tables are the sizes of the lists' Maglev tables (Table.Size); 0 means that backends are chosen at random.
	Tables [2]uint8
	// DSR says that the backend's node answers clients outside itself, not through the node at which they asked.
	DSR bool
	// AffinitySeconds is the ClientIP affinity timeout; 0 means none.
	AffinitySeconds uint32
	// Name and PortName are for people.
	Name     state.Key
	PortName string
}

// Member is a backend of a service port.
type Member struct {
	Service uint32
	Backend netip.AddrPort
}

// Membership says which lists a serving endpoint is in: those that new connections are given backends from.
type Membership struct {
	Cluster, Local bool
}

// SourceRange is a prefix of sources that may use the load balancer addresses of a service port (row V10).
type SourceRange struct {
	Service uint32
	Prefix  netip.Prefix
}

// Problem is something that was asked for and is not served.
type Problem struct {
	Service state.Key
	Message string
}

// Result is one compilation. It is read-only, and shares unchanged lists with the results before it.
type Result struct {
	Frontends map[Frontend]Service
	// Lists hold the backends in slot order. A list in use may be empty. An unchanged list is the identical slice.
	Lists map[uint32][]netip.AddrPort
	// Tables are, by list, the Maglev tables of those whose service asks for one and that need one. An unchanged one is the identical slice.
	Tables map[uint32]Table
	// Serving holds every endpoint that serves, whatever the traffic policy and the topology say, so that flows outlive changes of
	// those (row U1). Members of lists are always in it: also endpoints that are published although they are not ready.
	Serving map[Member]Membership
	// LocalBackends are, by service id, the backends on this node that any node may choose, whatever the traffic policy and the
	// topology are there: what other nodes forward here is for one of them. Ready ones come first, each group sorted; never empty.
	LocalBackends map[uint32][]netip.AddrPort
	// HealthChecks are what load balancers may ask, sorted by service, IPv4 first (row H1).
	HealthChecks []state.HealthCheck
	// SourceRanges hold what may use the frontends with SourceRanges.
	SourceRanges map[SourceRange]struct{}
	// ClusterAddrs are the cluster addresses of all services. A port of theirs that is no frontend is nobody else's (row V9).
	ClusterAddrs map[netip.Addr]struct{}
	// Problems are sorted by service.
	Problems []Problem
}
