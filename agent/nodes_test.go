// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/pkg/agent"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/link"
	"github.com/margay-cni/margay/pkg/node"
	"github.com/margay-cni/margay/pkg/state"
)

const nodeYAML = `apiVersion: v1
kind: Node
metadata: {name: %s}
spec: {podCIDRs: ["%s", "%s"]}
status: {addresses: [{type: InternalIP, address: "%s"}, {type: InternalIP, address: "%s"}]}
---
`

// nodes are n1 (the node of the tests) and n2, a neighbour of it on its network.
var nodes = fmt.Sprintf(nodeYAML, "n1", "10.1.0.0/24", "fd00:1::/64", nodetest.NodeAddrs[0], nodetest.NodeAddrs[1]) +
	fmt.Sprintf(nodeYAML, "n2", "10.2.0.0/24", "fd00:2::/64", nodetest.ClientAddrs[0], nodetest.ClientAddrs[1])

// networkOf reads the overlay device and the routes to other nodes of the node's namespace.
func networkOf(t *testing.T, n *nodetest.Node) (overlay link.Device, routes []link.NodeRoute) {
	t.Helper()
	n.NS.Do(func() {
		c, err := link.Dial(-1)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		overlay, _ = c.Device(agent.DefaultVXLANDevice)
		if routes, err = c.NodeRoutes(); err != nil {
			t.Fatal(err)
		}
	})
	return overlay, routes
}

func routed(routes []link.NodeRoute, prefix string, device int) bool {
	return slices.ContainsFunc(routes, func(r link.NodeRoute) bool { return r.Dst == netip.MustParsePrefix(prefix) && r.Device == device })
}

