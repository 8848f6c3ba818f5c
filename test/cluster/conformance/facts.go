// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

// facts asks the cluster where the coming report is from.
func (r runner) facts(ctx context.Context) (facts, error) {
	nodes, err := r.cluster.Kubectl(ctx, "get", "nodes", "--output=json")
	if err != nil {
		return facts{}, err
	}
	f, err := parseNodes(nodes)
	if err != nil {
		return facts{}, err
	}
	if f.version, err = r.version(ctx); err != nil {
		return facts{}, err
	}
	f.date = time.Now().UTC().Format(time.DateOnly)
	f.network = r.cluster.CNI
	if f.network == "margay" {
		f.network = "Margay"
	}
	f.command = strings.Join(append([]string{"conformance"}, os.Args[1:]...), " ")
	return f, nil
}

// version asks an agent for its version: the cluster may have been started from another state of the repository than the one that is here
// now. Without Margay there is none.
func (r runner) version(ctx context.Context) (string, error) {
	if r.cluster.CNI != "margay" {
		return "none", nil
	}
	cmd, err := r.cluster.KubectlCommand(ctx, "--namespace=kube-system", "exec", "daemonset/margay", "--container=agent", "--", "/usr/bin/margay-agent", "--version")
	if err != nil {
		return "", err
	}
	said, err := cmd.CombinedOutput() // it says so on standard error
	if err != nil {
		return "", fmt.Errorf("version of Margay: %w: %s", err, said)
	}
	for line := range strings.Lines(string(said)) {
		if version, ok := strings.CutPrefix(strings.TrimSpace(line), "margay-agent "); ok {
			return version, nil
		}
	}
	return "", fmt.Errorf("version of Margay: margay-agent --version says %q", said)
}

// parseNodes takes a NodeList as JSON. A node that is not ready is an error: the suite would wait half an hour for it.
func parseNodes(list string) (facts, error) {
	var nodes struct {
		Items []struct {
			Metadata struct{ Name string }
			Spec     struct{ PodCIDRs []string }
			Status   struct {
				Conditions []struct{ Type, Status string }
				NodeInfo   struct{ KubeletVersion, KernelVersion, ContainerRuntimeVersion string }
			}
		}
	}
	if err := json.Unmarshal([]byte(list), &nodes); err != nil {
		return facts{}, fmt.Errorf("list of nodes: %w", err)
	}
	if len(nodes.Items) == 0 {
		return facts{}, errors.New("the cluster has no nodes")
	}
	f := facts{nodes: len(nodes.Items)}
	for _, n := range nodes.Items {
		ready := false
		for _, c := range n.Status.Conditions {
			ready = ready || c.Type == "Ready" && c.Status == "True"
		}
		if !ready {
			return facts{}, fmt.Errorf("node %s is not ready", n.Metadata.Name)
		}
		info := n.Status.NodeInfo
		f.kubernetes, f.kernel, f.runtime = info.KubeletVersion, info.KernelVersion, info.ContainerRuntimeVersion
		f.families = families(n.Spec.PodCIDRs)
	}
	return f, nil
}

// families names the families of a node's pod ranges.
func families(ranges []string) string {
	var found []string
	for _, r := range ranges {
		name := "IPv4"
		if strings.Contains(r, ":") {
			name = "IPv6"
		}
		if !slices.Contains(found, name) {
			found = append(found, name)
		}
	}
	return strings.Join(found, ", ")
}
