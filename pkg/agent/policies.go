// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"net/netip"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/policy"
	"github.com/margay-cni/margay/pkg/state"
)

// planPolicy compares the kernel's content with what it should be, before the first write, and returns the devices of the pods whose flows
// the round will have to judge again. A pod's flows are judged again when its own entry changes, or when one
// of its policies decides differently now: by its entries, or by what its peers' addresses mean.
func (p *pipeline) planPolicy(hold bool) []int {
	devices := map[int]struct{}{}
	changed := p.changedPolicies(hold)
	note := func(e bpf.Endpoint) {
		for _, id := range e.PolicyId {
			if _, ok := changed[id]; ok {
				devices[int(e.Ifindex)] = struct{}{}
			}
		}
	}
	for _, have := range p.m.endpoints.have {
		note(have)
	}
	for a, want := range p.wantEndpoints {
		note(want.Endpoint)
		have, ok := p.m.endpoints.have[bpf.NewAddr(a)]
		if ok && have != p.next(have, want, nil, hold) {
			devices[int(want.Ifindex)] = struct{}{}
		}
	}
	return sortedKeys(devices)
}

// changedPolicies returns the policy ids under which a flow could be judged differently once the maps hold what they should. The past is
// the last result where the kernel held exactly that, and otherwise what the kernel really holds: a predecessor's maps, a round that
// went through only in part, somebody else's changes.
func (p *pipeline) changedPolicies(hold bool) map[uint32]struct{} {
	if p.policyResult == nil || (hold && p.nothingToAdd()) {
		return nil
	}
	var raised []uint32
	switch {
	case p.applied == p.policyResult:
		raised = p.policyRaised
	case p.applied != nil:
		raised = policy.Changed(p.applied, p.policyResult)
	case p.settledInKernel():
		return nil
	default:
		raised = policy.Changed(p.kernelResult(), p.policyResult)
	}
	ids := map[uint32]struct{}{}
	for _, id := range raised {
		// The fixed ids never decide differently. Pods that get or lose one are noticed by their own entry.
		if id >= bpf.PolicyFirst {
			ids[id] = struct{}{}
		}
	}
	return ids
}

// kernelResult is what the kernel holds in the form of a compilation.
func (p *pipeline) kernelResult() *policy.Result {
	r := &policy.Result{
		Identities: make(map[netip.Prefix]uint32, len(p.m.ipcache.have)),
		Entries:    make(map[policy.Key]policy.Entry, len(p.m.policy.have)),
		Pods:       make(map[state.Key]policy.Assignment, len(p.local)),
	}
	for k, v := range p.m.ipcache.have {
		if prefix, err := k.Prefix(); err == nil {
			r.Identities[prefix] = v.Identity
		}
	}
	for k, v := range p.m.policy.have {
		r.Entries[policy.Key{
			Policy: k.PolicyId, Identity: k.Identity, Direction: policy.Direction(k.Direction), Protocol: k.Proto,
			Port: bpf.Port16(k.Port), Bits: uint8(k.Prefixlen - bpf.PolicyPrefixBase),
		}] = policy.Entry{
			Verdict: policy.Verdict(v.Verdict), Rank: v.Rank, Rule: v.RuleId, Cluster: v.Flags&bpf.PolicyEntryCluster != 0,
		}
	}
	for _, l := range p.local {
		for _, a := range l.record.Addresses {
			if have, ok := p.m.endpoints.have[bpf.NewAddr(a.Unmap())]; ok {
				r.Pods[l.key] = policy.Assignment{Identity: have.Identity, Policy: have.PolicyId}
				break
			}
		}
	}
	return r
}

