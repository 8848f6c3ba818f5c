// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	networkingv1 "k8s.io/api/networking/v1"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/node"
	"github.com/margay-cni/margay/pkg/state"
)

// twoFamilies is the node n1 with a NIC that has an address of each family, and an overlay device.
func twoFamilies() *nodeFacts {
	v4, v6 := netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("2001:db8::1/64")
	flags := bpf.NodeAddrLocal | bpf.NodeAddrNodePort
	return &nodeFacts{
		routes: "r1", overlay: 7, addrs: map[netip.Addr]uint32{v4.Addr(): flags, v6.Addr(): flags},
		machine: node.Machine{
			Devices: []node.Device{{
				Index: 2, Name: "eth0", MTU: 1500, DefaultRoute: true,
				Addresses: []netip.Prefix{v4, v6}, Usable: []netip.Addr{v4.Addr(), v6.Addr()},
			}},
			Addresses: []netip.Addr{v4.Addr(), v6.Addr()},
		},
	}
}

func nodeObject(name, addresses, cidrs string) *state.Node {
	n := &state.Node{Name: name}
	for _, a := range strings.Fields(addresses) {
		n.Addresses = append(n.Addresses, netip.MustParseAddr(a))
	}
	for _, c := range strings.Fields(cidrs) {
		n.PodCIDRs = append(n.PodCIDRs, netip.MustParsePrefix(c))
	}
	return n
}

func nodesOnly(nodes ...*state.Node) *state.Snapshot {
	s := state.NewSnapshot()
	for _, n := range nodes {
		s.Nodes[n.Name] = n
	}
	return s
}

var (
	self  = nodeObject("n1", "192.0.2.1 2001:db8::1", "10.1.0.0/24 fd00:1::/64")
	other = nodeObject("n2", "192.0.2.2 2001:db8::2", "10.2.0.0/24 fd00:2::/64")
)

// dangling returns what names a node that the kernel does not hold, or "".
func (k *fakeKernel) dangling() string {
	named := func(number uint16) bool {
		_, ok := k.nodes.entries[uint32(number)]
		return number == 0 || ok
	}
	for _, r := range k.routes.entries {
		if !named(r.Node) {
			return "a route leads to a node that is not there"
		}
	}
	for _, flags := range k.nodeAddrs.entries {
		if !named(uint16(flags >> bpf.NodeAddrIndexShift)) {
			return "an address leads to a node that is not there"
		}
	}
	if k.nodeState.entries[0].Flags&bpf.NodeMasquerade != 0 && len(k.routes.entries) == 0 {
		return "masquerade is on and no route is known"
	}
	return ""
}

// watchNodes fails the test at the first instant at which something dangles.
func (k *fakeKernel) watchNodes(t *testing.T) {
	k.check = func(op string) {
		if wrong := k.dangling(); wrong != "" {
			t.Fatalf("after %s: %s", op, wrong)
		}
	}
}

func (k *fakeKernel) route(prefix string) bpf.Route {
	return k.routes.entries[bpf.NewRouteKey(netip.MustParsePrefix(prefix))]
}

