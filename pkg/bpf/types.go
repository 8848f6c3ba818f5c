// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"encoding/binary"
	"net/netip"

	"github.com/margay-cni/margay/pkg/addr"
)

// The types of bpf/types.h. Fields named Port, Sport and Dport are in network byte order: use the constructors and methods here.
type (
	Addr           = dpAddr
	FlowKey        = dpFlowKey
	Flow           = dpFlow
	Endpoint       = dpEndpoint
	PendingKey     = dpPendingKey
	Pending        = dpPending
	IPCacheKey     = dpIpcacheKey
	IPCacheEntry   = dpIpcacheEntry
	FrontendKey    = dpFrontendKey
	Service        = dpService
	BackendKey     = dpBackendKey
	Backend        = dpBackend
	ServiceBackend = dpServiceBackend
	AffinityKey    = dpAffinityKey
	Affinity       = dpAffinity
	MaglevKey      = dpMaglevKey
	MaglevChunk    = dpMaglevChunk
	SourceRangeKey = dpSourceRangeKey
	ServiceAddrKey = dpServiceAddrKey
	PolicyKey      = dpPolicyKey
	PolicyEntry    = dpPolicyEntry
	Counter        = dpCounter
	NodeState      = dpNodeState
	Node           = dpNode
	RouteKey       = dpRouteKey
	Route          = dpRoute
	EgressAddrs    = dpEgressAddrs
	Event          = dpEvent
	Sweep          = dpSweep
)

// Policy directions, index of PolicyId arrays.
const (
	Egress  = uint32(dpDirectionEGRESS)
	Ingress = uint32(dpDirectionINGRESS)
)

// Identities with a fixed meaning; the agent allocates from IdentityFirst.
const (
	IdentityWorld      = uint32(dpIdentityIDENTITY_WORLD)
	IdentityHost       = uint32(dpIdentityIDENTITY_HOST)
	IdentityRemoteNode = uint32(dpIdentityIDENTITY_REMOTE_NODE)
	IdentityPodUnknown = uint32(dpIdentityIDENTITY_POD_UNKNOWN)
	IdentityFirst      = uint32(dpIdentityIDENTITY_FIRST)
	IdentityAny        = uint32(dpIdentityIDENTITY_ANY)
)

// Policy ids with a fixed meaning; the agent allocates from PolicyFirst.
const (
	PolicyNone     = uint32(dpPolicyIdPOLICY_NONE)
	PolicyNodeOnly = uint32(dpPolicyIdPOLICY_NODE_ONLY)
	PolicyFirst    = uint32(dpPolicyIdPOLICY_FIRST)
)

