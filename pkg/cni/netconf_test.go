// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
)

const minimalConf = `{"cniVersion":"1.1.0","name":"net","type":"margay","ipam":{"type":"margay-ipam"}}`

func TestNetConfDefaults(t *testing.T) {
	c, err := decodeNetConf([]byte(minimalConf))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.validateAdd(); err != nil {
		t.Errorf("validateAdd() = %v, want nil", err)
	}
	got := []any{c.PolicyPending, c.PolicyWait, c.BPFFS, c.RunDir, c.MTU}
	if diff := cmp.Diff([]any{"auto", 10, "/sys/fs/bpf/margay", "/run/margay", 0}, got); diff != "" {
		t.Errorf("defaults differ (-want +got):\n%s", diff)
	}
}

func TestNetConfValidation(t *testing.T) {
	for name, c := range map[string]struct {
		conf string // merged over the minimal configuration
		code uint
		want []string // parts of the message
	}{
		"everything":              {`{"mtu":1400,"mac":"02:00:00:00:00:01","policyPending":"wait","policyWait":5,"bpffs":"/b","runDir":"/r","logFile":"/l","logLevel":"debug"}`, 0, nil},
		"unknown keys are others": {`{"com.example/x":1,"runtimeConfig":{"dns":{}},"args":{"com.example":1}}`, 0, nil},
		"capabilities": {`{"runtimeConfig":{"ips":["10.0.0.5/24","fd00::5"],"mac":"02:00:00:00:00:01","portMappings":[{"hostPort":80,"containerPort":8080}],
			"io.kubernetes.cri.pod-annotations":{"a":"b"}}}`, 0, nil},
		"labels": {`{"args":{"cni":{"labels":[{"key":"app","value":"web"}],"ips":["10.0.0.5"]}}}`, 0, nil},
		"all faults at once": {`{"mtu":10,"mac":"x","policyPending":"maybe","policyWait":-1,"bpffs":"b","runDir":"r","logFile":"l","logLevel":"loud",
			"runtimeConfig":{"ips":["10.0.0"],"mac":"01:00:00:00:00:01"},"args":{"cni":{"labels":[{"key":""},{"key":"a"},{"key":"a"}],"ips":["y"],"mac":"00:00:00:00:00:00"}}}`, 7,
			[]string{"mtu: 10", `mac: "x"`, "policyPending", "policyWait", "bpffs", "runDir", "logFile", "logLevel", "runtimeConfig.ips[0]",
				"runtimeConfig.mac", "labels[0]", "labels[2]", "args.cni.ips[0]", "args.cni.mac"}},
		"plugin name":       {`{"ipam":{"type":"../../bin/sh"}}`, 7, []string{"ipam.type"}},
		"no IPAM":           {`{"ipam":{}}`, 7, []string{"ipam.type is missing"}},
		"IPAM and adoption": {`{"prevResult":{"cniVersion":"1.1.0","ips":[]}}`, 7, []string{"remove ipam"}},
		"bandwidth":         {`{"runtimeConfig":{"bandwidth":{"ingressRate":1}}}`, 2, []string{"runtimeConfig.bandwidth", "ingressRate"}},
		"wrong type":        {`{"mtu":"1400"}`, 6, []string{"conflist"}},
		"broken prevResult": {`{"prevResult":{"ips":7}}`, 6, []string{"prevResult"}},
	} {
		t.Run(name, func(t *testing.T) {
			conf, err := decodeNetConf(merge(t, minimalConf, c.conf))
			if err == nil {
				err = conf.validateAdd()
			}
			if got := code(err); got != c.code {
				t.Fatalf("code = %d (%v), want %d", got, err, c.code)
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("error = %q, want it to mention %q", err, w)
				}
			}
		})
	}
}

