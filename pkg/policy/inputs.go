// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"iter"
	"maps"
	"net/netip"
	"slices"

	"github.com/margay-cni/margay/pkg/state"
)

// member is a pod as it was taken in.
type member struct {
	pod   *state.Pod
	class *class // nil: it takes no part
}

// take takes in what is another object than at the last call.
func (in *increment) take(s *state.Snapshot) {
	j, seen := &s.Journals, &in.seen
	follow(s.Namespaces, j.Namespaces, seen.Namespaces, maps.Keys(in.namespaces), in.takeNamespace)
	follow(s.Pods, j.Pods, seen.Pods, maps.Keys(in.pods), in.takePod)
	in.dropClasses()
	follow(s.Nodes, j.Nodes, seen.Nodes, maps.Keys(in.nodes), in.takeNode)
	follow(s.NetworkPolicies, j.NetworkPolicies, seen.NetworkPolicies, in.objectKeys(false), func(key state.Key, p *state.NetworkPolicy) {
		if old := in.objects[key]; p == nil {
			in.replace(old, nil, nil)
		} else if old == nil || old.source != any(p) {
			in.replace(old, parseObject(p), p)
		}
	})
	follow(byKey(s.ClusterNetworkPolicies), state.Journal[state.Key]{}, state.Journal[state.Key]{}, in.objectKeys(true), func(key state.Key, p *state.ClusterNetworkPolicy) {
		if old := in.objects[key]; p == nil {
			in.replace(old, nil, nil)
		} else if old == nil || old.source != any(p) {
			in.replace(old, parseCluster(p), p)
		}
	})
	in.seen = s.Journals
}

// byKey are ClusterNetworkPolicies, which are few, under keys without a namespace.
func byKey(policies map[string]*state.ClusterNetworkPolicy) map[state.Key]*state.ClusterNetworkPolicy {
	out := make(map[state.Key]*state.ClusterNetworkPolicy, len(policies))
	for name, p := range policies {
		out[state.Key{Name: name}] = p
	}
	return out
}

// objectKeys are the keys of the policies that are known, of one of the two kinds.
func (in *increment) objectKeys(cluster bool) iter.Seq[state.Key] {
	return func(yield func(state.Key) bool) {
		for key := range in.objects {
			if (key.Namespace == "") == cluster && !yield(key) {
				return
			}
		}
	}
}

// follow calls take for every object that may be another one than before: those that the journal names since the one that was seen last or,
// where it does not know, all that there are and all that there were. An object that is gone is nil.
func follow[K comparable, V any](now map[K]*V, journal, seen state.Journal[K], known iter.Seq[K], take func(K, *V)) {
	if keys, ok := journal.Since(seen); ok {
		for _, k := range keys {
			take(k, now[k])
		}
		return
	}
	for k := range known {
		if now[k] == nil {
			take(k, nil)
		}
	}
	for k, v := range now {
		take(k, v)
	}
}

func (in *increment) takeNamespace(name string, now *state.Namespace) {
	old := in.namespaces[name]
	if now == nil {
		delete(in.namespaces, name)
	} else {
		in.namespaces[name] = now
	}
	if (old == nil) != (now == nil) || old != nil && !maps.Equal(old.Labels, now.Labels) {
		in.dirty.namespaces[name] = struct{}{}
		in.dirty.restricted[name] = struct{}{}
	}
}

func (in *increment) takePod(key state.Key, p *state.Pod) {
	old, ok := in.pods[key]
	switch {
	case ok && old.pod == p:
	case ok && p != nil && samePod(old.pod, p):
		in.pods[key] = member{p, old.class}
		in.exchange(old.pod, p)
	default:
		if ok {
			in.removePod(old)
		}
		if p != nil {
			in.addPod(p)
		}
	}
}

// samePod reports whether policy cannot tell the pods of one key apart.
func samePod(a, b *state.Pod) bool {
	return a.Local == b.Local && a.HostNetwork == b.HostNetwork && a.Finished == b.Finished && a.Terminating == b.Terminating &&
		slices.Equal(a.IPs, b.IPs) && slices.Equal(a.Ports, b.Ports) && maps.Equal(a.Labels, b.Labels)
}

// exchange puts another object for the same pod in the place of the one that is known.
func (in *increment) exchange(old, now *state.Pod) {
	if in.local[old.Key] == old {
		in.local[old.Key] = now
	}
	for _, a := range old.IPs {
		in.claims.exchange(canonical(a), old, now)
	}
}

func (in *increment) addPod(p *state.Pod) {
	m := member{pod: p}
	if in.inUse[p.Namespace]++; in.inUse[p.Namespace] == 1 {
		in.dirty.restricted[p.Namespace] = struct{}{}
	}
	switch {
	case takesPart(p):
		m.class = in.join(p)
		for _, a := range p.IPs {
			if a = canonical(a); a.IsValid() {
				in.claims.add(a, p)
				in.dirty.addresses[a] = struct{}{}
			}
		}
	case !p.Finished:
		in.claimNode(p.IPs)
	}
	in.pods[p.Key] = m
}

