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
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/util/yaml"
	sigsyaml "sigs.k8s.io/yaml"
)

// shipped decodes the object of that kind in one of the manifests of install/kubernetes; no field may be unknown.
func shipped(t *testing.T, file, kind string, into any) {
	t.Helper()
	f, err := os.Open(filepath.Join("kubernetes", file))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for r := yaml.NewYAMLReader(bufio.NewReader(f)); ; {
		document, err := r.Read()
		if errors.Is(err, io.EOF) {
			t.Fatalf("%s has no %s", file, kind)
		}
		if err != nil {
			t.Fatal(err)
		}
		var of struct{ Kind string }
		if err := sigsyaml.Unmarshal(document, &of); err != nil {
			t.Fatal(err)
		}
		if of.Kind == kind {
			if err := sigsyaml.UnmarshalStrict(document, into); err != nil {
				t.Fatalf("%s, %s: %v", file, kind, err)
			}
			return
		}
	}
}

func daemonSet(t *testing.T, file string) *appsv1.DaemonSet {
	t.Helper()
	d := &appsv1.DaemonSet{}
	shipped(t, file, "DaemonSet", d)
	return d
}

// TestShippedCommandLines: every call of margay-install in the manifests is one that it takes.
func TestShippedCommandLines(t *testing.T) {
	calls := 0
	check := func(where string, argv []string) {
		t.Helper()
		if len(argv) == 0 || argv[0] != "/usr/bin/margay-install" {
			return
		}
		calls++
		if _, err := parseOptions(argv[1:], io.Discard); err != nil {
			t.Errorf("%s: %q: %v", where, argv, err)
		}
	}
	for _, file := range []string{"margay.yaml", "uninstall.yaml"} {
		spec := daemonSet(t, file).Spec.Template.Spec
		for _, c := range slices.Concat(spec.InitContainers, spec.Containers) {
			check(file+" "+c.Name, slices.Concat(c.Command, c.Args))
			for _, p := range []*corev1.Probe{c.StartupProbe, c.LivenessProbe, c.ReadinessProbe} {
				if p != nil && p.Exec != nil {
					check(file+" "+c.Name+" probe", p.Exec.Command)
				}
			}
		}
	}
	if calls != 4 {
		t.Errorf("%d calls of margay-install, want 4: binaries, conflist, uninstall, and stay", calls)
	}
}

// TestLeastPrivilege writes down what the agent is allowed, so that more of it is seen in a review.
func TestLeastPrivilege(t *testing.T) {
	var role rbacv1.ClusterRole
	shipped(t, "margay.yaml", "ClusterRole", &role)
	read, write := map[string]string{}, map[string]string{}
	for _, r := range role.Rules {
		if len(r.NonResourceURLs)+len(r.ResourceNames) > 0 {
			t.Errorf("unexpected rule %+v", r)
		}
		for _, group := range r.APIGroups {
			for _, resource := range r.Resources {
				into := read
				if !slices.Equal(r.Verbs, []string{"get", "list", "watch"}) {
					into = write
				}
				into[group+"/"+resource] = strings.Join(r.Verbs, ",")
			}
		}
	}
	const look = "get,list,watch"
	wantRead := map[string]string{
		"/namespaces": look, "/nodes": look, "/pods": look, "/services": look, "discovery.k8s.io/endpointslices": look,
		"networking.k8s.io/networkpolicies": look, "networking.k8s.io/servicecidrs": look, "policy.networking.k8s.io/clusternetworkpolicies": look,
	}
	wantWrite := map[string]string{
		"policy.networking.k8s.io/clusternetworkpolicies/status": "patch", "/events": "create,patch",
	}
	if diff := cmp.Diff(wantRead, read); diff != "" {
		t.Errorf("what may be read (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(wantWrite, write); diff != "" {
		t.Errorf("what may be done beyond reading (-want +got):\n%s", diff)
	}
}

// TestWhatTheAgentGets: capabilities, mounts and the rest of what makes a container dangerous.
func TestWhatTheAgentGets(t *testing.T) {
	spec := daemonSet(t, "margay.yaml").Spec.Template.Spec
	if !spec.HostNetwork || spec.HostPID || spec.HostIPC || spec.DNSPolicy != corev1.DNSDefault || spec.PriorityClassName != "system-node-critical" {
		t.Errorf("host network %v, PID %v, IPC %v, DNS %s, priority %s", spec.HostNetwork, spec.HostPID, spec.HostIPC, spec.DNSPolicy, spec.PriorityClassName)
	}
	capabilities := map[string][]corev1.Capability{"install": nil, "agent": {"BPF", "NET_ADMIN", "PERFMON", "SYS_ADMIN"}}
	for _, c := range slices.Concat(spec.InitContainers, spec.Containers) {
		s := c.SecurityContext
		if s == nil || s.Privileged != nil || s.Capabilities == nil || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) ||
			!slices.Equal(s.Capabilities.Add, capabilities[c.Name]) || s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem {
			t.Errorf("container %s: security context %+v", c.Name, s)
		}
		if c.Resources.Requests.Cpu().IsZero() || c.Resources.Requests.Memory().IsZero() || !c.Resources.Limits.Cpu().IsZero() {
			t.Errorf("container %s: resources %+v, want requests, and no limit of the CPU", c.Name, c.Resources)
		}
	}
	paths := map[string]string{}
	for _, v := range spec.Volumes {
		if v.HostPath != nil {
			paths[v.HostPath.Path] = string(*v.HostPath.Type)
		}
	}
	want := map[string]string{
		"/opt/cni/bin": "DirectoryOrCreate", "/etc/cni/net.d": "DirectoryOrCreate", "/sys/fs/bpf": "Directory", "/run/margay": "DirectoryOrCreate",
		"/run/netns": "DirectoryOrCreate", "/var/lib/margay": "DirectoryOrCreate", "/proc/sys/net": "Directory", "/etc/kubernetes/kubelet.conf": "File",
	}
	if diff := cmp.Diff(want, paths); diff != "" {
		t.Errorf("what is mounted of the node (-want +got):\n%s", diff)
	}
}

// TestManifestsNameOneImage: what is uninstalled is what was installed, and make image makes it.
func TestManifestsNameOneImage(t *testing.T) {
	images := map[string]bool{}
	for _, file := range []string{"margay.yaml", "uninstall.yaml"} {
		spec := daemonSet(t, file).Spec.Template.Spec
		for _, c := range slices.Concat(spec.InitContainers, spec.Containers) {
			images[c.Image] = true
			if c.ImagePullPolicy != corev1.PullIfNotPresent {
				t.Errorf("%s, %s: pull policy %s, want IfNotPresent: the image may come from a file", file, c.Name, c.ImagePullPolicy)
			}
		}
	}
	makefile, err := os.ReadFile("../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	for image := range images {
		if !strings.Contains(string(makefile), "--tag "+image) {
			t.Errorf("make image does not make %s", image)
		}
	}
	if len(images) != 1 {
		t.Errorf("images %v, want one", images)
	}
}
