// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// writeRun makes a run directory of the named files.
func writeRun(t *testing.T, files map[string]string) string {
	t.Helper()
	run := t.TempDir()
	for name, content := range files {
		path := filepath.Join(run, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return run
}

const clientFile = "endpoints/c0ffee0123456789-eth0.json"

const clientRecord = `{"version":1,"containerID":"c0ffee0123456789","ifName":"eth0","namespace":"default","name":"client",
	"addresses":["10.1.0.5","fd00:1::5"],"hostIfName":"veth1","hostIfindex":7}`

func TestLoadNames(t *testing.T) {
	v4, v6 := netip.MustParseAddr("10.1.0.5"), netip.MustParseAddr("fd00:1::5")
	for _, tc := range []struct {
		name                string
		files               map[string]string
		wantPod             string
		wantService, wantRl string
		wantErr             string
	}{
		{name: "nothing there"},
		{
			name: "everything",
			files: map[string]string{
				clientFile:      clientRecord,
				"services.json": `{"4":"default/web:http"}`,
				"rules.json":    `{"17":"default/allow-web ingress[0]"}`,
			},
			wantPod: "default/client", wantService: "default/web:http", wantRl: "default/allow-web ingress[0]",
		},
		{
			name:    "no pod name: the container's ID",
			files:   map[string]string{clientFile: `{"containerID":"c0ffee0123456789","ifName":"eth0","addresses":["10.1.0.5","fd00:1::5"]}`},
			wantPod: "c0ffee012345",
		},
		{
			name:    "temporary files are no records",
			files:   map[string]string{"endpoints/.a.tmp": "{", clientFile: clientRecord},
			wantPod: "default/client",
		},
		{
			name:    "one broken file does not hide the others",
			files:   map[string]string{clientFile: clientRecord, "endpoints/b.json": "{", "rules.json": `{"17":"r"}`},
			wantPod: "default/client", wantRl: "r",
			wantErr: "b.json",
		},
		{
			name:        "broken rules",
			files:       map[string]string{"rules.json": `[]`, "services.json": `{"4":"s"}`},
			wantService: "s",
			wantErr:     "rules.json",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n, err := LoadNames(writeRun(t, tc.files))
			if (err != nil) != (tc.wantErr != "") || err != nil && !strings.Contains(err.Error(), tc.wantErr) {
				t.Errorf("LoadNames() error = %v, want one that contains %q", err, tc.wantErr)
			}
			for _, a := range []netip.Addr{v4, v6, netip.AddrFrom16(v4.As16())} {
				if got := n.Pod(a); got != tc.wantPod {
					t.Errorf("Pod(%s) = %q, want %q", a, got, tc.wantPod)
				}
			}
			if got := n.Service(4); got != tc.wantService {
				t.Errorf("Service(4) = %q, want %q", got, tc.wantService)
			}
			if got := n.Rule(17); got != tc.wantRl {
				t.Errorf("Rule(17) = %q, want %q", got, tc.wantRl)
			}
		})
	}
}

func TestPodAddrs(t *testing.T) {
	n, err := LoadNames(writeRun(t, map[string]string{clientFile: clientRecord}))
	if err != nil {
		t.Fatal(err)
	}
	want := []netip.Addr{netip.MustParseAddr("10.1.0.5"), netip.MustParseAddr("fd00:1::5")}
	if diff := cmp.Diff(want, n.PodAddrs("default/client"), cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Errorf("PodAddrs(default/client) (-want +got):\n%s", diff)
	}
	if got := n.PodAddrs("default/nobody"); got != nil {
		t.Errorf("PodAddrs(default/nobody) = %v, want none", got)
	}
}

// TestNilNames: whoever has no names passes nil.
func TestNilNames(t *testing.T) {
	var n *Names
	if got := n.Pod(netip.MustParseAddr("10.1.0.5")) + n.Service(1) + n.Rule(1); got != "" || n.PodAddrs("a/b") != nil {
		t.Errorf("nil Names know %q, want nothing", got)
	}
}

// A hostPort has its pod's name, with or without an agent that names services.
func TestM3_HostPortHasItsPodsName(t *testing.T) {
	record := strings.Replace(clientRecord, `"hostIfName"`,
		`"hostPorts":[{"protocol":"tcp","host":"[::]:8080","pod":"[fd00:1::5]:80","id":57400}],"hostIfName"`, 1)
	for name, files := range map[string]map[string]string{
		"without agent": {clientFile: record},
		"with agent":    {clientFile: record, ServicesFile: `{"7":"default/web:http"}`},
	} {
		t.Run(name, func(t *testing.T) {
			n, err := LoadNames(writeRun(t, files))
			if err != nil || n.Service(57400) != "default/client:hostPort-8080" {
				t.Errorf("Service(57400) = %q, %v, want the pod's name", n.Service(57400), err)
			}
			if got := n.Service(57401); got != "" {
				t.Errorf("Service(57401) = %q, want none", got)
			}
		})
	}
}