func TestOtherNodesReachTheMaps(t *testing.T) {
	k := newKernel(1)
	k.watchNodes(t)
	run := runDir(t)
	r := newRig(t, k, run)
	r.takeFacts(*twoFamilies())
	r.give(nodesOnly(self, other))

	v4, v6 := bpf.NewAddr(netip.MustParseAddr("192.0.2.1")), bpf.NewAddr(netip.MustParseAddr("2001:db8::1"))
	wantNode := bpf.Node{Addr: bpf.NewAddr(netip.MustParseAddr("192.0.2.2")), Local: v4, Mtu: 1450}
	if got := k.nodes.entries[1]; got != wantNode {
		t.Errorf("nodes[1] = %+v, want %+v", got, wantNode)
	}
	for prefix, want := range map[string]bpf.Route{
		"10.1.0.0/24": {Flags: bpf.RouteLocal}, "fd00:1::/64": {Flags: bpf.RouteLocal},
		"10.2.0.0/24": {Node: 1, Flags: bpf.RouteOverlay}, "fd00:2::/64": {Node: 1, Flags: bpf.RouteOverlay},
	} {
		if got := k.route(prefix); got != want {
			t.Errorf("routes[%s] = %+v, want %+v", prefix, got, want)
		}
	}
	remote := bpf.NodeAddrRemote | bpf.NodeAddrNodePort | bpf.NodeAddrOverlay | 1<<bpf.NodeAddrIndexShift
	for _, a := range other.Addresses {
		if got := k.nodeAddrs.entries[bpf.NewAddr(a)]; got != remote {
			t.Errorf("node_addrs[%s] = %#x, want %#x", a, got, remote)
		}
	}
	if got, want := k.egress.entries[2], (bpf.EgressAddrs{V4: v4, V6: v6}); got != want {
		t.Errorf("egress_addrs[2] = %+v, want %+v", got, want)
	}
	wantState := bpf.NodeState{Flags: bpf.NodeMasquerade, OverlayIfindex: 7, Vni: DefaultVXLANVNI, OverlayPort: bpf.Port16(DefaultVXLANPort)}
	if got := k.nodeState.entries[0]; got != wantState {
		t.Errorf("node_state = %+v, want %+v", got, wantState)
	}
	if k.routeEpoch != 1 || k.ops[len(k.ops)-1] == "" || !slices.Contains(k.ops, "raise routes") {
		t.Errorf("route epoch was raised %d times, want once", k.routeEpoch)
	}
	file, err := endpoint.ReadNode(run)
	want := endpoint.NewNode("n1", "vxlan", 1450, self.PodCIDRs)
	if diff := cmp.Diff(want, file, cmpopts.EquateComparable(netip.Prefix{})); err != nil || diff != "" {
		t.Errorf("node.json: %v (-want +got):\n%s", err, diff)
	}
	if names, err := os.ReadFile(filepath.Join(run, "nodes.json")); err != nil || string(names) != "{\"1\":\"n2\"}\n" {
		t.Errorf("nodes.json = %s, %v, want the name of node 1", names, err)
	}
	if r.wanted == nil || r.wanted.overlay == nil || r.wanted.overlay.MTU != 1450 || r.wanted.podMTU != 1450 || len(r.wanted.routes) != 4 {
		t.Errorf("wanted network = %+v, want an overlay and four routes", r.wanted)
	}

	k.written()
	again := newRig(t, k, run)
	again.takeFacts(*twoFamilies())
	again.give(nodesOnly(self, other))
	if got := k.written(); len(got) > 0 {
		t.Errorf("operations of a restart in which nothing changed = %v, want none", got)
	}
}

// TestNodeFileComesAfterThePolicies: the runtime starts pods as soon as the file is there, so what they start with must be there before.
func TestNodeFileComesAfterThePolicies(t *testing.T) {
	k := newKernel(1)
	run := runDir(t)
	there := func() bool {
		_, err := endpoint.ReadNode(run)
		return err == nil
	}
	k.check = func(op string) {
		if there() {
			t.Errorf("node.json is there at %q", op)
		}
	}
	r := newRig(t, k, run)
	r.takeFacts(*twoFamilies())
	s := nodesOnly(self, other)
	deny := &state.NetworkPolicy{Key: state.Key{Namespace: "default", Name: "deny"}, Spec: networkingv1.NetworkPolicySpec{
		PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress},
	}}
	s.NetworkPolicies = map[state.Key]*state.NetworkPolicy{deny.Key: deny}

	// The records are missing, then what pods start with cannot be written.
	r.takeSnapshot(snapshotFrom{s, r.clock})
	r.work(false)
	if there() {
		t.Error("node.json is there before the first policy")
	}
	k.pending.max = 0
	r.takeRecords(nil)
	r.work(false)
	if there() {
		t.Error("node.json is there although no pending entry could be written")
	}
	k.pending.max = 1 << 20
	r.work(true)
	if len(k.pending.entries) == 0 || !there() {
		t.Errorf("pending entries %v, node.json there %v: want both", k.pending.entries, there())
	}

	// A later agent leaves it in place from the start.
	k.check = nil
	again := newRig(t, k, run)
	again.takeFacts(*twoFamilies())
	again.work(false)
	if !there() {
		t.Error("node.json is gone after a restart")
	}
}

