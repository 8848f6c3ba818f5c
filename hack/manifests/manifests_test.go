// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/v2/lint"
	"helm.sh/helm/v4/pkg/chart/v2/lint/support"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/util/yaml"
	sigsyaml "sigs.k8s.io/yaml"
)

const (
	chartDir = "../../install/helm/margay"
	manifest = "../../install/kubernetes/margay.yaml"
)

// kinds are the objects that installing makes, and the types in which no unknown field may be.
var kinds = map[string]func() any{
	"ServiceAccount":     func() any { return &corev1.ServiceAccount{} },
	"ClusterRole":        func() any { return &rbacv1.ClusterRole{} },
	"ClusterRoleBinding": func() any { return &rbacv1.ClusterRoleBinding{} },
	"ConfigMap":          func() any { return &corev1.ConfigMap{} },
	"DaemonSet":          func() any { return &appsv1.DaemonSet{} },
}

// objects decodes every document: kind/namespace/name → object.
func objects(t *testing.T, text string) map[string]any {
	t.Helper()
	found := map[string]any{}
	for r := yaml.NewYAMLReader(bufio.NewReader(strings.NewReader(text))); ; {
		document, err := r.Read()
		if errors.Is(err, io.EOF) {
			return found
		}
		if err != nil {
			t.Fatal(err)
		}
		var meta struct {
			Kind     string
			Metadata struct{ Namespace, Name string }
		}
		if err := sigsyaml.Unmarshal(document, &meta); err != nil {
			t.Fatalf("%v in\n%s", err, document)
		}
		if meta.Kind == "" {
			continue // the comment at the top
		}
		make, ok := kinds[meta.Kind]
		if !ok {
			t.Fatalf("unexpected kind %q", meta.Kind)
		}
		object := make()
		if err := sigsyaml.UnmarshalStrict(document, object); err != nil {
			t.Fatalf("%s %s: %v", meta.Kind, meta.Metadata.Name, err)
		}
		key := meta.Kind + " " + meta.Metadata.Namespace + "/" + meta.Metadata.Name
		if found[key] != nil {
			t.Fatalf("%s is there twice", key)
		}
		found[key] = object
	}
}

// rendered is what helm install would make with these values.
func rendered(t *testing.T, values string) map[string]any {
	t.Helper()
	text, err := render(chartDir, parseValues(t, values))
	if err != nil {
		t.Fatalf("render with %s: %v", values, err)
	}
	return objects(t, text)
}

func parseValues(t *testing.T, text string) map[string]any {
	t.Helper()
	values := map[string]any{}
	if err := sigsyaml.Unmarshal([]byte(text), &values); err != nil {
		t.Fatal(err)
	}
	return values
}

// TestManifestIsTheChart: kubectl and helm install the same objects, and the file is the one that the chart renders now.
func TestManifestIsTheChart(t *testing.T) {
	file, err := os.ReadFile(manifest)
	if err != nil {
		t.Fatal(err)
	}
	want, got := rendered(t, ""), objects(t, string(file))
	if len(got) != len(kinds) {
		t.Errorf("%d objects, want one of each of %d kinds", len(got), len(kinds))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("objects of the chart and of the file (-chart +file), make manifests renders it:\n%s", diff)
	}
	output := filepath.Join(t.TempDir(), "margay.yaml")
	if code := run([]string{"--chart", chartDir, "--output", output}, io.Discard); code != 0 {
		t.Fatalf("manifests = exit code %d", code)
	}
	if now, err := os.ReadFile(output); err != nil || string(now) != string(file) {
		t.Errorf("the file is not what make manifests makes (%v)", err)
	}
}

// TestLint has the chart judged by Helm itself.
func TestLint(t *testing.T) {
	version, err := common.ParseKubeVersion("v1.37.2")
	if err != nil {
		t.Fatal(err)
	}
	l := lint.RunAll(chartDir, nil, namespace, lint.WithKubeVersion(version))
	for _, m := range l.Messages {
		if m.Severity >= support.WarningSev {
			t.Error(m)
		}
	}
}

// TestConflistIsTheShippedOne compares what the ConfigMap has with what a person would take from the repository.
func TestConflistIsTheShippedOne(t *testing.T) {
	want, err := os.ReadFile("../../conf/kubernetes/10-margay.conflist")
	if err != nil {
		t.Fatal(err)
	}
	got := rendered(t, "")["ConfigMap kube-system/margay"].(*corev1.ConfigMap).Data
	if diff := cmp.Diff(map[string]string{"10-margay.conflist": string(want)}, got); diff != "" {
		t.Errorf("ConfigMap (-want +got):\n%s", diff)
	}
}