// Flags and values of the map entries; bpf/types.h says what each means.
const (
	EndpointAdopted = uint32(dpEndpointFlagsENDPOINT_ADOPTED)
	EndpointPending = uint32(dpEndpointFlagsENDPOINT_PENDING)

	PendingPod        = uint32(dpPendingFlagsPENDING_POD)
	PendingOpen       = uint32(dpPendingFlagsPENDING_OPEN)
	PendingRestricted = uint32(dpPendingFlagsPENDING_RESTRICTED)

	NodeAddrLocal    = uint32(dpNodeAddrFlagsNODE_ADDR_LOCAL)
	NodeAddrNodePort = uint32(dpNodeAddrFlagsNODE_ADDR_NODEPORT)
	NodeAddrRemote   = uint32(dpNodeAddrFlagsNODE_ADDR_REMOTE)
	NodeAddrOverlay  = uint32(dpNodeAddrFlagsNODE_ADDR_OVERLAY)
	// NodeAddrIndexShift is where a node_addrs value has the other node's index of the map nodes.
	NodeAddrIndexShift = 16

	NodeOnLink = uint16(dpNodeTunnelFlagsNODE_ON_LINK)

	RouteOverlay      = uint16(dpRouteFlagsROUTE_OVERLAY)
	RouteLocal        = uint16(dpRouteFlagsROUTE_LOCAL)
	RouteNoMasquerade = uint16(dpRouteFlagsROUTE_NO_MASQUERADE)

	VNIPods      = uint32(dpOverlayVniVNI_PODS)
	VNIForwarded = uint32(dpOverlayVniVNI_FORWARDED)
	VNIDSR       = uint32(dpOverlayVniVNI_DSR)

	BackendByHash = uint32(dpBackendListBACKEND_BY_HASH)

	// HostPortFirst to HostPortLast are the service ids of hostPorts, and HostPortList + id their lists: the plugin's, never the agent's.
	HostPortFirst = uint32(dpHostPortNumbersHOST_PORT_FIRST)
	HostPortLast  = uint32(65535)
	HostPortList  = uint32(dpHostPortNumbersHOST_PORT_LIST)

	EpochSlotOutside = uint32(dpEpochSlotsEPOCH_SLOT_OUTSIDE)
	EpochSlotRoutes  = uint32(dpEpochSlotsEPOCH_SLOT_ROUTES)

	NodeVerdictEvents = uint32(dpNodeFlagsNODE_VERDICT_EVENTS)
	NodeMasquerade    = uint32(dpNodeFlagsNODE_MASQUERADE)
	NodeLocalhostIPv4 = uint32(dpNodeFlagsNODE_LOCALHOST_IPV4)
	NodeLocalhostIPv6 = uint32(dpNodeFlagsNODE_LOCALHOST_IPV6)

	ScopeExternal = uint32(dpServiceScopeSCOPE_EXTERNAL)
	ScopeInternal = uint32(dpServiceScopeSCOPE_INTERNAL)

	ServiceDropExternal  = uint32(dpServiceFlagsSERVICE_DROP_EXTERNAL)
	ServiceDropInternal  = uint32(dpServiceFlagsSERVICE_DROP_INTERNAL)
	ServiceExternalLocal = uint32(dpServiceFlagsSERVICE_EXTERNAL_LOCAL)
	ServiceDSR           = uint32(dpServiceFlagsSERVICE_DSR)
	ServiceHostPort      = uint32(dpServiceFlagsSERVICE_HOST_PORT)
	ServiceInternalLocal = uint32(dpServiceFlagsSERVICE_INTERNAL_LOCAL)
	ServiceSourceRanges  = uint32(dpServiceFlagsSERVICE_SOURCE_RANGES)

	ServiceBackendServing = uint32(dpServiceBackendFlagsSERVICE_BACKEND_SERVING)
	ServiceBackendCluster = uint32(dpServiceBackendFlagsSERVICE_BACKEND_CLUSTER)
	ServiceBackendLocal   = uint32(dpServiceBackendFlagsSERVICE_BACKEND_LOCAL)

	ServiceAddrRange  = uint32(dpServiceAddrSERVICE_ADDR_RANGE)
	ServiceAddrActive = uint32(dpServiceAddrSERVICE_ADDR_ACTIVE)

	PolicyPrefixBase  = uint32(dpPolicyPrefixPOLICY_PREFIX_BASE)
	PolicyPrefixProto = uint32(dpPolicyPrefixPOLICY_PREFIX_PROTO)
	PolicyPrefixPort  = uint32(dpPolicyPrefixPOLICY_PREFIX_PORT)

	VerdictAllow = uint32(dpPolicyVerdictVERDICT_ALLOW)
	VerdictDeny  = uint32(dpPolicyVerdictVERDICT_DENY)

	PolicyEntryCluster = uint32(dpPolicyEntryFlagsPOLICY_ENTRY_CLUSTER)

	FlowToStack    = uint8(dpFlowActionFLOW_TO_STACK)
	FlowToPod      = uint8(dpFlowActionFLOW_TO_POD)
	FlowToNetdev   = uint8(dpFlowActionFLOW_TO_NETDEV)
	FlowToNode     = uint8(dpFlowActionFLOW_TO_NODE)
	FlowIntoNetdev = uint8(dpFlowActionFLOW_INTO_NETDEV)
	FlowToHost     = uint8(dpFlowActionFLOW_TO_HOST)

	FlowReply         = uint16(dpFlowFlagsFLOW_REPLY)
	FlowNAT           = uint16(dpFlowFlagsFLOW_NAT)
	FlowDenied        = uint16(dpFlowFlagsFLOW_DENIED)
	FlowInPod         = uint16(dpFlowFlagsFLOW_IN_POD)
	FlowService       = uint16(dpFlowFlagsFLOW_SERVICE)
	FlowViaStack      = uint16(dpFlowFlagsFLOW_VIA_STACK)
	FlowFromHost      = uint16(dpFlowFlagsFLOW_FROM_HOST)
	FlowDeniedIngress = uint16(dpFlowFlagsFLOW_DENIED_INGRESS)
	FlowInNode        = uint16(dpFlowFlagsFLOW_IN_NODE)
	FlowInOverlay     = uint16(dpFlowFlagsFLOW_IN_OVERLAY)
	FlowMasquerade    = uint16(dpFlowFlagsFLOW_MASQUERADE)
	FlowForwarded     = uint16(dpFlowFlagsFLOW_FORWARDED)
	FlowDSR           = uint16(dpFlowFlagsFLOW_DSR)
	FlowViaHost       = uint16(dpFlowFlagsFLOW_VIA_HOST)
	FlowToMAC         = uint16(dpFlowFlagsFLOW_TO_MAC)

	FlowTCPSyn         = uint8(dpFlowTcpFLOW_TCP_SYN)
	FlowTCPFin         = uint8(dpFlowTcpFLOW_TCP_FIN)
	FlowTCPRst         = uint8(dpFlowTcpFLOW_TCP_RST)
	FlowTCPEstablished = uint8(dpFlowTcpFLOW_TCP_ESTABLISHED)
	FlowTCPQueued      = uint8(dpFlowTcpFLOW_TCP_QUEUED)
	FlowTCPQueuedTick  = uint8(dpFlowTcpFLOW_TCP_QUEUED_TICK)

	EventDrop    = uint8(dpEventTypeEVENT_DROP)
	EventVerdict = uint8(dpEventTypeEVENT_VERDICT)
)

