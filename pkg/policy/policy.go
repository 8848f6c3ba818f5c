// SPDX-License-Identifier: Apache-2.0

// Package policy compiles NetworkPolicies and ClusterNetworkPolicies into the content of the ipcache and policy maps: identities for sets of labels and for the CIDR
// regions that policies name, one policy id for each distinct set of rules, and the entries that the kernel looks up. It owns the
// numbers (identity, policy id, rule) and keeps them stable from one compilation to the next, and it says which policy ids' epochs have to
// be raised when one result replaces another.
//
// It is pure: a snapshot goes in, desired state comes out. It reads no clock and knows neither maps nor netlink; writing the result to the
// kernel is pkg/agent's work. Whether NetworkPolicy has a say in traffic between a pod and its own node, or itself, is decided by the
// programs, and Entry.Cluster is what they need to know for it.
// A Compiler is for one goroutine; a Result is read-only for whoever gets it, and that of Update changes with the next Update.
package policy

import (
	"cmp"
	"fmt"
	"net/netip"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

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
// traffic that none of them allows. Where ClusterNetworkPolicies have a say the compiler has settled the order of tiers and rules for each
// peer (docs/design/0013-policy-tiers.md): what it says of one peer, RankPeer, decides before what it says of all others, RankOthers.
const (
	RankPeer          uint32 = 50_000
	RankNetworkPolicy uint32 = 100_000
	RankIsolation     uint32 = 100_001
	RankOthers        uint32 = 150_000
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
	// Cluster says that a ClusterNetworkPolicy denies, and so this holds also where NetworkPolicy has no say: from a pod to its own
	// node, and for a pod that reaches itself through a service (contract rows N10, C4, C7).
	Cluster bool
}

// Assignment is what the datapath needs to know about a local pod.
type Assignment struct {
	// Identity of the pod's first address. A pod without addresses has the identity of its labels outside every CIDR region, which no
	// ipBlock matches. Other addresses of the pod may have other identities: Result.Identity.
	Identity uint32
	// Policy by Direction; PolicyNone where nothing can be denied. PolicyNodeOnly where a ClusterNetworkPolicy could deny, but the labels
	// of the pod's namespace, which decide whether it does, are not known yet.
	Policy [2]uint32
}

// Values of Rule.Index that are no place in a list of rules.
const (
	// Isolation stands for the isolation that a NetworkPolicy causes (contract row N1).
	Isolation = -1
	// DefaultAllow stands for what happens when no policy decides (contract row C2). Such a Rule has no object.
	DefaultAllow = -2
)

// Kinds of the objects that rules are of.
const (
	kindNetworkPolicy        = "NetworkPolicy"
	kindClusterNetworkPolicy = "ClusterNetworkPolicy"
)

// Rule names what decided.
type Rule struct {
	// Kind of the object: NetworkPolicy or ClusterNetworkPolicy. The latter is in no namespace.
	Kind      string
	Object    state.Key
	Direction Direction
	// Index of the rule in the object's list for the direction, Isolation or DefaultAllow.
	Index int
	// Name is what the rule of a ClusterNetworkPolicy calls itself, often nothing.
	Name string
}

func (r Rule) String() string {
	object := r.Kind + " " + r.Object.Name
	if r.Object.Namespace != "" {
		object = r.Kind + " " + r.Object.String()
	}
	switch {
	case r.Index == DefaultAllow:
		return r.Direction.String() + " default allow"
	case r.Index == Isolation:
		return fmt.Sprintf("%s %s isolation", object, r.Direction)
	case r.Name != "":
		return fmt.Sprintf("%s %s[%d] (%s)", object, r.Direction, r.Index, r.Name)
	}
	return fmt.Sprintf("%s %s[%d]", object, r.Direction, r.Index)
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
	// Restricted has every namespace in the snapshot: true if a NetworkPolicy exists there, or a ClusterNetworkPolicy that denies anything
	// reaches into it, so that a policy could restrict a pod there.
	Restricted map[string]bool
	// RestrictedElsewhere says that a pod of a namespace that the snapshot lacks could be restricted.
	RestrictedElsewhere bool
	// Entries is the whole content of the policy map.
	Entries map[Key]Entry
	// Rules names the numbers in Entries; 0 is never among them.
	Rules map[uint32]Rule
	// Invalid names policies with parts that cannot be understood. Such a part never allows anything. The key of a ClusterNetworkPolicy has
	// no namespace.
	Invalid map[state.Key]error
	// Conditions has, by name, the condition that belongs into the status of each ClusterNetworkPolicy. It depends on nothing but the
	// policy, so all nodes agree on it; LastTransitionTime is for whoever writes it.
	Conditions map[string]metav1.Condition
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
