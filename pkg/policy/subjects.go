// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"slices"

	"k8s.io/apimachinery/pkg/labels"
)

// restrict fills Result.Restricted and Result.RestrictedElsewhere.
func (w *compilation) restrict() {
	for name := range w.snapshot.Namespaces {
		w.result.Restricted[name] = false
	}
	for key := range w.snapshot.Pods {
		w.result.Restricted[key.Namespace] = false
	}
	for name := range w.objects {
		w.result.Restricted[name] = true
	}
	for name, restricted := range w.result.Restricted {
		w.result.Restricted[name] = restricted || slices.ContainsFunc(w.cluster, func(o *object) bool { return w.mayRestrict(o, name) })
		w.result.RestrictedElsewhere = w.result.RestrictedElsewhere || w.result.Restricted[name]
	}
	w.result.RestrictedElsewhere = w.result.RestrictedElsewhere || slices.ContainsFunc(w.cluster, func(o *object) bool {
		return w.mayRestrict(o, "")
	})
}

// mayRestrict reports whether a ClusterNetworkPolicy could deny something to a pod in the namespace, whose labels may be unknown.
func (w *compilation) mayRestrict(o *object, namespace string) bool {
	reaches, known := w.reaches(o, namespace)
	return (reaches || !known) && (o.denies[Egress] || o.denies[Ingress])
}

// reaches reports whether the subject of a ClusterNetworkPolicy selects the namespace, and whether that can be known.
func (w *compilation) reaches(o *object, namespace string) (reaches, known bool) {
	if o.namespaces == nil || o.namespaces.Empty() {
		return o.namespaces != nil, true
	}
	ns, known := w.snapshot.Namespaces[namespace]
	return known && o.namespaces.Matches(labels.Set(ns.Labels)), known
}

// assign finds, for every local pod, the policies that select it and from them its intents.
func (w *compilation) assign() {
	groups := map[string]*intent{}
	byClass := map[*class][2]*intent{}
	for p, of := range w.classes {
		if !p.Local {
			continue
		}
		intents, ok := byClass[of]
		if !ok {
			intents = w.intentsOf(groups, of)
			byClass[of] = intents
		}
		w.assigned[p.Key] = intents
	}
}

// intentsOf returns the intents of the local pods of a class.
func (w *compilation) intentsOf(groups map[string]*intent, of *class) (intents [2]*intent) {
	selected, unclear := w.selecting(of)
	for d, objects := range selected {
		switch {
		case unclear[d]:
			intents[d] = nodeOnly
			continue
		case len(objects) == 0:
			continue
		}
		if intents[d] = w.intentOf(groups, Direction(d), objects, of); intents[d] == nil {
			continue
		}
		for _, o := range objects {
			w.activate(o, Direction(d))
		}
	}
	return intents
}

// selecting returns the policies that say something about pods of a class, by direction and in their order. It is unclear where a
// ClusterNetworkPolicy could deny, if only the labels of the namespace were known: then nothing may be allowed (promise 2).
func (w *compilation) selecting(of *class) (selected [2][]*object, unclear [2]bool) {
	network := w.objects[of.namespace]
	for _, o := range w.cluster {
		if o.tier == baselineTier && network != nil {
			selected, network = selectNetwork(selected, network, of), nil
		}
		if o.namespaces == nil || !o.subject.Matches(of.labels) {
			continue
		}
		reaches, known := w.reaches(o, of.namespace)
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

func (w *compilation) activate(o *object, d Direction) {
	a, ok := w.active[o]
	if !ok {
		a = &[2]bool{}
		w.active[o] = a
	}
	a[d] = true
}