func TestChangesOfNodesArePickedUp(t *testing.T) {
	for name, tt := range map[string]struct {
		nodes []*state.Node
		facts func(*nodeFacts)
		check func(k *fakeKernel) bool
	}{
		"another address": {
			nodes: []*state.Node{self, nodeObject("n2", "192.0.2.3 2001:db8::3", "10.2.0.0/24 fd00:2::/64")},
			check: func(k *fakeKernel) bool {
				_, old := k.nodeAddrs.entries[bpf.NewAddr(netip.MustParseAddr("192.0.2.2"))]
				return k.nodes.entries[1].Addr.Netip().String() == "192.0.2.3" && !old && k.route("10.2.0.0/24").Node == 1
			},
		},
		"another pod range": {
			nodes: []*state.Node{self, nodeObject("n2", "192.0.2.2 2001:db8::2", "10.9.0.0/24 fd00:2::/64")},
			check: func(k *fakeKernel) bool {
				return k.route("10.9.0.0/24").Node == 1 && k.route("10.2.0.0/24") == bpf.Route{}
			},
		},
		"a third node": {
			nodes: []*state.Node{self, other, nodeObject("n3", "192.0.2.3", "10.3.0.0/24")},
			check: func(k *fakeKernel) bool { return k.route("10.3.0.0/24").Node == 2 && k.route("10.2.0.0/24").Node == 1 },
		},
		"gone": {
			nodes: []*state.Node{self},
			check: func(k *fakeKernel) bool {
				return len(k.nodes.entries) == 0 && len(k.routes.entries) == 2 && len(k.nodeAddrs.entries) == 2
			},
		},
		"replaced by one with its range": {
			nodes: []*state.Node{self, nodeObject("n9", "192.0.2.2", "10.2.0.0/24")},
			check: func(k *fakeKernel) bool {
				_, old := k.nodes.entries[1]
				return k.route("10.2.0.0/24").Node == 2 && !old && k.nodeAddrs.entries[bpf.NewAddr(other.Addresses[0])]>>16 == 2
			},
		},
		"another MTU": {
			nodes: []*state.Node{self, other},
			facts: func(f *nodeFacts) { f.machine.Devices[0].MTU = 9000 },
			check: func(k *fakeKernel) bool { return k.nodes.entries[1].Mtu == 8950 },
		},
		"a device made anew": {
			nodes: []*state.Node{self, other},
			facts: func(f *nodeFacts) { f.machine.Devices[0].Index = 3; f.overlay = 8 },
			check: func(k *fakeKernel) bool {
				_, old := k.egress.entries[2]
				return k.egress.entries[3].V4 != bpf.Addr{} && !old && k.nodeState.entries[0].OverlayIfindex == 8
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			k := newKernel(1)
			r := newRig(t, k, runDir(t))
			r.takeFacts(*twoFamilies())
			r.give(nodesOnly(self, other))
			k.watchNodes(t)
			before := k.routeEpoch
			k.written()
			if tt.facts != nil {
				f := twoFamilies()
				tt.facts(f)
				r.takeFacts(*f)
			}
			r.give(nodesOnly(tt.nodes...))
			if !tt.check(k) {
				t.Errorf("maps: nodes %+v, routes %+v, node_addrs %+v, egress_addrs %+v, node_state %+v", k.nodes.entries, k.routes.entries,
					k.nodeAddrs.entries, k.egress.entries, k.nodeState.entries)
			}
			ops := slices.DeleteFunc(k.written(), func(op string) bool {
				return !slices.ContainsFunc([]string{"nodes", "routes", "node_addrs", "egress", "node_state"}, func(m string) bool { return strings.Contains(op, m) })
			})
			if k.routeEpoch != before+1 || len(ops) == 0 || ops[len(ops)-1] != "raise routes" {
				t.Errorf("route epoch raised %d times in %v, want once, at the end", k.routeEpoch-before, ops)
			}
		})
	}
}

// A Node object that cannot be read at the moment keeps its number, its routes and its addresses, across a restart too; what can be read
// is added and changed.
func TestNodesAreNotTakenBackWhileTheSourceIsIncomplete(t *testing.T) {
	k := newKernel(1)
	run := runDir(t)
	r := newRig(t, k, run)
	r.takeFacts(*twoFamilies())
	r.give(nodesOnly(self, other))
	was := endpointsOf(k)
	k.watchNodes(t)

	again := newRig(t, k, run)
	again.incompleteFiles = []string{"n2.yaml"}
	again.takeFacts(*twoFamilies())
	thief := nodeObject("n3", "192.0.2.3 192.0.2.2", "10.3.0.0/24 10.2.0.0/24")
	again.give(nodesOnly(self, thief))
	again.work(true)
	for prefix, want := range map[string]uint16{"10.2.0.0/24": 1, "fd00:2::/64": 1, "10.3.0.0/24": 2} {
		if got := k.route(prefix).Node; got != want {
			t.Errorf("routes[%s] leads to node %d, want %d", prefix, got, want)
		}
	}
	if got := k.nodeAddrs.entries[bpf.NewAddr(other.Addresses[0])] >> bpf.NodeAddrIndexShift; got != 1 {
		t.Errorf("the address of n2 leads to node %d, want 1", got)
	}
	if again.wanted == nil || !again.wanted.hold {
		t.Errorf("wanted network = %+v, want it held", again.wanted)
	}
	again.incompleteFiles = nil
	again.give(nodesOnly(self, other))
	if diff := cmp.Diff(was, endpointsOf(k)); diff != "" {
		t.Errorf("maps once everything is readable (-before +now):\n%s", diff)
	}
}

