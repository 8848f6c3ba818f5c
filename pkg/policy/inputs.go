// SPDX-License-Identifier: Apache-2.0

package policy

import (
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

func (in *increment) takeNamespaces(s *state.Snapshot) {
	changedKeys(in.namespaces, s.Namespaces, func(name string, old, now *state.Namespace) {
		if now == nil {
			delete(in.namespaces, name)
		} else {
			in.namespaces[name] = now
		}
		if old == nil || now == nil || !maps.Equal(old.Labels, now.Labels) {
			in.dirty.namespaces[name] = struct{}{}
			in.dirty.restricted[name] = struct{}{}
		}
	})
}

func (in *increment) takePods(s *state.Snapshot) {
	defer in.dropClasses()
	same, all := 0, len(in.pods)
	for key, p := range s.Pods {
		old, ok := in.pods[key]
		if ok {
			same++
		}
		switch {
		case ok && old.pod == p:
		case ok && samePod(old.pod, p):
			in.pods[key] = member{p, old.class}
			in.exchange(old.pod, p)
		default:
			if ok {
				in.removePod(old)
			}
			in.addPod(p)
		}
	}
	if same == all {
		return
	}
	for key, old := range in.pods {
		if _, ok := s.Pods[key]; !ok {
			in.removePod(old)
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

func (in *increment) takeNodes(s *state.Snapshot) {
	changedKeys(in.nodes, s.Nodes, func(name string, old, now *state.Node) {
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
	})
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

func (in *increment) takePolicies(s *state.Snapshot) {
	seen, all := 0, len(in.objects)
	for key, p := range s.NetworkPolicies {
		old := in.objects[key]
		if old != nil {
			seen++
		}
		if old == nil || old.source != any(p) {
			in.replace(old, parseObject(p), p)
		}
	}
	for name, p := range s.ClusterNetworkPolicies {
		old := in.objects[state.Key{Name: name}]
		if old != nil {
			seen++
		}
		if old == nil || old.source != any(p) {
			in.replace(old, parseCluster(p), p)
		}
	}
	if seen == all {
		return
	}
	for key, o := range in.objects {
		if !has(s, key) {
			in.replace(o, nil, nil)
		}
	}
}

func has(s *state.Snapshot, policy state.Key) bool {
	if policy.Namespace == "" {
		return s.ClusterNetworkPolicies[policy.Name] != nil
	}
	return s.NetworkPolicies[policy] != nil
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
