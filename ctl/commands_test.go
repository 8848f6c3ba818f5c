// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net/netip"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/internal/testutil/eventtest"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/bpf/object"
	"github.com/margay-cni/margay/pkg/flow"
)

// eachFamily runs a test on a node with pods and names.
func eachFamily(t *testing.T, test func(t *testing.T, n *testNode)) {
	for _, f := range families() {
		t.Run(f.name, func(t *testing.T) {
			n := newNode(t, f)
			n.addPods(t)
			n.addNames(t)
			test(t, n)
		})
	}
}

func TestEndpoints(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *testNode) {
		n.put(t, "endpoints", bpf.NewAddr(n.external), bpf.Endpoint{Ifindex: 7777, Identity: bpf.IdentityPodUnknown})
		n.golden(t, "endpoints", "endpoints")
		n.golden(t, "endpoints-json", "endpoints", "-o", "json")
	})
}

// TestEndpointsDualStack: both addresses of one interface are one line, also when their identities differ.
func TestEndpointsDualStack(t *testing.T) {
	f := families()
	n := newNode(t, f[0])
	n.name = "dual"
	for i, a := range []netip.Addr{f[0].client, f[1].client} {
		n.put(t, "endpoints", bpf.NewAddr(a), bpf.Endpoint{Ifindex: loopback, Identity: 17 + uint32(i)})
	}
	n.golden(t, "endpoints", "endpoints")
}

func (n *testNode) addServices(t *testing.T) {
	t.Helper()
	backends := func(list uint32, port uint16, addrs ...netip.Addr) {
		for i, a := range addrs {
			n.put(t, "backends", bpf.BackendKey{List: list, Slot: uint32(i)}, bpf.NewBackend(netip.AddrPortFrom(a, port)))
		}
	}
	backends(100, 8080, n.web1, n.web2)
	backends(101, 8080, n.web1)
	unspecified := netip.IPv4Unspecified()
	if n.client.Is6() {
		unspecified = netip.IPv6Unspecified()
	}
	web := bpf.Service{Id: 4, List: [2]uint32{100, 100}, Count: [2]uint32{2, 2}}
	n.put(t, "services", bpf.NewFrontendKey(tcp, n.service, 80), web)
	web.List[bpf.ScopeExternal], web.Count[bpf.ScopeExternal] = 101, 1
	n.put(t, "services", bpf.NewFrontendKey(tcp, unspecified, 30080), web)
	n.put(t, "services", bpf.NewFrontendKey(udp, n.service, 53), bpf.Service{Id: 5, Flags: bpf.ServiceDropExternal})
	n.addBalanced(t)
	n.put(t, "services", bpf.NewFrontendKey(udp, n.service, 54), bpf.Service{Id: 6, List: [2]uint32{100, 100}, Count: [2]uint32{3, 3}})
}

// addBalanced adds what a service may ask for: affinity, consistent hashing, and source ranges, of which one service has none.
func (n *testNode) addBalanced(t *testing.T) {
	t.Helper()
	pin[bpf.SourceRangeKey, uint32](t, n, "source_ranges", ebpf.LPMTrie, 64, 1)
	host := netip.PrefixFrom(n.client, n.client.BitLen())
	for _, p := range []netip.Prefix{host, netip.PrefixFrom(n.external, n.external.BitLen()-8).Masked()} {
		n.put(t, "source_ranges", bpf.NewSourceRangeKey(8, p), uint32(1))
	}
	n.put(t, "source_ranges", bpf.NewSourceRangeKey(4, host), uint32(1)) // of another frontend of that service
	balanced := bpf.Service{Id: 8, List: [2]uint32{100, 100}, Count: [2]uint32{2, 2}, Affinity: 10800, Maglev: [2]uint8{1, 1}, Flags: bpf.ServiceSourceRanges}
	n.put(t, "services", bpf.NewFrontendKey(tcp, n.external, 80), balanced)
	balanced.Id, balanced.Affinity = 9, 0
	n.put(t, "services", bpf.NewFrontendKey(tcp, n.external, 81), balanced)
}

