// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"testing"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/pins"
)

var (
	publishedPod = bpf.Pending{Identity: 77, PolicyId: [2]uint32{20, 21}, Flags: bpf.PendingPod}
	restricted   = bpf.Pending{Flags: bpf.PendingRestricted}
	open         = bpf.Pending{Flags: bpf.PendingOpen}
)

func TestStartPolicy(t *testing.T) {
	pod := podArgs{namespace: "shop", name: "web-0", uid: "1f0c"}
	type entry struct {
		namespace, name, uid string
		p                    bpf.Pending
	}
	asPublished := start{how: endpoint.StartedPublished, identity: 77, policy: [2]uint32{20, 21}}
	for name, c := range map[string]struct {
		pod     podArgs
		pending string
		entries []entry
		want    start
		code    uint
	}{
		"published by UID":                  {pod, pendingAuto, []entry{{"shop", "web-0", "1f0c", publishedPod}, {"shop", "", "", restricted}}, asPublished, 0},
		"published without UID":             {pod, pendingAuto, []entry{{"shop", "web-0", "", publishedPod}}, asPublished, 0},
		"published for an older UID":        {pod, pendingAuto, []entry{{"shop", "web-0", "old", publishedPod}, {"shop", "", "", restricted}}, nodeOnlyStart, 0},
		"runtime without UID":               {podArgs{namespace: "shop", name: "web-0"}, pendingAuto, []entry{{"shop", "web-0", "", publishedPod}}, asPublished, 0},
		"namespace open":                    {pod, pendingAuto, []entry{{"shop", "", "", open}, {"", "", "", restricted}}, openStart, 0},
		"namespace restricted":              {pod, pendingAuto, []entry{{"shop", "", "", restricted}, {"", "", "", open}}, nodeOnlyStart, 0},
		"namespace unknown, policies exist": {pod, pendingAuto, []entry{{"", "", "", restricted}}, nodeOnlyStart, 0},
		"namespace unknown, no policies":    {pod, pendingAuto, []entry{{"", "", "", open}}, openStart, 0},
		"never an agent":                    {pod, pendingAuto, nil, openStart, 0},
		"no pod identity, policies exist":   {podArgs{}, pendingAuto, []entry{{"", "", "", restricted}}, nodeOnlyStart, 0},
		"no pod identity, no agent":         {podArgs{}, pendingAuto, nil, openStart, 0},
		"deny, open namespace":              {pod, pendingDeny, []entry{{"shop", "", "", open}}, nodeOnlyStart, 0},
		"deny, published":                   {pod, pendingDeny, []entry{{"shop", "web-0", "1f0c", publishedPod}}, asPublished, 0},
		"allow, restricted namespace":       {pod, pendingAllow, []entry{{"shop", "", "", restricted}}, openStart, 0},
		"wait, published":                   {pod, pendingWait, []entry{{"shop", "web-0", "1f0c", publishedPod}}, asPublished, 0},
		"wait, never published":             {pod, pendingWait, []entry{{"shop", "", "", open}}, start{}, 11},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFakePlane()
			for _, e := range c.entries {
				f.publish(e.namespace, e.name, e.uid, e.p)
			}
			got, err := startPolicy(context.Background(), f, &NetConf{PolicyPending: c.pending, PolicyWait: 1}, c.pod)
			if code(err) != c.code || got != c.want {
				t.Errorf("startPolicy() = %+v, %v, want %+v, code %d", got, err, c.want, c.code)
			}
		})
	}
}

func TestWaitEndsWhenTheAgentPublishes(t *testing.T) {
	f := newFakePlane()
	f.onPending = func(call int) {
		if call == 6 {
			f.publish("shop", "web-0", "1f0c", publishedPod)
		}
	}
	pod := podArgs{namespace: "shop", name: "web-0", uid: "1f0c"}
	got, err := startPolicy(context.Background(), f, &NetConf{PolicyPending: pendingWait, PolicyWait: 10}, pod)
	if err != nil || got.identity != 77 {
		t.Errorf("startPolicy() = %+v, %v, want identity 77", got, err)
	}
}

func pendingKey(namespace, name, uid string) bpf.PendingKey {
	return pins.PendingKeyOf(namespace, name, uid)
}

// What the agent publishes while ADD registers the pod has an effect before ADD returns.
func TestPolicyPublishedDuringAdd(t *testing.T) {
	n, pod := newNode(t), netnstest.New(t)
	n.plane.publish("", "", "", restricted)
	n.plane.onPut = func(put int) {
		if put == 0 {
			n.plane.publish("shop", "web-0", "1f0c", publishedPod)
		}
	}
	r := n.mustAdd(cmdArgs("c1", pod.Path(), n.conf(familyRanges["dual stack"])))
	for _, a := range resultAddresses(r) {
		if e, _, _ := n.plane.LookupEndpoint(a); e.Identity != 77 || e.PolicyId != [2]uint32{20, 21} || e.Flags != 0 {
			t.Errorf("endpoint %s = %+v, want identity 77 and policy 20, 21", a, e)
		}
	}
	if rec, err := endpoint.NewStore(n.run).Load("c1", "eth0"); err != nil || rec.Policy != endpoint.StartedPublished {
		t.Errorf("record = %+v, %v, want policy %s", rec, err, endpoint.StartedPublished)
	}
}

// An entry that the agent has changed since it was written is the agent's: ADD must not put its older view back.
func TestAgentsEntryIsNotOverwritten(t *testing.T) {
	n, pod := newNode(t), netnstest.New(t)
	n.plane.publish("", "", "", restricted)
	var changed bool
	n.plane.onPending = func(int) {
		n.plane.mu.Lock()
		defer n.plane.mu.Unlock()
		for a, e := range n.plane.entries {
			if !changed {
				e.Identity, e.PolicyId, e.Flags = 99, [2]uint32{40, 41}, 0
				n.plane.entries[a] = e
				n.plane.pending[pendingKey("shop", "web-0", "1f0c")] = publishedPod
				changed = true
			}
		}
	}
	r := n.mustAdd(cmdArgs("c1", pod.Path(), n.conf([]string{range4})))
	if e, _, _ := n.plane.LookupEndpoint(resultAddresses(r)[0]); e.Identity != 99 {
		t.Errorf("endpoint = %+v, want the agent's identity 99", e)
	}
}

func TestNodeOnlyStartIsMarkedPending(t *testing.T) {
	n, pod := newNode(t), netnstest.New(t)
	n.plane.publish("shop", "", "", restricted)
	r := n.mustAdd(cmdArgs("c1", pod.Path(), n.conf(familyRanges["dual stack"])))
	for _, a := range resultAddresses(r) {
		e, _, _ := n.plane.LookupEndpoint(a)
		if e.PolicyId != [2]uint32{bpf.PolicyNodeOnly, bpf.PolicyNodeOnly} || e.Flags != bpf.EndpointPending {
			t.Errorf("endpoint %s = %+v, want node-only and pending", a, e)
		}
	}
}
