// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/bpf/object"
)

// Flow is both directions of one flow, told from the side that opened it. The JSON names are a promise to scripts.
type Flow struct {
	Protocol string `json:"protocol"`
	// Source and Destination are the opener's tuple as it sent it. For ICMP echo both ports are the identifier.
	Source         netip.AddrPort `json:"source"`
	SourcePod      string         `json:"sourcePod,omitempty"`
	Destination    netip.AddrPort `json:"destination"`
	DestinationPod string         `json:"destinationPod,omitempty"`
	// Backend is where the packets really go, nil without destination translation.
	Backend    *netip.AddrPort `json:"backend,omitempty"`
	BackendPod string          `json:"backendPod,omitempty"`
	// TranslatedSource is what the other end sees as the source, nil without source translation.
	TranslatedSource *netip.AddrPort `json:"translatedSource,omitempty"`
	// State is "new", "established", "closing", "closed" or "reset" for TCP, else "active".
	State string `json:"state"`
	// AgeSeconds is how long ago the last packet of either direction passed.
	AgeSeconds int64 `json:"ageSeconds"`
	// Denied: policy turned against the flow; its packets are dropped.
	Denied bool `json:"denied"`
	// RuleID is the rule that allowed or denied the flow, 0 without policy; Rule is its text where the agent wrote it.
	RuleID uint32 `json:"ruleID,omitempty"`
	Rule   string `json:"rule,omitempty"`
	// ServiceID and Service are set when the flow was opened to a service.
	ServiceID uint32 `json:"serviceID,omitempty"`
	Service   string `json:"service,omitempty"`
	// Action is what happens to the opener's packets: "to_pod", "to_stack", "to_netdev"; empty when their entry is gone.
	Action string `json:"action,omitempty"`
	// Paired: the table holds both directions. An unpaired flow lost the other one to eviction.
	Paired bool `json:"paired"`
}

// Query says which flows List returns.
type Query struct {
	// Addrs keeps flows that have one of these addresses at either end, before or after translation. Empty keeps all.
	Addrs []netip.Addr
	// Limit keeps that many flows, those with the latest packets; 0 keeps all.
	Limit int
}

// pair collects a flow's two entries under the opener's tuple.
type pair struct {
	opener, xlate bpf.FlowKey
	entries       [2]bpf.Flow // opener's direction, answering direction
	present       [2]bool
}

// List returns the flows that q selects, latest packet first, and how many it left out for q.Limit. Its memory is bounded by the
// table's capacity.
func List(flows *ebpf.Map, q Query, names *Names) ([]Flow, int, error) {
	clock, err := Now()
	if err != nil {
		return nil, 0, err
	}
	pairs := map[bpf.FlowKey]*pair{}
	err = Entries(flows, func(k bpf.FlowKey, f bpf.Flow) bool {
		opener, xlate, direction := k, f.Xlate, 0
		if f.Flags&bpf.FlowReply != 0 {
			opener, xlate, direction = f.Xlate.Reverse(), k.Reverse(), 1
		}
		p := pairs[opener]
		if p == nil {
			p = &pair{opener: opener, xlate: xlate}
			pairs[opener] = p
		}
		p.entries[direction], p.present[direction] = f, true
		return true
	})
	if err != nil {
		return nil, 0, err
	}
	var list []Flow
	for _, p := range pairs {
		if p.touches(q.Addrs) {
			list = append(list, p.flow(clock))
		}
	}
	slices.SortFunc(list, compareFlows)
	omitted := 0
	if q.Limit > 0 && len(list) > q.Limit {
		omitted = len(list) - q.Limit
		list = list[:q.Limit]
	}
	for i := range list {
		list[i].name(names)
	}
	return list, omitted, nil
}

// touches reports whether one of addrs is an end of the flow.
func (p *pair) touches(addrs []netip.Addr) bool {
	if len(addrs) == 0 {
		return true
	}
	for _, k := range []bpf.FlowKey{p.opener, p.xlate} {
		if slices.Contains(addrs, k.Source().Addr()) || slices.Contains(addrs, k.Destination().Addr()) {
			return true
		}
	}
	return false
}

// flow tells the pair as one line.
func (p *pair) flow(clock Clock) Flow {
	f := Flow{
		Protocol:    ProtocolName(p.opener.Proto),
		Source:      p.opener.Source(),
		Destination: p.opener.Destination(),
		State:       state(p.opener.Proto, p.entries[0].Tcp, p.entries[1].Tcp),
		Paired:      p.present[0] && p.present[1],
	}
	if d := p.xlate.Destination(); d != f.Destination {
		f.Backend = &d
	}
	if s := p.xlate.Source(); s != f.Source {
		f.TranslatedSource = &s
	}
	age := time.Duration(-1)
	for i, e := range p.entries {
		if !p.present[i] {
			continue
		}
		if a := clock.Age(e.LastSeen); age < 0 || a < age {
			age = a
		}
		f.Denied = f.Denied || e.Flags&bpf.FlowDenied != 0
		f.RuleID = cmp.Or(f.RuleID, e.RuleId)
		if e.Flags&bpf.FlowService != 0 {
			f.ServiceID = e.ServiceId
		}
	}
	if p.present[0] {
		f.Action = object.FlowActionName(p.entries[0].Action)
	}
	f.AgeSeconds = int64(age / time.Second)
	return f
}

// name fills in the names of pods, service and rule.
func (f *Flow) name(names *Names) {
	f.SourcePod = names.Pod(f.Source.Addr())
	f.DestinationPod = names.Pod(f.Destination.Addr())
	if f.Backend != nil {
		f.BackendPod = names.Pod(f.Backend.Addr())
	}
	f.Service = names.Service(f.ServiceID)
	f.Rule = names.Rule(f.RuleID)
}

// state tells a TCP flow's state from the flags seen in the opener's and the answering direction.
func state(proto, opener, answer uint8) string {
	either, both := opener|answer, opener&answer
	switch {
	case proto != unix.IPPROTO_TCP:
		return "active"
	case either&bpf.FlowTCPRst != 0:
		return "reset"
	case both&bpf.FlowTCPFin != 0:
		return "closed"
	case either&bpf.FlowTCPFin != 0:
		return "closing"
	case both&bpf.FlowTCPEstablished != 0:
		return "established"
	}
	return "new"
}

// ProtocolName returns the name of an IANA protocol number.
func ProtocolName(proto uint8) string {
	switch proto {
	case unix.IPPROTO_TCP:
		return "TCP"
	case unix.IPPROTO_UDP:
		return "UDP"
	case unix.IPPROTO_SCTP:
		return "SCTP"
	case unix.IPPROTO_ICMP:
		return "ICMP"
	case unix.IPPROTO_ICMPV6:
		return "ICMPv6"
	}
	return fmt.Sprintf("protocol-%d", proto)
}

// compareFlows orders by age, then by tuple, so that a listing is stable.
func compareFlows(a, b Flow) int {
	return cmp.Or(
		cmp.Compare(a.AgeSeconds, b.AgeSeconds),
		a.Source.Compare(b.Source),
		a.Destination.Compare(b.Destination),
		cmp.Compare(a.Protocol, b.Protocol),
	)
}
