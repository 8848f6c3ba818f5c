// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"github.com/margay-cni/margay/pkg/state"
)

const goodService = `apiVersion: v1
kind: Service
metadata:
  name: api
  namespace: web
spec:
  type: NodePort
  clusterIPs: [10.96.0.10, "fd00:96::10"]
  selector: {app: api}
  ports:
  - name: http
    port: 80
    targetPort: web
    nodePort: 30080
  - {name: dns, port: 53, protocol: UDP, nodePort: 30053}
`

func words(problems []Problem) []string {
	var out []string
	for _, p := range problems {
		out = append(out, p.String())
	}
	return out
}

// TestProblemsNameFileAndLine is the golden list of what people get to read.
func TestProblemsNameFileAndLine(t *testing.T) {
	replace := func(oldnew ...string) string {
		out := goodService
		for i := 0; i < len(oldnew); i += 2 {
			if !strings.Contains(out, oldnew[i]) {
				t.Fatalf("%q is not in the service", oldnew[i])
			}
			out = strings.Replace(out, oldnew[i], oldnew[i+1], 1)
		}
		return out
	}
	slice := func(rest string) string {
		return "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: s\n  labels: {kubernetes.io/service-name: api}\n" + rest
	}
	policy := func(spec string) string {
		return "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p, namespace: web}\nspec:\n" + spec
	}
	for _, tc := range []struct {
		name, text string
		want       []string
	}{
		{"good", goodService, nil},
		{"nothing", "# only a comment\n---\n", nil},
		{"port", replace("port: 80", "port: 70000"), []string{"x.yaml:12: Service web/api: spec.ports[0].port: 70000 is outside 1 to 65535"}},
		{"no node port", replace("    nodePort: 30080\n", ""),
			[]string{"x.yaml:11: Service web/api: warning: spec.ports[0].nodePort: is missing: there is no API server to allocate one, so there is none"}},
		{"no port", replace("    port: 80\n", ""), []string{"x.yaml:11: Service web/api: spec.ports[0].port: is missing or 0, want 1 to 65535"}},
		{"node port", replace("30080", "-1"), []string{"x.yaml:14: Service web/api: spec.ports[0].nodePort: -1 is outside 1 to 65535"}},
		{"node port of a ClusterIP", replace("type: NodePort", "type: ClusterIP"),
			[]string{"x.yaml:14: Service web/api: spec.ports[0].nodePort: 30080 needs a service of type NodePort or LoadBalancer",
				"x.yaml:15: Service web/api: spec.ports[1].nodePort: 30053 needs a service of type NodePort or LoadBalancer"}},
		{"H1: health check port of a NodePort", replace("  selector:", "  healthCheckNodePort: 30999\n  selector:"),
			[]string{"x.yaml:9: Service web/api: spec.healthCheckNodePort: 30999 needs a service of type LoadBalancer with externalTrafficPolicy Local"}},
		{"H1: health check port", replace("type: NodePort", "type: LoadBalancer\n  externalTrafficPolicy: Local\n  healthCheckNodePort: 30999"), nil},
		{"protocol", replace("protocol: UDP", "protocol: udp"), []string{`x.yaml:15: Service web/api: spec.ports[1].protocol: "udp" is not one of TCP, UDP, SCTP`}},
		{"target name", replace("targetPort: web", "targetPort: a_b"), []string{`x.yaml:13: Service web/api: spec.ports[0].targetPort: "a_b": must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)`}},
		{"cluster address", replace("10.96.0.10", "10.96.0.256"), []string{`x.yaml:8: Service web/api: spec.clusterIPs[0]: "10.96.0.256" is no IP address`}},
		{"special cluster address", replace("10.96.0.10", "127.0.0.1"),
			[]string{"x.yaml:8: Service web/api: spec.clusterIPs[0]: 127.0.0.1 is unspecified, loopback, link-local or multicast"}},
		{"two addresses of a family", replace(`"fd00:96::10"`, "10.96.0.11"),
			[]string{"x.yaml:8: Service web/api: spec.clusterIPs[1]: 10.96.0.11 is the second address of its family"}},
		{"no cluster address", replace("  clusterIPs: [10.96.0.10, \"fd00:96::10\"]\n", ""),
			[]string{"x.yaml:6: Service web/api: warning: spec.clusterIP: is missing: there is no API server to allocate one, so the service is not served"}},
		{"several faults", replace("port: 80", "port: 0", "name: dns", "name: http"), []string{
			"x.yaml:12: Service web/api: spec.ports[0].port: is missing or 0, want 1 to 65535",
			`x.yaml:15: Service web/api: spec.ports[1].name: "http" is also the name of spec.ports[0]`,
		}},
		{"type", replace("type: NodePort", "type: Nodeport"), []string{
			"x.yaml:14: Service web/api: spec.ports[0].nodePort: 30080 needs a service of type NodePort or LoadBalancer",
			"x.yaml:15: Service web/api: spec.ports[1].nodePort: 30053 needs a service of type NodePort or LoadBalancer",
			`x.yaml:7: Service web/api: spec.type: "Nodeport" is not one of [ ClusterIP NodePort LoadBalancer ExternalName]`,
		}},
		{"unknown field", replace("targetPort:", "targetport:"), []string{"x.yaml:13: Service web/api: warning: spec.ports[0].targetport: unknown field, ignored"}},
		{"wrong type", replace("port: 80", "port: http"), []string{"x.yaml:12: Service web/api: spec.ports.port: string where a number is wanted"}},
		{"wrong type that decodes itself", replace("targetPort: web", "targetPort: [80]"), []string{"x.yaml:13: Service web/api: spec.ports.targetPort: array where a number is wanted"}},
		{"wrong shape", replace("  selector: {app: api}", "  selector: app"), []string{"x.yaml:9: Service web/api: spec.selector: string where a mapping is wanted"}},
		{"key twice", replace("  type: NodePort", "  type: NodePort\n  type: ClusterIP"), []string{"x.yaml:8: Service web/api: type is already set in line 7"}},
		{"label value", replace("{app: api}", `{app: "a b"}`), []string{
			`x.yaml:9: Service web/api: spec.selector: Invalid value: "a b": a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')`}},
		{"no name", replace("  name: api\n", ""), []string{"x.yaml:3: Service web/: metadata.name: is missing"}},
		{"syntax", goodService + "  - [\n", []string{"x.yaml:16: did not find expected node content"}},
		{"half a document", goodService[:strings.Index(goodService, "clusterIPs: [10.96.0.10,")+len("clusterIPs: [10.96.0.10,")],
			[]string{"x.yaml:8: did not find expected node content"}},
		{"second document", goodService + "---\n" + strings.Replace(goodService, "port: 80", "port: 70000", 1), []string{
			"x.yaml:17: Service web/api: is already in line 1",
			"x.yaml:28: Service web/api: spec.ports[0].port: 70000 is outside 1 to 65535",
		}},
		{"no kind", "apiVersion: v1\nmetadata: {name: x}\n", []string{"x.yaml:1: apiVersion or kind is missing"}},
		{"no object", "just text\n", []string{"x.yaml:1: is no Kubernetes object: want apiVersion, kind, metadata"}},
		{"other kinds once", "apiVersion: apps/v1\nkind: Deployment\n---\napiVersion: apps/v1\nkind: Deployment\n",
			[]string{"x.yaml:1: warning: objects of kind Deployment of apps/v1 are ignored"}},
		{"item of a list", "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Pod\n  metadata:\n    name: A\n",
			[]string{`x.yaml:7: Pod default/A: metadata.name: "A": a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')`}},
		{"slice of the other family", slice("addressType: IPv4\nports: [{port: 80}]\nendpoints:\n- addresses: [10.0.0.1]\n- addresses:\n  - fd00::1\n"),
			[]string{"x.yaml:11: EndpointSlice default/s: endpoints[1].addresses[0]: fd00::1 is no IPv4 address"}},
		{"slice with loopback", slice("addressType: IPv6\nports: [{port: 80}]\nendpoints:\n- addresses: ['::1']\n"),
			[]string{"x.yaml:9: EndpointSlice default/s: endpoints[0].addresses[0]: ::1 is unspecified, loopback, link-local or multicast"}},
		{"policy: except outside", policy("  podSelector: {}\n  ingress:\n  - from:\n    - ipBlock:\n        cidr: 10.0.0.0/8\n        except: [10.1.0.0/16, 11.0.0.0/16]\n"),
			[]string{"x.yaml:10: NetworkPolicy web/p: spec.ingress[0].from[0].ipBlock.except[1]: 11.0.0.0/16 is not inside 10.0.0.0/8"}},
		{"policy: IPv6 except as large as its block", policy("  podSelector: {}\n  egress:\n  - to:\n    - ipBlock:\n        cidr: fd00::/8\n        except:\n        - fd00::/8\n"),
			[]string{"x.yaml:11: NetworkPolicy web/p: spec.egress[0].to[0].ipBlock.except[0]: fd00::/8 is not inside fd00::/8"}},
		{"policy: selector", policy("  podSelector:\n    matchExpressions:\n    - {key: a, operator: Is}\n"),
			[]string{`x.yaml:5: NetworkPolicy web/p: spec.podSelector: "Is" is not a valid label selector operator`}},
		{"policy: empty peer", policy("  podSelector: {}\n  ingress:\n  - from:\n    - {}\n"),
			[]string{"x.yaml:8: NetworkPolicy web/p: spec.ingress[0].from[0]: is empty: a peer needs podSelector, namespaceSelector or ipBlock"}},
		{"policy: endPort", policy("  podSelector: {}\n  ingress:\n  - ports:\n    - port: 90\n      endPort: 80\n    - port: http\n      endPort: 80\n"), []string{
			"x.yaml:11: NetworkPolicy web/p: spec.ingress[0].ports[1].endPort: 80 needs a port that is a number",
			"x.yaml:9: NetworkPolicy web/p: spec.ingress[0].ports[0].endPort: 80 is outside 90 to 65535",
		}},
		{"policy: host bits", policy("  podSelector: {}\n  ingress:\n  - from:\n    - ipBlock: {cidr: 10.1.2.3/8}\n"),
			[]string{"x.yaml:8: NetworkPolicy web/p: warning: spec.ingress[0].from[0].ipBlock.cidr: 10.1.2.3/8 has bits beyond its length: read as 10.0.0.0/8"}},
		{"alias of itself", "a: &a [*a]\nkind: Pod\napiVersion: v1\nmetadata: {name: x}\nspec: *a\n", []string{"x.yaml:1: Pod default/x: too large or nested too deeply"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := words(parse("x.yaml", "n", []byte(tc.text)).problems)
			if diff := cmp.Diff(sorted(tc.want), sorted(got)); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
		})
	}
}

