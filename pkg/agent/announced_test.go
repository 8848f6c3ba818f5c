// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"net/netip"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/state"
)

// A pod may have started before the source tells of it. Its record says nothing of its labels, so a policy that selects by them would not
// select it: it keeps what it started with until the source tells, or has had its time.
func TestN13_UnannouncedPodKeepsItsStart(t *testing.T) {
	for _, tc := range []struct {
		name    string
		started string
		all     bool // the source knows every pod
		labels  map[string]string
		created time.Duration // before now
		want    bool          // it waits
	}{
		{"started closed", endpoint.StartedNodeOnly, false, nil, 0, true},
		{"started with what was published", endpoint.StartedPublished, false, nil, 0, true},
		{"nobody knows how", "", false, nil, 0, true},
		{"started open", endpoint.StartedOpen, false, nil, 0, false},
		{"started open, of the API server", endpoint.StartedOpen, true, nil, 0, false},
		{"long ago", endpoint.StartedNodeOnly, false, nil, announceWait, false},
		{"long ago, of the API server", endpoint.StartedNodeOnly, true, nil, time.Hour, true},
		{"with labels of the runtime", endpoint.StartedNodeOnly, false, map[string]string{"a": "b"}, 0, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t, newKernel(1), runDir(t))
			s := state.NewSnapshot()
			s.KnowsAllPods = tc.all
			key := state.Key{Namespace: "default", Name: "deny"}
			s.NetworkPolicies[key] = &state.NetworkPolicy{Key: key, Spec: networkingv1.NetworkPolicySpec{
				PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "isolated"}}, PolicyTypes: []networkingv1.PolicyType{"Ingress", "Egress"},
			}}
			rec := r.pod("a", 10, "10.0.0.1", "fd00::1")
			rec.Policy, rec.Created, rec.Labels = tc.started, r.clock.Add(-tc.created), tc.labels
			policies := func() [2]uint32 {
				four, six := r.kernel.endpoints.entries[bpf.NewAddr(rec.Addresses[0])].PolicyId, r.kernel.endpoints.entries[bpf.NewAddr(rec.Addresses[1])].PolicyId
				if four != six {
					t.Errorf("policies %v in IPv4, %v in IPv6", four, six)
				}
				return four
			}
			closed, open := [2]uint32{bpf.PolicyNodeOnly, bpf.PolicyNodeOnly}, [2]uint32{}
			r.give(s, rec)
			if got := policies(); got != map[bool][2]uint32{true: closed, false: open}[tc.want] {
				t.Errorf("policies of a pod that the source has not told of = %v, want it to wait: %v", got, tc.want)
			}
			if !tc.want {
				return
			}
			told := *s
			told.Pods = map[state.Key]*state.Pod{}
			pod := &state.Pod{Key: state.Key{Namespace: "default", Name: "a"}, Labels: map[string]string{"app": "isolated"}, Local: true, IPs: []netip.Addr{}}
			told.Pods[pod.Key] = pod
			r.give(&told, rec)
			if got := policies(); got[0] < bpf.PolicyFirst || got[1] < bpf.PolicyFirst {
				t.Errorf("policies once the source has told = %v, want those of the policy that selects it", got)
			}
		})
	}
}

// Where the source need not know every pod, the time ends by itself.
func TestUnannouncedPodIsJudgedByItsRecordInTheEnd(t *testing.T) {
	r := newRig(t, newKernel(1), runDir(t))
	s := state.NewSnapshot()
	deny := denyAll("default")
	s.NetworkPolicies[deny.Key] = deny
	rec := r.pod("a", 10, "10.0.0.1", "fd00::1")
	rec.Policy, rec.Created = endpoint.StartedNodeOnly, r.clock
	r.takeSnapshot(snapshotFrom{s, r.clock})
	r.takeRecords([]*endpoint.Record{rec})
	if got := r.work(true); got != announceWait {
		t.Errorf("next round after %v, want %v", got, announceWait)
	}
	r.clock = r.clock.Add(announceWait)
	if got := r.work(false); got != 0 {
		t.Errorf("next round after %v, want none", got)
	}
	if got := r.kernel.endpoints.entries[bpf.NewAddr(rec.Addresses[0])].PolicyId; got[0] < bpf.PolicyFirst || got[1] < bpf.PolicyFirst {
		t.Errorf("policies = %v, want those of the policy that selects every pod", got)
	}
}
