// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"maps"
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/labels"
)

// subject is a class that has local pods, and what policies say about them.
type subject struct {
	pods int // local ones
	// variants are what the selecting policies say, by direction; nil: nothing is denied, or closed.
	variants [2]*variant
	// closed says that a ClusterNetworkPolicy could deny, if only the labels of the namespace were known: only traffic with the node is
	// allowed then (PolicyNodeOnly).
	closed [2]bool
	// objects are the policies whose rules may decide.
	objects [2][]*object
}

// assign finds the policies that select the subjects that have changed, and from them their intents.
func (in *increment) assign() {
	for of := range in.subjects {
		_, labels := in.dirty.namespaces[of.namespace]
		if in.dirty.cluster || labels && len(in.cluster) > 0 {
			in.dirty.subjects[of] = struct{}{}
		}
	}
	for of := range in.dirty.subjects {
		sub := in.subjects[of]
		if sub == nil {
			continue // came and went
		}
		old := *sub
		sub.variants, sub.closed, sub.objects = [2]*variant{}, [2]bool{}, [2][]*object{}
		if sub.pods > 0 {
			in.decide(of, sub)
		} else {
			delete(in.subjects, of)
		}
		for d, v := range old.variants {
			in.deactivate(old.objects[d], Direction(d))
			in.releaseVariant(v)
		}
	}
}

// decide fills in what policies say about a class.
func (in *increment) decide(of *class, sub *subject) {
	selected, unclear := in.selecting(of)
	sub.closed = unclear
	for d, objects := range selected {
		if unclear[d] || len(objects) == 0 {
			continue
		}
		v := in.holdVariant(Direction(d), objects, of)
		if v.intent == nil { // nothing is denied
			in.releaseVariant(v)
			continue
		}
		sub.variants[d], sub.objects[d] = v, objects
		in.activate(objects, Direction(d))
	}
}

// selecting returns the policies that say something about pods of a class, by direction and in their order. It is unclear where a
// ClusterNetworkPolicy could deny, if only the labels of the namespace were known: then nothing may be allowed (promise 2).
func (in *increment) selecting(of *class) (selected [2][]*object, unclear [2]bool) {
	network := in.network[of.namespace]
	for _, o := range in.cluster {
		if o.tier == baselineTier && network != nil {
			selected, network = selectNetwork(selected, network, of), nil
		}
		if o.namespaces == nil || !o.subject.Matches(of.labels) {
			continue
		}
		reaches, known := in.reaches(o, of.namespace)
		for d := range selected {
			unclear[d] = unclear[d] || !known && o.denies[d]
			if reaches && len(o.rules[d]) > 0 {
				selected[d] = append(selected[d], o)
			}
		}
	}
	return selectNetwork(selected, network, of), unclear
}

// selectNetwork appends the NetworkPolicies that isolate pods of a class.
func selectNetwork(selected [2][]*object, network []*object, of *class) [2][]*object {
	for _, o := range network {
		if o.subject != nil && !o.subject.Matches(of.labels) {
			continue
		}
		for d := range selected {
			if o.isolates[d] {
				selected[d] = append(selected[d], o)
			}
		}
	}
	return selected
}

// activate counts what the policies name in one direction: rules, prefixes, nodes. What is not counted by anyone need not be known here.
func (in *increment) activate(objects []*object, d Direction) {
	for _, o := range objects {
		for _, r := range o.rules[d] {
			in.rules.add(r.name, r.ref)
			for _, p := range r.peers {
				if p.nodes != nil {
					in.nodePeers.add(p.key, p.nodes)
				}
				for _, prefix := range p.prefixes() {
					in.named.add(prefix, struct{}{})
				}
			}
		}
		if o.tier == networkTier {
			in.rules.add(o.isolationName[d], o.isolation[d])
		}
	}
}

// deactivate takes back activate.
func (in *increment) deactivate(objects []*object, d Direction) {
	for _, o := range objects {
		for _, r := range o.rules[d] {
			in.rules.remove(r.name)
			for _, p := range r.peers {
				if p.nodes != nil {
					in.nodePeers.remove(p.key)
				}
				for _, prefix := range p.prefixes() {
					in.named.remove(prefix)
				}
			}
		}
		if o.tier == networkTier {
			in.rules.remove(o.isolationName[d])
		}
	}
}

// prefixes are those that an ipBlock names.
func (p *peer) prefixes() []netip.Prefix {
	if !p.block.IsValid() {
		return nil
	}
	return append(p.except[:len(p.except):len(p.except)], p.block)
}

// reaches reports whether the subject of a ClusterNetworkPolicy selects the namespace, and whether that can be known.
func (in *increment) reaches(o *object, namespace string) (reaches, known bool) {
	if o.namespaces == nil || o.namespaces.Empty() {
		return o.namespaces != nil, true
	}
	ns, known := in.namespaces[namespace]
	return known && o.namespaces.Matches(labels.Set(ns.Labels)), known
}

// restrict brings Result.Restricted and Result.RestrictedElsewhere to what they should be, and reports whether that changed anything.
func (in *increment) restrict() (changed bool) {
	r := in.result
	if in.dirty.cluster {
		for name := range r.Restricted {
			in.dirty.restricted[name] = struct{}{}
		}
	}
	for name := range in.dirty.restricted {
		_, known := in.namespaces[name]
		policies := len(in.network[name]) > 0
		was, listed := r.Restricted[name]
		if !known && !policies && in.inUse[name] == 0 {
			changed = changed || listed
			delete(r.Restricted, name)
			continue
		}
		now := policies || slices.ContainsFunc(in.cluster, func(o *object) bool { return in.mayRestrict(o, name) })
		changed = changed || !listed || was != now
		r.Restricted[name] = now
	}
	elsewhere := slices.Contains(slices.Collect(maps.Values(r.Restricted)), true) ||
		slices.ContainsFunc(in.cluster, func(o *object) bool { return in.mayRestrict(o, "") })
	changed = changed || elsewhere != r.RestrictedElsewhere
	r.RestrictedElsewhere = elsewhere
	return changed
}

// mayRestrict reports whether a ClusterNetworkPolicy could deny something to a pod in the namespace, whose labels may be unknown.
func (in *increment) mayRestrict(o *object, namespace string) bool {
	reaches, known := in.reaches(o, namespace)
	return (reaches || !known) && (o.denies[Egress] || o.denies[Ingress])
}
