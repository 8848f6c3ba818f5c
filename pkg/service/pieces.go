// SPDX-License-Identifier: Apache-2.0

package service

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/margay-cni/margay/pkg/state"
)

// take removes a piece from the result.
func (in *increment) take(p *piece, changes *Changes) {
	for _, id := range p.ids {
		changes.local(id, in.result.LocalBackends[id])
		delete(in.result.LocalBackends, id)
	}
	for _, n := range p.lists {
		changes.list(n, in.result.Lists[n], in.result.Tables[n])
		delete(in.result.Lists, n)
		delete(in.result.Tables, n)
	}
	for _, m := range p.members {
		changes.Serving[m] = struct{}{}
		delete(in.result.Serving, m)
	}
	for _, s := range p.ranges {
		changes.SourceRanges[s] = struct{}{}
		delete(in.result.SourceRanges, s)
	}
	for _, a := range p.addrs {
		changes.ClusterAddrs[a] = struct{}{}
		if in.addrs[a]--; in.addrs[a] == 0 {
			delete(in.addrs, a)
			delete(in.result.ClusterAddrs, a)
		}
	}
	for _, c := range p.claims {
		changes.Frontends[c.frontend] = struct{}{}
		in.claims[c.frontend] = slices.DeleteFunc(in.claims[c.frontend], func(o claim) bool { return o.service.Name == p.service.Key })
	}
	delete(in.unserved, p.service.Key)
	delete(in.checks, p.service.Key)
	delete(in.problems, p.service.Key)
}

// add puts a piece, whose content is in out, into the result.
func (in *increment) add(key state.Key, p *piece, out *Result, changes *Changes) {
	in.pieces[key] = p
	for id, backends := range out.LocalBackends {
		changes.local(id, nil)
		in.result.LocalBackends[id] = backends
		p.ids = append(p.ids, id)
	}
	for n, slots := range out.Lists {
		changes.list(n, nil, Table{})
		in.result.Lists[n] = slots
		p.lists = append(p.lists, n)
	}
	maps.Copy(in.result.Tables, out.Tables)
	p.members = make([]Member, 0, len(out.Serving)) // most of what a piece has: no room to grow
	for m, in2 := range out.Serving {
		changes.Serving[m] = struct{}{}
		in.result.Serving[m] = in2
		p.members = append(p.members, m)
	}
	for s := range out.SourceRanges {
		changes.SourceRanges[s] = struct{}{}
		in.result.SourceRanges[s] = struct{}{}
		p.ranges = append(p.ranges, s)
	}
	for a := range out.ClusterAddrs {
		changes.ClusterAddrs[a] = struct{}{}
		in.result.ClusterAddrs[a] = struct{}{}
		in.addrs[a]++
		p.addrs = append(p.addrs, a)
	}
	for i, c := range p.claims {
		c.order = i
		changes.Frontends[c.frontend] = struct{}{}
		in.claims[c.frontend] = append(in.claims[c.frontend], c)
	}
	if p.unserved {
		in.unserved[key] = struct{}{}
	}
	if len(p.checks) > 0 {
		in.checks[key] = p.checks
	}
	if len(p.problems) > 0 {
		in.problems[key] = p.problems
	}
}

// local and list note what was there before the first change.
func (c *Changes) local(id uint32, before []netip.AddrPort) {
	if _, noted := c.LocalBackends[id]; !noted {
		c.LocalBackends[id] = before
	}
}

func (c *Changes) list(n uint32, slots []netip.AddrPort, t Table) {
	if _, noted := c.Lists[n]; !noted {
		c.Lists[n] = ListBefore{Slots: slots, Table: t}
	}
}

// place gives every frontend whose claims have changed to one of them, as placeFrontends does.
func (in *increment) place(changes *Changes) {
	for f := range changes.Frontends {
		all := in.claims[f]
		delete(in.lost, f)
		if len(all) == 0 {
			delete(in.claims, f)
			delete(in.result.Frontends, f)
			continue
		}
		slices.SortFunc(all, claim.compare)
		in.result.Frontends[f] = all[0].service
		for _, c := range all[1:] {
			if c.service.ID != all[0].service.ID {
				in.lost[f] = append(in.lost[f], c)
			}
		}
	}
}

// compare orders claims as Compile meets them.
func (c claim) compare(o claim) int {
	return cmp.Or(cmp.Compare(c.kind, o.kind), compareKeys(c.service.Name, o.service.Name), cmp.Compare(c.order, o.order))
}

// collect makes the result's lists of health checks and problems. Few services have any.
func (in *increment) collect() {
	in.result.HealthChecks, in.result.Problems = nil, nil
	for _, key := range slices.SortedFunc(maps.Keys(in.checks), compareKeys) {
		in.result.HealthChecks = append(in.result.HealthChecks, in.checks[key]...)
	}
	for _, key := range slices.SortedFunc(maps.Keys(in.problems), compareKeys) {
		in.result.Problems = append(in.result.Problems, in.problems[key]...)
	}
	var lost []claim
	for _, claims := range in.lost {
		lost = append(lost, claims...)
	}
	slices.SortFunc(lost, claim.compare)
	for _, c := range lost {
		in.result.Problems = append(in.result.Problems, c.problem(in.result.Frontends[c.frontend]))
	}
	slices.SortStableFunc(in.result.Problems, func(a, b Problem) int { return compareKeys(a.Service, b.Service) })
}

// problem is that of a claim on what another service holds.
func (c claim) problem(holder Service) Problem {
	return Problem{Service: c.service.Name, Message: fmt.Sprintf("%s is already served by %s", c.frontend, holder.Name)}
}

// releaseOld takes back the numbers of the old pieces' ports that are not in use any more; all that are remembered at the first Update.
func (r *run) releaseOld(old map[state.Key]*piece, first bool) {
	if first {
		r.releaseUnused()
		return
	}
	var ports []portKey
	for _, p := range old {
		ports = append(ports, p.ports...)
	}
	slices.SortFunc(ports, portKey.compare)
	r.release(ports)
}
