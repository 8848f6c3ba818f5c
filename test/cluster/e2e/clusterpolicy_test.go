// SPDX-License-Identifier: Apache-2.0

//go:build cluster

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// policyModule has the definition of ClusterNetworkPolicy. The conformance tests pin its version.
const policyModule = "sigs.k8s.io/network-policy-api"

// defineClusterPolicies makes the API server know ClusterNetworkPolicy, from the files of the module: those of the experimental channel, which has all that tests use.
func defineClusterPolicies(t *testing.T) {
	t.Helper()
	cmd := exec.Command("go", "mod", "download", "-json", policyModule)
	cmd.Dir = filepath.Join("..", "tools", "network-policy-api")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v: %s", cmd, err, out)
	}
	var module struct{ Dir string }
	if err := json.Unmarshal(out, &module); err != nil {
		t.Fatal(err)
	}
	crd, err := os.ReadFile(filepath.Join(module.Dir, "config/crd/experimental/policy.networking.k8s.io_clusternetworkpolicies.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	if err := api.apply(ctx, "", strings.TrimPrefix(string(crd), "---\n"), nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the API server serves ClusterNetworkPolicies", time.Minute, func() error {
		var list struct{}
		return api.get(ctx, "ClusterNetworkPolicy", "", "", &list)
	})
}

// clusterPolicy makes or changes a ClusterNetworkPolicy about the pods of the scene's first namespace, until the test ends. ingress is YAML
// in one line.
func (c *policyScene) clusterPolicy(t *testing.T, name, tier string, priority int, ingress string) {
	t.Helper()
	full := c.s.name + "-" + name // these objects have no namespace
	manifest := fmt.Sprintf("apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {name: %s}\n"+
		"spec: {tier: %s, priority: %d, subject: {namespaces: {matchLabels: {kubernetes.io/metadata.name: %s}}}, ingress: %s}\n",
		full, tier, priority, c.s.name, ingress)
	t.Cleanup(func() { c.removeClusterPolicy(t, name) })
	c.s.must(api.apply(c.s.ctx, "", manifest, nil))
}

func (c *policyScene) removeClusterPolicy(t *testing.T, name string) {
	t.Helper()
	if err := api.remove(c.s.ctx, "ClusterNetworkPolicy", "", c.s.name+"-"+name); err != nil {
		t.Error(err)
	}
}

// TestClusterPolicy goes through both tiers: Admin's deny stands before NetworkPolicy, its pass leaves the pod to NetworkPolicy, Baseline
// counts where NetworkPolicy says nothing.
func TestClusterPolicy(t *testing.T) {
	c := newPolicyScene(t)
	defineClusterPolicies(t)
	away := fmt.Sprintf(`{name: away, action: %%s, from: [{namespaces: {matchLabels: {kubernetes.io/metadata.name: %s}}}]}`, c.other.name)
	rule := func(action string) string { return "[" + fmt.Sprintf(away, action) + "]" }
	allowGuest := networkPolicy("guests", `{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: away}}}]}]}`)

	c.allow(t, "without a policy", "friend", "stranger", "guest")
	c.clusterPolicy(t, "admin", "Admin", 10, rule("Deny"))
	c.allow(t, "Admin denies the other namespace", "friend", "stranger")
	c.s.apply(allowGuest)
	c.allow(t, "Admin denies what NetworkPolicy allows; the others are not in NetworkPolicy's rules")
	c.clusterPolicy(t, "admin", "Admin", 10, rule("Pass"))
	c.allow(t, "Admin passes to NetworkPolicy", "guest")
	c.clusterPolicy(t, "first", "Admin", 5, rule("Deny"))
	c.allow(t, "a rule of a lower priority number comes first")
	c.removeClusterPolicy(t, "first")
	c.s.apply(networkPolicy("guests", denyIngress))
	c.allow(t, "Admin passes to a NetworkPolicy that denies")
	c.clusterPolicy(t, "admin", "Admin", 10, rule("Accept"))
	c.allow(t, "Admin accepts what NetworkPolicy denies", "guest")

	c.removeClusterPolicy(t, "admin")
	c.s.must(api.remove(c.s.ctx, "NetworkPolicy", c.s.name, "guests"))
	c.clusterPolicy(t, "baseline", "Baseline", 0, rule("Deny"))
	c.allow(t, "Baseline denies the other namespace", "friend", "stranger")
	c.s.apply(allowGuest)
	c.allow(t, "NetworkPolicy allows what Baseline denies", "guest")
}

// TestClusterPolicyPorts denies one port of a pod by its name.
func TestClusterPolicyPorts(t *testing.T) {
	c := newPolicyScene(t)
	defineClusterPolicies(t)
	c.clusterPolicy(t, "ports", "Admin", 10, `[{name: http, action: Deny, from: [{namespaces: {}}], protocols: [{destinationNamedPort: http}]}]`)
	all := []string{"friend", "stranger", "guest"}
	judge(t, "the port named http is denied", append(over("tcp", table(c.clients(), c.server.place, portOf)),
		over("udp", table(c.clients(), c.server.place, portOf, all...))...)...)
	c.clusterPolicy(t, "ports", "Admin", 10, `[{name: ask, action: Deny, from: [{namespaces: {}}], protocols: [{udp: {destinationPort: {number: 8081}}}]}]`)
	judge(t, "the port 8081 of UDP is denied", append(over("udp", table(c.clients(), c.server.place, portOf)),
		over("tcp", table(c.clients(), c.server.place, portOf, all...))...)...)
}

// TestClusterPolicyStatus: the agents write what became of a policy into its status. Domain names are not supported: such a rule allows
// nothing, and the policy says so.
func TestClusterPolicyStatus(t *testing.T) {
	c := newPolicyScene(t)
	defineClusterPolicies(t)
	c.clusterPolicy(t, "plain", "Admin", 900, `[{name: all, action: Accept, from: [{namespaces: {}}]}]`)
	names := c.s.name + "-names"
	t.Cleanup(func() { c.removeClusterPolicy(t, "names") })
	c.s.must(api.apply(c.s.ctx, "", fmt.Sprintf("apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {name: %s}\n"+
		"spec: {tier: Admin, priority: 901, subject: {namespaces: {matchLabels: {kubernetes.io/metadata.name: %s}}}, "+
		"egress: [{name: site, action: Accept, to: [{domainNames: [example.org]}]}]}\n", names, c.s.name), nil))
	for name, want := range map[string]string{c.s.name + "-plain": "True Accepted", names: "False DomainNamesUnsupported"} {
		eventually(t, "the status of "+name, time.Minute, func() error {
			var policy struct {
				Status struct {
					Conditions []struct{ Type, Status, Reason string }
				}
			}
			if err := api.get(c.s.ctx, "ClusterNetworkPolicy", "", name, &policy); err != nil {
				return err
			}
			for _, condition := range policy.Status.Conditions {
				if condition.Type == "margay.io/Accepted" && condition.Status+" "+condition.Reason == want {
					return nil
				}
			}
			return fmt.Errorf("conditions are %+v, want %s", policy.Status.Conditions, want)
		})
	}
}
