// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var binary string

func TestMain(m *testing.M) {
	os.Exit(buildAndRun(m))
}

// buildAndRun makes the static binary that users run, and runs the tests with it.
func buildAndRun(m *testing.M) int {
	dir, err := os.MkdirTemp("", "margay-ipam")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	binary = filepath.Join(dir, "margay-ipam")
	build := exec.Command("go", "build", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "go build: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// call is one run of the binary.
type call struct {
	verb, id, netns, args string
	conf                  string
}

// answer is what the binary printed: a result, an error, or nothing.
type answer struct {
	CNIVersion string `json:"cniVersion"`
	Code       uint   `json:"code"`
	Msg        string `json:"msg"`
	IPs        []struct {
		Version string `json:"version"`
		Address string `json:"address"`
		Gateway string `json:"gateway"`
	} `json:"ips"`
	Routes []struct {
		Dst string `json:"dst"`
	} `json:"routes"`
	SupportedVersions []string `json:"supportedVersions"`
}

func (c call) run(t *testing.T) answer {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), binary)
	cmd.Env = []string{"CNI_COMMAND=" + c.verb, "CNI_PATH=/nonexistent", "CNI_IFNAME=eth0", "CNI_CONTAINERID=" + c.id, "CNI_NETNS=" + c.netns, "CNI_ARGS=" + c.args}
	cmd.Stdin = strings.NewReader(c.conf)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var a answer
	if stdout.Len() > 0 {
		if err := json.Unmarshal(stdout.Bytes(), &a); err != nil {
			t.Fatalf("%s printed %q: %v", c.verb, stdout.String(), err)
		}
	}
	if (err != nil) != (a.Code != 0) {
		t.Fatalf("%s: exit %v with answer %q", c.verb, err, stdout.String())
	}
	if stderr.Len() > 0 {
		t.Errorf("%s wrote to stderr: %q", c.verb, stderr.String())
	}
	return a
}

func netconf(version, run, more string) string {
	return fmt.Sprintf(`{"cniVersion":%q,"name":"net","type":"bridge","ipam":{"type":"margay-ipam","runDir":%q,
		"ranges":[[{"subnet":"10.1.0.0/30"}],[{"subnet":"fd00::/64"}]],"routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]}%s}`, version, run, more)
}

func want(t *testing.T, a answer, code uint, part string) {
	t.Helper()
	if a.Code != code || !strings.Contains(a.Msg, part) {
		t.Errorf("answer = %+v, want code %d and a message with %q", a, code, part)
	}
}

func TestAllVersions(t *testing.T) {
	for _, v := range []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		t.Run(v, func(t *testing.T) {
			run := t.TempDir()
			conf := netconf(v, run, "")
			netns := filepath.Join(run, "netns")
			if err := os.WriteFile(netns, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			first := call{verb: "ADD", id: "a", netns: netns, conf: conf}.run(t)
			if first.CNIVersion != v || len(first.IPs) != 2 || len(first.Routes) != 2 {
				t.Fatalf("ADD = %+v, want version %s, two addresses, two routes", first, v)
			}
			if ip := first.IPs[0]; ip.Address != "10.1.0.2/30" || ip.Gateway != "10.1.0.1" || (ip.Version == "4") != (v < "1") {
				t.Errorf("first address = %+v, want 10.1.0.2/30 by 10.1.0.1, version 4 below 1.0.0", ip)
			}
			if ip := first.IPs[1]; ip.Address != "fd00::2/64" || ip.Gateway != "fd00::1" {
				t.Errorf("second address = %+v, want fd00::2/64 by fd00::1", ip)
			}
			want(t, call{verb: "ADD", id: "b", netns: "/nonexistent", conf: conf}.run(t), 11, "10.1.0.0/30")

			prev := netconf(v, run, `,"prevResult":{"cniVersion":"`+v+`","ips":[{"version":"4","address":"10.1.0.2/32"},{"version":"6","address":"fd00::2/128"}]}`)
			check := call{verb: "CHECK", id: "a", netns: netns, conf: prev}.run(t)
			if v < "0.4.0" {
				want(t, check, 1, "")
			} else {
				want(t, check, 0, "")
				want(t, call{verb: "CHECK", id: "b", netns: netns, conf: prev}.run(t), 100, "holds no lease")
			}
			for _, verb := range []string{"STATUS", "GC"} {
				a := call{verb: verb, conf: conf}.run(t)
				if v == "1.1.0" {
					want(t, a, 0, "") // exhausted, but that is none of STATUS's business; GC keeps what has a namespace
				} else {
					want(t, a, 1, "")
				}
			}
			if v >= "0.4.0" {
				want(t, call{verb: "CHECK", id: "a", netns: netns, conf: prev}.run(t), 0, "")
			}
			want(t, call{verb: "DEL", id: "a", conf: conf}.run(t), 0, "")
			want(t, call{verb: "DEL", id: "a", netns: "/nonexistent", conf: conf}.run(t), 0, "")
			want(t, call{verb: "ADD", id: "b", netns: "/nonexistent", conf: conf}.run(t), 0, "")
		})
	}
}

