// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// said is one line of test2json's output, with an action, a test, and seconds or output.
func said(action, test string, more any) string {
	if text, ok := more.(string); ok {
		return fmt.Sprintf(`{"Action":%q,"Test":%q,"Output":%q}`+"\n", action, test, text)
	}
	return fmt.Sprintf(`{"Action":%q,"Test":%q,"Elapsed":%v}`+"\n", action, test, more)
}

func TestParsePolicy(t *testing.T) {
	const root = "TestConformance"
	events := strings.Join([]string{
		said("run", root, 0),
		said("output", root+"/TCP/one", "helper.go:70: "+probeMade+"\n"), said("pass", root+"/TCP/one", 1), said("pass", root+"/TCP", 2.5),
		said("output", root+"/Mixed/one", probeMade), said("output", root+"/Mixed/one", probeLeftOut), said("pass", root+"/Mixed", 1),
		said("output", root+"/SCTP/one", probeLeftOut), said("pass", root+"/SCTP/one", 1), said("pass", root+"/SCTP", 1),
		said("output", root+"/Fails/two", probeMade), said("fail", root+"/Fails/two", 1), said("fail", root+"/Fails", 1),
		said("skip", root+"/Feature", 0),
		said("run", root+"/Hangs", 0),
		said("fail", root, 10),
	}, "")
	want := report{tests: []result{
		{name: "TCP", outcome: passed, took: 2500 * time.Millisecond},
		{name: "Mixed", outcome: passed, took: time.Second, note: "without 1 of 2 probes: those by SCTP"},
		{name: "SCTP", outcome: notRun, took: time.Second},
		{name: "Fails", outcome: failed, took: time.Second, note: "failed first: Fails/two"},
		{name: "Feature", outcome: skipped, note: "a feature was not asked for"},
		{name: "Hangs", outcome: failed, note: "did not end"},
	}}
	got, err := parsePolicy([]byte(events))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(report{}, result{})); diff != "" {
		t.Errorf("parsePolicy (-want +got):\n%s", diff)
	}
}

// TestParsePolicyFaults: a run that failed before or outside of its tests must not pass.
func TestParsePolicyFaults(t *testing.T) {
	whole := said("pass", "TestConformance/TCP", 1) + said("fail", "TestConformance", 1)
	if got, err := parsePolicy([]byte(whole)); err != nil || got.verdict() == nil {
		t.Errorf("only the whole failed: verdict = %v, error %v, want a verdict", got.verdict(), err)
	}
	for name, events := range map[string]string{"nothing": "", "set-up failed": said("fail", "TestConformance", 1), "no events": "panic: x\n"} {
		if _, err := parsePolicy([]byte(events)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

const servers = `apiVersion: v1
    spec:
      containers:
        - name: a-client
          image: x
        - name: a-9003
          command: ["porter"]
          env:
          - name: SERVE_SCTP_PORT_{{ index .HostNetworkPorts 6 }}
            value: "foo"
        - name: a-80
          ports:
            - containerPort: 80
---
    spec:
      containers:
        - name: b-9003
          env:
          - name: SERVE_SCTP_PORT_9003
            value: "foo"
---
kind: Last
`

func TestWithoutSCTPServers(t *testing.T) {
	const want = `apiVersion: v1
    spec:
      containers:
        - name: a-client
          image: x
        - name: a-80
          ports:
            - containerPort: 80
---
    spec:
      containers:
---
kind: Last
`
	got, err := withoutSCTPServers([]byte(servers))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("manifest (-want +got):\n%s", diff)
	}
	for name, manifest := range map[string]string{
		"nothing to remove":    want,
		"in another indention": strings.ReplaceAll(servers, "        - name: b", "      - name: b"),
	} {
		if _, err := withoutSCTPServers([]byte(manifest)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestWithoutSCTPProbes(t *testing.T) {
	const source = "package p\n\nfunc PokeServer(t *testing.T, clientPod, protocol, targetHost string) {\n\tcall()\n}\n"
	got, err := withoutSCTPProbes([]byte(source))
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{"targetHost string) {\n\tif strings.EqualFold(protocol, \"sctp\") {\n", probeMade + "\")\n\tcall()"} {
		if !strings.Contains(string(got), part) {
			t.Errorf("%q is not in:\n%s", part, got)
		}
	}
	if _, err := withoutSCTPProbes([]byte("package p\n")); err == nil {
		t.Error("a source without the function was taken")
	}
}