// NewAddr returns the map form of a.
func NewAddr(a netip.Addr) Addr {
	return Addr{B: addr.As16(a)}
}

// Netip returns a as net/netip knows it; an IPv4-mapped address comes back as IPv4.
func (a dpAddr) Netip() netip.Addr {
	return addr.From16(a.B)
}

// Port16 converts a port between the byte order of the machine and the network's; it is its own inverse.
func Port16(p uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], p)
	return binary.NativeEndian.Uint16(b[:])
}

// NewFlowKey returns the key of packets from src to dst. For ICMP echo both ports are the identifier.
func NewFlowKey(proto uint8, src, dst netip.AddrPort) FlowKey {
	return FlowKey{
		Src: NewAddr(src.Addr()), Sport: Port16(src.Port()),
		Dst: NewAddr(dst.Addr()), Dport: Port16(dst.Port()),
		Proto: proto,
	}
}

// Source returns where the key's packets come from.
func (k dpFlowKey) Source() netip.AddrPort {
	return netip.AddrPortFrom(k.Src.Netip(), Port16(k.Sport))
}

// Destination returns where the key's packets go.
func (k dpFlowKey) Destination() netip.AddrPort {
	return netip.AddrPortFrom(k.Dst.Netip(), Port16(k.Dport))
}

// Reverse returns the key of the answering packets.
func (k dpFlowKey) Reverse() FlowKey {
	k.Src, k.Dst, k.Sport, k.Dport = k.Dst, k.Src, k.Dport, k.Sport
	return k
}

// NewFrontendKey returns the key of a service address. The zero netip.Addr stands for a NodePort on every NodePort address.
func NewFrontendKey(proto uint8, a netip.Addr, port uint16) FrontendKey {
	k := FrontendKey{Port: Port16(port), Proto: proto}
	if a.IsValid() {
		k.Addr = NewAddr(a)
	}
	return k
}

// NewBackend returns the value of one backend.
func NewBackend(ap netip.AddrPort) Backend {
	return Backend{Addr: NewAddr(ap.Addr()), Port: Port16(ap.Port())}
}

// AddrPort returns where the backend listens.
func (b dpBackend) AddrPort() netip.AddrPort {
	return netip.AddrPortFrom(b.Addr.Netip(), Port16(b.Port))
}

// NewServiceBackend returns the member of the set of backends that still serve.
func NewServiceBackend(service uint32, ap netip.AddrPort) ServiceBackend {
	return ServiceBackend{ServiceId: service, Addr: NewAddr(ap.Addr()), Port: Port16(ap.Port())}
}

