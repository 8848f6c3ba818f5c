// SPDX-License-Identifier: Apache-2.0

// Package state is the snapshot of the cluster that every source (Kubernetes API, a directory of manifests, the node's own endpoint
// records) fills and every compiler reads. The objects are trimmed to what Margay uses, immutable once in a snapshot, and know nothing
// of how they were read or of how they reach the kernel.
package state

import (
	"fmt"
	"net/netip"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
)

// Key names a namespaced object.
type Key struct {
	Namespace string
	Name      string
}

func (k Key) String() string {
	return k.Namespace + "/" + k.Name
}

// Protocol is an IANA protocol number, as the maps hold it.
type Protocol uint8

// The transport protocols that services and policies name.
const (
	TCP  Protocol = 6
	UDP  Protocol = 17
	SCTP Protocol = 132
)

func (p Protocol) String() string {
	switch p {
	case TCP:
		return "TCP"
	case UDP:
		return "UDP"
	case SCTP:
		return "SCTP"
	case 1:
		return "ICMP"
	case 58:
		return "ICMPv6"
	}
	return fmt.Sprintf("protocol-%d", uint8(p))
}

// Snapshot is one consistent view. Treat it as read-only: a source publishes a new one for each change and may share objects
// between snapshots.
type Snapshot struct {
	Namespaces      map[string]*Namespace
	Pods            map[Key]*Pod
	Services        map[Key]*Service
	EndpointSlices  map[Key]*EndpointSlice
	NetworkPolicies map[Key]*NetworkPolicy
	// ClusterNetworkPolicies are in no namespace: they are keyed by name.
	ClusterNetworkPolicies map[string]*ClusterNetworkPolicy
	Nodes                  map[string]*Node
	// ServiceCIDRs may be empty although cluster addresses come from somewhere: not every source knows.
	ServiceCIDRs map[string]*ServiceCIDR
	// KnowsAllPods says that the source knows every pod of this node, as the API server does: one that it does not name is not known yet, or
	// is gone, and nothing can be said of its labels.
	KnowsAllPods bool
	// Journals tell what has changed since earlier snapshots of the same source. A source need not keep any.
	Journals Journals
}

// NewSnapshot returns an empty snapshot whose maps may be written.
func NewSnapshot() *Snapshot {
	return &Snapshot{
		Namespaces:             map[string]*Namespace{},
		Pods:                   map[Key]*Pod{},
		Services:               map[Key]*Service{},
		EndpointSlices:         map[Key]*EndpointSlice{},
		NetworkPolicies:        map[Key]*NetworkPolicy{},
		ClusterNetworkPolicies: map[string]*ClusterNetworkPolicy{},
		Nodes:                  map[string]*Node{},
		ServiceCIDRs:           map[string]*ServiceCIDR{},
	}
}

// Namespace is a namespace's labels. The label kubernetes.io/metadata.name is always present: the source adds it where there is no
// API server to do so (contract row N5).
type Namespace struct {
	Name   string
	Labels map[string]string
}

// Pod is what policies and services need of a pod.
type Pod struct {
	Key
	UID    string
	Labels map[string]string
	// IPs may be empty for a pod that is scheduled but not started.
	IPs []netip.Addr
	// Node is spec.nodeName; Local says whether that is this node.
	Node  string
	Local bool
	// HostNetwork pods have the node's addresses and are neither policy subject nor pod peer (contract row N11).
	HostNetwork bool
	// Finished pods (Succeeded or Failed) have given their addresses back.
	Finished    bool
	Ready       bool
	Terminating bool
	// Ports are the containers' named and unnamed ports.
	Ports []ContainerPort
}

// ContainerPort is one declared port of a container.
type ContainerPort struct {
	Name     string
	Protocol Protocol
	Port     uint16
}

// NetworkPolicy is a networking.k8s.io/v1 NetworkPolicy, defaults applied (policyTypes set).
type NetworkPolicy struct {
	Key
	Spec networkingv1.NetworkPolicySpec
}

// ServiceType is spec.type.
type ServiceType string

// The service types that have frontends.
const (
	ClusterIP    ServiceType = "ClusterIP"
	NodePort     ServiceType = "NodePort"
	LoadBalancer ServiceType = "LoadBalancer"
)