// addNodes adds another node, with a range of pods and an address of its own, and a service in both places that answers directly.
func (n *testNode) addNodes(t *testing.T) {
	t.Helper()
	const noPrealloc = 1
	pin[bpf.Addr, uint32](t, n, "node_addrs", ebpf.Hash, 64, noPrealloc)
	pin[bpf.RouteKey, bpf.Route](t, n, "routes", ebpf.LPMTrie, 64, noPrealloc)
	pin[uint32, bpf.Node](t, n, "nodes", ebpf.Array, 64, 0)
	n.put(t, "nodes", uint32(2), bpf.Node{Addr: bpf.NewAddr(n.otherNode)})
	n.put(t, "node_addrs", bpf.NewAddr(n.otherNode), bpf.NodeAddrRemote|2<<bpf.NodeAddrIndexShift)
	// Pods of a node that has left the map nodes meanwhile.
	n.put(t, "routes", bpf.NewRouteKey(n.otherRange), bpf.Route{Node: 3})
	n.put(t, "routes", bpf.NewRouteKey(netip.PrefixFrom(n.otherPod, n.otherPod.BitLen()-1)), bpf.Route{Node: 2, Flags: bpf.RouteOverlay})
	n.put(t, "routes", bpf.NewRouteKey(netip.PrefixFrom(n.external, n.external.BitLen())), bpf.Route{Flags: bpf.RouteNoMasquerade})
	backends := []netip.Addr{n.web1, n.otherPod, n.otherNode, n.otherRange.Addr().Next(), n.external}
	for i, a := range backends {
		n.put(t, "backends", bpf.BackendKey{List: 102, Slot: uint32(i)}, bpf.NewBackend(netip.AddrPortFrom(a, 9090)))
	}
	// What other nodes forward here is no list of a frontend, and not shown.
	n.put(t, "backends", bpf.BackendKey{List: bpf.BackendByHash | 7, Slot: 5}, bpf.NewBackend(netip.AddrPortFrom(n.web1, 9090)))
	all := uint32(len(backends))
	n.put(t, "services", bpf.NewFrontendKey(tcp, n.service, 90), bpf.Service{
		Id: 7, List: [2]uint32{102, 102}, Count: [2]uint32{all, all}, Flags: bpf.ServiceDSR | bpf.ServiceExternalLocal,
	})
}

func TestServicesOfSeveralNodes(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *testNode) {
		n.addNodes(t)
		n.write(t, flow.ServicesFile, `{"7":"default/far:http"}`)
		n.golden(t, "services-nodes", "services")
		n.golden(t, "services-nodes-json", "services", "-o", "json")
	})
}

func TestServices(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *testNode) {
		n.addServices(t)
		n.golden(t, "services", "services")
		n.golden(t, "services-numeric", "services", "-n")
		n.golden(t, "services-json", "services", "-o", "json")
	})
}

// future is a last packet that cannot grow older while the test runs.
func future(t *testing.T) uint32 {
	t.Helper()
	c, err := flow.Now()
	if err != nil {
		t.Fatal(err)
	}
	return uint32(c.Monotonic.Seconds()) + 1000
}

func (n *testNode) addFlows(t *testing.T) {
	t.Helper()
	both := bpf.FlowTCPSyn | bpf.FlowTCPEstablished
	add := func(opener, xlate bpf.FlowKey, f bpf.Flow) {
		f.LastSeen, f.Xlate = future(t), xlate
		n.put(t, "flows", opener, f)
		f.Xlate, f.Flags = opener.Reverse(), f.Flags|bpf.FlowReply
		n.put(t, "flows", xlate.Reverse(), f)
	}
	ap := netip.AddrPortFrom
	add(bpf.NewFlowKey(tcp, ap(n.client, 40001), ap(n.service, 80)), bpf.NewFlowKey(tcp, ap(n.client, 40001), ap(n.web1, 8080)),
		bpf.Flow{Flags: bpf.FlowService | bpf.FlowNAT, ServiceId: 4, RuleId: 30, Tcp: both, Action: bpf.FlowToPod})
	denied := bpf.NewFlowKey(tcp, ap(n.external, 50000), ap(n.web2, 8080))
	add(denied, denied, bpf.Flow{Flags: bpf.FlowDenied, RuleId: 99, Tcp: both, Action: bpf.FlowToPod})
	icmp := uint8(1)
	if n.client.Is6() {
		icmp = 58
	}
	echo := bpf.NewFlowKey(icmp, ap(n.client, 777), ap(n.external, 777))
	add(echo, echo, bpf.Flow{Action: bpf.FlowToNetdev})
}

func TestFlows(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *testNode) {
		n.addFlows(t)
		n.golden(t, "flows", "flows")
		n.golden(t, "flows-numeric", "flows", "--numeric")
		n.golden(t, "flows-pod", "flows", "--pod", "default/web-1")
		n.golden(t, "flows-limit", "flows", "--limit", "1")
		n.golden(t, "flows-json", "flows", "-o", "json", "--pod", "default/client")
	})
}

