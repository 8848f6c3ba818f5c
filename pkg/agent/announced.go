// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"time"

	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/state"
)

// announceWait is how long a source that need not know every pod has to tell of one that has started. A watched directory is read at most
// half a second after a change.
const announceWait = 2 * time.Second

// waits reports whether the pod of a record keeps the policies that it started with, because the source has not told of it: judged by its
// record alone, without the labels that only the source knows, it could be less isolated than it is to be (promise 2). That is over when the
// source tells, and where the source need not know every pod, after announceWait. A pod that started open has nothing to lose.
func (p *pipeline) waits(l localPod, s *state.Snapshot) bool {
	switch {
	case s.Pods[l.key] != nil, l.record.Name == "", l.record.Policy == endpoint.StartedOpen:
		return false
	case s.KnowsAllPods:
		return true
	case len(l.record.Labels) > 0: // by the runtime: nobody else will tell
		return false
	}
	end := l.record.Created.Add(announceWait)
	if !p.now().Before(end) {
		return false
	}
	if p.announceEnd.IsZero() || end.Before(p.announceEnd) {
		p.announceEnd = end
	}
	return true
}

// announced returns the pods that can be judged, and how many have to wait. Those that wait are compiled again when their time is over.
func (p *pipeline) announced(s *state.Snapshot) (pods []localPod, waiting int) {
	p.announceEnd = time.Time{}
	for _, l := range p.local {
		if p.waits(l, s) {
			waiting++
		} else {
			pods = append(pods, l)
		}
	}
	return pods, waiting
}