func merge(t testing.TB, base, over string) []byte {
	t.Helper()
	var c map[string]any
	for _, s := range []string{base, over} {
		if err := json.Unmarshal([]byte(s), &c); err != nil {
			t.Fatal(err)
		}
	}
	out, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestRequestedMACPrefersTheMoreSpecificOne(t *testing.T) {
	all := `{"mac":"02:00:00:00:00:04","args":{"cni":{"mac":"02:00:00:00:00:02"}},"runtimeConfig":{"mac":"02:00:00:00:00:01"}}`
	for name, c := range map[string]struct{ conf, arg, want string }{
		"nobody":      {`{}`, "", ""},
		"capability":  {all, "02:00:00:00:00:03", "02:00:00:00:00:01"},
		"args.cni":    {`{"mac":"02:00:00:00:00:04","args":{"cni":{"mac":"02:00:00:00:00:02"}}}`, "02:00:00:00:00:03", "02:00:00:00:00:02"},
		"CNI_ARGS":    {`{"mac":"02:00:00:00:00:04"}`, "02:00:00:00:00:03", "02:00:00:00:00:03"},
		"conflist":    {`{"mac":"02:00:00:00:00:04"}`, "", "02:00:00:00:00:04"},
		"upper case":  {`{"mac":"02-00-00-00-00-AB"}`, "", "02:00:00:00:00:ab"},
		"bad CNI_ARG": {`{}`, "zz", "error"},
	} {
		t.Run(name, func(t *testing.T) {
			conf, err := decodeNetConf(merge(t, minimalConf, c.conf))
			if err != nil {
				t.Fatal(err)
			}
			mac, err := conf.requestedMAC(podArgs{mac: c.arg})
			got := mac.String()
			if err != nil {
				got = "error"
			}
			if got != c.want {
				t.Errorf("requestedMAC() = %q, want %q", got, c.want)
			}
		})
	}
}

func TestParseArgs(t *testing.T) {
	for name, c := range map[string]struct {
		in    string
		want  podArgs
		fault []string
	}{
		"empty":            {"", podArgs{}, nil},
		"kubelet":          {"IgnoreUnknown=1;K8S_POD_NAMESPACE=a;K8S_POD_NAME=b;K8S_POD_INFRA_CONTAINER_ID=c;K8S_POD_UID=d;X=y", podArgs{namespace: "a", name: "b", uid: "d"}, nil},
		"order":            {"X=y;IgnoreUnknown=true", podArgs{}, nil},
		"fixed":            {"IP=10.0.0.5;MAC=02:00:00:00:00:01", podArgs{mac: "02:00:00:00:00:01"}, nil},
		"trailing":         {"IP=10.0.0.5;", podArgs{}, nil},
		"value with =":     {"K8S_POD_NAME=a=b", podArgs{name: "a=b"}, nil},
		"unknown":          {"X=y;Z=1", podArgs{}, []string{"X, Z", "IgnoreUnknown"}},
		"unknown, not now": {"X=y;IgnoreUnknown=0", podArgs{}, []string{"X"}},
		"no pair":          {"IgnoreUnknown=1;X", podArgs{}, []string{`"X"`}},
		"two faults":       {"IgnoreUnknown=maybe;X", podArgs{}, []string{"maybe", `"X"`}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parseArgs(c.in)
			if got != c.want {
				t.Errorf("parseArgs() = %+v, want %+v", got, c.want)
			}
			if (err != nil) != (c.fault != nil) {
				t.Fatalf("parseArgs() error = %v, want %v", err, c.fault)
			}
			for _, w := range c.fault {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("parseArgs() error = %v, want it to mention %s", err, w)
				}
			}
		})
	}
}

// FuzzNetConf: whatever is on standard input, decoding never panics, and every fault has a code that the specification knows.
func FuzzNetConf(f *testing.F) {
	f.Add([]byte(minimalConf), "")
	f.Add([]byte(`{"cniVersion":"0.3.1","name":"n","prevResult":{"ips":[{"address":"10.0.0.1/24","interface":0}],"interfaces":[{"name":"eth0"}]}}`), podArgsText)
	f.Add([]byte(`{"cniVersion":"1.0.0","name":"n","mtu":1e9,"runtimeConfig":{"ips":[""],"bandwidth":{}}}`), "IP=;=;")
	f.Add([]byte(`{"cniVersion":"1.1.0","cni.dev/valid-attachments":null,"args":{"cni":{"labels":[{}]}}}`), "IgnoreUnknown")
	f.Fuzz(func(t *testing.T, data []byte, args string) {
		if _, err := parseArgs(args); err != nil && err.Error() == "" {
			t.Error("error without a word")
		}
		c, err := decodeNetConf(data)
		if err != nil {
			if code(err) != types.ErrDecodingFailure {
				t.Errorf("decodeNetConf() = %v with code %d, want 6", err, code(err))
			}
			return
		}
		if c.PolicyPending == "" || c.RunDir == "" || c.BPFFS == "" {
			t.Errorf("defaults are missing in %+v", c)
		}
		if err := c.validateAdd(); err != nil && code(err) != types.ErrInvalidNetworkConfig && code(err) != types.ErrUnsupportedField {
			t.Errorf("validateAdd() = %v with code %d, want 7 or 2", err, code(err))
		}
		if prev, err := c.prevResult(); err == nil && prev != nil {
			interfaceAddresses(prev, "eth0", "")
		}
	})
}
