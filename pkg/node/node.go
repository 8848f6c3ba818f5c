// SPDX-License-Identifier: Apache-2.0

// Package node compiles Node objects and facts about this machine into what one node needs to reach the others: numbers of the nodes,
// where each prefix is, which addresses are nodes', the kernel routes of the host's own traffic, and whether there is an overlay device
// and with what MTU. It owns the choice between overlay and underlay (Mode), the addresses that a tunnel runs between, and who has a
// prefix or an address that two nodes claim; every node comes to the same answer from the same objects.
//
// It knows no map, no kernel and no clock. A Compiler belongs to one goroutine.
package node

import (
	"fmt"
	"net/netip"

	"github.com/margay-cni/margay/pkg/state"
)

// Mode says how packets to other nodes' pods travel.
type Mode string

// The routing modes.
const (
	// VXLAN encapsulates everything between pods of two nodes, and from a pod to another node.
	VXLAN Mode = "vxlan"
	// Direct leaves it to the underlay, which must know the pod ranges; between nodes on one network the routes are installed.
	Direct Mode = "direct"
	// Auto is Direct between nodes on one network and VXLAN beyond, for each address family by itself.
	Auto Mode = "auto"
)

// ParseMode returns the mode of that name.
func ParseMode(s string) (Mode, error) {
	switch m := Mode(s); m {
	case VXLAN, Direct, Auto:
		return m, nil
	}
	return "", fmt.Errorf("routing mode %q: want %s, %s or %s", s, VXLAN, Direct, Auto)
}

// What VXLAN adds to a packet, in bytes: outer IP, UDP and VXLAN headers, and the inner Ethernet header.
const (
	Overhead4 = 20 + 8 + 8 + 14
	Overhead6 = 40 + 8 + 8 + 14
)

// MaxIndex is the largest node number that the maps can name: they have 16 bits for it.
const MaxIndex = 1<<16 - 1

// Device is a network device that this node is reached by.
type Device struct {
	Index int
	Name  string
	MTU   int // bytes
	// DefaultRoute says that a default route leaves by it.
	DefaultRoute bool
	// Addresses are its global addresses with the length of the network they are on, in the kernel's order.
	Addresses []netip.Prefix
	// Usable are those of them that new connections may start from: not deprecated, tentative or temporary.
	Usable []netip.Addr
}

// Machine is what the compiler is told about this machine.
type Machine struct {
	// Devices that the node is reached by.
	Devices []Device
	// Addresses are all of the machine's own, on whatever device.
	Addresses []netip.Addr
}

// Input is what one compilation reads.
type Input struct {
	Snapshot *state.Snapshot
	Machine  Machine
	// Hold says that the snapshot is incomplete: nodes that it lacks keep their numbers.
	Hold bool
	// InUse are numbers that the maps still name: no other node gets them.
	InUse map[uint16]bool
}

// Tunnel is how another node is reached by the overlay.
type Tunnel struct {
	// Remote and Local are the outer addresses, of one family.
	Remote, Local netip.Addr
	// MTU is the largest packet that can be encapsulated, bytes from the inner IP header; 0 if no device's MTU is known.
	MTU int
}

// Route says where a prefix is. The zero Node is no other node.
type Route struct {
	Node         uint16
	Overlay      bool // encapsulated, else by the kernel's routes
	Local        bool // this node's pods
	NoMasquerade bool // pods keep their own address towards it
}

// Address is an address of another node.
type Address struct {
	Node    uint16
	Overlay bool // pods reach it through the overlay
}

// RouteKind says what a kernel route does.
type RouteKind int

// The kinds of kernel routes.
const (
	// ViaOverlay leads into the overlay device.
	ViaOverlay RouteKind = iota + 1
	// ViaNode leads to the node on a shared network.
	ViaNode
	// Unreachable answers for this node's pod addresses that no pod has.
	Unreachable
)

// KernelRoute is a route for what the host itself sends, and in the underlay's modes for pods too.
type KernelRoute struct {
	Prefix netip.Prefix
	Kind   RouteKind
	// Gateway and Device (its ifindex) with ViaNode.
	Gateway netip.Addr
	Device  int
	// Source is the address that the host sends from, with ViaOverlay; zero where this node has none of the family.
	Source netip.Addr
}

// Overlay is the wanted overlay device.
type Overlay struct {
	MTU int // bytes; 0 if no device's MTU is known
}

// Problem is something that was asked for and is not in force.
type Problem struct {
	Node    string
	Message string
}

// Result is one compilation. It is read-only.
type Result struct {
	// Tunnels are by node number; a node that cannot be reached by the overlay has none.
	Tunnels map[uint16]Tunnel
	// Names of the nodes by number.
	Names map[uint16]string
	// Routes are by masked prefix, Addresses those of other nodes.
	Routes    map[netip.Prefix]Route
	Addresses map[netip.Addr]Address
	// Egress are the addresses of masqueraded traffic, by ifindex of the machine's devices.
	Egress map[int]Egress
	// KernelRoutes are sorted by prefix; each prefix is there once.
	KernelRoutes []KernelRoute
	// Overlay is nil while there is no other node.
	Overlay *Overlay
	// PodMTU is the MTU of pods' interfaces, bytes; 0 if no device's MTU is known.
	PodMTU int
	// PodCIDRs are this node's own.
	PodCIDRs []netip.Prefix
	// Own are this node's addresses, primary first.
	Own []netip.Addr
	// Problems are sorted by node.
	Problems []Problem
}
