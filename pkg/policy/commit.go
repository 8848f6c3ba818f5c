// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/margay-cni/margay/pkg/addr"
)

// Changes are what one Update has changed in its Result; of a Result that is another one than before they are not complete. The keys may have
// the value that they had.
type Changes struct {
	Identities map[netip.Prefix]struct{}
	Entries    map[Key]struct{}
	// Rules says that Result.Rules is another one, Conditions the same of Result.Conditions and Pods of everything about pods: Pods,
	// Restricted and RestrictedElsewhere.
	Rules, Conditions, Pods bool
	// Raised are, sorted, the policy ids whose epochs must be raised: what Changed would say of the Result before and after.
	Raised []uint32
}

// staged are changes of Result.Entries that are not in it yet.
type staged struct {
	put  map[Key]Entry
	gone map[Key]struct{}
}

func (s *staged) remove(policy uint32, d Direction, identity uint32, list []portEntry) {
	for _, p := range list {
		k := p.key(policy, d, identity)
		delete(s.put, k)
		s.gone[k] = struct{}{}
	}
}

func (s *staged) add(policy uint32, d Direction, identity uint32, list []portEntry) {
	for _, p := range list {
		k := p.key(policy, d, identity)
		delete(s.gone, k)
		s.put[k] = p.Entry
	}
}

func (p *portPrefix) key(policy uint32, d Direction, identity uint32) Key {
	return Key{Policy: policy, Identity: identity, Direction: d, Protocol: uint8(p.protocol), Port: p.port, Bits: p.bits}
}

// expand works out the entries of the intents that have changed.
func (in *increment) expand() (*staged, error) {
	st := &staged{put: map[Key]Entry{}, gone: map[Key]struct{}{}}
	limit := in.compiler.Limits.Entries
	for s := range in.dirty.intents {
		if in.intents[s.hash] != s {
			s.remove(st)
		}
	}
	for s := range in.dirty.intents {
		if in.intents[s.hash] == s {
			in.expandOne(s, st)
		}
		if len(st.put) > limit {
			break
		}
	}
	n := len(in.result.Entries)
	for k := range st.gone {
		if _, ok := in.result.Entries[k]; ok {
			n--
		}
	}
	for k := range st.put {
		if _, ok := in.result.Entries[k]; !ok {
			n++
		}
	}
	if n > limit {
		return nil, fmt.Errorf("more than %d policy entries: %w", limit, ErrLimit)
	}
	return st, nil
}

func (s *shared) remove(st *staged) {
	st.remove(s.number, s.direction, AnyIdentity, s.entries.everybody)
	for id, list := range s.entries.peers {
		st.remove(s.number, s.direction, id.number, list)
	}
}

// expandOne works out the entries of an intent: all of them if it is new or its rules have other names, otherwise those of the identities that
// have changed.
func (in *increment) expandOne(s *shared, st *staged) {
	e := &s.entries
	if renamed := s.names(); e.in == nil || renamed {
		s.remove(st)
		e.begin(in, s.intent)
		e.all()
		st.add(s.number, s.direction, AnyIdentity, e.everybody)
		for id, list := range e.peers {
			st.add(s.number, s.direction, id.number, list)
		}
		e.dirty = nil
		return
	}
	for id := range e.dirty {
		st.remove(s.number, s.direction, id.number, e.peers[id])
		list := e.one(id)
		if len(list) == 0 {
			delete(e.peers, id)
			continue
		}
		e.peers[id] = list
		st.add(s.number, s.direction, id.number, list)
	}
	e.dirty = nil
}

// commit puts what was worked out in force.
func (in *increment) commit(st *staged) *Changes {
	raised := map[uint32]struct{}{}
	c := &Changes{Identities: map[netip.Prefix]struct{}{}, Entries: make(map[Key]struct{}, len(st.put)+len(st.gone))}
	in.commitNumbers()
	in.commitEntries(st, c, raised)
	c.Pods = in.commitPods(raised)
	c.Pods = in.restrict() || c.Pods
	moved := in.commitIdentities(c)
	in.raiseMoved(raised, moved)
	for name := range in.rules.changed {
		c.Rules = true
		if r, ok := in.rules.values[name]; ok {
			in.result.Rules[in.compiler.rules.Assigned[name]] = r
		}
	}
	c.Conditions = in.commitPolicies()
	c.Raised = slices.Sorted(maps.Keys(raised))
	return c
}

