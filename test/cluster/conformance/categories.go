// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// A category is a set of tests, told by their names. It has either a group, under which it can be run, or the reason why it cannot run on
// the test cluster.
type category struct {
	group   string
	pattern string // regular expression, as ginkgo's --skip takes it
	reason  string
}

// base is the group of every test that no category claims.
const base = "base"

// noSCTP is the reason of tests that do nothing without SCTP sockets.
const noSCTP = "the kernel of the test machine has no SCTP sockets (CONFIG_IP_SCTP is not set)"

// categories claims tests in this order; a test that several claim is run only if all of them are. Counts and reasons are of Kubernetes
// v1.37.2.
var categories = []category{
	{pattern: `\[Feature:LoadBalancer\]`, reason: "needs a controller that gives services load balancer addresses; the cluster has none"},
	{pattern: `\[Feature:SCTPConnectivity\]`, reason: noSCTP},
	{pattern: `\[Feature:Networking-(IPv4|IPv6|DNS)\]`, reason: "needs the Internet"},
	{pattern: `\[Feature:(Networking-Performance|PerformanceDNS)\]`, reason: "measures a cluster of hundreds of services; is no statement on this machine"},
	{pattern: `\[Feature:KubeProxyNFAcct\]`, reason: "tests kube-proxy's nfacct counters; there is no kube-proxy"},
	{pattern: `should set TCP CLOSE_WAIT timeout`, reason: "tests kube-proxy's setting of netfilter's connection tracking; there is no kube-proxy"},
	{pattern: `\[Disruptive\]`, reason: "restarts daemons of a node by SSH or by a cloud's interface; neither is there"},
	{pattern: `\[Provider:`, reason: "needs the cloud that it names"},
	{pattern: `DNS configMap nameserver`, reason: "rewrites the Corefile of a DNS server that its cloud installed, and asks servers on the Internet"},
	{pattern: `let a node pull an image`, reason: "pulls from a registry; the cluster has none"},
	{group: "policy", pattern: `\[Feature:NetworkPolicy\]`},
	{group: "dualstack", pattern: `\[Feature:IPv6DualStack\]`},
	{group: "localhost", pattern: `\[Feature:LocalhostNodePorts\]`},
	{group: "topology", pattern: `Traffic Distribution|Topology Hints`},
}

// knownSkips are the words with which tests skip themselves for what three nodes cannot give them. Every other skip is a fault.
var knownSkips = []string{
	"need at least 3 zones, with at least 2 schedulable nodes each", // Traffic Distribution: that would be six nodes
}

// groups are the names that can be asked for.
func groups() []string {
	names := []string{base}
	for _, c := range categories {
		if c.group != "" && !slices.Contains(names, c.group) {
			names = append(names, c.group)
		}
	}
	return append(names, clusterPolicy)
}

// selection is which groups a run has.
type selection map[string]bool

// parseSelection reads group names with commas between them.
func parseSelection(list string) (selection, error) {
	s := selection{}
	for name := range strings.SplitSeq(list, ",") {
		if !slices.Contains(groups(), name) {
			return nil, fmt.Errorf("no group %q, there are %s", name, strings.Join(groups(), ", "))
		}
		s[name] = true
	}
	return s, nil
}

// e2e reports whether the selection has tests of Kubernetes.
func (s selection) e2e() bool { return len(s) > 1 || !s[clusterPolicy] }

// left returns the categories that the selection leaves out.
func (s selection) left() []category {
	return slices.DeleteFunc(slices.Clone(categories), func(c category) bool { return s[c.group] })
}

// skip is the expression of the tests to leave out.
func (s selection) skip() string {
	var patterns []string
	for _, c := range s.left() {
		patterns = append(patterns, c.pattern)
	}
	return strings.Join(patterns, "|")
}

// group returns the group of a test: that of the first category that claims it, "" if that one cannot run, base if none does.
func group(name string) string {
	for _, c := range categories {
		if regexp.MustCompile(c.pattern).MatchString(name) {
			return c.group
		}
	}
	return base
}

// whyNot returns why the selection leaves out a test. An empty answer means that it should have been run.
func (s selection) whyNot(name string) string {
	for _, c := range s.left() {
		if !regexp.MustCompile(c.pattern).MatchString(name) {
			continue
		}
		if c.reason != "" {
			return c.reason
		}
		return notAsked(c.group)
	}
	if !s[base] && group(name) == base {
		return notAsked(base)
	}
	return ""
}

func notAsked(group string) string { return "group " + group + " was not asked for" }
