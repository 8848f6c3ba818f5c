// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"fmt"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// kinds are the changes of the soak. One without affects may not make any connection fail.
func (s *soak) kinds() []kind {
	n2, n3 := s.Node("n2"), s.Node("n3")
	return []kind{
		{name: "backends come and go", make: s.changeBackends},
		{name: "a policy of others comes and goes", make: func() { s.isolate("bystander") }},
		{name: "a policy cuts a path", make: func() { s.isolate("cut") }, affects: func(p *path) bool { return p.isolated },
			drops: []string{"policy"}, never: []string{"policy"}},
		{name: "n1's agent is killed", make: s.killAgent},
		{name: "n1's MTU changes", make: s.changeMTU},
		{name: "n2's addresses change", make: s.changeAddresses, affects: through(n2), drops: []string{"overlay_source", "no_route"}},
		{name: "n3 is not a node for a while", make: s.removeNode, affects: through(n3), drops: []string{"overlay_source", "no_route"}},
	}
}

// changeBackends adds pods to a service on both sides and takes them away as a rollout does: first from the service, then altogether.
func (s *soak) changeBackends() {
	for i, name := range []string{"n1", "n2"} {
		p := s.AddPod(s.Node(name), fmt.Sprintf("churn-%d-%d", i, len(s.ended)), map[string]string{"app": "starting"})
		p.Serve(podPort)
		p.Object.Labels = map[string]string{"app": "churn"}
		s.Apply(p.Object)
		s.WaitSettled()
		s.load(4 * workers)
		p.Object.Labels = map[string]string{"app": "ending"}
		s.Apply(p.Object)
		s.WaitSettled()
		s.outlive(time.Now())
		s.DeletePod(p)
	}
}

// isolate applies a policy that lets nobody reach the pods of an app, and lifts it.
func (s *soak) isolate(app string) {
	deny := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: "isolate"}}
	deny.Spec.PodSelector.MatchLabels = map[string]string{"app": app}
	deny.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
	before := s.Drops(s.cut.Node)["policy"]
	s.Apply(deny)
	s.WaitSettled()
	if app == "cut" {
		s.Eventually("the policy cuts a path", func() bool { return s.Drops(s.cut.Node)["policy"] > before })
	}
	s.load(workers)
	s.Delete(deny)
}

// killAgent ends n1's agent as a crash does, changes what it would have to know, and starts another.
func (s *soak) killAgent() {
	n1 := s.Node("n1")
	s.KillAgent(n1)
	p := s.AddPod(s.Node("n2"), fmt.Sprintf("meanwhile-%d", len(s.ended)), nil)
	s.load(workers)
	s.StartAgent(n1)
	s.WaitSettled()
	s.load(workers)
	s.DeletePod(p)
}

func (s *soak) changeMTU() {
	for _, mtu := range []int{1400, 1500} {
		s.SetMTU(s.Node("n1").Host, "eth0", mtu)
		s.WaitSettled()
		s.load(workers)
	}
}

// changeAddresses gives n2 other addresses, and the old ones back.
func (s *soak) changeAddresses() {
	n2 := s.Node("n2")
	for _, number := range []int{72, 12} {
		s.Readdress(n2, number)
		s.noteAddrs(n2)
		s.WaitSettled()
		s.load(workers)
	}
}

// removeNode takes n3 from the objects that the agents know, and adds it again.
func (s *soak) removeNode() {
	n3 := s.Node("n3")
	s.Delete(n3.Object)
	s.WaitSettled()
	s.load(workers)
	s.Apply(n3.Object)
}