// ServiceReturn is the way that the answers of a backend on another node take to a client outside the cluster.
type ServiceReturn string

// The ways back: through the node at which the client's packet arrived, or from the backend's node directly.
const (
	ReturnTunnel ServiceReturn = "tunnel"
	ReturnDSR    ServiceReturn = "dsr"
)

// Known reports whether r is one of the ways above.
func (r ServiceReturn) Known() bool {
	return r == ReturnTunnel || r == ReturnDSR
}

// LoadBalancing is how a backend is chosen for a new flow.
type LoadBalancing string

// The ways of choosing: at random, or by a hash of the flow that is the same on every node.
const (
	BalanceRandom LoadBalancing = "random"
	BalanceMaglev LoadBalancing = "maglev"
)

// Known reports whether b is one of the ways above.
func (b LoadBalancing) Known() bool {
	return b == BalanceRandom || b == BalanceMaglev
}

// Service is a service that takes part in load balancing: not headless, not ExternalName, not another proxy's (contract rows I1, I2).
type Service struct {
	Key
	Type        ServiceType
	ClusterIPs  []netip.Addr
	ExternalIPs []netip.Addr
	// LoadBalancerIPs are status.loadBalancer.ingress[].ip with ipMode VIP (row V3).
	LoadBalancerIPs []netip.Addr
	// LoadBalancerSourceRanges limit who may use LoadBalancerIPs, and nothing else (row V10).
	LoadBalancerSourceRanges []netip.Prefix
	Ports                    []ServicePort
	// Selector is used only where no EndpointSlice controller runs: the manifest source makes slices from it.
	Selector map[string]string
	// InternalLocal and ExternalLocal say that the traffic policy is Local.
	InternalLocal bool
	ExternalLocal bool
	// Return is the annotation margay.io/service-return; empty: the agent's default. What is not Known is kept for the compiler to report.
	Return ServiceReturn
	// Balancing is the annotation margay.io/load-balancing, as Return is its own.
	Balancing LoadBalancing
	// AffinitySeconds is the ClientIP affinity timeout; 0 means none.
	AffinitySeconds uint32
	// PublishNotReady is spec.publishNotReadyAddresses.
	PublishNotReady bool
	// HealthCheckNodePort is spec.healthCheckNodePort; 0: none. It means something only for type LoadBalancer with ExternalLocal.
	HealthCheckNodePort uint16
}

// ServicePort is one port of a service. Slices are joined by (Name, Protocol), never by number (row I5).
type ServicePort struct {
	Name     string
	Protocol Protocol
	Port     uint16
	NodePort uint16
	// TargetPort and TargetName are used only where slices are made from the selector. Both empty means Port.
	TargetPort uint16
	TargetName string
}

// EndpointSlice is a discovery.k8s.io/v1 EndpointSlice of one address family.
type EndpointSlice struct {
	Key
	Service   Key
	IPv6      bool
	Endpoints []Endpoint
	Ports     []SlicePort
	// Triggered is when what the slice was last written for happened, by the clock of whoever wrote it; zero if unknown.
	Triggered time.Time
}

// SlicePort is a port of every endpoint in the slice; slices without a port number are dropped by the source (row I6).
type SlicePort struct {
	Name     string
	Protocol Protocol
	Port     uint16
}

// Endpoint is one endpoint of a slice, condition defaults applied (row I8).
type Endpoint struct {
	Addr        netip.Addr
	Node        string
	Zone        string
	Ready       bool
	Serving     bool
	Terminating bool
	// ForZones and ForNodes are topology hints (row S4).
	ForZones []string
	ForNodes []string
}

// Node is a cluster node.
type Node struct {
	Name   string
	Labels map[string]string
	// Addresses are the InternalIPs, primary first.
	Addresses []netip.Addr
	// AllAddresses are the IP addresses in status.addresses, whatever their type, in their order (contract row C4).
	AllAddresses []netip.Addr
	PodCIDRs     []netip.Prefix
	// Leaving says that the node is being deleted, or is marked for it by the cluster autoscaler (row H2).
	Leaving bool
}

// ServiceCIDR is a networking.k8s.io/v1 ServiceCIDR: ranges that cluster addresses are taken from (contract rows I11, V9).
type ServiceCIDR struct {
	Name     string
	Prefixes []netip.Prefix
}
