// SPDX-License-Identifier: Apache-2.0

package node

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/pkg/state"
)

// object makes a Node from its name, its addresses and its pod ranges, each list with spaces.
func object(name, addresses, cidrs string) *state.Node {
	n := &state.Node{Name: name}
	for _, a := range strings.Fields(addresses) {
		n.Addresses = append(n.Addresses, netip.MustParseAddr(a))
	}
	for _, c := range strings.Fields(cidrs) {
		n.PodCIDRs = append(n.PodCIDRs, netip.MustParsePrefix(c))
	}
	return n
}

func snapshot(nodes ...*state.Node) *state.Snapshot {
	s := state.NewSnapshot()
	for _, n := range nodes {
		s.Nodes[n.Name] = n
	}
	return s
}

// machine is one with a NIC eth0, index 2 and MTU 1500, that has these addresses.
func machine(addresses ...string) Machine {
	d := Device{Index: 2, Name: "eth0", MTU: 1500, DefaultRoute: true}
	m := Machine{}
	for _, a := range addresses {
		p := netip.MustParsePrefix(a)
		d.Addresses = append(d.Addresses, p)
		m.Addresses = append(m.Addresses, p.Addr())
	}
	m.Devices = []Device{d}
	return m
}

// text is a result as lines, sorted within their kinds.
func text(r *Result) []string {
	var out []string
	add := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	for i, t := range r.Tunnels {
		add("node %d %s: %s from %s mtu %d", i, r.Names[i], t.Remote, t.Local, t.MTU)
	}
	for p, route := range r.Routes {
		flags := ""
		for name, on := range map[string]bool{" overlay": route.Overlay, " local": route.Local, " nomasquerade": route.NoMasquerade} {
			if on {
				flags += name
			}
		}
		add("route %s: %d%s", p, route.Node, flags)
	}
	for a, v := range r.Addresses {
		add("address %s: %d overlay %v", a, v.Node, v.Overlay)
	}
	for _, k := range r.KernelRoutes {
		switch k.Kind {
		case ViaOverlay:
			add("kernel %s overlay src %s", k.Prefix, k.Source)
		case ViaNode:
			add("kernel %s via %s dev %d", k.Prefix, k.Gateway, k.Device)
		case Unreachable:
			add("kernel %s unreachable", k.Prefix)
		}
	}
	if r.Overlay != nil {
		add("overlay mtu %d", r.Overlay.MTU)
	}
	add("pods mtu %d", r.PodMTU)
	for _, p := range r.Problems {
		add("problem %s: %s", p.Node, p.Message)
	}
	slices.Sort(out)
	return out
}

