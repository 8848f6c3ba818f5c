// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
)

// With bigTCP the pod's TCP makes packets beyond 64 KiB, for IPv4 where the kernel can (6.3); the host's end, and every other pod, is as
// the kernel makes it.
func TestBigTCP(t *testing.T) {
	const legacy = 64 << 10
	for name, tt := range map[string]struct {
		tweak []func(map[string]any)
		want  uint32
	}{
		"not asked for": {nil, legacy},
		"off":           {[]func(map[string]any){set("bigTCP", false)}, legacy},
		"on":            {[]func(map[string]any){set("bigTCP", true)}, bigTCPSize},
	} {
		t.Run(name, func(t *testing.T) {
			n, pod := newNode(t), netnstest.New(t)
			n.mustAdd(cmdArgs("c1", pod.Path(), n.conf([]string{range4, range6}, tt.tweak...)))
			rec, err := n.records().Load("c1", "eth0")
			if err != nil {
				t.Fatal(err)
			}
			for _, end := range []struct {
				ns     *netnstest.NS
				device string
				want   uint32
			}{{pod, "eth0", tt.want}, {n.ns, rec.HostIfName, legacy}} {
				end.ns.Do(func() {
					l, err := netlink.LinkByName(end.device)
					if err != nil {
						t.Fatal(err)
					}
					a := l.Attrs()
					if a.GSOMaxSize != end.want {
						t.Errorf("gso_max_size of %s = %d, want %d", end.device, a.GSOMaxSize, end.want)
					}
					if a.GSOIPv4MaxSize != end.want && a.GSOIPv4MaxSize != 0 { // 0: the kernel has no such size
						t.Errorf("gso_ipv4_max_size of %s = %d, want %d", end.device, a.GSOIPv4MaxSize, end.want)
					}
				})
			}
		})
	}
}
