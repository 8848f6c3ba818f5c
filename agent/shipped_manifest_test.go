// SPDX-License-Identifier: Apache-2.0

package main

import (
	"io"
	"regexp"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	"sigs.k8s.io/yaml"
)

// TestShippedManifestStartsThisAgent: the DaemonSet's command line is one that the agent takes, and so is every flag that the chart may add.
func TestShippedManifestStartsThisAgent(t *testing.T) {
	documents := strings.Split(readFile(t, "../install/kubernetes/margay.yaml"), "\n---\n")
	var d appsv1.DaemonSet
	if err := yaml.Unmarshal([]byte(documents[len(documents)-1]), &d); err != nil || len(d.Spec.Template.Spec.Containers) != 1 {
		t.Fatalf("the last object of the manifest is no DaemonSet with one container: %v", err)
	}
	args := d.Spec.Template.Spec.Containers[0].Args
	for i := range args {
		args[i] = strings.ReplaceAll(args[i], "$(NODE_NAME)", "worker-1")
	}
	o, err := parse(args, io.Discard)
	if err != nil {
		t.Fatalf("parse(%q) = %v", args, err)
	}
	_, agent, _ := strings.Cut(readFile(t, "../install/helm/margay/templates/daemonset.yaml"), "- name: agent")
	agent, _, _ = strings.Cut(agent, " env:")
	flags := regexp.MustCompile(`(?m)^\s*- --([a-z-]+)`).FindAllStringSubmatch(agent, -1)
	if len(flags) < len(args) {
		t.Errorf("%d flags in the chart, want at least the %d of the manifest", len(flags), len(args))
	}
	for _, f := range flags {
		if o.flags.Lookup(f[1]) == nil {
			t.Errorf("the chart may give --%s, which the agent does not have", f[1])
		}
	}
}
