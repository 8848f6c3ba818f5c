// SPDX-License-Identifier: Apache-2.0

//go:build cluster

package e2e

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// networkPolicy renders a NetworkPolicy; spec is YAML in one line.
func networkPolicy(name, spec string) string {
	return fmt.Sprintf("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: %s}\nspec: %s\n", name, spec)
}

const (
	denyIngress = `{podSelector: {}, policyTypes: [Ingress]}`
	denyEgress  = `{podSelector: {}, policyTypes: [Egress]}`
)

// policyScene is what most policy tests need: in one namespace a server on node1, with friend (node1) and stranger (node2); in another
// one guest (node2).
type policyScene struct {
	s, other                        *space
	server, friend, stranger, guest pod
}

func newPolicyScene(t *testing.T) *policyScene {
	t.Helper()
	needMargay(t, "policy")
	c := &policyScene{s: newSpace(t, map[string]string{"team": "home"}), other: newSpace(t, map[string]string{"team": "away"})}
	c.other.create(idle("guest", 2))
	pods := c.s.start(server("server", 1), idle("friend", 1), idle("stranger", 2))
	c.server, c.friend, c.stranger, c.guest = pods[0], pods[1], pods[2], c.other.ready(2*time.Minute, "guest")[0]
	return c
}

func (c *policyScene) clients() []place {
	return []place{c.friend.place, c.stranger.place, c.guest.place}
}

// allow expects that those who are named reach the server, and nobody else.
func (c *policyScene) allow(t *testing.T, situation string, allowed ...string) {
	t.Helper()
	judge(t, situation, table(c.clients(), c.server.place, portOf, allowed...)...)
}

// TestPolicyIngress goes through what an ingress rule can say about peers, and through labels that change.
func TestPolicyIngress(t *testing.T) {
	c := newPolicyScene(t)
	c.allow(t, "without a policy", "friend", "stranger", "guest")
	c.s.apply(networkPolicy("deny", denyIngress))
	c.allow(t, "default deny")
	c.s.apply(networkPolicy("allow", `{podSelector: {matchLabels: {app: server}}, ingress: [{from: [{podSelector: {matchLabels: {app: friend}}}]}]}`))
	c.allow(t, "allow by label", "friend")

	c.s.label("stranger", "app", "friend")
	c.allow(t, "a stranger becomes a friend", "friend", "stranger")
	c.s.label("stranger", "app", "stranger")
	c.allow(t, "and is a stranger again", "friend")
	c.s.label("server", "app", "hidden")
	c.allow(t, "the server loses the label that the rule selects it by")
	c.s.label("server", "app", "server")
	c.allow(t, "and has it again", "friend")

	c.s.apply(networkPolicy("allow", `{podSelector: {matchLabels: {app: server}}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: away}}}]}]}`))
	c.allow(t, "allow by namespace", "guest")
	c.other.must(api.patch(c.other.ctx, "Namespace", "", c.other.name, `{"metadata":{"labels":{"team":"elsewhere"}}}`))
	c.allow(t, "the namespace gets another label")
	c.s.apply(networkPolicy("allow", `{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: elsewhere}}, podSelector: {matchLabels: {app: guest}}}, {podSelector: {matchLabels: {app: stranger}}}]}]}`))
	c.allow(t, "allow by namespace and label, or by label", "guest", "stranger")

	c.s.must(api.remove(c.s.ctx, "NetworkPolicy", c.s.name, "allow"))
	c.allow(t, "default deny is left")
	c.s.must(api.remove(c.s.ctx, "NetworkPolicy", c.s.name, "deny"))
	c.allow(t, "no policy is left", "friend", "stranger", "guest")
}