func sorted(s []string) map[string]int {
	out := map[string]int{}
	for _, v := range s {
		out[v]++
	}
	return out
}

func snapshotOf(t *testing.T, text string) *state.Snapshot {
	t.Helper()
	c := parse("x.yaml", "node-a", []byte(text))
	if hasErrors(c.problems) {
		t.Fatalf("problems: %v", c.problems)
	}
	s, problems := assemble([]source{{file: "x.yaml", objects: c.objects}})
	if len(problems) > 0 {
		t.Fatalf("problems: %v", problems)
	}
	return s
}

func TestServiceReturnAnnotation(t *testing.T) {
	s := snapshotOf(t, strings.Replace(goodService, "  namespace: web\n", "  namespace: web\n  annotations: {margay.io/service-return: dsr}\n", 1))
	if got := s.Services[state.Key{Namespace: "web", Name: "api"}].Return; got != state.ReturnDSR {
		t.Errorf("Return = %q, want %q", got, state.ReturnDSR)
	}
}

func TestDefaultsOfTheAPIServer(t *testing.T) {
	s := snapshotOf(t, goodService+`---
apiVersion: v1
kind: Service
metadata: {name: plain}
spec: {clusterIP: "fd00:96::1", sessionAffinity: ClientIP, ports: [{port: 80}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: in-and-out}
spec: {podSelector: {}, egress: [{ports: [{port: 80}]}]}
---
apiVersion: v1
kind: Namespace
metadata: {name: web, labels: {team: a}}
---
apiVersion: v1
kind: Pod
metadata: {name: p, namespace: other, labels: {<<: {a: b}, c: "1"}}
spec: {nodeName: node-a, containers: [{name: c, image: i, ports: [{name: web, containerPort: 8080}]}]}
status: {podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: s, labels: {kubernetes.io/service-name: plain}}
addressType: IPv6
ports: [{port: 8080}]
endpoints: [{addresses: ["fd00::2"]}]
`)
	tcp, udp := state.TCP, state.UDP
	want := map[state.Key]*state.Service{
		{Namespace: "web", Name: "api"}: {
			Key: state.Key{Namespace: "web", Name: "api"}, Type: state.NodePort, Selector: map[string]string{"app": "api"},
			ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("fd00:96::10")},
			Ports: []state.ServicePort{
				{Name: "http", Protocol: tcp, Port: 80, NodePort: 30080, TargetName: "web"},
				{Name: "dns", Protocol: udp, Port: 53, NodePort: 30053, TargetPort: 53},
			},
		},
		{Namespace: "default", Name: "plain"}: {
			Key: state.Key{Namespace: "default", Name: "plain"}, Type: state.ClusterIP, AffinitySeconds: 10800,
			ClusterIPs: []netip.Addr{netip.MustParseAddr("fd00:96::1")},
			Ports:      []state.ServicePort{{Protocol: tcp, Port: 80, TargetPort: 80}},
		},
	}
	addrs := cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	if diff := cmp.Diff(want, s.Services, addrs); diff != "" {
		t.Errorf("services (-want +got):\n%s", diff)
	}
	wantNamespaces := map[string]*state.Namespace{
		"web":     {Name: "web", Labels: map[string]string{"team": "a", "kubernetes.io/metadata.name": "web"}},
		"other":   {Name: "other", Labels: map[string]string{"kubernetes.io/metadata.name": "other"}},
		"default": {Name: "default", Labels: map[string]string{"kubernetes.io/metadata.name": "default"}},
	}
	if diff := cmp.Diff(wantNamespaces, s.Namespaces); diff != "" {
		t.Errorf("namespaces (-want +got):\n%s", diff)
	}
	policy := s.NetworkPolicies[state.Key{Namespace: "default", Name: "in-and-out"}]
	if diff := cmp.Diff([]networkingv1.PolicyType{"Ingress", "Egress"}, policy.Spec.PolicyTypes); diff != "" {
		t.Errorf("policyTypes (-want +got):\n%s", diff)
	}
	if got := policy.Spec.Egress[0].Ports[0].Protocol; got == nil || *got != corev1.ProtocolTCP {
		t.Errorf("protocol of a policy's port = %v, want TCP", got)
	}
	wantPod := &state.Pod{
		Key: state.Key{Namespace: "other", Name: "p"}, Labels: map[string]string{"a": "b", "c": "1"}, Node: "node-a", Local: true, Ready: true,
		IPs:   []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")},
		Ports: []state.ContainerPort{{Name: "web", Protocol: tcp, Port: 8080}},
	}
	if diff := cmp.Diff(wantPod, s.Pods[wantPod.Key], addrs); diff != "" {
		t.Errorf("pod (-want +got):\n%s", diff)
	}
	wantSlice := &state.EndpointSlice{
		Key: state.Key{Namespace: "default", Name: "s"}, Service: state.Key{Namespace: "default", Name: "plain"}, IPv6: true,
		Ports:     []state.SlicePort{{Protocol: tcp, Port: 8080}},
		Endpoints: []state.Endpoint{{Addr: netip.MustParseAddr("fd00::2"), Ready: true, Serving: true}},
	}
	if diff := cmp.Diff(wantSlice, s.EndpointSlices[wantSlice.Key], addrs); diff != "" {
		t.Errorf("slice (-want +got):\n%s", diff)
	}
}

