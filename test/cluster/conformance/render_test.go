// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestRender compares the document of the made-up report, byte for byte. Names and messages that could break a table are in it.
func TestRender(t *testing.T) {
	selected, err := parseSelection("base,policy")
	if err != nil {
		t.Fatal(err)
	}
	f := facts{
		date: "2026-01-02", version: "v0", kubernetes: "v1.2.3", nodes: 3, families: "IPv4, IPv6", kernel: "6.18", runtime: "containerd://2", network: "Margay",
		command: "conformance -x", took: 100 * time.Second,
	}
	got := render(f, []suite{{title: "Tests of Kubernetes", report: parsed(t, madeUp), group: group, whyNot: selected.whyNot}})
	want, err := os.ReadFile("testdata/rendered.md")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("document (-want +got):\n%s", diff)
	}
}

func TestSelection(t *testing.T) {
	tests := []struct{ groups, test, group, whyNot string }{
		{"base", "[sig-network] DNS should answer [Conformance]", "base", ""},
		{"base", "[sig-network] Netpol API should support creating NetworkPolicy API operations", "base", ""},
		{"base", "[sig-network] Netpol x [Feature:NetworkPolicy]", "policy", "group policy was not asked for"},
		{"base,policy", "[sig-network] Netpol x [Feature:NetworkPolicy]", "policy", ""},
		{"base,policy", "[sig-network] Netpol [Feature:SCTPConnectivity] x [Feature:NetworkPolicy]", "", "CONFIG_IP_SCTP"},
		{"policy", "[sig-network] DNS should answer [Conformance]", "base", "group base was not asked for"},
		{"policy", "[sig-network] LoadBalancers [Feature:LoadBalancer] x", "", "load balancer"},
		{"base", "[sig-network] Services should work after restarting kube-proxy [Disruptive]", "", "SSH"},
		{"base", "[sig-network] DNS x [FeatureGate:RelaxedServiceNameValidation]", "base", ""},
		{"base", "[sig-network] Services should allow creating a basic SCTP service with pod and endpoints [LinuxOnly] [Serial]", "base", ""},
	}
	for _, tt := range tests {
		t.Run(tt.groups+" "+tt.test, func(t *testing.T) {
			s, err := parseSelection(tt.groups)
			if err != nil {
				t.Fatal(err)
			}
			if got := group(tt.test); got != tt.group {
				t.Errorf("group = %q, want %q", got, tt.group)
			}
			if got := s.whyNot(tt.test); (got == "") != (tt.whyNot == "") || !strings.Contains(got, tt.whyNot) {
				t.Errorf("whyNot = %q, want %q", got, tt.whyNot)
			}
		})
	}
	if _, err := parseSelection("base,none"); err == nil {
		t.Error("an unknown group was taken")
	}
}

// TestMayWrite: only a whole run on Margay may become the document.
func TestMayWrite(t *testing.T) {
	whole := strings.Join(groups(), ",")
	tests := []struct {
		name, network, groups string
		o                     options
		want                  bool
	}{
		{"whole run", "margay", whole, options{write: "x"}, true},
		{"reference network", "reference", whole, options{write: "x"}, false},
		{"focus", "margay", whole, options{write: "x", focus: "DNS"}, false},
		{"without base", "margay", "policy,dualstack", options{write: "x"}, false},
		{"nothing to write", "reference", "base", options{focus: "DNS"}, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s, err := parseSelection(tt.groups)
			if err != nil {
				t.Fatal(err)
			}
			if err := tt.o.mayWrite(s, tt.network); (err == nil) != tt.want {
				t.Errorf("mayWrite = %v, want allowed: %v", err, tt.want)
			}
		})
	}
}

func TestMissingImages(t *testing.T) {
	packed := []string{"example.org/a:1", "example.org/a:2", "localhost:5000/b"}
	if err := missingImages([]string{"example.org/a:2", "example.org/other:7", "localhost:5000/b"}, packed); err != nil {
		t.Errorf("nothing is missing: %v", err)
	}
	if err := missingImages([]string{"example.org/a:1", "example.org/a:3"}, packed); err == nil || !strings.Contains(err.Error(), "example.org/a:3") {
		t.Errorf("error = %v, want one that names example.org/a:3", err)
	}
}

func TestParseNodes(t *testing.T) {
	const list = `{"items": [{"metadata": {"name": "node1"}, "spec": {"podCIDRs": ["10.0.0.0/24", "fd00::/64"]}, "status": {
		"conditions": [{"type": "Ready", "status": "True"}],
		"nodeInfo": {"kubeletVersion": "v1", "kernelVersion": "6.18", "containerRuntimeVersion": "containerd://2"}}}]}`
	got, err := parseNodes(list)
	if err != nil {
		t.Fatal(err)
	}
	if want := (facts{kubernetes: "v1", nodes: 1, families: "IPv4, IPv6", kernel: "6.18", runtime: "containerd://2"}); got != want {
		t.Errorf("parseNodes = %+v, want %+v", got, want)
	}
	if _, err := parseNodes(strings.Replace(list, "True", "False", 1)); err == nil || !strings.Contains(err.Error(), "node1") {
		t.Errorf("error = %v, want one that names the node", err)
	}
	if _, err := parseNodes(`{"items": []}`); err == nil {
		t.Error("a cluster without nodes was taken")
	}
}
