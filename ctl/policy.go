// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/bpf/object"
	"github.com/margay-cni/margay/pkg/flow"
)

// portRange is the destination ports of a policy entry, after service translation.
type portRange struct {
	First uint16 `json:"first"`
	Last  uint16 `json:"last"`
}

// policyEntry is one line of a policy. Entries whose ports follow each other and that agree in the rest are shown as one.
type policyEntry struct {
	Identity uint32 `json:"identity"`
	// Peers are the pods and prefixes that have the identity; "any" for every peer.
	Peers []string `json:"peers"`
	// Protocol is empty for any protocol, Ports nil for any port.
	Protocol string     `json:"protocol,omitempty"`
	Ports    *portRange `json:"ports,omitempty"`
	Verdict  string     `json:"verdict"`
	// Rank: of two entries that match, the lower rank decides; within one rank that with fewer ports.
	Rank   uint32 `json:"rank"`
	RuleID uint32 `json:"ruleID"`
	Rule   string `json:"rule,omitempty"`
	// Cluster: a ClusterNetworkPolicy denies, also to the pod's own node and to itself through a service.
	Cluster bool `json:"cluster,omitempty"`
}

// policyInfo is one policy id in one direction.
type policyInfo struct {
	ID        uint32 `json:"id"`
	Direction string `json:"direction"`
	// Pods of this node that have it.
	Pods []string `json:"pods"`
	// Note says what a policy without entries means.
	Note    string        `json:"note,omitempty"`
	Entries []policyEntry `json:"entries"`
}

type policyList struct {
	Policies []policyInfo `json:"policies"`
}

func newPolicy(a *app) *cobra.Command {
	var pod string
	cmd := &cobra.Command{
		Use:   "policy",
		Short: "List the policies in force, by policy id, with peers and rules",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			s := a.source()
			defer s.close()
			c := policyCollector{names: a.names()}
			for name, m := range map[string]**ebpf.Map{"policy": &c.policy, "ipcache": &c.ipcache, "endpoints": &c.endpoints} {
				var err error
				if *m, err = s.openMap(name); err != nil {
					return err
				}
			}
			if pod != "" {
				if _, err := podAddrs(c.names, pod); err != nil {
					return err
				}
			}
			list, err := c.collect(pod)
			if err != nil {
				return err
			}
			return a.show(policyList{list})
		},
	}
	cmd.Flags().StringVar(&pod, "pod", "", "only the policies of this pod (namespace/name)")
	return cmd
}

// policyCollector reads policies and gives their numbers a meaning.
type policyCollector struct {
	policy, ipcache, endpoints *ebpf.Map
	names                      *flow.Names
}

type policyRef struct {
	id        uint32
	direction uint8
}

// collect returns the policies in use and those with entries; with pod, both directions of that pod, isolated or not.
func (c *policyCollector) collect(pod string) ([]policyInfo, error) {
	pods, err := c.podsByPolicy()
	if err != nil {
		return nil, err
	}
	peers, err := c.peersByIdentity()
	if err != nil {
		return nil, err
	}
	entries := map[policyRef][]policyEntry{}
	err = flow.Entries(c.policy, func(k bpf.PolicyKey, e bpf.PolicyEntry) bool {
		ref := policyRef{k.PolicyId, k.Direction}
		entries[ref] = append(entries[ref], c.entry(k, e, peers))
		return true
	})
	if err != nil {
		return nil, err
	}
	for ref := range entries {
		if _, used := pods[ref]; !used {
			pods[ref] = nil
		}
	}
	list := []policyInfo{}
	for ref, users := range pods {
		if pod == "" && ref.id < bpf.PolicyFirst || pod != "" && !slices.Contains(users, pod) {
			continue
		}
		slices.Sort(users)
		list = append(list, policyInfo{
			ID: ref.id, Direction: object.DirectionName(ref.direction), Pods: slices.Compact(append([]string{}, users...)),
			Note: policyNote(ref, len(entries[ref])), Entries: mergeEntries(entries[ref]),
		})
	}
	slices.SortFunc(list, func(a, b policyInfo) int {
		return cmp.Or(cmp.Compare(a.ID, b.ID), strings.Compare(a.Direction, b.Direction))
	})
	return list, nil
}

// policyNote explains a policy without entries.
func policyNote(ref policyRef, entries int) string {
	switch {
	case ref.id == bpf.PolicyNone:
		return "not isolated: everything is allowed"
	case ref.id == bpf.PolicyNodeOnly:
		return "not known yet: only traffic with this node is allowed"
	case entries == 0 && uint32(ref.direction) == bpf.Ingress:
		return "no entries: everything but traffic from this node is denied"
	case entries == 0:
		return "no entries: everything is denied"
	}
	return ""
}

// podsByPolicy returns the pods that have each policy.
func (c *policyCollector) podsByPolicy() (map[policyRef][]string, error) {
	pods := map[policyRef][]string{}
	err := flow.Entries(c.endpoints, func(k bpf.Addr, e bpf.Endpoint) bool {
		pod := cmp.Or(c.names.Pod(k.Netip()), k.Netip().String())
		for _, direction := range []uint32{bpf.Egress, bpf.Ingress} {
			ref := policyRef{e.PolicyId[direction], uint8(direction)}
			pods[ref] = append(pods[ref], pod)
		}
		return true
	})
	return pods, err
}