// values is what a user may set, and what must come of it: an argument of the agent, or else a text anywhere in the manifest.
var values = []struct{ values, want string }{
	{"apiServer: ['https://192.0.2.1:6443', 'https://[2001:db8::1]:6443']", "--api-server=https://192.0.2.1:6443,https://[2001:db8::1]:6443"},
	{"kubeletKubeconfig: /var/lib/rancher/k3s/agent/kubelet.kubeconfig", "--kubelet-kubeconfig=/var/lib/rancher/k3s/agent/kubelet.kubeconfig"},
	{"routingMode: auto", "--routing-mode=auto"},
	{"vxlan: {port: 4789}", "--vxlan-port=4789"},
	{"vxlan: {vni: 7}", "--vxlan-vni=7"},
	{"devices: ['eth*', br0]", "--devices=eth*,br0"},
	{"masquerade: false", "--masquerade=false"},
	{"nonMasqueradeCIDRs: [192.0.2.0/24, '2001:db8::/32']", "--non-masquerade-cidrs=192.0.2.0/24,2001:db8::/32"},
	{"nodePortAddresses: [localhost, 192.0.2.0/24]", "--nodeport-addresses=localhost,192.0.2.0/24"},
	{"serviceReturn: dsr", "--service-return=dsr"},
	{"loadBalancing: maglev", "--load-balancing=maglev"},
	{"healthAddress: '[::1]:20256'", "--healthz-bind-address=[::1]:20256"},
	{"metricsAddress: ''", "--metrics-bind-address=\n"},
	{"logLevel: debug", "--log-level=debug"},
	{"extraArgs: ['--map-size=flows=1000']", "--map-size=flows=1000"},
	{"policyPending: wait", `"policyPending": "wait"`},
	{"cni: {conflist: '{\"name\": \"mine\"}'}", `{"name": "mine"}`},
	{"cni: {binDir: /usr/libexec/cni}", "--cni-bin-dir=/usr/libexec/cni"},
	{"cni: {confDir: /etc/other/net.d}", "--cni-conf-dir=/etc/other/net.d"},
	{"toolsDir: /usr/local/bin", "--bin-dir=/usr/local/bin"},
	{"netnsDir: /var/run/other", "path: /var/run/other"},
	{"image: {repository: example.com/margay, tag: v1}", "image: example.com/margay:v1"},
	{"image: {pullPolicy: Always}", "imagePullPolicy: Always"},
	{"imagePullSecrets: [{name: key}]", "name: key"},
	{"resources: {limits: {memory: 1Gi}}", "memory: 1Gi"},
	{"tolerations: [{key: special}]", "key: special"},
	{"nodeSelector: {margay: wanted}", "margay: wanted"},
	{"priorityClassName: high", "priorityClassName: high"},
	{"updateStrategy: {maxUnavailable: 3}", "maxUnavailable: 3"},
	{"podAnnotations: {a: b}", "a: b"},
}

// TestValues: every value does something, and only that.
func TestValues(t *testing.T) {
	plain, err := render(chartDir, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range values {
		text, err := render(chartDir, parseValues(t, tt.values))
		if err != nil {
			t.Errorf("%s: %v", tt.values, err)
			continue
		}
		if !strings.Contains(text, tt.want) || strings.Contains(plain, tt.want) {
			t.Errorf("%s: want %q in what is rendered, and not in what is rendered without", tt.values, tt.want)
		}
		all := objects(t, text)
		if want := strings.HasPrefix(tt.want, "--") && !strings.Contains(tt.want, "-dir="); want {
			agent := all["DaemonSet kube-system/margay"].(*appsv1.DaemonSet).Spec.Template.Spec.Containers[0]
			if !slices.Contains(agent.Args, strings.TrimSpace(tt.want)) {
				t.Errorf("%s: arguments %q, want %q among them", tt.values, agent.Args, tt.want)
			}
		}
		checkMounts(t, tt.values, all)
	}
}

// TestEveryValueIsTested: a value that is added needs a row above.
func TestEveryValueIsTested(t *testing.T) {
	file, err := os.ReadFile(filepath.Join(chartDir, "values.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	tested := map[string]bool{}
	for _, tt := range values {
		for key := range parseValues(t, tt.values) {
			tested[key] = true
		}
	}
	for key := range parseValues(t, string(file)) {
		if !tested[key] {
			t.Errorf("no test sets %s", key)
		}
	}
}

// TestWrongValuesAreRefused: the schema knows every value, and what may be in it.
func TestWrongValuesAreRefused(t *testing.T) {
	for _, text := range []string{
		"colour: red", "image: {name: x}", "routingMode: bgp", "vxlan: {port: 0}", "vxlan: {port: 65536}", "vxlan: {vni: 16777216}", "masquerade: 'yes'",
		"nonMasqueradeCIDRs: 10.0.0.0/8", "nodePortAddresses: []", "serviceReturn: snat", "loadBalancing: ''", "policyPending: never", "apiServer: [http://x]",
		"apiServer: 192.0.2.1", "kubeletKubeconfig: kubelet.conf", "cni: {binDir: bin}", "logLevel: trace", "healthAddress: ''", "metricsAddress: '10249'",
		"extraArgs: [{a: b}]", "priorityClassName: 1", "updateStrategy: {maxUnavailable: 10 percent}", "resources: {cpu: 1}", "tolerations: {operator: Exists}",
		"image: {pullPolicy: Sometimes}",
	} {
		if _, err := render(chartDir, parseValues(t, text)); err == nil {
			t.Errorf("%s is accepted", text)
		}
	}
}

// checkMounts requires of every container that its mounts are volumes, and of every volume that somebody mounts it.
func checkMounts(t *testing.T, what string, all map[string]any) {
	t.Helper()
	spec := all["DaemonSet kube-system/margay"].(*appsv1.DaemonSet).Spec.Template.Spec
	volumes := map[string]bool{}
	for _, v := range spec.Volumes {
		volumes[v.Name] = false
	}
	for _, c := range slices.Concat(spec.InitContainers, spec.Containers) {
		for _, m := range c.VolumeMounts {
			if _, ok := volumes[m.Name]; !ok {
				t.Errorf("%s: container %s mounts %s, which is no volume", what, c.Name, m.Name)
			}
			volumes[m.Name] = true
		}
	}
	for name, mounted := range volumes {
		if !mounted {
			t.Errorf("%s: nobody mounts the volume %s", what, name)
		}
	}
}