func TestCompile(t *testing.T) {
	self := object("n1", "192.0.2.1 2001:db8::1", "10.1.0.0/24 fd00:1::/64")
	dual := machine("192.0.2.1/24", "2001:db8::1/64")
	tests := []struct {
		name    string
		mode    Mode
		machine Machine
		nodes   []*state.Node
		keep    string // non-masquerade ranges
		want    []string
	}{
		{
			name: "vxlan, dual stack", mode: VXLAN, machine: dual,
			nodes: []*state.Node{self, object("n2", "192.0.2.2 2001:db8::2", "10.2.0.0/24 fd00:2::/64")},
			want: []string{
				"address 192.0.2.2: 1 overlay true", "address 2001:db8::2: 1 overlay true",
				"kernel 10.1.0.0/24 unreachable", "kernel 10.2.0.0/24 overlay src 192.0.2.1",
				"kernel fd00:1::/64 unreachable", "kernel fd00:2::/64 overlay src 2001:db8::1",
				"node 1 n2: 192.0.2.2 from 192.0.2.1 mtu 1450", "overlay mtu 1450", "pods mtu 1450",
				"route 10.1.0.0/24: 0 local", "route 10.2.0.0/24: 1 overlay", "route fd00:1::/64: 0 local", "route fd00:2::/64: 1 overlay",
			},
		},
		{
			name: "vxlan over IPv6 only, pods of both families", mode: VXLAN, machine: machine("2001:db8::1/64"),
			nodes: []*state.Node{object("n1", "2001:db8::1", "10.1.0.0/24 fd00:1::/64"), object("n2", "2001:db8::2", "10.2.0.0/24 fd00:2::/64")},
			want: []string{
				"address 2001:db8::2: 1 overlay true",
				"kernel 10.1.0.0/24 unreachable", "kernel 10.2.0.0/24 overlay src invalid IP",
				"kernel fd00:1::/64 unreachable", "kernel fd00:2::/64 overlay src 2001:db8::1",
				"node 1 n2: 2001:db8::2 from 2001:db8::1 mtu 1430", "overlay mtu 1430", "pods mtu 1430",
				"route 10.1.0.0/24: 0 local", "route 10.2.0.0/24: 1 overlay", "route fd00:1::/64: 0 local", "route fd00:2::/64: 1 overlay",
			},
		},
		{
			name: "vxlan, alone: no overlay device yet, but room for it", mode: VXLAN, machine: dual, nodes: []*state.Node{self},
			want: []string{
				"kernel 10.1.0.0/24 unreachable", "kernel fd00:1::/64 unreachable", "pods mtu 1450",
				"route 10.1.0.0/24: 0 local", "route fd00:1::/64: 0 local",
			},
		},
		{
			name: "direct: routes to a neighbour, none to one behind a router, the overlay for forwarding", mode: Direct, machine: dual,
			nodes: []*state.Node{
				self, object("n2", "192.0.2.2 2001:db8::2", "10.2.0.0/24 fd00:2::/64"), object("n3", "198.51.100.3", "10.3.0.0/24"),
			},
			want: []string{
				"address 192.0.2.2: 1 overlay false", "address 198.51.100.3: 2 overlay false", "address 2001:db8::2: 1 overlay false",
				"kernel 10.1.0.0/24 unreachable", "kernel 10.2.0.0/24 via 192.0.2.2 dev 2",
				"kernel fd00:1::/64 unreachable", "kernel fd00:2::/64 via 2001:db8::2 dev 2",
				"node 1 n2: 192.0.2.2 from 192.0.2.1 mtu 1450", "node 2 n3: 198.51.100.3 from 192.0.2.1 mtu 1450",
				"overlay mtu 1450", "pods mtu 1500",
				"route 10.1.0.0/24: 0 local", "route 10.2.0.0/24: 1", "route 10.3.0.0/24: 2", "route fd00:1::/64: 0 local", "route fd00:2::/64: 1",
			},
		},
		{
			name: "auto: direct to a neighbour, the overlay beyond", mode: Auto, machine: dual,
			nodes: []*state.Node{
				self, object("n2", "192.0.2.2 2001:db8::2", "10.2.0.0/24 fd00:2::/64"),
				object("n3", "198.51.100.3 2001:db8:3::3", "10.3.0.0/24 fd00:3::/64"),
			},
			want: []string{
				"address 192.0.2.2: 1 overlay false", "address 198.51.100.3: 2 overlay true",
				"address 2001:db8:3::3: 2 overlay true", "address 2001:db8::2: 1 overlay false",
				"kernel 10.1.0.0/24 unreachable", "kernel 10.2.0.0/24 via 192.0.2.2 dev 2", "kernel 10.3.0.0/24 overlay src 192.0.2.1",
				"kernel fd00:1::/64 unreachable", "kernel fd00:2::/64 via 2001:db8::2 dev 2", "kernel fd00:3::/64 overlay src 2001:db8::1",
				"node 1 n2: 192.0.2.2 from 192.0.2.1 mtu 1450", "node 2 n3: 198.51.100.3 from 192.0.2.1 mtu 1450",
				"overlay mtu 1450", "pods mtu 1450",
				"route 10.1.0.0/24: 0 local", "route 10.2.0.0/24: 1", "route 10.3.0.0/24: 2 overlay",
				"route fd00:1::/64: 0 local", "route fd00:2::/64: 1", "route fd00:3::/64: 2 overlay",
			},
		},
		{
			name: "auto among neighbours needs no room", mode: Auto, machine: machine("192.0.2.1/24"),
			nodes: []*state.Node{object("n1", "192.0.2.1", "10.1.0.0/24"), object("n2", "192.0.2.2", "10.2.0.0/24")},
			want: []string{
				"address 192.0.2.2: 1 overlay false", "kernel 10.1.0.0/24 unreachable", "kernel 10.2.0.0/24 via 192.0.2.2 dev 2",
				"node 1 n2: 192.0.2.2 from 192.0.2.1 mtu 1450", "overlay mtu 1450", "pods mtu 1500",
				"route 10.1.0.0/24: 0 local", "route 10.2.0.0/24: 1",
			},
		},
		{
			name: "no family in common: its pods stay in the cluster", mode: VXLAN, machine: machine("192.0.2.1/24"),
			nodes: []*state.Node{object("n1", "192.0.2.1", "10.1.0.0/24"), object("n2", "2001:db8::2", "10.2.0.0/24")},
			want: []string{
				"address 2001:db8::2: 1 overlay false", "kernel 10.1.0.0/24 unreachable", "overlay mtu 1450", "pods mtu 1450",
				"problem n2: it has no address of a family in which this node has one: the overlay does not reach it",
				"route 10.1.0.0/24: 0 local", "route 10.2.0.0/24: 1 overlay",
			},
		},
		{
			name: "primary addresses of two families: the first node by name decides", mode: VXLAN, machine: dual,
			nodes: []*state.Node{
				object("n0", "2001:db8::9 192.0.2.9", ""), object("n1", "192.0.2.1 2001:db8::1", ""), object("n2", "2001:db8::2 192.0.2.2", ""),
			},
			want: []string{
				"address 192.0.2.2: 2 overlay true", "address 192.0.2.9: 1 overlay true",
				"address 2001:db8::2: 2 overlay true", "address 2001:db8::9: 1 overlay true",
				"node 1 n0: 2001:db8::9 from 2001:db8::1 mtu 1430", "node 2 n2: 192.0.2.2 from 192.0.2.1 mtu 1450",
				"overlay mtu 1430", "pods mtu 1430",
			},
		},
		{
			name: "claims of two nodes: the first by name has it, and this machine its own", mode: VXLAN, machine: machine("192.0.2.1/24"),
			nodes: []*state.Node{
				object("n1", "192.0.2.1", "10.1.0.0/24"), object("n2", "192.0.2.2", "10.2.0.0/24"),
				object("n3", "192.0.2.3 192.0.2.2 192.0.2.1", "10.2.0.128/25 10.3.0.0/24"), object("n4", "192.0.2.4", "10.0.0.0/8 10.4.0.0/24"),
			},
			want: []string{
				"address 192.0.2.2: 1 overlay true", "address 192.0.2.3: 2 overlay true", "address 192.0.2.4: 3 overlay true",
				"kernel 10.1.0.0/24 unreachable", "kernel 10.2.0.0/24 overlay src 192.0.2.1", "kernel 10.3.0.0/24 overlay src 192.0.2.1",
				"kernel 10.4.0.0/24 overlay src 192.0.2.1",
				"node 1 n2: 192.0.2.2 from 192.0.2.1 mtu 1450", "node 2 n3: 192.0.2.3 from 192.0.2.1 mtu 1450",
				"node 3 n4: 192.0.2.4 from 192.0.2.1 mtu 1450", "overlay mtu 1450", "pods mtu 1450",
				"problem n3: its address 192.0.2.1 belongs to node n1 already", "problem n3: its address 192.0.2.2 belongs to node n2 already",
				"problem n3: its pod range 10.2.0.128/25 overlaps with 10.2.0.0/24 of node n2",
				"problem n4: its pod range 10.0.0.0/8 overlaps with 10.1.0.0/24 of node n1",
				"route 10.1.0.0/24: 0 local", "route 10.2.0.0/24: 1 overlay", "route 10.3.0.0/24: 2 overlay", "route 10.4.0.0/24: 3 overlay",
			},
		},
		{
			name: "no Node object of our own", mode: VXLAN,
			machine: Machine{
				Devices: []Device{
					{Index: 2, MTU: 9000, Addresses: []netip.Prefix{netip.MustParsePrefix("198.51.100.1/24")}},
					{Index: 3, MTU: 1400, DefaultRoute: true, Addresses: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24")}},
				},
				Addresses: []netip.Addr{netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("192.0.2.1")},
			},
			nodes: []*state.Node{object("n2", "198.51.100.2", "10.2.0.0/24")},
			want: []string{
				"address 198.51.100.2: 1 overlay true", "kernel 10.2.0.0/24 overlay src 192.0.2.1",
				"node 1 n2: 198.51.100.2 from 192.0.2.1 mtu 8950", "overlay mtu 1350", "pods mtu 1350",
				"problem n1: this node has no Node object: other nodes do not know its pods", "route 10.2.0.0/24: 1 overlay",
			},
		},
		{
			name: "a Node object with an address that the machine lacks", mode: VXLAN, machine: machine("192.0.2.1/24"),
			nodes: []*state.Node{object("n1", "192.0.2.7", "")},
			want:  []string{"pods mtu 1450", "problem n1: its address 192.0.2.7 is on no device of this machine"},
		},
		{
			name: "non-masquerade ranges hide no pods", mode: Direct, machine: machine("192.0.2.1/24"),
			nodes: []*state.Node{object("n1", "192.0.2.1", "10.1.0.0/24")},
			keep:  "10.0.0.0/8 10.1.0.0/24 10.1.0.64/26 fd00::/8",
			want: []string{
				"kernel 10.1.0.0/24 unreachable", "pods mtu 1500",
				"route 10.0.0.0/8: 0 nomasquerade", "route 10.1.0.0/24: 0 local", "route fd00::/8: 0 nomasquerade",
			},
		},
		{
			name: "MTU too small for IPv6", mode: Direct,
			machine: Machine{Devices: []Device{{Index: 2, MTU: 1200}, {Index: 3, MTU: 1500}}},
			nodes:   []*state.Node{object("n1", "", "fd00:1::/64")},
			want: []string{
				"kernel fd00:1::/64 unreachable", "pods mtu 1200",
				"problem n1: the MTU of pods would be 1200, and IPv6 needs 1280: raise the MTU of the node's devices", "route fd00:1::/64: 0 local",
			},
		},
		{
			name: "no device: no MTU", mode: VXLAN, machine: Machine{},
			nodes: []*state.Node{object("n2", "192.0.2.2", "")},
			want: []string{
				"address 192.0.2.2: 1 overlay false", "overlay mtu 0", "pods mtu 0",
				"problem n1: this node has no Node object: other nodes do not know its pods",
				"problem n2: it has no address of a family in which this node has one: the overlay does not reach it",
			},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var keep []netip.Prefix
			for _, p := range strings.Fields(tt.keep) {
				keep = append(keep, netip.MustParsePrefix(p))
			}
			c := NewCompiler("n1", tt.mode, keep, nil)
			r := c.Compile(Input{Snapshot: snapshot(tt.nodes...), Machine: tt.machine})
			if diff := cmp.Diff(tt.want, text(r)); diff != "" {
				t.Errorf("result (-want +got):\n%s", diff)
			}
		})
	}
}