// peersByIdentity returns the pods and prefixes that have each identity.
func (c *policyCollector) peersByIdentity() (map[uint32][]string, error) {
	peers := map[uint32][]string{}
	var bad error
	err := flow.Entries(c.ipcache, func(k bpf.IPCacheKey, e bpf.IPCacheEntry) bool {
		p, err := k.Prefix()
		if err != nil {
			bad = fmt.Errorf("read map ipcache: %w", err)
			return true
		}
		text := p.String()
		if p.IsSingleIP() {
			text = cmp.Or(c.names.Pod(p.Addr()), p.Addr().String())
		}
		peers[e.Identity] = append(peers[e.Identity], text)
		return true
	})
	for id := range peers {
		slices.Sort(peers[id])
		peers[id] = slices.Compact(peers[id])
	}
	return peers, errors.Join(err, bad)
}

// entry tells one entry of the map.
func (c *policyCollector) entry(k bpf.PolicyKey, e bpf.PolicyEntry, peers map[uint32][]string) policyEntry {
	out := policyEntry{
		Identity: k.Identity, Peers: peers[k.Identity], Verdict: object.VerdictName(e.Verdict), Rank: e.Rank,
		RuleID: e.RuleId, Rule: c.names.Rule(e.RuleId), Cluster: e.Flags&bpf.PolicyEntryCluster != 0,
	}
	if k.Identity < bpf.IdentityFirst || k.Identity == bpf.IdentityAny {
		out.Peers = []string{object.IdentityName(k.Identity)}
	} else if len(out.Peers) == 0 {
		out.Peers = []string{object.IdentityName(k.Identity)}
	}
	if k.Prefixlen >= bpf.PolicyPrefixProto {
		out.Protocol = flow.ProtocolName(k.Proto)
	}
	if k.Prefixlen > bpf.PolicyPrefixProto {
		rest := bpf.PolicyPrefixPort - min(k.Prefixlen, bpf.PolicyPrefixPort)
		first := bpf.Port16(k.Port)
		out.Ports = &portRange{First: first, Last: first | uint16(1<<rest-1)}
	}
	return out
}

// mergeEntries orders entries and joins neighbouring port ranges that say the same.
func mergeEntries(entries []policyEntry) []policyEntry {
	slices.SortFunc(entries, func(a, b policyEntry) int {
		return cmp.Or(
			cmp.Compare(a.Rank, b.Rank), cmp.Compare(a.RuleID, b.RuleID), slices.Compare(a.Peers, b.Peers),
			cmp.Compare(a.Identity, b.Identity), strings.Compare(a.Verdict, b.Verdict),
			strings.Compare(a.Protocol, b.Protocol), cmp.Compare(a.firstPort(), b.firstPort()),
		)
	})
	merged := []policyEntry{}
	for _, e := range entries {
		if n := len(merged); n > 0 && merged[n-1].continuedBy(e) {
			merged[n-1].Ports = &portRange{First: merged[n-1].Ports.First, Last: e.Ports.Last}
			continue
		}
		merged = append(merged, e)
	}
	return merged
}

func (e policyEntry) firstPort() int {
	if e.Ports == nil {
		return -1
	}
	return int(e.Ports.First)
}

// continuedBy reports whether next says the same for the ports right after e's.
func (e policyEntry) continuedBy(next policyEntry) bool {
	return e.Ports != nil && next.Ports != nil && int(e.Ports.Last)+1 == int(next.Ports.First) &&
		e.Identity == next.Identity && e.Protocol == next.Protocol && e.Verdict == next.Verdict &&
		e.Rank == next.Rank && e.RuleID == next.RuleID
}

func (l policyList) print(w io.Writer) {
	if len(l.Policies) == 0 {
		fmt.Fprintln(w, "no policies: no pod of this node is isolated")
		return
	}
	for i, p := range l.Policies {
		if i > 0 {
			fmt.Fprintln(w)
		}
		users := cmp.Or(shorten(p.Pods, 5), "no pod")
		fmt.Fprintf(w, "policy %s, %s of %s\n", policyText(p.ID), p.Direction, users)
		if p.Note != "" {
			fmt.Fprintf(w, "  %s\n", p.Note)
		}
		t := newTable("PEER", "PROTO", "PORTS", "VERDICT", ">RANK", "RULE")
		t.indent = "  "
		for _, e := range p.Entries {
			t.add(shorten(e.Peers, 3), protoText(e.Protocol), e.Ports.text(e.Protocol), e.Verdict, fmt.Sprint(e.Rank), named(e.Rule, e.RuleID))
		}
		// A dual-stack peer has an identity of its own in each family: one line for a reader.
		t.rows = slices.CompactFunc(t.rows, slices.Equal)
		t.print(w)
	}
}

func protoText(protocol string) string {
	return cmp.Or(protocol, "any")
}

// text shows the ports; ICMP has none, and any port is all of them.
func (r *portRange) text(protocol string) string {
	icmp := protocol == flow.ProtocolName(unix.IPPROTO_ICMP) || protocol == flow.ProtocolName(unix.IPPROTO_ICMPV6)
	switch {
	case r == nil && icmp:
		return "-"
	case r == nil:
		return "any"
	case r.First == r.Last:
		return fmt.Sprint(r.First)
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}