func (n *testNode) addPolicies(t *testing.T) {
	t.Helper()
	for p, id := range map[netip.Prefix]uint32{
		netip.PrefixFrom(n.client, n.client.BitLen()): 17,
		netip.PrefixFrom(n.web1, n.web1.BitLen()):     20,
		netip.PrefixFrom(n.web2, n.web2.BitLen()):     20,
		n.cidr: 21,
	} {
		n.put(t, "ipcache", bpf.NewIPCacheKey(p), bpf.IPCacheEntry{Identity: id})
	}
	key := func(policy, identity uint32, direction uint32, proto uint8, prefix uint32, port uint16) bpf.PolicyKey {
		return bpf.PolicyKey{
			Prefixlen: prefix, PolicyId: policy, Identity: identity, Direction: uint8(direction), Proto: proto, Port: bpf.Port16(port),
		}
	}
	allow := bpf.PolicyEntry{Verdict: bpf.VerdictAllow, Rank: 100, RuleId: 30}
	n.put(t, "policy", key(18, 20, bpf.Egress, tcp, bpf.PolicyPrefixPort, 8080), allow)
	// Ports 8192 to 8207 and 8208 to 8215 are one range of the rule, as the compiler takes it apart.
	n.put(t, "policy", key(18, 21, bpf.Egress, tcp, 92, 8192), allow)
	n.put(t, "policy", key(18, 21, bpf.Egress, tcp, 93, 8208), allow)
	n.put(t, "policy", key(18, bpf.IdentityAny, bpf.Egress, udp, bpf.PolicyPrefixProto, 0),
		bpf.PolicyEntry{Verdict: bpf.VerdictDeny, Rank: 50, RuleId: 77})
	n.put(t, "policy", key(40, 17, bpf.Ingress, 0, bpf.PolicyPrefixBase, 0), bpf.PolicyEntry{Verdict: bpf.VerdictAllow, Rank: 100, RuleId: 31})
}

func TestPolicy(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *testNode) {
		n.addPolicies(t)
		n.golden(t, "policy", "policy")
		n.golden(t, "policy-client", "policy", "--pod", "default/client")
		n.golden(t, "policy-web", "policy", "--pod", "default/web-1")
		n.golden(t, "policy-json", "policy", "--pod", "default/client", "-o", "json")
	})
}

func TestDropTotals(t *testing.T) {
	n := newNode(t, families()[0])
	n.golden(t, "drops-none", "drops")
	for index, packets := range map[uint32]uint64{6*2 + 1: 12, 4 * 2: 7000} {
		var perCPU []bpf.Counter
		if err := n.maps["counters"].Lookup(index, &perCPU); err != nil {
			t.Fatal(err)
		}
		perCPU[0] = bpf.Counter{Packets: packets - 1, Bytes: packets * 60}
		perCPU[len(perCPU)-1].Packets++
		n.put(t, "counters", index, perCPU)
	}
	n.golden(t, "drops", "drops")
	n.golden(t, "drops-json", "drops", "-o", "json")
	var all dropList
	n.decode(t, &all, "drops", "--all")
	reasons, err := object.DropReasons()
	if err != nil {
		t.Fatal(err)
	}
	if got, want := len(all.Drops), 2*len(reasons); got != want {
		t.Errorf("drops --all has %d lines, want %d", got, want)
	}
}

// emit writes policy drops from the client to web-1, and a verdict, five seconds ago, as the programs do.
func (n *testNode) emit(t *testing.T) {
	t.Helper()
	c, err := flow.Now()
	if err != nil {
		t.Fatal(err)
	}
	e := bpf.Event{
		Time: uint64(c.Monotonic - 5*time.Second), Type: bpf.EventDrop, Hook: 1, Direction: uint8(bpf.Egress), Reason: 6, Ifindex: loopback,
		RuleId: 30, Length: 74,
		Tuple: bpf.NewFlowKey(tcp, netip.AddrPortFrom(n.client, 40001), netip.AddrPortFrom(n.web1, 8080)),
	}
	verdict, spoofed := e, e
	verdict.Type, verdict.Reason = bpf.EventVerdict, 0
	spoofed.Reason, spoofed.RuleId = 4, 0
	spoofed.Tuple = bpf.NewFlowKey(udp, netip.AddrPortFrom(n.external, 53), netip.AddrPortFrom(n.service, 53))
	eventtest.Emit(t, n.maps["events"], e, verdict, spoofed)
}

// goldenFollow compares live output, its times made equal.
func (n *testNode) goldenFollow(t *testing.T, name string, args ...string) {
	t.Helper()
	n.emit(t)
	out, errs, code := n.ctl(t, append([]string{"drops", "--follow", "--since", "1m"}, args...)...)
	if code != 0 || errs != "" {
		t.Fatalf("margayctl drops --follow %v = %d, stderr %q; want 0, nothing", args, code, errs)
	}
	out = regexp.MustCompile(`(?m)^\d\d:\d\d:\d\d\.\d{3}`).ReplaceAllString(out, "15:04:05.000")
	out = regexp.MustCompile(`"time":"[^"]*"`).ReplaceAllString(out, `"time":"2006-01-02T15:04:05Z"`)
	compareGolden(t, name+"-"+n.name, out)
}

