// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"fmt"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/margay-cni/margay/pkg/state"
)

// place is where this package's problems are.
const place = "Kubernetes API"

// Problems lists what is wrong now, in a fixed order.
func (s *Source) Problems() []state.Problem {
	var out []state.Problem
	add := func(severity state.Severity, object, format string, args ...any) {
		out = append(out, state.Problem{File: place, Object: object, Message: fmt.Sprintf(format, args...), Severity: severity})
	}
	if since, err := s.gate.state(); !since.IsZero() {
		add(state.Error, "API server", "cannot be reached since %s; what is known stays in force: %s", stamp(since), oneLine(err))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range s.all {
		if k.err == nil {
			continue
		}
		cure := ""
		if apierrors.IsForbidden(k.err) {
			cure = ": the agent's ClusterRole must allow list and watch"
		}
		add(state.Error, k.name, "cannot be read since %s%s: %s", stamp(k.errSince), cure, oneLine(k.err))
	}
	if unread := s.unread(); len(unread) > 0 {
		add(state.Warning, "", "nothing is changed until everything has been read; not yet: %s", strings.Join(unread, ", "))
		return out
	}
	switch n := s.nodes.live[s.cfg.Node]; {
	case n == nil:
		add(state.Warning, "Node "+s.cfg.Node, "is not there: --node must be the name that kubelet registers")
	case len(n.PodCIDRs) == 0:
		add(state.Warning, "Node "+s.cfg.Node, "spec.podCIDRs is empty: this node's pods have no address ranges until the controller manager gives them (--allocate-node-cidrs)")
	}
	if s.serversErr != nil {
		add(state.Warning, "API server", "its addresses are not remembered for the next start: %v", s.serversErr)
	}
	return out
}

// Incomplete lists the kinds that have not been read whole since the start.
func (s *Source) Incomplete() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.unread()
}

func stamp(t time.Time) string {
	return t.UTC().Format(time.RFC3339)
}

func oneLine(err error) string {
	return strings.ReplaceAll(err.Error(), "\n", "; ")
}