// TestPolicyPorts allows ports: by number, by name, by range, and for one protocol only.
func TestPolicyPorts(t *testing.T) {
	c := newPolicyScene(t)
	all := []string{"friend", "stranger", "guest"}
	expect := func(situation string, tcp, udp bool) {
		t.Helper()
		var want []expectation
		for network, allowed := range map[string]bool{"tcp": tcp, "udp": udp} {
			var names []string
			if allowed {
				names = all
			}
			want = append(want, over(network, table(c.clients(), c.server.place, portOf, names...))...)
		}
		judge(t, situation, want...)
	}
	rule := func(ports string) {
		c.s.apply(networkPolicy("ports", `{podSelector: {matchLabels: {app: server}}, ingress: [{ports: `+ports+`}]}`))
	}
	rule(`[{port: 8080}]`)
	expect("a number, which is TCP", true, false)
	rule(`[{port: ask, protocol: UDP}]`)
	expect("a name", false, true)
	rule(`[{port: http}]`)
	expect("another name", true, false)
	rule(`[{port: 8000, endPort: 8079}, {port: 8081, endPort: 8090, protocol: UDP}]`)
	expect("ranges", false, true)
	rule(`[{port: 8000, endPort: 8080}, {protocol: UDP}]`)
	expect("a range that ends with the port, and all of UDP", true, true)
}

// TestPolicyEgress isolates clients: by peer, by ipBlock, and by the pods behind a service, which is judged by the backend and not by its
// own address.
func TestPolicyEgress(t *testing.T) {
	c := newPolicyScene(t)
	second := c.other.start(server("second", 2))[0]
	first, otherOne := c.s.service("first", "server"), c.other.service("second", "second")
	clients := []place{c.friend.place, c.stranger.place}
	expect := func(situation string, toFirst, toSecond bool) {
		t.Helper()
		var want []expectation
		for _, target := range []struct {
			to      place
			port    func(string) uint16
			allowed bool
		}{{c.server.place, portOf, toFirst}, {first.place, port80, toFirst}, {second.place, portOf, toSecond}, {otherOne.place, port80, toSecond}} {
			var names []string
			if target.allowed {
				names = []string{"friend", "stranger"}
			}
			want = append(want, table(clients, target.to, target.port, names...)...)
		}
		judge(t, situation, want...)
	}
	expect("without a policy", true, true)
	c.s.apply(networkPolicy("deny", denyEgress))
	expect("default deny", false, false)
	c.s.apply(networkPolicy("allow", `{podSelector: {}, policyTypes: [Egress], egress: [{to: [{podSelector: {matchLabels: {app: server}}}]}]}`))
	expect("allow the server", true, false)
	c.s.apply(networkPolicy("allow", `{podSelector: {}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchLabels: {team: away}}}], ports: [{port: 8080}, {port: 8081, protocol: UDP}]}]}`))
	expect("allow the other namespace, by the ports of the pods", false, true)
	c.s.apply(networkPolicy("allow", `{podSelector: {}, policyTypes: [Egress], egress: [{to: [`+ipBlocks(c.server.addrs)+`]}]}`))
	expect("allow the server's addresses", true, false)
}

// ipBlocks renders peers that are these addresses alone.
func ipBlocks(addrs []netip.Addr) string {
	var all []string
	for _, a := range addrs {
		all = append(all, fmt.Sprintf("{ipBlock: {cidr: %q}}", netip.PrefixFrom(a, a.BitLen())))
	}
	return strings.Join(all, ", ")
}

// TestPolicyClient judges the client outside by its own address, by whichever node it comes.
func TestPolicyClient(t *testing.T) {
	c := newPolicyScene(t)
	svc := c.s.service("server", "server", nodePort)
	client := clientPlace()
	expect := func(situation string, allowed bool) {
		t.Helper()
		var want []expectation
		for _, f := range families() {
			for _, network := range networks {
				for i := 1; i <= 2; i++ {
					want = append(want, expectation{client, network, f.at(nodePlace(i), svc.nodePort(network)), allowed})
				}
			}
		}
		judge(t, situation, append(want, table([]place{c.friend.place}, c.server.place, portOf)...)...)
	}
	var around, except []string
	for _, a := range client.addrs {
		wide, _ := a.Prefix(a.BitLen() - 8)
		around = append(around, fmt.Sprintf("{ipBlock: {cidr: %q}}", wide))
		except = append(except, fmt.Sprintf("{ipBlock: {cidr: %q, except: [%q]}}", wide, netip.PrefixFrom(a, a.BitLen())))
	}
	c.s.apply(networkPolicy("block", `{podSelector: {}, ingress: [{from: [`+strings.Join(around, ", ")+`]}]}`))
	expect("its network is allowed", true)
	c.s.apply(networkPolicy("block", `{podSelector: {}, ingress: [{from: [`+strings.Join(except, ", ")+`]}]}`))
	expect("its network is allowed, but it is excepted", false)
}