func TestListsAndJSON(t *testing.T) {
	for name, text := range map[string]string{
		"List":        "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Namespace, metadata: {name: a}}\n- {apiVersion: v1, kind: Namespace, metadata: {name: b}}\n",
		"typed list":  "apiVersion: v1\nkind: NamespaceList\nitems:\n- metadata: {name: a}\n- metadata: {name: b}\n",
		"JSON":        "{\n\t\"apiVersion\": \"v1\",\n\t\"kind\": \"List\",\n\t\"items\": [\n\t\t{\"apiVersion\": \"v1\", \"kind\": \"Namespace\", \"metadata\": {\"name\": \"a\"}},\n\t\t{\"apiVersion\": \"v1\", \"kind\": \"Namespace\", \"metadata\": {\"name\": \"b\"}}]}",
		"documents":   "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n---\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: b}\n...\n",
		"CRLF, BOM":   "\ufeffapiVersion: v1\r\nkind: NamespaceList\r\nitems:\r\n- metadata: {name: a}\r\n- metadata: {name: b}\r\n",
		"with anchor": "apiVersion: v1\nkind: List\nitems:\n- &a {apiVersion: v1, kind: Namespace, metadata: {name: a}}\n- {<<: *a, metadata: {name: b}}\n",
	} {
		t.Run(name, func(t *testing.T) {
			s := snapshotOf(t, text)
			if len(s.Namespaces) != 2 || s.Namespaces["a"] == nil || s.Namespaces["b"] == nil {
				t.Errorf("namespaces = %v, want a and b", s.Namespaces)
			}
		})
	}
}