// Both ends of every pair choose the same two outer addresses: each believes only the one that the other sends from.
func TestTunnelsAgree(t *testing.T) {
	nodes := []*state.Node{
		object("a", "192.0.2.1 2001:db8::1", ""), object("b", "2001:db8::2 192.0.2.2", ""),
		object("c", "192.0.2.3", ""), object("d", "2001:db8::4", ""), object("e", "192.0.2.5 2001:db8::5", ""),
	}
	for _, x := range nodes {
		for _, y := range nodes {
			if x == y {
				continue
			}
			tunnel := func(from, to *state.Node) Tunnel {
				m := Machine{Addresses: from.Addresses}
				r := NewCompiler(from.Name, VXLAN, nil, nil).Compile(Input{Snapshot: snapshot(x, y), Machine: m})
				for i, name := range r.Names {
					if name == to.Name {
						return r.Tunnels[i]
					}
				}
				return Tunnel{}
			}
			there, back := tunnel(x, y), tunnel(y, x)
			if there.Local != back.Remote || there.Remote != back.Local {
				t.Errorf("tunnel %s → %s = %v, %s → %s = %v, want the same addresses", x.Name, y.Name, there, y.Name, x.Name, back)
			}
		}
	}
}

func TestPodsOutsideTheirNodesRanges(t *testing.T) {
	pod := func(name, node, ip string, change func(*state.Pod)) *state.Pod {
		p := &state.Pod{Key: state.Key{Namespace: "default", Name: name}, Node: node, IPs: []netip.Addr{netip.MustParseAddr(ip)}}
		if change != nil {
			change(p)
		}
		return p
	}
	s := snapshot(object("n1", "192.0.2.1", "10.1.0.0/24"), object("n2", "192.0.2.2", "10.2.0.0/24"), object("n3", "192.0.2.3", "10.3.0.0/24"))
	for _, p := range []*state.Pod{
		pod("inside", "n2", "10.2.0.5", nil),
		pod("outside", "n2", "10.9.0.5", nil),
		pod("outside6", "n2", "fd09::5", nil),
		pod("moved", "n3", "10.2.0.9", nil), // from n2, with its address
		pod("here", "n1", "10.9.0.1", func(p *state.Pod) { p.Local = true }),
		pod("host", "n2", "192.0.2.2", func(p *state.Pod) { p.HostNetwork = true }),
		pod("done", "n2", "10.9.0.6", func(p *state.Pod) { p.Finished = true }),
		pod("unscheduled", "", "10.9.0.7", nil),
		pod("unknown", "n9", "10.9.0.8", nil),
		pod("a-ending", "n2", "10.9.0.9", func(p *state.Pod) { p.Terminating = true }),
		pod("b-next", "n3", "10.9.0.9", nil),
		pod("x", "n3", "10.9.0.10", nil), pod("y", "n2", "10.9.0.10", nil),
	} {
		s.Pods[p.Key] = p
	}
	r := NewCompiler("n1", VXLAN, nil, nil).Compile(Input{Snapshot: s, Machine: machine("192.0.2.1/24")})
	got := map[string]uint16{}
	for p, route := range r.Routes {
		if p.IsSingleIP() && route.Overlay {
			got[p.Addr().String()] = route.Node
		}
	}
	want := map[string]uint16{"10.9.0.5": 1, "fd09::5": 1, "10.2.0.9": 2, "10.9.0.9": 2, "10.9.0.10": 2}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("host prefixes by node number (-want +got):\n%s", diff)
	}
	wantProblems := []Problem{{"n2", "address 10.9.0.10 of its pod default/y is that of pod default/x on node n3"}}
	if diff := cmp.Diff(wantProblems, r.Problems); diff != "" {
		t.Errorf("problems (-want +got):\n%s", diff)
	}
}