func (in *increment) commitEntries(st *staged, c *Changes, raised map[uint32]struct{}) {
	for k := range st.gone {
		if _, ok := in.result.Entries[k]; ok {
			delete(in.result.Entries, k)
			c.Entries[k], raised[k.Policy] = struct{}{}, struct{}{}
		}
	}
	if len(in.result.Entries) == 0 && in.compiler.compilations == in.began+1 {
		in.result.Entries = st.put // a new result: nobody asks for its changes
		return
	}
	for k, e := range st.put {
		if old, ok := in.result.Entries[k]; !ok || old != e {
			in.result.Entries[k] = e
			c.Entries[k], raised[k.Policy] = struct{}{}, struct{}{}
		}
	}
}

// commitPods writes Result.Pods and raises the former ids of pods whose id is another one now.
func (in *increment) commitPods(raised map[uint32]struct{}) (changed bool) {
	for key := range in.result.Pods {
		if in.local[key] == nil {
			delete(in.result.Pods, key)
			changed = true
		}
	}
	for key, p := range in.local {
		var a Assignment
		if id := in.bare[key]; id != nil {
			a.Identity = id.number
		} else {
			a.Identity = in.at(addr.HostPrefix(in.primaryAddress(p))).number
		}
		sub := in.subjects[in.pods[key].class]
		for d, v := range sub.variants {
			switch {
			case sub.closed[d]:
				a.Policy[d] = PolicyNodeOnly
			case v != nil:
				a.Policy[d] = v.shared.number
			}
		}
		old, ok := in.result.Pods[key]
		for d, id := range old.Policy {
			if ok && a.Policy[d] != id {
				raised[id] = struct{}{}
			}
		}
		if !ok || old != a {
			in.result.Pods[key] = a
			changed = true
		}
	}
	return changed
}

// commitIdentities writes Result.Identities and returns the changes of identity that at least one address has made; see moves.
func (in *increment) commitIdentities(c *Changes) map[move]struct{} {
	out := map[move]struct{}{}
	for p, old := range in.moved {
		now := in.at(p)
		if old == now {
			continue
		}
		c.Identities[p] = struct{}{}
		if now == nil {
			delete(in.result.Identities, p)
		} else {
			in.result.Identities[p] = now.number
		}
		if from, to := in.around(p, true), in.around(p, false); from != to {
			out[move{from, to}] = struct{}{}
		}
	}
	in.commitMapped(c)
	return out
}

// commitMapped keeps IPv6 prefixes that hold all of IPv4 in its mapped form from catching it.
func (in *increment) commitMapped(c *Changes) {
	all4 := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	if in.rest[all4] != nil {
		return
	}
	_, there := in.result.Identities[all4]
	if in.mapped > 0 {
		in.result.Identities[all4] = World
	} else {
		delete(in.result.Identities, all4)
	}
	if there != (in.mapped > 0) {
		c.Identities[all4] = struct{}{}
	}
}

// around is the identity of what holds all of p, before this call or now.
func (in *increment) around(p netip.Prefix, before bool) uint32 {
	for bits := p.Bits(); bits >= 0; bits-- {
		outer, err := p.Addr().Prefix(bits)
		if err != nil {
			break
		}
		id := in.at(outer)
		if old, ok := in.moved[outer]; ok && before {
			id = old
		}
		if id != nil {
			return id.number
		}
	}
	return World
}

// raiseMoved raises the ids that treat the ends of a move differently.
func (in *increment) raiseMoved(raised map[uint32]struct{}, moved map[move]struct{}) {
	if len(moved) == 0 {
		return
	}
	numbers := map[uint32]*identity{}
	for m := range moved {
		numbers[m.from], numbers[m.to] = nil, nil
	}
	for _, id := range in.population.identities {
		if _, ok := numbers[id.number]; ok {
			numbers[id.number] = id
		}
	}
	for _, s := range in.intents {
		if _, ok := raised[s.number]; ok {
			continue
		}
		for m := range moved {
			if !slices.Equal(s.entries.peers[numbers[m.from]], s.entries.peers[numbers[m.to]]) {
				raised[s.number] = struct{}{}
				break
			}
		}
	}
}

// commitPolicies writes Result.Invalid and Result.Conditions and reports whether the latter has changed.
func (in *increment) commitPolicies() (conditions bool) {
	for key := range in.dirty.policies {
		o := in.objects[key]
		delete(in.result.Invalid, key)
		if o != nil && o.err != nil {
			in.result.Invalid[key] = o.err
		}
		if key.Namespace != "" {
			continue
		}
		conditions = true
		if o == nil {
			delete(in.result.Conditions, key.Name)
		} else {
			in.result.Conditions[key.Name] = o.condition
		}
	}
	return conditions
}