func (in *increment) removePod(m member) {
	p := m.pod
	if in.inUse[p.Namespace]--; in.inUse[p.Namespace] == 0 {
		delete(in.inUse, p.Namespace)
		in.dirty.restricted[p.Namespace] = struct{}{}
	}
	switch {
	case m.class != nil:
		in.leave(p, m.class)
		for _, a := range p.IPs {
			a = canonical(a)
			in.claims.remove(a, p)
			in.dirty.addresses[a] = struct{}{}
		}
	case !p.Finished:
		in.releaseNode(p.IPs)
	}
	delete(in.pods, p.Key)
}

// join makes the pod one of its class.
func (in *increment) join(p *state.Pod) *class {
	of := classOf(p)
	if known := in.classes[of.key]; known != nil {
		of = known
	} else {
		in.classes[of.key] = of
	}
	of.pods++
	if p.Local {
		in.local[p.Key] = p
		sub := in.subjects[of]
		if sub == nil {
			sub = &subject{}
			in.subjects[of] = sub
			in.dirty.subjects[of] = struct{}{}
		}
		sub.pods++
	}
	return of
}

func (in *increment) leave(p *state.Pod, of *class) {
	if of.pods--; of.pods == 0 {
		in.dirty.classes = append(in.dirty.classes, of) // perhaps another pod joins it
	}
	if p.Local {
		delete(in.local, p.Key)
		in.subjects[of].pods--
		in.dirty.subjects[of] = struct{}{}
	}
}

// dropClasses forgets the classes that have no pod any more.
func (in *increment) dropClasses() {
	for _, of := range in.dirty.classes {
		if of.pods == 0 {
			delete(in.classes, of.key)
		}
	}
}

func (in *increment) takeNode(name string, now *state.Node) {
	old := in.nodes[name]
	if old == now {
		return
	}
	if old != nil {
		in.releaseNode(slices.Collect(nodeAddresses(old)))
	}
	if now == nil {
		delete(in.nodes, name)
	} else {
		in.claimNode(slices.Collect(nodeAddresses(now)))
		in.nodes[name] = now
	}
	in.dirty.nodes = true
}

// claimNode says that a node has the addresses, releaseNode that it has them no more: no pod owns them meanwhile.
func (in *increment) claimNode(list []netip.Addr) {
	for _, a := range list {
		a = canonical(a)
		in.nodeClaims[a]++
		in.dirty.addresses[a] = struct{}{}
	}
}

func (in *increment) releaseNode(list []netip.Addr) {
	for _, a := range list {
		a = canonical(a)
		if in.nodeClaims[a]--; in.nodeClaims[a] == 0 {
			delete(in.nodeClaims, a)
		}
		in.dirty.addresses[a] = struct{}{}
	}
}

// replace puts one policy in the place of another; either may be nil.
func (in *increment) replace(old, now *object, source any) {
	if old != nil {
		in.removeObject(old)
		delete(in.objects, old.key)
		in.dirty.policies[old.key] = struct{}{}
	}
	if now != nil {
		in.compiler.parsed++
		now.source, now.serial = source, in.compiler.parsed
		in.addObject(now)
		in.objects[now.key] = now
		in.dirty.policies[now.key] = struct{}{}
	}
}

func (in *increment) addObject(o *object) {
	if o.tier != networkTier {
		at, _ := slices.BinarySearchFunc(in.cluster, o, compareObjects)
		in.cluster = slices.Insert(in.cluster, at, o)
		in.dirty.cluster = true
		return
	}
	list := in.network[o.key.Namespace]
	at, _ := slices.BinarySearchFunc(list, o, compareObjects)
	in.network[o.key.Namespace] = slices.Insert(list, at, o)
	in.selects(o)
}

func (in *increment) removeObject(o *object) {
	if o.tier != networkTier {
		in.cluster = slices.DeleteFunc(in.cluster, func(other *object) bool { return other == o })
		in.dirty.cluster = true
		return
	}
	ns := o.key.Namespace
	list := slices.DeleteFunc(in.network[ns], func(other *object) bool { return other == o })
	if in.network[ns] = list; len(list) == 0 {
		delete(in.network, ns)
	}
	in.selects(o)
}

// selects notes whom a NetworkPolicy that came or goes is about.
func (in *increment) selects(o *object) {
	in.dirty.restricted[o.key.Namespace] = struct{}{}
	for of := range in.subjects {
		if of.namespace == o.key.Namespace && (o.subject == nil || o.subject.Matches(of.labels)) {
			in.dirty.subjects[of] = struct{}{}
		}
	}
}