// endpointsOf copies what the kernel holds about nodes.
func endpointsOf(k *fakeKernel) []any {
	nodes, _ := k.nodes.Load()
	routes, _ := k.routes.Load()
	addrs, _ := k.nodeAddrs.Load()
	return []any{nodes, routes, addrs}
}

// Whatever fails, and whenever the agent is killed, nothing dangles, and in the end everything is there and the flows are routed anew.
func TestNodesThroughFaultsAndKills(t *testing.T) {
	snapshots := []*state.Snapshot{
		nodesOnly(self, other),
		nodesOnly(self, nodeObject("n3", "192.0.2.2", "10.2.0.0/24")),
		nodesOnly(self, nodeObject("n2", "2001:db8::2", "fd00:2::/64"), nodeObject("n4", "192.0.2.4", "10.4.0.0/24")),
		nodesOnly(self),
	}
	for seed := range uint64(40) {
		k := newKernel(seed)
		run := runDir(t)
		k.watchNodes(t)
		var final map[bpf.RouteKey]bpf.Route
		for i, s := range snapshots {
			epoch, routes := k.routeEpoch, len(k.routes.entries)
			k.fault = 0.2
			k.killAfter = int(k.rand.IntN(12))
			func() {
				defer func() {
					if e := recover(); e != nil && e != errKilled {
						panic(e)
					}
				}()
				r := newRig(t, k, run)
				r.takeFacts(*twoFamilies())
				r.give(s)
			}()
			k.killAfter = 0
			r := newRig(t, k, run)
			r.takeFacts(*twoFamilies())
			r.takeSnapshot(snapshotFrom{s, r.clock})
			r.takeRecords(nil)
			r.settle()
			k.fault = 0
			r.work(true)
			if k.routeEpoch == epoch && len(k.routes.entries) != routes {
				t.Fatalf("seed %d, snapshot %d: routes changed and the epoch was not raised", seed, i)
			}
			final = newNodeMaps(r.nodeResult, nil, r.serves, 0).routes
			if diff := cmp.Diff(final, k.routes.entries); diff != "" {
				t.Fatalf("seed %d, snapshot %d: routes (-want +got):\n%s", seed, i, diff)
			}
		}
		if len(k.nodes.entries) > 0 {
			t.Errorf("seed %d: nodes at the end = %v, want none", seed, k.nodes.entries)
		}
	}
}

func TestReservedPorts(t *testing.T) {
	k := newKernel(1)
	r := newRig(t, k, runDir(t))
	r.host.reserved = []portRange{{63, 65}, {40000, 40000}}
	s, records := shop(r) // NodePort 30080
	r.give(s, records...)
	set := func() (ports []int) {
		for word, v := range k.reserved.entries {
			for bit := range 64 {
				if v&(1<<bit) != 0 {
					ports = append(ports, int(word)*64+bit)
				}
			}
		}
		slices.Sort(ports)
		return ports
	}
	if diff := cmp.Diff([]int{63, 64, 65, 8472, 30080, 40000}, set()); diff != "" {
		t.Errorf("reserved ports (-want +got):\n%s", diff)
	}
	r.host.reserved = nil
	r.incompleteFiles = []string{"x.yaml"}
	r.give(state.NewSnapshot(), records...)
	r.work(true)
	if diff := cmp.Diff([]int{63, 64, 65, 8472, 30080, 40000}, set()); diff != "" {
		t.Errorf("reserved ports while the source is incomplete (-want +got):\n%s", diff)
	}
	r.incompleteFiles = nil
	r.work(true)
	if diff := cmp.Diff([]int{8472}, set()); diff != "" {
		t.Errorf("reserved ports in the end (-want +got):\n%s", diff)
	}
}

func TestReachIsValidated(t *testing.T) {
	for name, r := range map[string]Reach{
		"mode": {Mode: "bgp"}, "device": {VXLANDevice: "a-device-name-too-long"}, "pod's device": {VXLANDevice: "mgyvxlan"},
		"slash": {VXLANDevice: "a/b"}, "network number": {VXLANVNI: maxVNI + 1},
	} {
		if err := r.validate(); err == nil {
			t.Errorf("%s: validate(%+v) = nil, want an error", name, r)
		}
	}
	var r Reach
	if err := r.validate(); err != nil || r.Mode != node.VXLAN || r.VXLANPort != 8472 || r.VXLANVNI != 28000 || r.VXLANDevice != "margay.vxlan" {
		t.Errorf("validate of nothing = %v, %+v, want the defaults", err, r)
	}
}
