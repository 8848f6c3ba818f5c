// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/node"
	"github.com/margay-cni/margay/pkg/policy"
	"github.com/margay-cni/margay/pkg/service"
)

// longAgo is a count of compilations that puts freed policy ids past their quarantine.
const longAgo = 1 << 10

// numberAfresh starts the compilers' numbers outside everything that the kernel's maps hold, and notes that every pod's flows have to be
// judged again: nobody knows what the numbers in them stood for.
func (p *pipeline) numberAfresh() {
	identity, rule := policy.FirstIdentity-1, uint32(0)
	policies, services := map[uint32]bool{}, map[uint32]bool{}
	var list uint32
	devices := map[int]struct{}{}

	for k, v := range p.m.policy.have {
		policies[k.PolicyId] = true
		if k.Identity != bpf.IdentityAny {
			identity = max(identity, k.Identity)
		}
		rule = max(rule, v.RuleId)
	}
	for _, v := range p.m.ipcache.have {
		identity = max(identity, v.Identity)
	}
	for _, v := range p.m.endpoints.have {
		identity = max(identity, v.Identity)
		policies[v.PolicyId[0]], policies[v.PolicyId[1]] = true, true
		devices[int(v.Ifindex)] = struct{}{}
	}
	for _, v := range p.m.pending.have {
		identity = max(identity, v.Identity)
		policies[v.PolicyId[0]], policies[v.PolicyId[1]] = true, true
	}
	for _, v := range p.m.services.have {
		services[v.Id] = true
		list = max(list, v.List[0], v.List[1])
	}
	for k := range p.m.members.have {
		services[k.ServiceId] = true
	}
	for k := range p.m.ranges.have {
		services[k.ServiceId] = true
	}
	for k := range p.m.maglev.have {
		list = max(list, k.List)
	}
	for k := range p.m.backends.have {
		if k.List > service.MaxList {
			services[k.List&^bpf.BackendByHash] = true
			continue
		}
		list = max(list, k.List)
	}

	p.raise = raise{Endpoints: sortedKeys(devices), Routes: len(p.m.nodes.have) > 0}
	p.must(p.nodes.Import(node.Numbers{})) // it hands out no number that the maps name
	next, free := unused(policies, policy.FirstPolicy, policy.MaxPolicy)
	freed := make([]policy.Freed, 0, len(free))
	for _, id := range free {
		freed = append(freed, policy.Freed{Number: id})
	}
	p.must(p.policies.Import(policy.Numbers{
		Version:      p.policies.Export().Version,
		Compilations: longAgo,
		Identities:   policy.Space{Next: identity + 1},
		Policies:     policy.Space{Next: next, Freed: freed},
		Rules:        policy.Space{Next: rule + 1},
	}))
	next, free = unused(services, 1, service.MaxServiceID)
	p.must(p.services.Import(service.Numbers{
		Version:  p.services.Export().Version,
		Services: service.NumberRange{Next: next, Released: free},
		Lists:    service.NumberRange{Next: min(list, service.MaxList-1) + 1},
	}))
}

// unused returns the number above the highest one in use, and the free ones below it, of a space from first to last.
func unused(used map[uint32]bool, first, last uint32) (next uint32, free []uint32) {
	next = first
	for n := range used {
		if n >= first && n <= last {
			next = max(next, n+1)
		}
	}
	for n := first; n < next; n++ {
		if !used[n] {
			free = append(free, n)
		}
	}
	return next, free
}

// must reports numbers that a compiler refused although they were made for it: it then numbers from the start of its space.
func (p *pipeline) must(err error) {
	if err != nil {
		p.log.Error("fresh numbers were refused", "err", err)
	}
}
