// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"

	"github.com/margay-cni/margay/pkg/node"
	"github.com/margay-cni/margay/pkg/policy"
	"github.com/margay-cni/margay/pkg/service"
	"github.com/margay-cni/margay/pkg/state"
)

// numbersVersion is the layout of numbers.json.
const numbersVersion = 1

// numbers is the content of numbers.json: what a restarted agent needs to give the same things the same numbers, and to finish a round
// in which its predecessor was killed.
type numbers struct {
	Version int             `json:"version"`
	Policy  policy.Numbers  `json:"policy"`
	Service service.Numbers `json:"service"`
	Node    node.Numbers    `json:"node"`
	// Routes is the fingerprint of the routes under which the route epoch was last raised.
	Routes string `json:"routes,omitempty"`
	// Raise is in raise.json (pipeline.saveRaise); agents before that noted it here.
	Raise raise `json:"raise,omitzero"`
}

// raise lists epochs.
type raise struct {
	Endpoints []int    `json:"endpoints,omitempty"`
	Services  []uint32 `json:"services,omitempty"`
	Routes    bool     `json:"routes,omitempty"`
	// Outside is for flows that lead to no pod of this node: some may be under way to what has become a service.
	Outside bool `json:"outside,omitempty"`
}

// add adds the epochs of other; the lists stay sorted and without repetition.
func (r *raise) add(other raise) {
	r.Endpoints = union(r.Endpoints, other.Endpoints)
	r.Services = union(r.Services, other.Services)
	r.Routes = r.Routes || other.Routes
	r.Outside = r.Outside || other.Outside
}

func (r raise) empty() bool {
	return len(r.Endpoints) == 0 && len(r.Services) == 0 && !r.Routes && !r.Outside
}

func union[T int | uint32](a, b []T) []T {
	all := slices.Concat(a, b)
	slices.Sort(all)
	return slices.Compact(all)
}

// sortedKeys returns the members of a set.
func sortedKeys[T int | uint32](set map[T]struct{}) []T {
	return slices.Sorted(maps.Keys(set))
}

// importNumbers gives the compilers the numbers of the predecessor. Without a usable file, numbering starts above everything that the
// kernel holds: a number that is in use there never changes its meaning under a flow or a pod.
func (p *pipeline) importNumbers() {
	var n numbers
	err := p.numbers.load(&n)
	if err == nil && n.Version != numbersVersion {
		err = errors.New("numbers.json has another version")
	}
	if err == nil {
		err = errors.Join(p.policies.Import(n.Policy), p.services.Import(n.Service), p.nodes.Import(n.Node))
	}
	if err == nil {
		p.routes, p.raise = n.Routes, n.Raise
		p.importRaise()
		p.kept = n
		return
	}
	if !errors.Is(err, fs.ErrNotExist) {
		p.log.Warn("numbers of the previous run cannot be used; numbering afresh", "err", err)
	}
	p.numberAfresh()
}

// importRaise adds what a predecessor had still to raise.
func (p *pipeline) importRaise() {
	var outstanding raise
	err := p.raiseFile.load(&outstanding)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		p.log.Warn("epochs that the previous run had still to raise cannot be read", "err", err)
	}
	p.raise.add(outstanding)
}

// stamp tells states of the numbers apart.
type stamp struct {
	services uint64
	policies uint64
	nodes    uint64
	routes   string
}

func (p *pipeline) stampNumbers() stamp {
	return stamp{p.services.Uses(), p.policies.Uses(), p.nodes.Uses(), p.routes}
}

// saveNumbers puts the numbers and the outstanding epochs where a restart finds them. If that is impossible, it takes the file away: a
// restart without the file numbers afresh and stays right, one with an old file might give a number a second meaning.
//
// The order of slots is not worth writing all of the numbers after each change: it is brought up to date by some whole rounds, and at the end. A
// restart that finds an old one moves some backends to other slots, which nobody notices.
func (p *pipeline) saveNumbers() {
	now := p.stampNumbers()
	p.numbersErr = p.saveRaise()
	if p.numbersErr == nil && (p.saved == nil || *p.saved != now || p.round.Whole || p.round.Held) {
		var data []byte
		if data, p.numbersErr = p.encodeNumbers(); p.numbersErr == nil {
			_, p.numbersErr = p.numbers.hold(data)
		}
		p.saved = &now
	}
	if p.numbersErr == nil {
		return
	}
	p.saved = nil
	p.log.Error("numbers could not be saved; a restart will number afresh", "err", p.numbersErr)
	if err := os.Remove(p.numbers.path); err != nil && !os.IsNotExist(err) {
		p.log.Error("old numbers could not be removed", "err", err)
	}
}