func TestFirstFileWins(t *testing.T) {
	first := parse("a.yaml", "", []byte(goodService))
	second := parse("b.yaml", "", []byte("# comment\n"+strings.Replace(goodService, "port: 80", "port: 81", 1)))
	third := parse("c.yaml", "", []byte(strings.NewReplacer("name: api", "name: other", "10.96.0.10", "10.96.0.11", "::10", "::11").Replace(goodService)))
	s, problems := assemble([]source{{"a.yaml", first.objects}, {"b.yaml", second.objects}, {"c.yaml", third.objects}})
	want := []string{
		"b.yaml:2: Service web/api: is already in a.yaml:1, which counts",
		"c.yaml:14: Service web/other: spec.ports[0].nodePort: 30080 with TCP belongs to Service web/api in a.yaml:1",
		"c.yaml:15: Service web/other: spec.ports[1].nodePort: 30053 with UDP belongs to Service web/api in a.yaml:1",
	}
	if diff := cmp.Diff(want, words(problems)); diff != "" {
		t.Errorf("problems (-want +got):\n%s", diff)
	}
	if got := s.Services[state.Key{Namespace: "web", Name: "api"}].Ports[0].Port; got != 80 {
		t.Errorf("port of the service in two files = %d, want the first file's 80", got)
	}
	other := s.Services[state.Key{Namespace: "web", Name: "other"}]
	if other == nil || other.Ports[0].NodePort != 0 || other.Ports[0].Port != 80 {
		t.Errorf("service without a free NodePort = %+v, want it without NodePort", other)
	}
	if again := third.objects[0].value.(*state.Service); again.Ports[0].NodePort != 30080 {
		t.Error("assemble wrote to the file's own content")
	}
}

