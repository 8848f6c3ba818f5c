// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"maps"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/policy"
)

// takePolicies makes a compilation what the policy maps should hold. After one change it looks at what changed and at nothing else.
func (p *pipeline) takePolicies(r *policy.Result, c *policy.Changes) {
	w := &p.wantPolicy
	fresh := p.policyResult != r
	if fresh {
		p.policyResult, p.wantPolicy = r, newPolicyMaps(r, p.snapshot.Pods)
		p.m.policy.differ, p.m.ipcache.differ = nil, nil
	} else {
		for key := range c.Entries {
			p.takeEntry(key)
		}
		for prefix := range c.Identities {
			id, ok := r.Identities[prefix]
			set(p.m.ipcache, w.ipcache, bpf.NewIPCacheKey(prefix), bpf.IPCacheEntry{Identity: id}, ok)
		}
		w.pending = pendingOf(r, p.snapshot.Pods)
		p.policyRaised = union(p.policyRaised, c.Raised)
	}
	if fresh || c.Rules {
		p.rulesNamed = false
	}
	if fresh || c.Conditions {
		p.policyStatus(maps.Clone(r.Conditions)) // who gets it keeps it, and the result changes
	}
}

// takeEntry takes over one policy entry.
func (p *pipeline) takeEntry(key policy.Key) {
	w, k := &p.wantPolicy, newPolicyKey(key)
	_, was := w.policy[k]
	e, ok := p.policyResult.Entries[key]
	set(p.m.policy, w.policy, k, newPolicyEntry(e), ok)
	switch {
	case ok && !was:
		w.ids[k.PolicyId]++
	case was && !ok:
		if w.ids[k.PolicyId]--; w.ids[k.PolicyId] == 0 {
			delete(w.ids, k.PolicyId)
		}
	}
}

// comparePolicies finds where the kernel's policy maps are not what they should be, unless that is known.
func (p *pipeline) comparePolicies() {
	if p.policyResult == nil {
		return
	}
	p.m.policy.compare(p.wantPolicy.policy)
	p.m.ipcache.compare(p.wantPolicy.ipcache)
}

// settledInKernel reports whether the kernel holds the wanted policy entries and ipcache already.
func (p *pipeline) settledInKernel() bool {
	p.comparePolicies()
	p.m.policy.settle(p.wantPolicy.policy)
	p.m.ipcache.settle(p.wantPolicy.ipcache)
	return len(p.m.policy.differ) == 0 && len(p.m.ipcache.differ) == 0
}

// nothingToAdd reports whether the kernel holds all that a round with hold would write: entries, and prefixes with any identity.
func (p *pipeline) nothingToAdd() bool {
	for range p.m.policy.missing(p.wantPolicy.policy) {
		return false
	}
	for k := range p.m.ipcache.missing(p.wantPolicy.ipcache) {
		if _, ok := p.m.ipcache.have[k]; !ok {
			return false
		}
	}
	return true
}