// nodeEntry is an element of the map nodes, and mapped one of routes.
func nodeEntry(t *testing.T, n *nodetest.Node, index uint32) (v bpf.Node) {
	t.Helper()
	if err := n.DP.Maps.Nodes.Lookup(&index, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func mapped(n *nodetest.Node, prefix string) (v bpf.Route) {
	k := bpf.NewRouteKey(netip.MustParsePrefix(prefix))
	_ = n.DP.Maps.Routes.Lookup(&k, &v) // a missing one is zero
	return v
}

func nodeState(t *testing.T, n *nodetest.Node) (v bpf.NodeState) {
	t.Helper()
	var zero uint32
	if err := n.DP.Maps.NodeState.Lookup(&zero, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestAnotherNodeComesChangesAndGoes(t *testing.T) {
	n := nodetest.New(t)
	manifests := t.TempDir()
	p := start(t, n, manifests)
	if d, _ := networkOf(t, n); d.Index != 0 {
		t.Errorf("overlay device without another node = %+v, want none", d)
	}
	put(t, manifests, "nodes.yaml", nodes)
	eventually(t, "the overlay device with its programs", func() bool {
		d, _ := networkOf(t, n)
		attached := false
		n.NS.Do(func() { attached = n.DP.OverlayAttached(d.Index) == nil })
		return d.Up && attached && nodeState(t, n).OverlayIfindex == uint32(d.Index)
	})
	made, routes := networkOf(t, n)
	if made.MTU != 1450 || made.Kind != "vxlan" {
		t.Errorf("overlay device = %+v, want VXLAN with MTU 1450", made)
	}
	eventually(t, "kernel routes of both families", func() bool {
		_, routes = networkOf(t, n)
		return routed(routes, "10.2.0.0/24", made.Index) && routed(routes, "fd00:2::/64", made.Index) &&
			routed(routes, "10.1.0.0/24", 0) && routed(routes, "fd00:1::/64", 0)
	})
	for prefix, want := range map[string]bpf.Route{
		"10.2.0.0/24": {Node: 1, Flags: bpf.RouteOverlay}, "fd00:2::/64": {Node: 1, Flags: bpf.RouteOverlay}, "10.1.0.0/24": {Flags: bpf.RouteLocal},
	} {
		if got := mapped(n, prefix); got != want {
			t.Errorf("routes[%s] = %+v, want %+v", prefix, got, want)
		}
	}
	eventually(t, "masquerade", func() bool { return nodeState(t, n).Flags == bpf.NodeMasquerade })
	if v := nodeEntry(t, n, 1); v.Addr.Netip() != nodetest.ClientAddrs[0] || v.Local.Netip() != nodetest.NodeAddrs[0] || v.Mtu != 1450 {
		t.Errorf("nodes[1] = %+v, want the tunnel to %s", v, nodetest.ClientAddrs[0])
	}
	eventually(t, "the overlay device in the status, and not as a NIC", func() bool {
		last := p.status().Last
		return last.Overlay != nil && last.Overlay.Ifindex == made.Index && len(last.Devices) == 1
	})

	// Somebody removes the device: it is made anew, and everything that names it follows.
	n.NS.Do(func() {
		if err := netlink.LinkDel(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: made.Index}}); err != nil {
			t.Fatal(err)
		}
	})
	eventually(t, "the overlay device again", func() bool {
		d, routes := networkOf(t, n)
		return d.Up && d.Index != made.Index && nodeState(t, n).OverlayIfindex == uint32(d.Index) && routed(routes, "10.2.0.0/24", d.Index)
	})
	// Somebody removes its programs.
	again, _ := networkOf(t, n)
	n.NS.Do(func() {
		q := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: again.Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
		if err := netlink.QdiscDel(q); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the overlay's programs again", func() bool { return n.DP.OverlayAttached(again.Index) == nil })
	})

	put(t, manifests, "nodes.yaml", strings.ReplaceAll(nodes, "10.2.0.0/24", "10.9.0.0/24"))
	eventually(t, "the other range", func() bool {
		d, routes := networkOf(t, n)
		return mapped(n, "10.9.0.0/24").Node == 1 && mapped(n, "10.2.0.0/24") == bpf.Route{} &&
			routed(routes, "10.9.0.0/24", d.Index) && !routed(routes, "10.2.0.0/24", d.Index)
	})
	p.kill()
	p = start(t, n, manifests)
	rounds := p.status().Rounds
	eventually(t, "full compares", func() bool { return p.status().Rounds > rounds+2 })
	if got := p.writes(); got != 0 {
		t.Errorf("entries written by an agent that was killed and started again = %d, want 0", got)
	}
	if d, _ := networkOf(t, n); d.Index != again.Index {
		t.Errorf("overlay device after a restart = %+v, want %+v", d, again)
	}

	put(t, manifests, "nodes.yaml", strings.Split(nodes, "---\n")[0])
	eventually(t, "the other node to be gone", func() bool {
		d, routes := networkOf(t, n)
		return d.Index == 0 && len(routes) == 2 && mapped(n, "10.9.0.0/24") == bpf.Route{} && nodeEntry(t, n, 1) == bpf.Node{} &&
			nodeState(t, n).OverlayIfindex == 0
	})
}

func TestDeviceMTUIsFollowed(t *testing.T) {
	n := nodetest.New(t)
	manifests := t.TempDir()
	put(t, manifests, "nodes.yaml", nodes)
	follows, fixed := n.AddPod("follows"), n.AddPod("fixed")
	for _, pod := range []*nodetest.Pod{follows, fixed} {
		n.NS.Do(func() {
			l, err := netlink.LinkByIndex(pod.Ifindex)
			if err != nil {
				t.Fatal(err)
			}
			r := &endpoint.Record{
				ContainerID: "c-" + pod.Name, IfName: "eth0", Netns: pod.NS.Path(), Namespace: "default", Name: pod.Name, Addresses: pod.Addrs,
				MAC: pod.MAC.String(), HostMAC: pod.HostMAC.String(), HostIfName: l.Attrs().Name, HostIfindex: pod.Ifindex, FollowMTU: pod == follows,
			}
			if err := endpoint.NewStore(n.Config.Run).Save(r); err != nil {
				t.Fatal(err)
			}
		})
	}
	start(t, n, manifests)
	mtu := func(pod *nodetest.Pod) (host, inside int) {
		n.NS.Do(func() {
			if l, err := netlink.LinkByIndex(pod.Ifindex); err == nil {
				host = l.Attrs().MTU
			}
		})
		pod.NS.Do(func() {
			if l, err := netlink.LinkByName("eth0"); err == nil {
				inside = l.Attrs().MTU
			}
		})
		return host, inside
	}
	was, _ := mtu(fixed)
	for _, nic := range []int{1500, 1400, 9000} {
		n.NS.Do(func() {
			l, err := netlink.LinkByName("eth0")
			if err != nil {
				t.Fatal(err)
			}
			if err := netlink.LinkSetMTU(l, nic); err != nil {
				t.Fatal(err)
			}
		})
		want := nic - node.Overhead4
		eventually(t, fmt.Sprintf("everything to follow a NIC's MTU of %d", nic), func() bool {
			d, _ := networkOf(t, n)
			file, _ := endpoint.ReadNode(n.Config.Run)
			host, inside := mtu(follows)
			return d.MTU == want && file.MTU == want && nodeEntry(t, n, 1).Mtu == uint16(want) && host == want && inside == want
		})
		if host, inside := mtu(fixed); host != was || inside != was {
			t.Errorf("MTU of a pod whose MTU is configured = %d and %d, want %d as before", host, inside, was)
		}
	}
}

func TestReachFlags(t *testing.T) {
	least := []string{"--manifests", "m", "--node", "n"}
	o, err := parse(append(slices.Clone(least), "--routing-mode", "auto", "--vxlan-port", "4789", "--vxlan-vni", "7", "--vxlan-device", "vx0",
		"--masquerade=false", "--non-masquerade-cidrs", "198.51.100.0/24, 2001:db8:9::/48", "--egress-address", "192.0.2.9",
		"--egress-address", "eth1=2001:db8::9", "--service-return", "dsr"), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	r := o.reach
	if r.Mode != node.Auto || r.VXLANPort != 4789 || r.VXLANVNI != 7 || r.VXLANDevice != "vx0" || r.Masquerade || len(r.NonMasquerade) != 2 ||
		len(r.Egress) != 2 || r.Egress[1].Device != "eth1" || o.serviceReturn != state.ReturnDSR {
		t.Errorf("options = %+v, want what the flags say", o)
	}
	for _, wrong := range [][]string{
		{"--routing-mode", "bgp"}, {"--vxlan-port", "0"}, {"--vxlan-port", "65536"}, {"--vxlan-vni", "16777216"},
		{"--non-masquerade-cidrs", "10.0.0.1"}, {"--egress-address", "eth0"}, {"--service-return", "there"},
	} {
		if _, err := parse(append(slices.Clone(least), wrong...), io.Discard); err == nil {
			t.Errorf("parse(%q) succeeds, want an error", wrong)
		}
	}
}

// A predecessor's file is no proof that the maps are gone: without numbers, a node gets one that no map names.
func TestNodeNumbersAreLost(t *testing.T) {
	n := nodetest.New(t)
	manifests := t.TempDir()
	put(t, manifests, "nodes.yaml", nodes)
	p := start(t, n, manifests)
	eventually(t, "the other node", func() bool { return mapped(n, "10.2.0.0/24").Node == 1 })
	p.kill()
	if err := os.Remove(filepath.Join(n.Config.Run, "numbers.json")); err != nil {
		t.Fatal(err)
	}
	start(t, n, manifests)
	eventually(t, "the other node under a new number", func() bool {
		return mapped(n, "10.2.0.0/24").Node == 2 && nodeEntry(t, n, 1) == bpf.Node{} && nodeEntry(t, n, 2) != bpf.Node{}
	})
}