// TestBombsEnd parses texts that grow exponentially when aliases and merge keys are followed.
func TestBombsEnd(t *testing.T) {
	lists, merges := "x0: &x0 [a]\n", "x0: &x0 {a: b}\n"
	for i := 1; i <= 60; i++ {
		lists += fmt.Sprintf("x%d: &x%d [*x%d, *x%d]\n", i, i, i-1, i-1)
		merges += fmt.Sprintf("x%d: &x%d {<<: [*x%d, *x%d]}\n", i, i, i-1, i-1)
	}
	for name, text := range map[string]string{
		"lists":  lists + "spec: *x60\n",
		"merges": merges + "spec: *x60\n",
		"root":   merges + "<<: *x60\n",
		"items":  merges + "items: [{<<: *x60}]\n",
	} {
		t.Run(name, func(t *testing.T) {
			c := parse("x.yaml", "", []byte("apiVersion: v1\nkind: Pod\nmetadata: {name: x}\n"+text))
			if !strings.Contains(strings.Join(words(c.problems), "\n"), "too large or nested too deeply") {
				t.Errorf("problems = %v, want one about size", c.problems)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(goodService))
	f.Add([]byte("a: &a [*a]\nkind: Pod\napiVersion: v1\nmetadata: {name: x}\nspec: *a\n"))
	f.Add([]byte("apiVersion: v1\nkind: List\nitems: [{<<: [{a: b}, *x]}]\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c := parse("f.yaml", "n", data)
		if _, problems := assemble([]source{{"f.yaml", c.objects}}); !hasErrors(c.problems) && len(problems) > len(c.objects)*10 {
			t.Errorf("%d problems of %d objects", len(problems), len(c.objects))
		}
	})
}
