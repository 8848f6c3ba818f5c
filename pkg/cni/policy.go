// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/pins"
)

// start is the identity and policy that a pod begins its life with.
type start struct {
	how      string
	identity uint32
	policy   [2]uint32
	flags    uint32 // of the endpoint
}

var (
	openStart     = start{how: endpoint.StartedOpen, identity: bpf.IdentityPodUnknown, policy: [2]uint32{bpf.PolicyNone, bpf.PolicyNone}}
	nodeOnlyStart = start{how: endpoint.StartedNodeOnly, identity: bpf.IdentityPodUnknown,
		policy: [2]uint32{bpf.PolicyNodeOnly, bpf.PolicyNodeOnly}, flags: bpf.EndpointPending}
)

// pollInterval is how often policyPending "wait" looks: the agent needs some milliseconds from seeing a pod to publishing it.
const pollInterval = 10 * time.Millisecond

// startPolicy decides what the pod starts with, and waits for the agent if the configuration says so.
func startPolicy(ctx context.Context, m pendings, conf *NetConf, pod podArgs) (start, error) {
	s, found, err := published(m, pod)
	if err != nil || found {
		return s, err
	}
	switch conf.PolicyPending {
	case pendingDeny:
		return nodeOnlyStart, nil
	case pendingAllow:
		return openStart, nil
	case pendingWait:
		return waitPublished(ctx, m, conf, pod)
	}
	return summary(m, pod)
}

// published looks for what the agent published for this very pod: under its UID, or without one where the agent's source knows none.
func published(m pendings, pod podArgs) (start, bool, error) {
	if pod.name == "" {
		return start{}, false, nil
	}
	keys := []bpf.PendingKey{pins.PendingKeyOf(pod.namespace, pod.name, pod.uid)}
	if pod.uid != "" {
		keys = append(keys, pins.PendingKeyOf(pod.namespace, pod.name, ""))
	}
	for _, k := range keys {
		e, ok, err := m.LookupPending(k)
		if err != nil {
			return start{}, false, fail(codeRegister, err, "look up the pod's published policy")
		}
		if ok && e.Flags&bpf.PendingPod != 0 {
			return start{how: endpoint.StartedPublished, identity: e.Identity, policy: e.PolicyId}, true, nil
		}
	}
	return start{}, false, nil
}

// summary asks what is known of the pod's namespace, and if that is nothing, of the node: a node whose agent knows policies restricts a
// pod of a namespace that it has not heard of; one that never had an agent, or knows no policy at all, lets it start open.
func summary(m pendings, pod podArgs) (start, error) {
	keys := []bpf.PendingKey{pins.PendingKeyOf("", "", "")}
	if pod.namespace != "" {
		keys = []bpf.PendingKey{pins.PendingKeyOf(pod.namespace, "", ""), keys[0]}
	}
	for _, k := range keys {
		e, ok, err := m.LookupPending(k)
		if err != nil {
			return start{}, fail(codeRegister, err, "look up the policy summary of namespace %q", pod.namespace)
		}
		switch {
		case ok && e.Flags&bpf.PendingRestricted != 0:
			return nodeOnlyStart, nil
		case ok && e.Flags&bpf.PendingOpen != 0:
			return openStart, nil
		}
	}
	return openStart, nil
}

func waitPublished(ctx context.Context, m pendings, conf *NetConf, pod podArgs) (start, error) {
	ctx, cancel := context.WithTimeout(ctx, conf.policyWait())
	defer cancel()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		s, found, err := published(m, pod)
		if err != nil || found {
			return s, err
		}
		select {
		case <-ctx.Done():
			return start{}, fail(types.ErrTryAgainLater, ctx.Err(),
				"the agent has published no policy for pod %s/%s within %s; is margay-agent running? (policyPending is \"wait\")",
				pod.namespace, pod.name, conf.policyWait())
		case <-tick.C:
		}
	}
}
