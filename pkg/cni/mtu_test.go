// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/pkg/endpoint"
)

// The MTU is what the conflist says, else what the agent knows of the node, else that of the default route's device; in all but the first
// case the agent may change it later.
func TestMTUIsTheNodes(t *testing.T) {
	told, err := json.Marshal(endpoint.NewNode("n1", "vxlan", 1430, nil))
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		file   string
		tweak  []func(map[string]any)
		want   int
		follow bool
	}{
		"no agent yet":     {"", nil, 1500, true},
		"told":             {string(told), nil, 1430, true},
		"configured":       {string(told), []func(map[string]any){set("mtu", 1400)}, 1400, false},
		"file of no use":   {"{", nil, 1500, true},
		"MTU is not known": {`{"version":1,"name":"n1","routingMode":"vxlan"}`, nil, 1500, true},
	} {
		t.Run(name, func(t *testing.T) {
			n, pod := newNode(t), netnstest.New(t)
			if tt.file != "" {
				if err := os.WriteFile(filepath.Join(n.run, endpoint.NodeFile), []byte(tt.file), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			n.mustAdd(cmdArgs("c1", pod.Path(), n.conf([]string{range4, range6}, tt.tweak...)))
			rec, err := n.records().Load("c1", "eth0")
			if err != nil {
				t.Fatal(err)
			}
			if rec.FollowMTU != tt.follow {
				t.Errorf("record's followMTU = %v, want %v", rec.FollowMTU, tt.follow)
			}
			ends := map[string]*netnstest.NS{"eth0": pod, rec.HostIfName: n.ns}
			for device, ns := range ends {
				ns.Do(func() {
					l, err := netlink.LinkByName(device)
					if err != nil {
						t.Fatal(err)
					}
					if got := l.Attrs().MTU; got != tt.want {
						t.Errorf("MTU of %s = %d, want %d", device, got, tt.want)
					}
				})
			}
		})
	}
}
