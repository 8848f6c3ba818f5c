// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/labels"
)

// peerUse is a peer that intents name, with the identities that it matches.
type peerUse struct {
	peer    *peer
	matches identities
	users   map[*shared]struct{}
}

// everyPod stands for the peers of a statement about everybody whose ports pods resolve.
var everyPod = &peer{key: "every pod", namespaces: labels.Everything(), pods: labels.Everything()}

// matched are the peers whose identities the statement may treat differently from everybody.
func (s *statement) matched() []*peer {
	switch {
	case !s.anyPeer:
		return s.peers
	case len(s.named) > 0:
		return []*peer{everyPod}
	}
	return nil
}

// matchPeers brings the peers in use to the identities that there are, and notes which intents that concerns.
func (in *increment) matchPeers() {
	for _, use := range in.peers {
		for id := range in.dirty.unused {
			in.setMatch(use, id, false)
		}
		for id := range in.dirty.fresh {
			in.setMatch(use, id, in.matches(use.peer, id))
		}
		if use.peer.namespaces == nil || use.peer.namespaces.Empty() {
			continue
		}
		for ns := range in.dirty.namespaces {
			for id := range in.population.byNamespace[ns] {
				in.setMatch(use, id, in.matches(use.peer, id))
			}
		}
	}
	for s := range in.dirty.intents {
		if in.intents[s.hash] == s {
			in.usePeers(s)
		}
	}
	for s := range in.dirty.intents {
		if in.intents[s.hash] != s {
			in.leavePeers(s)
		}
	}
}

func (in *increment) setMatch(use *peerUse, id *identity, now bool) {
	if _, was := use.matches[id]; was == now {
		return
	}
	if now {
		use.matches[id] = struct{}{}
	} else {
		delete(use.matches, id)
	}
	for s := range use.users {
		if s.entries.dirty == nil {
			s.entries.dirty = identities{}
		}
		s.entries.dirty[id] = struct{}{}
		in.dirty.intents[s] = struct{}{}
	}
}

// usePeers registers the intent with its peers, unless it is.
func (in *increment) usePeers(s *shared) {
	for _, list := range [][]statement{s.admin, s.rules, s.baseline} {
		for i := range list {
			for _, p := range list[i].matched() {
				use := in.peers[p.key]
				if use == nil {
					use = &peerUse{peer: p, matches: in.match(p), users: map[*shared]struct{}{}}
					in.peers[p.key] = use
				}
				use.users[s] = struct{}{}
			}
		}
	}
}

func (in *increment) leavePeers(s *shared) {
	for _, list := range [][]statement{s.admin, s.rules, s.baseline} {
		for i := range list {
			for _, p := range list[i].matched() {
				use := in.peers[p.key]
				if use == nil {
					continue
				}
				if delete(use.users, s); len(use.users) == 0 {
					delete(in.peers, p.key)
				}
			}
		}
	}
}

// matches reports whether the peer matches an identity.
//
// A block matches whole regions. That is exact, because its own prefix and its exceptions are regions: the longest named prefix that holds
// an address is inside the block if and only if the address is.
func (in *increment) matches(of *peer, id *identity) bool {
	switch {
	case of.block.IsValid():
		return id.region.IsValid() && of.holds(id.region)
	case of.nodes != nil:
		return id.nodes != "" && slices.Contains(splitKeys(id.nodes), of.key)
	case id.class == nil:
		return false
	case of.namespaces == nil && id.class.namespace != of.namespace:
		return false
	case of.namespaces != nil && !in.namespaceMatches(of, id.class.namespace):
		return false
	}
	return of.pods.Empty() || of.pods.Matches(id.class.labels)
}

// namespaceMatches judges the namespace of pods. The labels of one that the source has not seen are unknown: only the selector that asks
// nothing matches.
func (in *increment) namespaceMatches(of *peer, name string) bool {
	if of.namespaces.Empty() {
		return true
	}
	ns, ok := in.namespaces[name]
	return ok && of.namespaces.Matches(labels.Set(ns.Labels))
}

// holds reports whether a block holds a region.
func (p *peer) holds(region netip.Prefix) bool {
	return contains(p.block, region) && !slices.ContainsFunc(p.except, func(e netip.Prefix) bool { return contains(e, region) })
}

// match returns the identities that the peer matches, by the indexes.
func (in *increment) match(of *peer) identities {
	out := identities{}
	add := func(ids identities) {
		for id := range ids {
			out[id] = struct{}{}
		}
	}
	pods := func(ids identities) {
		for id := range ids {
			if of.pods.Empty() || of.pods.Matches(id.class.labels) {
				out[id] = struct{}{}
			}
		}
	}
	switch {
	case of.block.IsValid():
		for region, ids := range in.population.byRegion {
			if of.holds(region) {
				add(ids)
			}
		}
	case of.nodes != nil:
		add(in.population.byNodes[of.key])
	case of.namespaces == nil:
		pods(in.population.byNamespace[of.namespace])
	case of.namespaces.Empty():
		pods(in.population.pods)
	default:
		for name, ids := range in.population.byNamespace {
			if in.namespaceMatches(of, name) {
				pods(ids)
			}
		}
	}
	return out
}
