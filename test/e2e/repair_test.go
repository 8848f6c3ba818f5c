// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/pkg/link"
)

// programs lists what is attached in the node, as tc shows it.
func (m *machine) programs(device string) (out string) {
	m.node.Do(func() {
		for _, side := range []string{"ingress", "egress"} {
			b, _ := exec.Command("tc", "filter", "show", "dev", device, side).CombinedOutput()
			out += string(b)
		}
	})
	return out
}

// TestRemovedFiltersComeBack: somebody removes our filters, together with the qdisc they hang on; a pod without them is a pod without
// policy. The agent, whose regular look is an hour away, puts them back at once.
func TestRemovedFiltersComeBack(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.apply("web.yaml", webService)
	m.startAgent("--resync", "1h")
	p := m.startPod("web")
	m.eventually("the NodePort works", func() bool { _, ok := m.asks(false); return ok })
	pod := link.HostName("e2e-"+p.name, "eth0")
	for device, programs := range map[string][]string{pod: {"margay/from_pod", "margay/to_pod"}, "eth0": {"margay/from_netdev"}} {
		attached := func() bool { return m.attached(device, programs...) }
		m.eventually(device+" has its programs", attached)
		m.removeFilters(device)
		m.eventually(device+" has its programs again", attached)
	}
	m.killAgent()
	m.removeFilters(pod)
	m.startAgent("--resync", "1h")
	m.eventually("the next agent puts them back", func() bool { return m.attached(pod, "margay/from_pod", "margay/to_pod") })
	if why, ok := m.asks(false); !ok {
		t.Errorf("NodePort afterwards: %s", why)
	}
}

// attached tells whether tc shows all of the programs on the device.
func (m *machine) attached(device string, programs ...string) bool {
	list := m.programs(device)
	return !slices.ContainsFunc(programs, func(name string) bool { return !strings.Contains(list, name) })
}

// removeFilters removes the qdisc that the device's filters hang on.
func (m *machine) removeFilters(device string) {
	m.t.Helper()
	m.node.Do(func() {
		l, err := netlink.LinkByName(device)
		m.must(err)
		m.must(netlink.QdiscDel(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
		}}))
	})
}
