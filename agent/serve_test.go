// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
)

const balancedYAML = `apiVersion: v1
kind: Service
metadata: {name: balanced, namespace: default}
spec:
  type: LoadBalancer
  externalTrafficPolicy: Local
  healthCheckNodePort: 30999
  selector: {app: web}
  clusterIPs: [10.96.0.11, "fd00:96::11"]
  ipFamilies: [IPv4, IPv6]
  ipFamilyPolicy: RequireDualStack
  ports: [{name: http, port: 80, targetPort: 8080, nodePort: 30081}]
`

const leavingYAML = `apiVersion: v1
kind: Node
metadata: {name: n1}
spec: {taints: [{key: ToBeDeletedByClusterAutoscaler, effect: NoSchedule}]}
`

// ask sends one request from the node itself; code 0: nobody listens.
func ask(t *testing.T, n *nodetest.Node, url string) (code int, body string) {
	t.Helper()
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, address string) (c net.Conn, err error) {
			n.NS.Do(func() { c, err = new(net.Dialer).DialContext(ctx, network, address) })
			return c, err
		}}}
	r, err := client.Get(url)
	if err != nil {
		return 0, err.Error()
	}
	defer func() { _ = r.Body.Close() }()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, string(b)
}

// The agent answers what kube-proxy does, at its addresses, and from the node itself by localhost.
func TestH1_H2_H3_M1_AgentAnswers(t *testing.T) {
	n := nodetest.New(t)
	manifests := t.TempDir()
	one := n.AddPod("one")
	record(t, n, one, map[string]string{"app": "web"})
	put(t, manifests, "balanced.yaml", balancedYAML)
	p := start(t, n, manifests)

	for url, want := range map[string]string{
		"http://localhost:10256/healthz":   `"lastUpdated"`,
		"http://localhost:10256/livez":     `"healthy":true`,
		"http://localhost:10249/proxyMode": "ebpf",
		"http://localhost:10249/healthz":   "ok",
		"http://localhost:10249/configz":   `"service-node-port-range": "30000-32767"`,
	} {
		eventually(t, url, func() bool { code, _ := ask(t, n, url); return code == 200 })
		if _, body := ask(t, n, url); !strings.Contains(body, want) {
			t.Errorf("%s = %s, want %s", url, body, want)
		}
	}
	addrs := []string{"127.0.0.1", "[::1]"}
	for _, a := range nodetest.NodeAddrs {
		addrs = append(addrs, strings.TrimSuffix(net.JoinHostPort(a.String(), ""), ":"))
	}
	for _, host := range addrs {
		url := "http://" + host + ":30999/"
		eventually(t, url+" with one endpoint", func() bool {
			code, body := ask(t, n, url)
			return code == 200 && strings.Contains(body, `"localEndpoints": 1`)
		})
	}
	_, scrape := ask(t, n, "http://127.0.0.1:10249/metrics")
	for _, want := range []string{
		`margay_drops_total{direction="ingress",reason="policy"} 0`, `margay_map_entries{map="services"} `, `margay_map_capacity{map="flows"} `,
		`kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family="IPv6"} `, `kubeproxy_proxy_healthz_total{code="200"} `,
		`margay_build_info{programs="`, `margay_round_duration_seconds_count{part="write"} `,
	} {
		if !strings.Contains(scrape, want) {
			t.Errorf("the scrape lacks %s", want)
		}
	}
	if code, _ := ask(t, n, "http://127.0.0.1:10249/debug/pprof/"); code != 404 {
		t.Errorf("profiles = %d, want 404 without the flag", code)
	}
	n.NS.Do(func() {
		b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_reserved_ports")
		if err != nil || strings.TrimSpace(string(b)) != "30000-32767" {
			t.Errorf("reserved ports = %q, %v, want those of NodePorts", b, err)
		}
	})

	put(t, manifests, "node.yaml", leavingYAML)
	eventually(t, "the node to leave", func() bool { code, _ := ask(t, n, "http://127.0.0.1:10256/healthz"); return code == 503 })
	if code, body := ask(t, n, "http://127.0.0.1:10256/livez"); code != 200 {
		t.Errorf("/livez of a leaving node = %d %s, want 200", code, body)
	}
	put(t, manifests, "balanced.yaml", strings.Replace(balancedYAML, "  healthCheckNodePort: 30999\n", "", 1))
	eventually(t, "the health check to end", func() bool { code, _ := ask(t, n, "http://127.0.0.1:30999/"); return code == 0 })
	if c := p.status().Conditions; len(c) > 0 {
		t.Errorf("conditions = %+v, want none", c)
	}
}

// An address that is taken does not end the agent.
func TestH3_AddressesThatAreTaken(t *testing.T) {
	n := nodetest.New(t)
	var others []net.Listener
	n.NS.Do(func() {
		for _, address := range []string{"127.0.0.1:10249", ":10256"} {
			l, err := net.Listen("tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = l.Close() })
			others = append(others, l)
		}
	})
	p := start(t, n, t.TempDir())
	eventually(t, "two conditions", func() bool { return len(p.status().Conditions) == 2 })
	raw, err := json.Marshal(p.status().Conditions)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"health server", "metrics server", "in use"} {
		if !strings.Contains(string(raw), want) {
			t.Errorf("conditions = %s, want %q in them", raw, want)
		}
	}
	for _, l := range others {
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "no condition", func() bool { return len(p.status().Conditions) == 0 })
	if code, body := ask(t, n, "http://127.0.0.1:10249/proxyMode"); code != 200 || body != "ebpf" {
		t.Errorf("/proxyMode = %d %s, want ebpf", code, body)
	}
}

func TestServeFlags(t *testing.T) {
	for _, tc := range []struct {
		args []string
		ok   bool
	}{
		{nil, true},
		{[]string{"--healthz-bind-address", "", "--metrics-bind-address", ""}, true},
		{[]string{"--service-node-port-range", "20000-22767"}, true},
		{[]string{"--service-node-port-range", "22767-20000"}, false},
		{[]string{"--metrics-bind-address", "10249"}, false},
		{[]string{"--healthz-bind-address", "node:10256"}, false},
	} {
		o, err := parse(append([]string{"--manifests", "/m", "--node", "n"}, tc.args...), io.Discard)
		if (err == nil) != tc.ok {
			t.Errorf("parse(%q) = %v, accepted: want %v", tc.args, err, tc.ok)
		}
		if tc.args == nil && (o.serve.Healthz != "0.0.0.0:10256" || o.serve.Metrics != "127.0.0.1:10249" || o.nodePortRange.String() != "30000-32767") {
			t.Errorf("defaults = %+v, %v, want kube-proxy's", o.serve, o.nodePortRange)
		}
	}
}
