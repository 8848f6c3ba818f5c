// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
)

const webService = `
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {nodeName: node, containers: [{name: web, ports: [{name: http, containerPort: 8080}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  type: NodePort
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, "fd00:96::10"]
  ipFamilyPolicy: RequireDualStack
  selector: {app: web}
  ports:
    - {name: tcp, port: 80, targetPort: http, nodePort: 30080}
    - {name: udp, port: 80, targetPort: 8080, nodePort: 30080, protocol: UDP}
`

// ingressFrom is a policy for app=web with one rule.
func ingressFrom(rule string) string {
	return fmt.Sprintf(`
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec: {podSelector: {matchLabels: {app: web}}, policyTypes: [Ingress], ingress: [%s]}
`, rule)
}

func (m *machine) nodePort(v6 bool) netip.AddrPort {
	a := nodetest.NodeAddrs[0]
	if v6 {
		a = nodetest.NodeAddrs[1]
	}
	return netip.AddrPortFrom(a, 30080)
}

// asks tells whether the client outside gets its own address back from the pod, by NodePort, on both protocols alike.
func (m *machine) asks(v6 bool) (string, bool) {
	client := nodetest.ClientAddrs[0]
	if v6 {
		client = nodetest.ClientAddrs[1]
	}
	for _, network := range []string{"tcp", "udp"} {
		got, err := nodetest.Ask(m.t, m.client, network, m.nodePort(v6))
		if err != nil {
			return network + ": " + err.Error(), false
		}
		if want := "web " + client.String(); got != want {
			m.t.Errorf("%s by NodePort = %q, want %q", network, got, want)
		}
	}
	return "", true
}

// TestIPBlockDecidesAtNodePort: the client's own address, which it keeps through the NodePort, is what an ipBlock is compared with.
func TestIPBlockDecidesAtNodePort(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.apply("web.yaml", webService)
	m.startAgent()
	m.startPod("web")
	for _, v6 := range []bool{false, true} {
		m.eventually("the NodePort works", func() bool { _, ok := m.asks(v6); return ok })
	}
	for _, tc := range []struct {
		name, rule string
		v4, v6     bool
	}{
		{"IPv4 client's network", `{from: [{ipBlock: {cidr: 192.0.2.0/24}}]}`, true, false},
		{"IPv6 client's network", `{from: [{ipBlock: {cidr: "2001:db8:1::/64"}}]}`, false, true},
		{"client excepted", `{from: [{ipBlock: {cidr: 192.0.2.0/24, except: [192.0.2.100/32]}}, {ipBlock: {cidr: "2001:db8:1::/64"}}]}`, false, true},
		{"pods only", `{from: [{podSelector: {}}]}`, false, false},
		{"the pod's port by name", `{ports: [{port: http}, {port: 8080, protocol: UDP}]}`, true, true},
		{"the service's port is not the pod's", `{ports: [{port: 80}, {port: 80, protocol: UDP}]}`, false, false},
		{"a range of ports", `{ports: [{port: 8000, endPort: 8100}, {port: 8000, endPort: 8100, protocol: UDP}]}`, true, true},
	} {
		m.apply("policy.yaml", ingressFrom(tc.rule))
		for v6, want := range map[bool]bool{false: tc.v4, true: tc.v6} {
			m.eventually(fmt.Sprintf("%s: IPv6 %v is allowed: %v", tc.name, v6, want), func() bool { _, ok := m.asks(v6); return ok == want })
		}
	}
}

// TestAgentMayDie: an open connection, the services and the policy in force outlive the agent, and its restart disturbs nothing.
func TestAgentMayDie(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.apply("web.yaml", webService)
	m.apply("policy.yaml", ingressFrom(`{from: [{ipBlock: {cidr: 192.0.2.0/24}}]}`))
	m.startAgent()
	m.startPod("web")
	m.eventually("the NodePort works", func() bool { _, ok := m.asks(false); return ok })
	conn, err := nodetest.Dial(t, m.client, "tcp", m.nodePort(false), 0)
	m.must(err)
	works := func(when string) {
		t.Helper()
		if got, err := conn.Ask(); err != nil || !strings.HasPrefix(got, "web 192.0.2.100") {
			t.Errorf("%s: open connection = %q, %v, want an answer", when, got, err)
		}
		if why, ok := m.asks(false); !ok {
			t.Errorf("%s: new connection: %s, want an answer", when, why)
		}
		if _, ok := m.asks(true); ok {
			t.Errorf("%s: the client that policy denies got an answer", when)
		}
	}
	works("with the agent")
	m.killAgent()
	works("without the agent")
	m.startAgent()
	works("with the agent again")
}

// TestUnpublishedPodStartsByItsNamespace: with the agent gone, a pod that it never saw starts open where no policy could select it, and
// with node-local traffic only where one could (promise 2, policyPending: auto).
func TestUnpublishedPodStartsByItsNamespace(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name, manifest string
		open           bool
	}{
		{"policies in its namespace", ingressFrom(`{}`), false},
		{"its namespace has none", "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n---\n" +
			strings.ReplaceAll(ingressFrom(`{}`), "namespace: shop", "namespace: other"), true},
		{"policies, but its namespace is unknown", strings.ReplaceAll(ingressFrom(`{}`), "namespace: shop", "namespace: other"), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t)
			m.apply("policy.yaml", tc.manifest)
			m.startAgent()
			m.killAgent()
			a, b := m.startPod("a"), m.startPod("b")
			for i, to := range b.addrs {
				_, err := nodetest.Ask(t, a.ns, "tcp", netip.AddrPortFrom(to, 8080))
				if (err == nil) != tc.open {
					t.Errorf("pod to pod %s: %v, want an answer: %v", to, err, tc.open)
				}
				got, err := nodetest.Ask(t, m.node, "tcp", netip.AddrPortFrom(to, 8080))
				if want := "b " + nodetest.NodeAddrs[i].String(); err != nil || got != want {
					t.Errorf("node to pod %s = %q, %v, want %q", to, got, err, want)
				}
			}
		})
	}
}
