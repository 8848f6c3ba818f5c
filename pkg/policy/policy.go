// SPDX-License-Identifier: Apache-2.0

// Package policy compiles NetworkPolicies into the content of the ipcache and policy maps: identities for sets of labels and for the CIDR
// regions that policies name, one policy id for each distinct set of rules, and the entries that the kernel looks up. It owns the
// numbers (identity, policy id, rule) and keeps them stable from one compilation to the next, and it says which policy ids' epochs have to
// be raised when one result replaces another.
//
// It is pure: a snapshot goes in, desired state comes out. It reads no clock and knows neither maps nor netlink; writing the result to the
// kernel is pkg/agent's work. Traffic between a pod and its own node is always allowed by the programs and does not appear here.
// A Compiler is for one goroutine; a Result is read-only once returned.
package policy

import (
	"cmp"
	"fmt"
	"net/netip"

	"github.com/margay-cni/margay/pkg/state"
)

// Direction is the pod's policy direction. The values are those of enum direction in bpf/types.h.
type Direction uint8

// Egress is what a pod sends, Ingress what it receives.
const (
	Egress  Direction = 0
	Ingress Direction = 1
)

func (d Direction) String() string {
	if d == Egress {
		return "egress"
	}
	return "ingress"
}

// Verdict is what an entry decides. The values are those of enum policy_verdict in bpf/types.h.
type Verdict uint32

// The verdicts.
const (
	Allow Verdict = 1
	Deny  Verdict = 2
)

func (v Verdict) String() string {
	if v == Allow {
		return "allow"
	}
	return "deny"
}

// Identities with a fixed meaning, as enum identity in bpf/types.h. The compiler allocates from FirstIdentity.
const (
	World         uint32 = 0
	Host          uint32 = 1
	RemoteNode    uint32 = 2
	PodUnknown    uint32 = 3
	FirstIdentity uint32 = 16
	AnyIdentity   uint32 = 0xffffffff
)

// Policy ids with a fixed meaning, as enum policy_id in bpf/types.h. The compiler allocates from FirstPolicy to MaxPolicy: more distinct
// policies than a node has pods are not needed, and the numbers stay short for people.
const (
	PolicyNone     uint32 = 0
	PolicyNodeOnly uint32 = 1
	FirstPolicy    uint32 = 16
	MaxPolicy      uint32 = 16383
)

// Ranks of entries; the lower one decides. NetworkPolicy has one rank, because its rules have no order; RankIsolation is what happens to
// traffic that none of them allows. ClusterNetworkPolicy's Admin tier (1001 priorities of 25 rules) has its place below, Baseline above.
const (
	RankNetworkPolicy uint32 = 100_000
	RankIsolation     uint32 = 100_001
)

// Key is the key of one entry of the policy map.
type Key struct {
	Policy uint32
	// Identity of the peer, or AnyIdentity.
	Identity  uint32
	Direction Direction
	// Protocol is an IANA number; 0 where Bits is 0.
	Protocol uint8
	// Port is the first destination port of the prefix, in host byte order; 0 where Bits is at most 8.
	Port uint16
	// Bits is how much of Protocol and Port counts: 0 any protocol, 8 the protocol, 9 to 24 the protocol and Bits-8 leading bits of Port.
	// The length of the kernel's prefix is POLICY_PREFIX_BASE + Bits.
	Bits uint8
}

// Entry is the value of one entry of the policy map.
type Entry struct {
	Verdict Verdict
	Rank    uint32
	// Rule is a key of Result.Rules.
	Rule uint32
}

// Assignment is what the datapath needs to know about a local pod.
type Assignment struct {
	// Identity of the pod's first address. A pod without addresses has the identity of its labels outside every CIDR region, which no
	// ipBlock matches. Other addresses of the pod may have other identities: Result.Identity.
	Identity uint32
	// Policy by Direction; PolicyNone where the pod is not isolated.
	Policy [2]uint32
}

// Isolation is the Index of a Rule that stands for no rule of the policy but for the isolation that it causes (contract row N1).
const Isolation = -1

// Rule names what decided.
type Rule struct {
	// Kind of the object: NetworkPolicy.
	Kind      string
	Object    state.Key
	Direction Direction
	// Index of the rule in the object's list for the direction, or Isolation.
	Index int
}

func (r Rule) String() string {
	if r.Index == Isolation {
		return fmt.Sprintf("%s %s %s isolation", r.Kind, r.Object, r.Direction)
	}
	return fmt.Sprintf("%s %s %s[%d]", r.Kind, r.Object, r.Direction, r.Index)
}

// compareRules orders rules by object, direction and index.
func compareRules(a, b Rule) int {
	return cmp.Or(
		compareKeys(a.Object, b.Object),
		cmp.Compare(a.Direction, b.Direction),
		cmp.Compare(a.Index, b.Index),
	)
}

func compareKeys(a, b state.Key) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}

// Result is one compilation: everything that the kernel should hold.
type Result struct {
	// Identities is the whole content of the ipcache: every pod address (/32, /128) and every CIDR region named by a policy that selects a
	// local pod. It may hold 0.0.0.0/0 with identity World: IPv4 addresses lie inside ::/0 in the map's IPv4-mapped form, and a policy that
	// names ::/0 must not catch them.
	Identities map[netip.Prefix]uint32
	// Pods holds every local pod that is neither hostNetwork nor finished, with or without addresses.
	Pods map[state.Key]Assignment
	// Restricted has every namespace in the snapshot: true if a policy exists there, so that one could select a pod.
	Restricted map[string]bool
	// Entries is the whole content of the policy map.
	Entries map[Key]Entry
	// Rules names the numbers in Entries; 0 is never among them.
	Rules map[uint32]Rule
	// Invalid names policies with parts that cannot be understood. Such a part never allows anything.
	Invalid map[state.Key]error
}

// Identity is the identity of an address: that of the longest prefix in Identities that holds it, or World.
func (r *Result) Identity(a netip.Addr) uint32 {
	a = a.Unmap().WithZone("")
	for bits := a.BitLen(); bits >= 0; bits-- {
		p, err := a.Prefix(bits)
		if err != nil {
			break
		}
		if id, ok := r.Identities[p]; ok {
			return id
		}
	}
	return World
}