// TestPolicyReachesConnections changes policy under connections that are open: they stop, and go on when they are allowed again.
func TestPolicyReachesConnections(t *testing.T) {
	c := newPolicyScene(t)
	eachFamily(t, func(t *testing.T, f family) {
		open := map[string]*http.Transport{}
		at := f.at(c.server.place, httpPort)
		ask := func(name string, within time.Duration) error {
			ctx, cancel := context.WithTimeout(context.Background(), within)
			defer cancel()
			_, err := get(ctx, open[name], at, "hostname")
			return err
		}
		for _, from := range c.clients() {
			dialled := false
			open[from.name] = &http.Transport{DialContext: func(ctx context.Context, network, address string) (_ net.Conn, err error) {
				if dialled {
					return nil, fmt.Errorf("the connection of %s was closed", from.name)
				}
				dialled = true
				return from.dial(ctx, network, address)
			}}
			t.Cleanup(open[from.name].CloseIdleConnections)
			eventually(t, from.name+" opens a connection", 20*time.Second, func() error { return ask(from.name, answerTime) })
		}
		start := time.Now()
		c.s.apply(networkPolicy("friends", `{podSelector: {matchLabels: {app: server}}, ingress: [{from: [{podSelector: {matchLabels: {app: friend}}}]}]}`))
		// A request on a connection that was cut hangs: TCP repeats it. So everyone asks once, after a while that is long for an agent.
		waitDenied(t, f, c)
		t.Logf("new connections are denied %v after the policy was made", time.Since(start).Round(10*time.Millisecond))
		if err := ask("friend", answerTime); err != nil {
			t.Errorf("the friend's connection does not go on: %v", err)
		}
		for _, name := range []string{"stranger", "guest"} {
			if err := ask(name, silenceTime); !silent(err) {
				t.Errorf("the %s's connection goes on although policy denies it: %v", name, err)
			}
		}
		c.s.must(api.remove(c.s.ctx, "NetworkPolicy", c.s.name, "friends"))
		c.allow(t, "without the policy", "friend", "stranger", "guest")
	})
}

// waitDenied waits until the stranger gets no new connection.
func waitDenied(t *testing.T, f family, c *policyScene) {
	t.Helper()
	judge(t, "the stranger and the guest are denied",
		expectation{c.stranger.place, "tcp", f.at(c.server.place, httpPort), false},
		expectation{c.guest.place, "tcp", f.at(c.server.place, httpPort), false},
		expectation{c.friend.place, "tcp", f.at(c.server.place, httpPort), true})
}

// TestPolicyKeepsProbes denies everything before a pod with probes exists: kubelet's probes pass, so it becomes ready and is not restarted.
func TestPolicyKeepsProbes(t *testing.T) {
	needMargay(t, "policy")
	s := newSpace(t, nil)
	s.apply(networkPolicy("deny", `{podSelector: {}, policyTypes: [Ingress, Egress]}`))
	var objects []*corev1.Pod
	for i := 1; i <= 2; i++ {
		p := server(fmt.Sprintf("probed%d", i), i)
		probe := corev1.Probe{PeriodSeconds: 1, TimeoutSeconds: 5, FailureThreshold: 3}
		ready, live := probe, probe
		ready.HTTPGet = &corev1.HTTPGetAction{Path: "/healthz", Port: intstr.FromInt32(httpPort)}
		live.TCPSocket = &corev1.TCPSocketAction{Port: intstr.FromInt32(httpPort)}
		p.Spec.Containers[0].ReadinessProbe, p.Spec.Containers[0].LivenessProbe = &ready, &live
		objects = append(objects, p)
	}
	pods := s.start(append(objects, idle("idle", 2))...)
	judge(t, "probes pass, but no pod does", table([]place{pods[2].place}, pods[0].place, portOf)...)
	for _, p := range s.ready(time.Second, "probed1", "probed2") {
		if n := p.object.Status.ContainerStatuses[0].RestartCount; n != 0 {
			t.Errorf("%s was restarted %d times", p.name, n)
		}
	}
	eachFamily(t, func(t *testing.T, f family) {
		if err := nodePlace(1).ping(f.of(pods[0].addrs), 56, answerTime); err != nil {
			t.Errorf("a pod's own node reaches it whatever policy says: %v", err)
		}
	})
}