func TestGCList(t *testing.T) {
	for _, tc := range []struct {
		name, list    string
		alive, exists bool // of a pod that is not listed: does its namespace exist, does its lease afterwards
	}{
		{"missing", ``, true, true},
		{"null", `,"cni.dev/valid-attachments":null`, true, true},
		{"empty", `,"cni.dev/valid-attachments":[]`, true, true},
		{"missing, namespace gone", ``, false, false},
		{"empty, namespace gone", `,"cni.dev/valid-attachments":[]`, false, false},
		{"others", `,"cni.dev/valid-attachments":[{"containerID":"other","ifname":"eth0"}]`, true, false},
		{"itself", `,"cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}]`, false, true},
		{"itself, other interface", `,"cni.dev/valid-attachments":[{"containerID":"a","ifname":"net1"}]`, false, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			run := t.TempDir()
			netns := filepath.Join(run, "netns")
			if tc.alive {
				if err := os.WriteFile(netns, nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			conf := netconf("1.1.0", run, "")
			want(t, call{verb: "ADD", id: "a", netns: netns, conf: conf}.run(t), 0, "")
			want(t, call{verb: "GC", conf: netconf("1.1.0", run, tc.list)}.run(t), 0, "")
			exists := call{verb: "CHECK", id: "a", netns: netns, conf: conf}.run(t).Code == 0
			if exists != tc.exists {
				t.Errorf("lease exists after GC: %v, want %v", exists, tc.exists)
			}
		})
	}
}

func TestErrors(t *testing.T) {
	run := t.TempDir()
	if a := (call{verb: "VERSION", conf: "{}"}).run(t); !slices.Equal(a.SupportedVersions, []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}) {
		t.Errorf("VERSION = %+v", a)
	}
	noRanges := fmt.Sprintf(`{"cniVersion":"1.1.0","name":"net","ipam":{"runDir":%q}}`, run)
	for _, tc := range []struct {
		name string
		call call
		code uint
		part string
	}{
		{"version", call{verb: "ADD", id: "a", netns: "/n", conf: netconf("2.0.0", run, "")}, 1, ""},
		{"unknown key", call{verb: "ADD", id: "a", netns: "/n", conf: `{"cniVersion":"1.1.0","name":"net","ipam":{"x":1}}`}, 2, "ipam.x = 1"},
		{"CNI_ARGS", call{verb: "ADD", id: "a", netns: "/n", args: "IP=x", conf: netconf("1.1.0", run, "")}, 4, "IP"},
		{"no JSON", call{verb: "DEL", id: "a", conf: "{"}, 6, ""},
		{"no ranges", call{verb: "ADD", id: "a", netns: "/n", conf: noRanges}, 11, "node.json"},
		{"STATUS without pod CIDR", call{verb: "STATUS", conf: noRanges}, 50, "node.json"},
		{"STATUS without directory", call{verb: "STATUS", conf: netconf("1.1.0", "/proc/nonexistent", "")}, 50, "lease directory"},
		{"DEL without anything", call{verb: "DEL", id: "a", conf: `{"cniVersion":"1.1.0","name":"net","ipam":{"runDir":"/proc/nonexistent"}}`}, 0, ""},
		{"GC without anything", call{verb: "GC", conf: `{"cniVersion":"1.1.0","name":"net","ipam":{"runDir":"/proc/nonexistent"}}`}, 0, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := tc.call.run(t)
			want(t, a, tc.code, tc.part)
			if a.Code > 1 && a.CNIVersion != "1.1.0" && tc.name != "no JSON" {
				t.Errorf("error has cniVersion %q, want 1.1.0", a.CNIVersion)
			}
		})
	}
}
