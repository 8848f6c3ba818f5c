// SPDX-License-Identifier: Apache-2.0

// Package nodetest makes a whole node for tests of the dataplane: a network namespace with its own bpffs and run directory, the shipped
// programs loaded over fresh maps, pods connected as the CNI plugin does it, and an external client on a network of its own. It fills the
// maps directly; tests of the plugin and the agent bring those instead.
package nodetest

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/privileged"
	"github.com/margay-cni/margay/pkg/addr"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/bpf/object"
	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/link"
)

// Addresses of the fixture: documentation and private ranges that exist only inside its namespaces.
var (
	NodeAddrs   = []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8:1::1")}
	ClientAddrs = []netip.Addr{netip.MustParseAddr("192.0.2.100"), netip.MustParseAddr("2001:db8:1::100")}
)

// Node is a node that lives until the test ends.
type Node struct {
	t      testing.TB
	NS     *netnstest.NS
	DP     *datapath.Datapath
	Config datapath.Config
	// Client is the external host; ClientDevice the node's device towards it, with from_netdev attached.
	Client       *netnstest.NS
	ClientDevice int
	// Addrs are the node's own: IPv4, IPv6.
	Addrs []netip.Addr
	index int
	pods  int
}

// Pod is a pod of a Node.
type Pod struct {
	NS      *netnstest.NS
	Name    string
	Addrs   []netip.Addr // IPv4, IPv6
	Ifindex int          // host-side device
	MAC     net.HardwareAddr
	HostMAC net.HardwareAddr
}

// Addr returns the pod's address of a's family.
func (p *Pod) Addr(v6 bool) netip.Addr {
	for _, a := range p.Addrs {
		if a.Is6() == v6 {
			return a
		}
	}
	return netip.Addr{}
}

// New makes the node. It needs root.
func New(t testing.TB) *Node {
	t.Helper()
	privileged.Require(t)
	n := newNode(t, 0)
	n.addClient(netnstest.New(t), "eth0")
	return n
}

// newNode makes a node without any network.
func newNode(t testing.TB, index int) *Node {
	t.Helper()
	n := &Node{t: t, NS: netnstest.New(t), index: index, Addrs: slices.Clone(NodeAddrs)}
	for i := range n.Addrs {
		n.Addrs[i] = network(n.Addrs[i], index)
	}
	n.Config = datapath.Config{BPFFS: filepath.Join(t.TempDir(), "bpf"), Run: t.TempDir()}
	t.Cleanup(func() {
		if err := unix.Unmount(n.Config.BPFFS, unix.MNT_DETACH); err != nil && !os.IsNotExist(err) {
			t.Errorf("unmount bpffs: %v", err)
		}
	})
	n.NS.Do(func() {
		dp, err := datapath.Ensure(context.Background(), n.Config)
		if err != nil {
			t.Fatal(err)
		}
		n.DP = dp
	})
	t.Cleanup(func() { n.DP.Close() })
	return n
}

// network moves an address of the first node's network into that of another one.
func network(a netip.Addr, index int) netip.Addr {
	b := a.AsSlice()
	if a.Is4() {
		b[1] += byte(index)
	} else {
		b[7] += byte(index)
	}
	out, _ := netip.AddrFromSlice(b)
	return out
}

// clientAddrs are the external host's addresses on the node's network.
func (n *Node) clientAddrs() []netip.Addr {
	out := slices.Clone(ClientAddrs)
	for i := range out {
		out[i] = network(out[i], n.index)
	}
	return out
}