// AddrPort returns where the backend listens.
func (m dpServiceBackend) AddrPort() netip.AddrPort {
	return netip.AddrPortFrom(m.Addr.Netip(), Port16(m.Port))
}

// BackendHash is the slot of a backend in its service's BackendByHash list; lib/lb.h computes the same. Never 0.
func BackendHash(ap netip.AddrPort) uint32 {
	b := addr.As16(ap.Addr())
	h := uint32(Port16(ap.Port()))
	for i := 0; i < len(b); i += 4 {
		h = (h ^ binary.NativeEndian.Uint32(b[i:])) * 0x9e3779b1
	}
	return max(h>>16, 1)
}

// MaglevSlots is how many positions of a Maglev table one MaglevChunk holds.
const MaglevSlots = len(MaglevChunk{}.Slot)

// MaglevHash is the number by which a flow finds its position in a Maglev table, which is hash * size >> 32; lib/maglev.h computes the same.
// byClient leaves out all but the client's address, as for services with session affinity.
func MaglevHash(k FlowKey, byClient bool) uint32 {
	h := uint32(0)
	mix := func(word uint32) {
		h = (h ^ word) * 0x9e3779b1
		h ^= h >> 15
	}
	for i := 0; i < len(k.Src.B); i += 4 {
		mix(binary.NativeEndian.Uint32(k.Src.B[i:]))
	}
	if !byClient {
		mix(uint32(k.Sport) | uint32(k.Dport)<<16)
		mix(uint32(k.Proto))
	}
	h *= 0x85ebca6b
	h ^= h >> 13
	h *= 0xc2b2ae35
	return h ^ h>>16
}

// NewAffinityKey returns the key of a client's affinity to a service port.
func NewAffinityKey(client netip.Addr, service uint32) AffinityKey {
	return AffinityKey{Client: NewAddr(client), ServiceId: service}
}

// AddrPort returns the backend that the client has.
func (a dpAffinity) AddrPort() netip.AddrPort {
	return netip.AddrPortFrom(a.Addr.Netip(), Port16(a.Port))
}

// NewSourceRangeKey returns the LPM key of a prefix that may use the load balancer addresses of a service port.
func NewSourceRangeKey(service uint32, p netip.Prefix) SourceRangeKey {
	b, bits := addr.MapPrefix(p)
	return SourceRangeKey{Prefixlen: 32 + uint32(bits), ServiceId: service, Addr: Addr{B: b}}
}

// Prefix returns the prefix that the key stands for.
func (k dpSourceRangeKey) Prefix() (netip.Prefix, error) {
	return addr.UnmapPrefix(k.Addr.B, int(k.Prefixlen)-32)
}

// NewServiceAddrKey returns the LPM key of p.
func NewServiceAddrKey(p netip.Prefix) ServiceAddrKey {
	b, bits := addr.MapPrefix(p)
	return ServiceAddrKey{Prefixlen: uint32(bits), Addr: Addr{B: b}}
}

// Prefix returns the prefix that the key stands for.
func (k dpServiceAddrKey) Prefix() (netip.Prefix, error) {
	return addr.UnmapPrefix(k.Addr.B, int(k.Prefixlen))
}

// NewRouteKey returns the LPM key of p.
func NewRouteKey(p netip.Prefix) RouteKey {
	b, bits := addr.MapPrefix(p)
	return RouteKey{Prefixlen: uint32(bits), Addr: Addr{B: b}}
}

// Prefix returns the prefix that the key stands for.
func (k dpRouteKey) Prefix() (netip.Prefix, error) {
	return addr.UnmapPrefix(k.Addr.B, int(k.Prefixlen))
}

// NewIPCacheKey returns the LPM key of p.
func NewIPCacheKey(p netip.Prefix) IPCacheKey {
	b, bits := addr.MapPrefix(p)
	return IPCacheKey{Prefixlen: uint32(bits), Addr: Addr{B: b}}
}

// Prefix returns the prefix that the key stands for.
func (k dpIpcacheKey) Prefix() (netip.Prefix, error) {
	return addr.UnmapPrefix(k.Addr.B, int(k.Prefixlen))
}