// applyPolicy brings the policy maps to what they should hold, in an order in which traffic that both the old and the new state refuse is
// refused at every instant:
//
//   - A number means something before anything refers to it: entries of policies and identities that are not in use come first, then the
//     addresses that move to them, then the pods. A pod changes its policies in one map write.
//   - Where policy and identity are both in use, an entry speaks about addresses that may be about to leave the identity, or to come to it.
//     It is added after the addresses have left, and removed before others come.
//   - Everything else that is gone is deleted when nothing refers to it any more. Flows are judged again when the maps say the new thing.
func (p *pipeline) applyPolicy(hold bool) {
	if p.policyResult == nil {
		return
	}
	live := p.livePairs()
	incomplete := map[uint32]bool{}
	p.putPolicies(incomplete, func(k bpf.PolicyKey) bool { return !live.has(k) })
	if !hold {
		arriving := p.arriving()
		p.removePolicies(func(k bpf.PolicyKey) bool { return live.has(k) && arriving[k.Identity] })
	}
	stuck := p.putIPCache(hold)
	p.putPolicies(incomplete, func(k bpf.PolicyKey) bool { return live.has(k) && !stuck[k.Identity] })
	if len(stuck) > 0 {
		for k := range p.wantPolicy.policy {
			if stuck[k.Identity] {
				incomplete[k.PolicyId] = true
			}
		}
	}
	// Pods that start from here on get the new policy; those that started just before have a map entry or a record by now.
	for k, v := range p.wantPolicy.pending {
		if have, ok := p.m.pending.have[k]; !hold || !ok || tighter(have, v) {
			p.m.pending.put(k, v)
		}
	}
	p.applyEndpoints(incomplete, hold)
	if !hold {
		if p.allMoved() {
			for _, k := range p.m.ipcache.surplus(p.wantPolicy.ipcache) {
				p.m.ipcache.remove(k)
			}
		}
		p.removePolicies(func(k bpf.PolicyKey) bool { _, used := p.wantPolicy.ids[k.PolicyId]; return used })
	}
	p.raiseEndpoints()
	if !hold {
		inKernel := p.policiesInKernel()
		p.removePolicies(func(k bpf.PolicyKey) bool { return !inKernel[k.PolicyId] })
		for _, k := range p.m.pending.surplus(p.wantPolicy.pending) {
			p.m.pending.remove(k)
		}
	}
	p.applied = nil
	if !hold && p.settledInKernel() {
		p.applied, p.policyRaised = p.policyResult, nil
	}
}

// pairs are the policy ids and the identities that the kernel refers to, as far as entries that are to be written have to do with them.
type pairs struct {
	policies   map[uint32]bool
	identities map[uint32]bool
}

// has reports whether an entry with the key decides about traffic right now.
func (l pairs) has(k bpf.PolicyKey) bool {
	return l.policies[k.PolicyId] && (l.identities[k.Identity] || k.Identity == bpf.IdentityAny || k.Identity == bpf.IdentityWorld)
}

func (p *pipeline) livePairs() pairs {
	l := pairs{policies: p.policiesInKernel(), identities: map[uint32]bool{}}
	for k := range p.m.policy.missing(p.wantPolicy.policy) {
		l.identities[k.Identity] = false
	}
	for _, k := range p.m.policy.surplus(p.wantPolicy.policy) {
		l.identities[k.Identity] = false
	}
	if len(l.identities) == 0 {
		return l
	}
	note := func(id uint32) {
		if _, asked := l.identities[id]; asked {
			l.identities[id] = true
		}
	}
	for _, v := range p.m.ipcache.have {
		note(v.Identity)
	}
	for _, v := range p.m.endpoints.have {
		note(v.Identity)
	}
	return l
}

// arriving returns the identities to which addresses are about to come.
func (p *pipeline) arriving() map[uint32]bool {
	ids := map[uint32]bool{}
	for _, v := range p.m.ipcache.missing(p.wantPolicy.ipcache) {
		ids[v.Identity] = true
	}
	return ids
}