// addClient joins an external host to the node by a veth pair with one network on it, by the device of that name at the host.
func (n *Node) addClient(client *netnstest.NS, device string) {
	n.t.Helper()
	n.Client = client
	peer, err := os.Open(n.Client.Path())
	if err != nil {
		n.t.Fatal(err)
	}
	defer peer.Close()
	// Neighbour discovery needs link-local addresses at once, not after duplicate address detection.
	for _, ns := range []*netnstest.NS{n.NS, n.Client} {
		ns.Do(func() { n.must(os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0)) })
	}
	n.NS.Do(func() {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "eth0"
		veth := netlink.NewVeth(attrs)
		veth.PeerName = device
		veth.PeerNamespace = netlink.NsFd(int(peer.Fd()))
		n.must(netlink.LinkAdd(veth))
		n.ClientDevice = n.up("eth0", n.Addrs)
		n.must(n.DP.AttachNetdev(n.ClientDevice))
	})
	n.Client.Do(func() {
		n.up(device, n.clientAddrs())
		for i, p := range n.PodRanges() {
			if n.index == 0 {
				p = netip.PrefixFrom(p.Addr(), 8).Masked()
			}
			n.must(netlink.RouteAdd(&netlink.Route{Dst: ipNet(p), Gw: n.Addrs[i].AsSlice()}))
		}
	})
	n.NS.Do(func() {
		n.must(link.SyncCarrier("eth0"))
		for _, a := range n.clientAddrs() {
			n.resolve(a)
		}
	})
	for _, a := range n.Addrs {
		n.Put(n.DP.Maps.NodeAddrs, bpf.NewAddr(a), bpf.NodeAddrLocal|bpf.NodeAddrNodePort)
	}
}

// resolve waits until neighbour discovery towards a works: both ends' addresses become usable only some time after they were added.
func (n *Node) resolve(a netip.Addr) {
	n.t.Helper()
	Await(n.t, a)
}

// Await waits, in the calling thread's namespace, until each of the addresses answers a ping, and fails the test after 20 seconds.
func Await(t testing.TB, addrs ...netip.Addr) {
	t.Helper()
	for _, a := range addrs {
		if !answers(a) {
			t.Fatalf("no answer from %s", a)
		}
	}
}

func answers(a netip.Addr) bool {
	for range 20 {
		if exec.Command("ping", "-n", "-c1", "-W1", a.String()).Run() == nil {
			return true
		}
	}
	return false
}

// up configures a device in the calling thread's namespace and returns its index.
func (n *Node) up(name string, addrs []netip.Addr) int {
	n.t.Helper()
	l, err := netlink.LinkByName(name)
	n.must(err)
	for _, a := range addrs {
		bits := 24
		if a.Is6() {
			bits = 64
		}
		n.must(netlink.AddrAdd(l, &netlink.Addr{
			IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(bits, a.BitLen())}, Flags: unix.IFA_F_NODAD,
		}))
	}
	n.must(netlink.LinkSetUp(l))
	return l.Attrs().Index
}

// PodRanges are where the node's pods have their addresses from: IPv4, IPv6.
func (n *Node) PodRanges() []netip.Prefix {
	return []netip.Prefix{
		netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(n.index)}), 24),
		netip.MustParsePrefix(fmt.Sprintf("fd00:244:0:%x::/64", n.index)),
	}
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// AddPod makes a pod with an IPv4 and an IPv6 address and registers it without policy, as IdentityPodUnknown.
func (n *Node) AddPod(name string) *Pod {
	n.t.Helper()
	n.pods++
	p := &Pod{NS: netnstest.New(n.t), Name: name, Addrs: []netip.Addr{
		netip.AddrFrom4([4]byte{10, 244, byte(n.index), byte(9 + n.pods)}),
		netip.MustParseAddr(fmt.Sprintf("fd00:244:0:%x::%x", n.index, 9+n.pods)),
	}}
	podNS, err := os.Open(p.NS.Path())
	n.must(err)
	defer podNS.Close()
	hostNS, err := os.Open(n.NS.Path())
	n.must(err)
	defer hostNS.Close()
	inPod, err := link.Dial(int(podNS.Fd()))
	n.must(err)
	defer inPod.Close()
	p.MAC, p.HostMAC = link.MACs(name, "eth0")
	pod, host, err := inPod.AddVeth(link.VethSpec{
		PodName: "eth0", HostName: "mgy" + name, PodMAC: p.MAC, HostMAC: p.HostMAC, MTU: 1500, HostNS: int(hostNS.Fd()),
	})
	n.must(err)
	p.Ifindex = host
	n.NS.Do(func() { n.must(n.DP.AttachPod(host)) })
	n.Register(p, bpf.Endpoint{Identity: bpf.IdentityPodUnknown})
	inHost, err := link.Dial(int(hostNS.Fd()))
	n.must(err)
	defer inHost.Close()
	n.must(inHost.ConfigureHost(link.Host{Index: host, PodMAC: p.MAC, Addresses: p.Addrs}))
	n.must(inPod.ConfigurePod(link.Pod{Index: pod, Addresses: p.Addrs, GatewayMAC: p.HostMAC, Routes: []link.Route{
		{Dst: netip.MustParsePrefix("0.0.0.0/0")}, {Dst: netip.MustParsePrefix("::/0")},
	}}))
	n.NS.Do(func() { n.must(link.SyncCarrier("mgy" + name)) })
	return p
}

