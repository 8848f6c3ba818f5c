// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"testing"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/datapath"
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
	asPublished := start{how: startPublished, identity: 77, policy: [2]uint32{20, 21}}
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
	return datapath.PendingKeyOf(namespace, name, uid)
}