func TestDropsFollow(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *testNode) {
		n.goldenFollow(t, "follow", "--count", "2")
		n.goldenFollow(t, "follow-numeric", "--count", "2", "-n")
		n.goldenFollow(t, "follow-verdicts", "--verdicts", "--count", "3")
		n.goldenFollow(t, "follow-json", "--count", "2", "-o", "json")
		n.emit(t) // with goldenFollow's own: the one with other addresses lies between the two that are wanted
		n.goldenFollow(t, "follow-pod", "--pod", "default/web-1", "--count", "2")
		n.emit(t)
		n.goldenFollow(t, "follow-reason", "--reason", "spoofed_address", "--count", "2")
	})
}

// TestDropsFollowStartsNow: what was waiting in the buffer is old news unless asked for.
func TestDropsFollowStartsNow(t *testing.T) {
	n := newNode(t, families()[0])
	n.emit(t)
	out, errs, code := n.ctl(t, "drops", "--follow", "--timeout", "50ms", "-o", "json")
	if out != "" || errs != "" || code != 0 {
		t.Errorf("drops --follow = %q, %q, %d; want nothing, nothing, 0", out, errs, code)
	}
}

func TestNumbersWithoutNames(t *testing.T) {
	n := newNode(t, families()[0])
	n.addServices(t)
	n.addFlows(t)
	n.name = "nameless"
	n.golden(t, "services", "services")
	n.golden(t, "flows", "flows")
}

func TestErrors(t *testing.T) {
	n := newNode(t, families()[0])
	empty := *n
	empty.bpffs = t.TempDir()
	half := newNode(t, families()[1])
	if err := half.maps["flows"].Unpin(); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		node *testNode
		args []string
		want string
	}{
		{"not loaded", &empty, []string{"flows"}, "margay is not loaded on this node: no pins under " + empty.bpffs + "; run a pod or start margay-agent"},
		{"not loaded, live", &empty, []string{"drops", "--follow"}, "margay is not loaded"},
		{"half loaded", half, []string{"flows"}, "map flows is not pinned"},
		{"unknown pod", n, []string{"flows", "--pod", "default/nobody"}, "pod default/nobody is not known on this node"},
		{"unknown pod's policy", n, []string{"policy", "--pod", "default/nobody"}, "pod default/nobody is not known on this node"},
		{"format", n, []string{"flows", "-o", "yaml"}, `output format "yaml" is unknown`},
		{"unknown reason", n, []string{"drops", "--follow", "--reason", "bad_luck"}, `there is no drop reason "bad_luck"`},
		{"count without follow", n, []string{"drops", "--count", "1"}, "--count needs --follow"},
		{"argument", n, []string{"flows", "everything"}, "unknown command"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			out, errs, code := tc.node.ctl(t, tc.args...)
			if code != 1 || out != "" || !strings.Contains(errs, tc.want) {
				t.Errorf("margayctl %v = %d, %q, %q; want 1, no output, and %q", tc.args, code, out, errs, tc.want)
			}
			if strings.Count(errs, "\n") != 1 {
				t.Errorf("stderr = %q, want one line", errs)
			}
		})
	}
}

// TestBrokenNames: an unreadable name file costs the names, not the listing.
func TestBrokenNames(t *testing.T) {
	n := newNode(t, families()[0])
	n.addServices(t)
	n.write(t, flow.ServicesFile, "{")
	out, errs, code := n.ctl(t, "services")
	if code != 0 || !strings.Contains(errs, "services.json") || !strings.Contains(out, "service 4") {
		t.Errorf("services = %d, %q, %q; want 0, the numbers, and a warning that names the file", code, out, errs)
	}
}

// TestNothingIsWritten: looking leaves the run directory as it is.
func TestNothingIsWritten(t *testing.T) {
	n := newNode(t, families()[0])
	n.addPods(t)
	before := tree(t, n.run)
	for _, args := range [][]string{{"status"}, {"endpoints"}, {"services"}, {"flows"}, {"policy"}, {"drops"}} {
		n.ctl(t, args...)
	}
	if diff := cmp.Diff(before, tree(t, n.run)); diff != "" {
		t.Errorf("run directory changed (-before +after):\n%s", diff)
	}
}

func tree(t *testing.T, dir string) []string {
	t.Helper()
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range files {
		names = append(names, f.Name())
	}
	return names
}
