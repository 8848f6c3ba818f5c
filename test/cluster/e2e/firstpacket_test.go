// SPDX-License-Identifier: Apache-2.0

//go:build cluster

package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// firstReport is what the program firstpacket prints.
type firstReport struct {
	Sent    int
	Reached []string
	Allowed map[string]struct{ After, Stalled time.Duration }
	Missed  []string
}

// TestFirstPacket is promise 2: policy is in force before a pod's first packet. 100 pods send from their first instruction to targets that
// policy denies, one by the sender's policy, one by its own, on each node; no packet may arrive. And what policy allows answers within the
// first second of a pod's life, without the time that a busy machine did not run the pod.
//
// A target whose own policy allows the senders by their labels can do so on another node only when the API server says which pod has the
// address, and kubelet tells it that after the start. So for these targets there is a time to read, and no second.
func TestFirstPacket(t *testing.T) {
	needMargay(t, "policy")
	program := buildProgram(t, "firstpacket")
	s := newSpace(t, nil)
	// far is denied by the policy of those who send, guarded by its own.
	s.apply(networkPolicy("senders", `{podSelector: {matchLabels: {role: sender}}, policyTypes: [Egress], egress: [{to: [{podSelector: {matchExpressions: [{key: app, operator: In, values: [open1, open2, guarded1, guarded2, picky1, picky2]}]}}]}]}`) +
		"---\n" + networkPolicy("picky", `{podSelector: {matchExpressions: [{key: app, operator: In, values: [picky1, picky2]}]}, ingress: [{from: [{podSelector: {matchLabels: {role: sender}}}]}]}`) +
		"---\n" + networkPolicy("guarded", `{podSelector: {matchExpressions: [{key: app, operator: In, values: [guarded1, guarded2]}]}, ingress: [{from: [{podSelector: {matchLabels: {app: control}}}]}]}`))
	targets := s.start(server("far1", 1), server("far2", 2), server("guarded1", 1), server("guarded2", 2), server("open1", 1), server("open2", 2),
		server("picky1", 1), server("picky2", 2), idle("control", 1), idle("outcast", 1, labelled("role", "sender")))
	closed, open, picky, control, outcast := targets[:4], targets[4:6], targets[6:8], targets[8], targets[9]

	var counters []counter
	for _, target := range closed {
		judge(t, "policy is in force, and the control may", append(table([]place{control.place, outcast.place}, target.place, portOf, "control"),
			table([]place{outcast.place}, open[0].place, portOf, "outcast")...)...)
		c := count(t, target.place, httpPort)
		reach(t, control.place, "tcp", families()[0].at(target.place, httpPort), "hostname")
		if c.value(t) == 0 {
			t.Fatalf("the counter at %s did not see the control's packets", target.name)
		}
		counters = append(counters, c)
	}
	var before []int
	for _, c := range counters {
		before = append(before, c.value(t))
	}

	const pods, batch = 100, 20
	var sent, late int
	var allowed, stalls durations
	selective := map[bool]durations{} // by whether the target is on the sender's node
	for first := 0; first < pods; first += batch {
		var names []string
		nodes := map[string]int{}
		for i := first; i < first+batch; i++ {
			name := fmt.Sprintf("sender%d", i)
			names, nodes[name] = append(names, name), i%2+1
			s.create(sender(name, nodes[name], program, addressList(closed), addressList(open)+","+addressList(picky)))
		}
		for _, name := range names {
			r := firstWords(t, s, name)
			sent += r.Sent
			if len(r.Reached) > 0 || len(r.Missed) > 0 {
				t.Errorf("%s reached %v, which policy denies, and not %v, which it allows", name, r.Reached, r.Missed)
			}
			for at, m := range r.Allowed {
				if i := slices.IndexFunc(picky, func(p pod) bool { return strings.Contains(addressList([]pod{p}), at) }); i >= 0 {
					near := picky[i].node == nodes[name]
					selective[near] = append(selective[near], m.After)
					continue
				}
				allowed, stalls = append(allowed, m.After), append(stalls, m.Stalled)
				if m.After-m.Stalled > time.Second {
					late++
					t.Logf("%s reached %s only after %v, for %v of which it did not run", name, at, m.After, m.Stalled)
				}
			}
			s.must(api.remove(s.ctx, "Pod", s.name, name))
		}
	}
	leaked := 0
	for i, c := range counters {
		n := c.value(t) - before[i]
		leaked += n
		if n != 0 {
			t.Errorf("%d packets arrived at %s, which policy denies", n, closed[i].name)
		}
	}
	t.Logf("%d pods sent %d packets from their first instruction on to 4 denied targets: %d arrived", pods, sent, leaked)
	t.Logf("from a pod's first instruction to an answer of an allowed target: %v", allowed)
	t.Logf("of that, the pod did not run for: %v", stalls)
	t.Logf("the same for a target that allows it by its labels, on the same node: %v; on the other: %v", selective[true], selective[false])
	if want := pods * len(families()) * len(open); len(allowed) != want || late > 0 {
		t.Errorf("%d of %d allowed targets answered, %d of them after more than a second", len(allowed), want, late)
	}
	if sent < 100*pods {
		t.Errorf("the pods sent only %d packets: that proves little", sent)
	}
}

// sender describes a pod that runs firstpacket.
func sender(name string, node int, program, denied, allowed string) *corev1.Pod {
	p := podOf(name, node, corev1.Container{Name: "sender", Image: pauseName, Command: []string{"/firstpacket", "-denied", denied, "-allowed", allowed},
		VolumeMounts: []corev1.VolumeMount{{Name: "program", MountPath: "/firstpacket", ReadOnly: true}}})
	file := corev1.HostPathFile
	p.Spec.Volumes = []corev1.Volume{{Name: "program", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: program, Type: &file}}}}
	p.Labels["role"] = "sender"
	return p
}

func addressList(pods []pod) string {
	var all []string
	for _, p := range pods {
		for _, f := range families() {
			all = append(all, f.at(p.place, httpPort).String())
		}
	}
	return strings.Join(all, ",")
}

// firstWords waits for the report of a sender.
func firstWords(t *testing.T, s *space, name string) (r firstReport) {
	t.Helper()
	eventually(t, "report of "+name, 3*time.Minute, func() error {
		response, err := api.client.Get(api.base + kinds["Pod"].path(s.name, name) + "/log")
		if err != nil {
			return err
		}
		defer response.Body.Close()
		b, err := io.ReadAll(response.Body)
		if err != nil || response.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s: %w", response.Status, b, err)
		}
		return json.NewDecoder(bytes.NewReader(b)).Decode(&r)
	})
	return r
}
