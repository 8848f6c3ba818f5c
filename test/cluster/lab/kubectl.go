// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// KubectlCommand returns a kubectl that talks to the cluster as its administrator.
func (c *Cluster) KubectlCommand(ctx context.Context, args ...string) (*exec.Cmd, error) {
	return c.Command(ctx, append([]string{c.bin("kubectl")}, args...)...)
}

// Command returns a command that reaches the cluster's API server: it has the control plane's network, KUBECONFIG set, and the files of
// the real machine.
func (c *Cluster) Command(ctx context.Context, argv ...string) (*exec.Cmd, error) {
	cmd, err := c.Control().NetCommand(ctx, argv...)
	if err != nil {
		return nil, err
	}
	// A home of its own: kubectl keeps a cache of each server there, and every cluster has the same address.
	home := filepath.Join(c.State(), "home")
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig(), "HOME="+home, "PATH="+c.binDir()+":"+os.Getenv("PATH"))
	return cmd, os.MkdirAll(home, 0o755)
}

// Kubectl runs kubectl and returns what it prints.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	cmd, err := c.KubectlCommand(ctx, args...)
	if err != nil {
		return "", err
	}
	return output(cmd, append([]string{"kubectl"}, args...))
}

// Apply applies objects in YAML.
func (c *Cluster) Apply(ctx context.Context, manifests string) error {
	cmd, err := c.KubectlCommand(ctx, "apply", "-f", "-")
	if err != nil {
		return err
	}
	cmd.Stdin = strings.NewReader(manifests)
	_, err = output(cmd, []string{"kubectl", "apply", "-f", "-"})
	return err
}

// nodeObjects returns the Node objects, by name.
func (c *Cluster) nodeObjects(ctx context.Context) (map[string]*corev1.Node, error) {
	out, err := c.Kubectl(ctx, "get", "nodes", "--output=json")
	if err != nil {
		return nil, err
	}
	var list corev1.NodeList
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return nil, fmt.Errorf("decode the nodes: %w", err)
	}
	nodes := map[string]*corev1.Node{}
	for i := range list.Items {
		nodes[list.Items[i].Name] = &list.Items[i]
	}
	return nodes, nil
}

// podRanges returns the pod ranges of a Node object.
func podRanges(n *corev1.Node) ([]netip.Prefix, error) {
	var all []netip.Prefix
	for _, s := range n.Spec.PodCIDRs {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, fmt.Errorf("node %s: %w", n.Name, err)
		}
		all = append(all, p)
	}
	return all, nil
}

// ready returns an error unless a node's condition Ready is true, and was said after since. The API server keeps whole seconds.
func ready(n *corev1.Node, since time.Time) error {
	for _, cond := range n.Status.Conditions {
		switch {
		case cond.Type != corev1.NodeReady:
		case cond.LastHeartbeatTime.Time.Before(since.Truncate(time.Second)):
			return fmt.Errorf("node %s has said nothing since its start at %s", n.Name, since)
		case cond.Status != corev1.ConditionTrue:
			return fmt.Errorf("node %s is not ready: %s: %s", n.Name, cond.Reason, cond.Message)
		default:
			return nil
		}
	}
	return fmt.Errorf("node %s has no condition Ready yet", n.Name)
}
