// SPDX-License-Identifier: Apache-2.0

package node

import (
	"net/netip"
	"reflect"
	"slices"

	"github.com/margay-cni/margay/pkg/state"
)

// before is what Update goes on from.
type before struct {
	*compilation
	journals state.Journals
	hold     bool
	// outside has the pods that got prefixes of their own.
	outside map[state.Key]struct{}
}

// Update is Compile for whoever follows a source: where the snapshot's journals say that nothing has changed that a compilation reads, it
// returns the result that it returned the last time. Of pods only those outside their nodes' ranges are read, which are few.
func (c *Compiler) Update(in Input) *Result {
	if c.unchanged(in) {
		c.last.journals = in.Snapshot.Journals
		return c.last.result
	}
	return c.Compile(in)
}

func (c *Compiler) unchanged(in Input) bool {
	l := c.last
	if l == nil || l.hold != in.Hold || !in.Snapshot.Journals.Nodes.Same(l.journals.Nodes) || !reflect.DeepEqual(l.machine, in.Machine) {
		return false
	}
	pods, known := in.Snapshot.Journals.Pods.Since(l.journals.Pods)
	return known && !slices.ContainsFunc(pods, func(key state.Key) bool {
		_, was := l.outside[key]
		pod := in.Snapshot.Pods[key]
		return was || pod != nil && len(l.outsideOf(pod)) > 0
	})
}

// outsideOf are the addresses of a pod of another node that are outside that node's ranges.
func (b *compilation) outsideOf(pod *state.Pod) (out []netip.Addr) {
	p := b.peers[pod.Node]
	if p == nil || pod.Local || pod.HostNetwork || pod.Finished {
		return nil
	}
	for _, ip := range pod.IPs {
		_, isNode := b.result.Addresses[ip]
		if !isNode && !slices.Contains(b.machine.Addresses, ip) &&
			!slices.ContainsFunc(p.cidrs, func(c netip.Prefix) bool { return c.Contains(ip) }) {
			out = append(out, ip)
		}
	}
	return out
}