// putIPCache gives the addresses their identities and returns the identities that some address could not leave.
func (p *pipeline) putIPCache(hold bool) map[uint32]bool {
	stuck := map[uint32]bool{}
	for k, v := range p.m.ipcache.missing(p.wantPolicy.ipcache) {
		had, ok := p.m.ipcache.have[k]
		if ok && hold {
			continue
		}
		if p.m.ipcache.put(k, v) {
			continue
		}
		if !ok {
			had.Identity = p.covering(k)
		}
		stuck[had.Identity] = true
	}
	return stuck
}

// covering is the identity that the addresses of a prefix have while the kernel does not hold it: that of the longest one around it.
func (p *pipeline) covering(k bpf.IPCacheKey) uint32 {
	identity := bpf.IdentityWorld
	inner, err := k.Prefix()
	if err != nil {
		return identity
	}
	longest := -1
	for other, e := range p.m.ipcache.have {
		outer, err := other.Prefix()
		if err == nil && outer.Bits() < inner.Bits() && outer.Contains(inner.Addr()) && outer.Bits() > longest {
			longest, identity = outer.Bits(), e.Identity
		}
	}
	return identity
}

// tighter reports whether a pod that starts with v is held to more than one that starts with have. While the source cannot read
// everything, nothing published may become more open than it is.
func tighter(have, v bpf.Pending) bool {
	for d := range have.PolicyId {
		if have.PolicyId[d] != bpf.PolicyNone {
			return false
		}
	}
	return v != have
}

// putPolicies writes the chosen entries, denials before permissions, and notes the ids that are not entirely in the map.
func (p *pipeline) putPolicies(incomplete map[uint32]bool, chosen func(k bpf.PolicyKey) bool) {
	for _, verdict := range []uint32{bpf.VerdictDeny, bpf.VerdictAllow} {
		for k, v := range p.m.policy.missing(p.wantPolicy.policy) {
			if v.Verdict == verdict && chosen(k) && !p.m.policy.put(k, v) {
				incomplete[k.PolicyId] = true
			}
		}
	}
}

// removePolicies deletes the chosen surplus entries, permissions before denials.
func (p *pipeline) removePolicies(chosen func(k bpf.PolicyKey) bool) {
	surplus := p.m.policy.surplus(p.wantPolicy.policy)
	for _, verdict := range []uint32{bpf.VerdictAllow, bpf.VerdictDeny} {
		for _, k := range surplus {
			if p.m.policy.have[k].Verdict == verdict && chosen(k) {
				p.m.policy.remove(k)
			}
		}
	}
}

// policiesInKernel returns the ids that an endpoint, or a pending entry that stays, of the kernel refers to.
func (p *pipeline) policiesInKernel() map[uint32]bool {
	ids := map[uint32]bool{}
	for _, e := range p.m.endpoints.have {
		ids[e.PolicyId[0]], ids[e.PolicyId[1]] = true, true
	}
	for k, e := range p.m.pending.have {
		if _, ok := p.wantPolicy.pending[k]; ok {
			ids[e.PolicyId[0]], ids[e.PolicyId[1]] = true, true
		}
	}
	return ids
}

// allMoved reports whether every endpoint of the kernel has policies of this compilation. A policy of an older one, kept because the new one
// is not entirely in the map, gives a meaning to prefixes that the new compilation does not need: without them, an address that it excepts
// would fall into the block around it.
func (p *pipeline) allMoved() bool {
	for _, e := range p.m.endpoints.have {
		for _, id := range e.PolicyId {
			if _, used := p.wantPolicy.ids[id]; id >= bpf.PolicyFirst && !used {
				return false
			}
		}
	}
	return true
}

// raiseEndpoints raises the outstanding epochs of pods.
func (p *pipeline) raiseEndpoints() {
	if len(p.raise.Endpoints) == 0 {
		return
	}
	if err := p.epochs.RaiseEndpointEpochs(p.raise.Endpoints...); err != nil {
		p.fault("endpoint_epochs", err)
		return
	}
	p.round.Raised.Endpoints = len(p.raise.Endpoints)
	p.raise.Endpoints = nil
}
