// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"github.com/margay-cni/margay/pkg/netfilter"
)

// notracker keeps conntrack, where it is in use, away from the overlay's outer packets, so that its full table does not stop them;
// pkg/netfilter does it.
type notracker interface {
	EnsureNotrack(port uint16) (changed bool, err error)
	Remove() (removed bool, err error)
}

// systemNetfilter is the netfilter of the agent's network namespace.
type systemNetfilter struct{}

func (systemNetfilter) EnsureNotrack(port uint16) (bool, error) { return netfilter.EnsureNotrack(port) }
func (systemNetfilter) Remove() (bool, error)                   { return netfilter.Remove() }

// applyNotrack looks after the rules at each full round: conntrack comes into use, or who reloads the node's firewall takes them away, and no
// event says so. What fails is tried again then, and hinders nothing.
func (w *nodeWatcher) applyNotrack(verify bool) {
	if w.rules == nil || !verify {
		return
	}
	known := w.notrackErr
	switch {
	case w.want.overlay != nil:
		var changed bool
		if changed, w.notrackErr = w.rules.EnsureNotrack(w.vxlan.Port); changed && w.notrackErr == nil {
			w.log.Info("conntrack is kept away from the overlay", "port", w.vxlan.Port)
		}
	case !w.want.hold:
		var removed bool
		if removed, w.notrackErr = w.rules.Remove(); removed {
			w.log.Info("there is no overlay any more; its conntrack rules are removed")
		}
	}
	if err := w.notrackErr; err != nil && (known == nil || known.Error() != err.Error()) {
		w.log.Warn("conntrack rules of the overlay are not as they should be", "err", err)
	}
}

// notrackProblems is the same for the status.
func (w *nodeWatcher) notrackProblems() []string {
	if w.notrackErr == nil {
		return nil
	}
	return []string{"conntrack rules of the overlay, which a full conntrack table stops without them: " + w.notrackErr.Error()}
}