// Register writes the pod's endpoint entries: identity, policy and flags from e, the rest from the pod.
func (n *Node) Register(p *Pod, e bpf.Endpoint) {
	n.t.Helper()
	e.Ifindex, e.Mac, e.HostMac = uint32(p.Ifindex), [6]byte(p.MAC), [6]byte(p.HostMAC)
	for _, a := range p.Addrs {
		n.must(n.DP.PutEndpoint(a, e))
	}
}

// Identify gives a prefix an identity.
func (n *Node) Identify(p netip.Prefix, identity uint32) {
	n.t.Helper()
	n.Put(n.DP.Maps.IPCache, bpf.NewIPCacheKey(p), bpf.IPCacheEntry{Identity: identity})
}

// IdentifyPod gives the pod's addresses an identity, and the pod its policies.
func (n *Node) IdentifyPod(p *Pod, identity, egress, ingress uint32) {
	n.t.Helper()
	for _, a := range p.Addrs {
		n.Identify(addr.HostPrefix(a), identity)
	}
	n.Register(p, bpf.Endpoint{Identity: identity, PolicyId: [2]uint32{egress, ingress}})
}

// AllowPort adds a policy entry: from or to the identity, to one port.
func (n *Node) AllowPort(policy, direction, identity uint32, proto uint8, port uint16, rule uint32) bpf.PolicyKey {
	n.t.Helper()
	k := bpf.PolicyKey{
		Prefixlen: bpf.PolicyPrefixPort, PolicyId: policy, Identity: identity, Direction: uint8(direction), Proto: proto, Port: bpf.Port16(port),
	}
	n.Put(n.DP.Maps.Policy, k, bpf.PolicyEntry{Verdict: bpf.VerdictAllow, Rank: 1000, RuleId: rule})
	return k
}

// inAllLists is the value of service_backends for a backend that every traffic policy may choose.
const inAllLists = bpf.ServiceBackendServing | bpf.ServiceBackendCluster | bpf.ServiceBackendLocal

// AddService writes a service's backends and then its frontend, with one list for both scopes.
func (n *Node) AddService(id uint32, frontend bpf.FrontendKey, backends ...netip.AddrPort) {
	n.t.Helper()
	for slot, b := range backends {
		n.Put(n.DP.Maps.Backends, bpf.BackendKey{List: id, Slot: uint32(slot)}, bpf.NewBackend(b))
		n.Put(n.DP.Maps.ServiceBackends, bpf.NewServiceBackend(id, b), inAllLists)
	}
	count := uint32(len(backends))
	n.Put(n.DP.Maps.Services, frontend, bpf.Service{Id: id, List: [2]uint32{id, id}, Count: [2]uint32{count, count}})
}

// Put writes a map entry.
func (n *Node) Put(m *ebpf.Map, key, value any) {
	n.t.Helper()
	if err := m.Put(key, value); err != nil {
		n.t.Fatalf("write map %s: %v", m, err)
	}
}

// Drops returns how many packets were dropped for a reason, in both directions.
func (n *Node) Drops(reason uint32) (packets uint64) {
	n.t.Helper()
	for direction := range uint32(2) {
		var perCPU []bpf.Counter
		n.must(n.DP.Maps.Counters.Lookup(reason*2+direction, &perCPU))
		for _, c := range perCPU {
			packets += c.Packets
		}
	}
	return packets
}

// AllDrops returns the packets dropped by reason, reasons without drops left out.
func (n *Node) AllDrops() map[string]uint64 {
	n.t.Helper()
	out := map[string]uint64{}
	for reason := range uint32(64) {
		if packets := n.Drops(reason); packets != 0 {
			out[object.DropReasonName(uint8(reason))] = packets
		}
	}
	return out
}

func (n *Node) must(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}
