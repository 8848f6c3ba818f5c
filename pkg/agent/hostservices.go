// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/margay-cni/margay/pkg/link"
	"github.com/margay-cni/margay/pkg/node"
)

// loopback is the index of the loopback device in every network namespace.
const loopback = 1

// leastMTU is taken where no device's MTU is known.
const leastMTU = 1280

// hostLinker makes the pair by which the host's own sockets reach services, and the routes into it; link.Conn does both.
type hostLinker interface {
	EnsureHostPair() (host, service link.Device, err error)
	SyncServiceRoutes(device int, want []link.ServiceRoute, keep bool) (changed int, err error)
}

// ownAddr is the address of one family that other nodes know this one by; the zero Addr if it has none.
func ownAddr(r *node.Result, v6 bool) netip.Addr {
	for _, a := range r.Own {
		if a.Is6() == v6 {
			return a
		}
	}
	return netip.Addr{}
}

// serviceRoutes are the host's routes to service addresses: the configured ranges, and every address outside them that is nobody's. What is
// sent to a node's address arrives there, and the services are served there (an external address that is a node's, NodePorts). The result
// is nil before the services are known.
func (p *pipeline) serviceRoutes() []link.ServiceRoute {
	if p.serviceResult == nil {
		return nil
	}
	want := map[netip.Prefix]bool{}
	for _, c := range p.serviceCIDRs {
		want[c] = true
	}
	inside := func(a netip.Addr) bool {
		return slices.ContainsFunc(p.serviceCIDRs, func(c netip.Prefix) bool { return c.Contains(a) })
	}
	for f := range p.serviceResult.Frontends {
		if !f.Addr.IsUnspecified() && !f.Addr.IsLoopback() && !inside(f.Addr) && !p.isNodes(f.Addr) {
			want[netip.PrefixFrom(f.Addr, f.Addr.BitLen())] = true
		}
	}
	routes := make([]link.ServiceRoute, 0, len(want))
	for c := range want {
		if source := ownAddr(p.nodeResult, c.Addr().Is6()); source.IsValid() {
			routes = append(routes, link.ServiceRoute{Dst: c, Source: source, MTU: cmp.Or(p.nodeResult.PodMTU, leastMTU)})
		}
	}
	slices.SortFunc(routes, func(x, y link.ServiceRoute) int { return x.Dst.Compare(y.Dst) })
	return routes
}

// isNodes reports whether the address is this node's or another's.
func (p *pipeline) isNodes(a netip.Addr) bool {
	_, own := p.facts.addrs[a]
	_, others := p.nodeResult.Addresses[a]
	return own || others
}

// adoptHost lets a predecessor's pair work on while nobody knows the services. An upgrade brings it this build's programs.
func (w *nodeWatcher) adoptHost(s *survey, verify bool) (changed bool) {
	host, service := s.named(link.HostDevice), s.named(link.ServiceDevice)
	if host == nil || service == nil || !host.up || !service.up {
		w.host, w.hostPeer = 0, 0
		return false
	}
	return w.attachHost(host.index, service.index, verify)
}

// applyHost makes the pair and the routes into it. A route comes after what answers behind it.
func (w *nodeWatcher) applyHost(s *survey, verify bool) (changed bool) {
	if w.want.services == nil {
		return w.adoptHost(s, verify)
	}
	have := s.named(link.HostDevice)
	fits := have != nil && have.up && have.index == w.host && s.named(link.ServiceDevice) != nil
	if !fits || verify {
		host, service, err := w.network.EnsureHostPair()
		if err != nil {
			w.failHost(err)
			return true
		}
		if have == nil || have.index != host.Index {
			w.log.Info("pair by which the node's own sockets reach services is made", "ifName", host.Name)
			changed = true
		}
		if w.attachHost(host.Index, service.Index, true) {
			changed = true
		}
	}
	if w.host == 0 {
		return true
	}
	return w.syncServiceRoutes(s, changed || verify) || changed
}

func (w *nodeWatcher) failHost(err error) {
	if w.hostErr == nil || w.hostErr.Error() != err.Error() {
		w.log.Error("the node's own sockets do not reach services", "err", err)
	}
	w.hostErr, w.host, w.hostPeer = err, 0, 0
}

// attachHost makes sure that the programs are there, and that w.host says so.
func (w *nodeWatcher) attachHost(host, service int, verify bool) (changed bool) {
	if w.host == host && w.hostPeer == service && !verify {
		return false
	}
	missing := w.attach.HostAttached(service)
	if missing != nil {
		if err := w.attach.AttachHost(service); err != nil {
			w.failHost(err)
			return true
		}
		if w.host == host {
			w.log.Warn("programs for the node's own sockets were removed by somebody and are attached again", "err", missing,
				"present", present(service), "loopback", present(loopback))
		} else {
			w.log.Info("from_host and to_loopback attached", "ifName", link.ServiceDevice)
		}
	}
	w.host, w.hostPeer, w.hostErr = host, service, nil
	return missing != nil
}

// syncServiceRoutes brings the routes into the pair to what is wanted.
func (w *nodeWatcher) syncServiceRoutes(s *survey, verify bool) (changed bool) {
	have, differs := s.serviceRoutes[w.host], verify || len(s.serviceRoutes) > 1
	for _, r := range w.want.services {
		differs = differs || !have[r]
	}
	if !differs && (w.want.hold || len(have) == len(w.want.services)) {
		w.hostErr = nil
		return false
	}
	count, err := w.network.SyncServiceRoutes(w.host, w.want.services, w.want.hold)
	if err != nil && (w.hostErr == nil || w.hostErr.Error() != err.Error()) {
		w.log.Error("routes to services are not as they should be", "err", err)
	}
	w.hostErr = err
	return count > 0
}