// encodedNumbers is a part of numbers.json as it was encoded last, and for which uses and moves of its numbers.
type encodedNumbers struct {
	uses, moves uint64
	text        []byte
}

// encode returns the part's text. Most rounds change the other part, or the order of slots only, which is not worth much; exact has it
// brought up to date as well.
func (e *encodedNumbers) encode(uses, moves uint64, exact bool, export func() any) ([]byte, error) {
	if e.text != nil && e.uses == uses && (e.moves == moves || !exact) {
		return e.text, nil
	}
	text, err := json.Marshal(export())
	e.uses, e.moves, e.text = uses, moves, text
	return text, err
}

// encodeNumbers is exportNumbers as JSON.
func (p *pipeline) encodeNumbers() ([]byte, error) {
	exact := p.round.Whole && p.wholes%trust == 0 || p.round.Held || p.saved == nil
	services, err1 := p.serviceNumbers.encode(p.services.Uses(), p.services.Moves(), exact, func() any { return p.services.Export() })
	nodes, err2 := p.nodeNumbers.encode(p.nodes.Uses(), 0, exact, func() any { return p.nodes.Export() })
	policies, err3 := p.policyNumbers.encode(p.policies.Uses(), 0, exact, func() any { return p.policies.Export() })
	routes, err4 := json.Marshal(p.routes)
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return nil, fmt.Errorf("encode numbers: %w", err)
	}
	out := make([]byte, 0, len(services)+len(nodes)+len(policies)+len(routes)+64)
	out = fmt.Appendf(out, `{"version":%d,"policy":`, numbersVersion)
	out = append(append(out, policies...), `,"service":`...)
	out = append(append(out, services...), `,"node":`...)
	out = append(append(out, nodes...), `,"routes":`...)
	return append(append(out, routes...), '}', '\n'), nil
}

// saveRaise notes the epochs that the maps' content calls for but that have not been raised yet, before the first write of a round: after a
// kill in the middle, nothing in the maps would show any more that flows were judged under the old content.
func (p *pipeline) saveRaise() error {
	_, err := p.raiseFile.save(p.raise)
	return err
}

// end leaves the numbers as the last round left them.
func (p *pipeline) end() {
	if p.saved != nil {
		p.saved = nil
		p.saveNumbers()
	}
}

// keepNumbers gives the numbers of things that the source cannot read at the moment back to the compilers, which have just compiled
// without them: what the maps still hold of those must find its numbers again once the source can read it.
func (p *pipeline) keepNumbers() {
	n := p.exportNumbers()
	keepSpace(&n.Policy.Identities, p.kept.Policy.Identities)
	keepSpace(&n.Policy.Policies, p.kept.Policy.Policies)
	keepSpace(&n.Policy.Rules, p.kept.Policy.Rules)
	keepPorts(&n.Service, p.kept.Service)
	policies, services := newCompilers(p.node, p.policies.Limits, p.services.DefaultReturn, p.services.DefaultBalancing)
	if err := errors.Join(policies.Import(n.Policy), services.Import(n.Service)); err != nil {
		p.log.Error("numbers of what the source cannot read are lost", "err", err)
		return
	}
	p.policies, p.services, p.kept = policies, services, n
	p.serviceNumbers = encodedNumbers{} // another compiler counts anew
}

// keepSpace takes over the numbers of names that only old has. Their numbers are free, because old is where new comes from.
func keepSpace(now *policy.Space, old policy.Space) {
	for name, number := range old.Assigned {
		if _, ok := now.Assigned[name]; ok {
			continue
		}
		if now.Assigned == nil {
			now.Assigned = map[string]uint32{}
		}
		now.Assigned[name] = number
		now.Freed = slices.DeleteFunc(now.Freed, func(f policy.Freed) bool { return f.Number == number })
	}
}

// keepPorts takes over the ports that only old has.
func keepPorts(now *service.Numbers, old service.Numbers) {
	type name struct {
		namespace, name, port string
		protocol              state.Protocol
		ipv6                  bool
	}
	known := make(map[name]bool, len(now.Ports))
	for _, p := range now.Ports {
		known[name{p.Namespace, p.Name, p.Port, p.Protocol, p.IPv6}] = true
	}
	for _, p := range old.Ports {
		if known[name{p.Namespace, p.Name, p.Port, p.Protocol, p.IPv6}] {
			continue
		}
		now.Ports = append(now.Ports, p)
		now.Services.Released = slices.DeleteFunc(now.Services.Released, func(n uint32) bool { return n == p.ID })
		now.Lists.Released = slices.DeleteFunc(now.Lists.Released, func(n uint32) bool { return n == p.Cluster || n == p.Local })
	}
}
