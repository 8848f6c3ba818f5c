// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"errors"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/clustertest"
)

// TestA8_PodGoneWithoutDEL: a pod's interface goes, as with its network namespace, and neither the plugin nor the service hears of it. The
// agents see the device go: within seconds the open connections are reset, at this node and through another one.
func TestA8_PodGoneWithoutDEL(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{RoutingMode: "vxlan"})
	near, far := c.AddPod(c.Node("n2"), "near", nil), c.AddPod(c.Node("n1"), "far", nil)
	for _, v6 := range c.Families() {
		t.Run(clustertest.FamilyName(v6), func(t *testing.T) {
			name := map[bool]string{false: "backend4", true: "backend6"}[v6]
			number := map[bool]int{false: 60, true: 61}[v6]
			backend := c.AddPod(c.Node("n3"), name, map[string]string{"app": name})
			backend.Serve(podPort)
			c.Apply(clustertest.NodePortService(name, number, map[string]string{"app": name}, 80, podPort, int32(30500+number)))
			c.WaitSettled()
			conns := map[string]interface{ Ask() (string, error) }{}
			for what, from := range map[string]*clustertest.Host{"a pod": far.Host, "another pod": near.Host, "a client outside": c.Client} {
				to := clusterIP(number, v6)
				if from == c.Client {
					to = c.Node("n1").AddrPort(v6, uint16(30500+number))
				}
				conn, err := from.Dial("tcp", to, 0)
				if err != nil {
					t.Fatalf("%s: %v", what, err)
				}
				if _, err := conn.Ask(); err != nil {
					t.Fatalf("%s: %v", what, err)
				}
				conns[what] = conn
			}
			removePodDevice(t, backend)
			for what, conn := range conns {
				var err error
				for end := time.Now().Add(5 * time.Second); time.Now().Before(end); {
					if _, err = conn.Ask(); errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) {
						break
					}
				}
				if !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
					t.Errorf("the connection of %s: %v, want a reset within 5 s", what, err)
				}
			}
		})
	}
}

// removePodDevice deletes the host-side device of a pod, which takes the pod's end along.
func removePodDevice(t *testing.T, p *clustertest.Pod) {
	t.Helper()
	route, err := p.Node.Output("ip", "route", "get", p.Addrs[0].String())
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(route)
	for i, word := range fields {
		if word == "dev" && i+1 < len(fields) {
			if _, err := p.Node.Output("ip", "link", "del", fields[i+1]); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatalf("no device in %q", route)
}
