// SPDX-License-Identifier: Apache-2.0

package program

import (
	"bytes"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
	"github.com/margay-cni/margay/pkg/bpf"
)

// outerLen is what stands before an encapsulated Ethernet frame.
const outerLen = 50

// tunnel is the overlay between two nodes, as test runs see it: what the one's programs let out, the other's device takes in.
type tunnel struct {
	from  *nodetest.Node
	to    *progtest.Fixture
	mac   net.HardwareAddr // of its device: a frame for another one is nobody's
	outer outer            // of the packets
	// overlay is the hook behind the overlay device.
	overlay progtest.Hook
}

func newTunnel(t *testing.T, from, to *progtest.Fixture, vni uint32, group uint16) *tunnel {
	t.Helper()
	u := &tunnel{from: from.Node, to: to, outer: between(from, to)}
	u.overlay = to.FromOverlay(t, from.Addrs[0], vni, group)
	u.outer.VNI, u.outer.Group = vni, group
	u.to.NS.Do(func() {
		l, err := netlink.LinkByIndex(to.ClientDevice)
		must(t, err)
		u.mac = l.Attrs().HardwareAddr
	})
	return u
}

// leave runs the first node's program on a packet, and returns what the second one's device gets of it.
func (u *tunnel) leave(t *testing.T, f *progtest.Fixture, name string, h progtest.Hook, in pkt.Packet) []byte {
	t.Helper()
	encapsulated(t, f, name, h, in.Bytes(), hop(in).Bytes(), u.outer)
	return u.arrive(f.Run(t, h, in.Bytes()).Out)
}

// arrive is the frame as the device of the second node gets it.
func (u *tunnel) arrive(frame []byte) []byte {
	return slices.Concat(u.mac, routerMAC, []byte{0x08, 0}, frame[pkt.L3:])
}

// wrap is the inner frame with outer headers, as leave returns it, for those that no program would let out.
func (u *tunnel) wrap(t *testing.T, inner []byte) []byte {
	t.Helper()
	return u.arrive(slices.Concat(inner[:pkt.L3], u.outer.headers(t, inner, 1, 50000), inner[pkt.L3:]))
}

// device checks that from_netdev leaves the frame to the overlay device, as it is.
func (u *tunnel) device(t *testing.T, name string, frame []byte) {
	t.Helper()
	u.to.Check(t, progtest.Case{Name: name, Hook: u.to.FromNetdev(), In: frame, WantAction: progtest.OK})
}

// opens checks a flow's first packet: it is left to the device, and behind that makes the flow known.
func (u *tunnel) opens(t *testing.T, name string, frame []byte, want pkt.Packet) {
	t.Helper()
	name += " opens"
	u.device(t, name, frame)
	u.to.Check(t, progtest.Case{Name: name, Hook: u.overlay, In: frame[outerLen:], WantAction: progtest.Redirect, WantOut: want.Bytes()})
}

// taken checks that from_netdev makes of the frame what from_overlay would make of it behind the device.
func (u *tunnel) taken(t *testing.T, name string, frame []byte, want pkt.Packet) {
	t.Helper()
	leaves := bytes.Equal(want.SrcMAC, routerMAC)
	if nodetest.ProgramsDecapsulate(t, want.V6(), !leaves) {
		u.to.Check(t, progtest.Case{Name: name, Hook: u.to.FromNetdev(), In: frame, WantAction: progtest.Redirect, WantOut: want.Bytes()})
	} else {
		u.device(t, name, frame)
	}
	behind := u.to.Run(t, u.overlay, frame[outerLen:])
	got := want.Bytes()
	if leaves {
		got = append(bytes.Clone(frame[outerLen:][:12]), got[12:]...) // the link layer of what leaves by a device is still to come
	}
	if diff := cmp.Diff(behind.Out, got); behind.Action != progtest.Redirect || diff != "" {
		t.Errorf("%s: from_overlay's action is %d, drops %v; what it makes of the packet (-from_overlay +want):\n%s",
			name, behind.Action, behind.Drops, diff)
	}
}

// bothWays runs the test for both families on two nodes without flows, also with the NIC's sum of each packet where the kernel can.
func bothWays(t *testing.T, first, second *progtest.Fixture, test func(t *testing.T, v6 bool)) {
	families(t, second, func(t *testing.T, v6 bool) {
		first.Flags = second.Flags
		first.ClearFlows(t)
		test(t, v6)
	})
	first.Flags, second.Flags = 0, 0
}

var segmented = []pkt.Kind{pkt.TCP, pkt.UDP}

// TestDecapsulation holds from_netdev to what the overlay device, and from_overlay behind it, would make of a packet. On one pair of nodes: each
// takes 200 MB.
func TestDecapsulation(t *testing.T) {
	t.Parallel()
	c, n0, n1 := progtest.NewCluster(t, nodetest.ClusterOptions{})
	u := newTunnel(t, n0, n1, bpf.VNIPods, 0)
	t.Run("between pods", func(t *testing.T) { decapsulatedBetweenPods(t, u, n0, n1) })
	t.Run("forwarded", func(t *testing.T) { decapsulatedForwarded(t, c, n0, n1) })
	t.Run("left to the device", func(t *testing.T) { leftToTheDevice(t, u, n0, n1) })
	t.Run("other protocols", func(t *testing.T) { otherProtocols(t, u, n0, n1) })
	t.Run("segments", func(t *testing.T) { singlesFollowSegments(t, u, n0, n1) })
}

// decapsulatedBetweenPods: all but a flow's first packet go from the underlay's device to the pod at once.
func decapsulatedBetweenPods(t *testing.T, there *tunnel, n0, n1 *progtest.Fixture) {
	back := newTunnel(t, n1, n0, bpf.VNIPods, 0)
	bothWays(t, n0, n1, func(t *testing.T, v6 bool) {
		for _, kind := range segmented {
			name := kind.String()
			open := fromPod(n0.A, kind, at(n1.B.Addr(v6), podPort))
			there.opens(t, name, there.leave(t, n0, name, progtest.FromPod(n0.A), open), atPod(hop(open), n1.B))
			reply := answer(atPod(hop(open), n1.B))
			back.taken(t, name+" is answered", back.leave(t, n1, name, progtest.FromPod(n1.B), reply), atPod(hop(reply), n0.A))
			more := data(open)
			there.taken(t, name+" goes on", there.leave(t, n0, name, progtest.FromPod(n0.A), more), atPod(hop(more), n1.B))
			more.Payload = bytes.Repeat([]byte("margay!"), 200)[:1450-40-20] // as much as fits, of IPv6 and TCP
			there.taken(t, name+" with much", there.leave(t, n0, name, progtest.FromPod(n0.A), more), atPod(hop(more), n1.B))
		}
	})
}

// decapsulatedForwarded: what another node forwards is translated for the pod, and the answers leave by the forwarding node's device in the
// service's name.
func decapsulatedForwarded(t *testing.T, c *nodetest.Cluster, n0, n1 *progtest.Fixture) {
	id := uint32(0)
	bothWays(t, n0, n1, func(t *testing.T, v6 bool) {
		backend := at(n1.B.Addr(v6), podPort)
		for vni, flags := range map[uint32]uint32{bpf.VNIForwarded: 0, bpf.VNIDSR: bpf.ServiceDSR} {
			there := newTunnel(t, n0, n1, vni, uint16(bpf.BackendHash(backend)))
			back := newTunnel(t, n1, n0, vni, 0)
			for _, kind := range segmented {
				n0.ClearFlows(t)
				n1.ClearFlows(t)
				id++
				name := map[uint32]string{bpf.VNIForwarded: "tunnel, ", bpf.VNIDSR: "DSR, "}[vni] + kind.String()
				c.AddService(id, bpf.NewFrontendKey(kind.Proto(v6), of(unspecified, v6), nodePort), flags, backend)
				open := fromClient(kind, at(of(nodetest.NodeAddrs, v6), nodePort))
				arrived := with(atPod(hop(open), n1.B), open.Src, backend)
				there.opens(t, name, there.leave(t, n0, name, n0.FromNetdev(), open), arrived)
				more := data(open)
				there.taken(t, name+" goes on", there.leave(t, n0, name, n0.FromNetdev(), more), data(arrived))
				if vni == bpf.VNIDSR {
					continue // the answers go to the client
				}
				reply := answer(arrived)
				out := n1.Run(t, progtest.FromPod(n1.B), reply.Bytes())
				translated := with(reply, open.Dst, open.Src)
				inner := hop(translated)
				if want := back.wrap(t, inner.Bytes()); out.Action != progtest.Redirect || !bytes.Equal(out.Out[outerLen:], want[outerLen:]) {
					t.Fatalf("%s: answer: action %d, drops %v, want it encapsulated:\n%s", name, out.Action, out.Drops, pkt.Dump(out.Out))
				}
				home := hop(inner)
				home.SrcMAC, home.DstMAC = routerMAC, back.mac
				back.taken(t, name+" is answered", back.arrive(out.Out), home)
			}
		}
	})
}

// known is a packet that from_netdev decapsulates, before one thing about it is changed.
type known struct {
	*tunnel
	key   bpf.FlowKey
	entry bpf.Flow // of key
	node  bpf.Node // that has sent it
	hook  progtest.Hook
	in    pkt.Packet // as the pod has sent it
	frame []byte     // as the device gets it
	inner []byte     // in it
}

// put has the outer IP header's bytes at off in the frame changed, and its checksum with them.
func (k *known) put(off int, value ...byte) {
	k.frame = pkt.With(k.frame, off, value...)
	ipv4Sum(k.frame[pkt.L3:])
}

// putInside does it in the inner one.
func (k *known) putInside(t *testing.T, off int, value ...byte) {
	t.Helper()
	inner := pkt.With(k.inner, off, value...)
	ipv4Sum(inner[pkt.L3:])
	k.frame = k.wrap(t, inner)
}

// Where the fields of a known packet are; in the inner frame where the name says so.
const (
	outerTOS, outerFragment = pkt.L3 + 1, pkt.L3 + 6
	outerSrc, outerDst      = pkt.L3 + 12, pkt.L3 + 16
	outerChecksum           = pkt.L4v4 + 6
	vxlanFlags              = pkt.L4v4 + 8
	vxlanVNI                = vxlanFlags + 4
	innerFragment           = pkt.L3 + 6
	innerType               = outerLen + 12
)

func vni(n uint32) []byte { return []byte{byte(n >> 16), byte(n >> 8), byte(n)} }

// toDevice are the changes: of the frame, of the flow's entry, of the node's, of the maps.
var toDevice = []struct {
	name   string
	only   string // "TCP", "UDP", "IPv4", "IPv6"; empty: all
	change func(t *testing.T, k *known)
}{
	// The flow.
	{"no flow is known", "", func(t *testing.T, k *known) { must(t, k.to.Flows.Delete(&k.key)) }},
	{"a SYN", "TCP", func(t *testing.T, k *known) { k.frame = k.wrap(t, reopened(k.in).Bytes()) }},
	{"the flow is of somebody outside the overlay", "", func(_ *testing.T, k *known) { k.entry.Flags &^= bpf.FlowInOverlay }},
	{"policy has turned against it", "", func(_ *testing.T, k *known) { k.entry.Flags |= bpf.FlowDenied }},
	{"it goes to the host's stack", "", func(_ *testing.T, k *known) { k.entry.Action = bpf.FlowToStack }},
	{"it goes to the node's own backend", "", func(_ *testing.T, k *known) { k.entry.Action = bpf.FlowIntoNetdev }},
	{"its pod has changed", "", func(t *testing.T, k *known) { must(t, k.to.DP.RaiseEndpointEpochs(k.to.B.Ifindex)) }},
	{"the routes have changed", "", func(t *testing.T, k *known) { must(t, k.to.DP.RaiseRouteEpoch()) }},
	{"one byte more than fits the way ahead", "", func(_ *testing.T, k *known) { k.entry.Mtu = uint16(len(k.inner) - pkt.L3 - 1) }},
	// The node.
	{"the programs do not send to the node", "", func(_ *testing.T, k *known) { k.node.Ifindex = 0 }},
	{"they send to it by another device", "", func(_ *testing.T, k *known) { k.node.Ifindex++ }},
	{"they send to it from another address", "", func(_ *testing.T, k *known) { k.node.Local = bpf.NewAddr(other4) }},
	{"the node has gone", "", func(_ *testing.T, k *known) { k.node = bpf.Node{} }},
	{"by another device", "", func(_ *testing.T, k *known) {
		k.hook.Ifindex, k.hook.Ingress = k.to.B.Ifindex, k.to.B.Ifindex
		copy(k.frame, k.to.B.HostMAC)
	}},
	// The outer frame.
	{"to somebody else's MAC", "", func(_ *testing.T, k *known) { copy(k.frame, nodeMAC) }},
	{"to all", "", func(_ *testing.T, k *known) { copy(k.frame, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}) }},
	{"options outside", "", func(_ *testing.T, k *known) { k.frame = pkt.WithOptions(k.frame, 0) }},
	{"options outside that look like the headers behind them", "", func(_ *testing.T, k *known) {
		k.put(vxlanFlags+2, byte(nodetest.OverlayPort>>8), nodetest.OverlayPort&0xff) // the port, eight bytes further behind
		k.put(pkt.L3, 0x47)
	}},
	{"a mark of congestion outside", "", func(_ *testing.T, k *known) { k.put(outerTOS, 3) }},
	{"first fragment outside", "", func(_ *testing.T, k *known) { k.put(outerFragment, 0x20) }},
	{"later fragment outside", "", func(t *testing.T, k *known) {
		k.put(outerFragment, 0x20)
		k.to.Run(t, k.hook, k.frame)
		k.put(outerFragment, 0, 5)
	}},
	{"from another address", "", func(_ *testing.T, k *known) { k.put(outerSrc, other4.AsSlice()...) }},
	{"from another node's address", "", func(_ *testing.T, k *known) { k.put(outerSrc, k.to.Addrs[0].AsSlice()...) }},
	{"to another address of this node", "", func(t *testing.T, k *known) {
		own := bpf.NewAddr(other4)
		k.to.Put(k.to.DP.Maps.NodeAddrs, own, bpf.NodeAddrLocal)
		t.Cleanup(func() { _ = k.to.DP.Maps.NodeAddrs.Delete(&own) }) // both kinds of packets put it there
		k.put(outerDst, other4.AsSlice()...)
	}},
	{"a checksum outside", "", func(_ *testing.T, k *known) { k.put(outerChecksum, 0xbe, 0xef) }},
	{"VXLAN without number", "", func(_ *testing.T, k *known) { k.put(vxlanFlags, 0) }},
	{"VXLAN with group policy and without number", "", func(_ *testing.T, k *known) { k.put(vxlanFlags, 0x80) }},
	{"VXLAN with another flag", "", func(_ *testing.T, k *known) { k.put(vxlanFlags, 0x0c) }},
	{"the number before", "", func(_ *testing.T, k *known) { k.put(vxlanVNI, vni(nodetest.OverlayVNI-1)...) }},
	{"the number behind", "", func(_ *testing.T, k *known) { k.put(vxlanVNI, vni(nodetest.OverlayVNI+bpf.VNIDSR+1)...) }},
	{"the byte behind the number", "", func(_ *testing.T, k *known) { k.put(vxlanVNI+3, 1) }},
	// The inner one.
	{"neither IPv4 nor IPv6 inside", "", func(_ *testing.T, k *known) { k.put(innerType, 0x81, 0) }},
	{"the other family's number inside", "", func(_ *testing.T, k *known) { k.put(outerLen+pkt.L3, k.frame[outerLen+pkt.L3]^0x20) }},
	{"options or an extension header inside", "", func(t *testing.T, k *known) { k.frame = k.wrap(t, pkt.WithOptions(k.inner, 0)) }},
	{"options inside where ports should be", "IPv4", func(t *testing.T, k *known) { k.putInside(t, pkt.L3, 0x46) }},
	{"first fragment inside", "IPv4", func(t *testing.T, k *known) { k.putInside(t, innerFragment, 0x20) }},
	{"later fragment inside", "IPv4", func(t *testing.T, k *known) { k.putInside(t, innerFragment, 0, 5) }},
	{"fragment inside", "IPv6", func(t *testing.T, k *known) { k.frame = k.wrap(t, pkt.Fragment(k.inner, 7, 24)[0]) }},
	{"IPv4 addresses in IPv6 inside", "IPv4", func(t *testing.T, k *known) { k.frame = k.wrap(t, mapped(k.in).Bytes()) }},
	{"the last hop inside", "", func(t *testing.T, k *known) { k.frame = k.wrap(t, lastHop(k.in).Bytes()) }},
	{"ends in the inner TCP header", "TCP", func(_ *testing.T, k *known) { k.frame = k.frame[:outerLen+l4(k.in)+19] }},
	{"ends in the inner UDP header", "UDP", func(_ *testing.T, k *known) { k.frame = k.frame[:outerLen+l4(k.in)+7] }},
	{"ends in the inner IP header", "", func(_ *testing.T, k *known) { k.frame = k.frame[:outerLen+l4(k.in)-1] }},
	{"ends in the inner Ethernet header", "", func(_ *testing.T, k *known) { k.frame = k.frame[:outerLen+pkt.L3-1] }},
	{"segments that were put together", "", func(_ *testing.T, k *known) { k.to.GSOSize = 8 }},
}

// other4 is one more address of the second node's network.
var other4 = netip.MustParseAddr("192.1.2.77")

func reopened(p pkt.Packet) pkt.Packet {
	p.Flags = pkt.SYN
	return hop(p)
}

func lastHop(p pkt.Packet) pkt.Packet {
	p.TTL = 1
	return p
}

func mapped(p pkt.Packet) pkt.Packet {
	src, dst := p.Src.Addr().As16(), p.Dst.Addr().As16()
	return hop(with(p, at(netip.AddrFrom16(src), p.Src.Port()), at(netip.AddrFrom16(dst), p.Dst.Port())))
}

func l4(p pkt.Packet) int {
	if p.V6() {
		return pkt.L4v6
	}
	return pkt.L4v4
}

// leftToTheDevice: what is not as our own nodes send it, or what only the stack may judge, and untouched. Without the change it is decapsulated.
func leftToTheDevice(t *testing.T, u *tunnel, n0, n1 *progtest.Fixture) {
	for _, tc := range toDevice {
		t.Run(tc.name, func(t *testing.T) {
			bothFamilies(t, n0, n1, func(t *testing.T, v6 bool) {
				for _, kind := range segmented {
					if family := map[bool]string{false: "IPv4", true: "IPv6"}[v6]; tc.only == "" || tc.only == kind.String() || tc.only == family {
						k := u.know(t, n0, fromPod(n0.A, kind, at(n1.B.Addr(v6), podPort)))
						k.changed(t, kind.String(), tc.change)
					}
				}
			})
		})
	}
}

// otherProtocols: only TCP and UDP are read inside, though the others' flows are known.
func otherProtocols(t *testing.T, u *tunnel, n0, n1 *progtest.Fixture) {
	bothFamilies(t, n0, n1, func(t *testing.T, v6 bool) {
		for _, kind := range []pkt.Kind{pkt.SCTP, pkt.Ping} {
			open := fromPod(n0.A, kind, at(n1.B.Addr(v6), podPort))
			u.opens(t, kind.String(), u.leave(t, n0, kind.String(), progtest.FromPod(n0.A), open), atPod(hop(open), n1.B))
			u.opens(t, kind.String()+" again, which", u.leave(t, n0, kind.String(), progtest.FromPod(n0.A), data(open)), atPod(hop(data(open)), n1.B))
		}
	})
}

// know opens the packet's flow and returns one from the middle of it.
func (u *tunnel) know(t *testing.T, from *progtest.Fixture, open pkt.Packet) *known {
	t.Helper()
	u.opens(t, open.Kind.String(), u.wrap(t, hop(open).Bytes()), atPod(hop(open), u.to.B))
	k := &known{tunnel: u, key: key(open), hook: u.to.FromNetdev(), in: data(open)}
	k.frame = u.leave(t, from, open.Kind.String(), progtest.FromPod(from.A), k.in)
	k.inner = k.frame[outerLen:]
	u.taken(t, open.Kind.String()+" as usual", k.frame, atPod(hop(k.in), u.to.B))
	return k
}

func (k *known) changed(t *testing.T, name string, change func(t *testing.T, k *known)) {
	t.Helper()
	k.entry, _ = k.to.Flow(t, k.key)
	index, nodes := nodetest.NodeIndex(k.from), k.to.DP.Maps.Nodes
	must(t, nodes.Lookup(index, &k.node))
	usual, entry := k.node, k.entry
	change(t, k)
	defer func() {
		k.to.GSOSize = 0
		k.to.Put(nodes, index, usual)
	}()
	if k.entry != entry {
		k.to.Put(k.to.Flows, k.key, k.entry)
	}
	k.to.Put(nodes, index, k.node)
	k.to.Check(t, progtest.Case{Name: name, Hook: k.hook, In: k.frame, WantAction: progtest.OK})
}

// age has the flow's last packet seen in an earlier tick.
func (k *known) age(t *testing.T) {
	t.Helper()
	k.entry, _ = k.to.Flow(t, k.key)
	k.entry.Tick--
	k.to.Put(k.to.Flows, k.key, k.entry)
}

// outlive has the flow's mark be of two ticks ago.
func (k *known) outlive(t *testing.T) {
	t.Helper()
	k.entry, _ = k.to.Flow(t, k.key)
	k.entry.Tcp -= 2 * bpf.FlowTCPQueuedTick
	k.to.Put(k.to.Flows, k.key, k.entry)
}

// segments are left to the device. They are more than fits the way that the single packet takes.
func (k *known) segments(t *testing.T) (inner []byte) {
	t.Helper()
	k.to.GSOSize = 8
	defer func() { k.to.GSOSize = 0 }()
	in := hop(k.in)
	in.Payload = bytes.Repeat(k.in.Payload, 10)
	k.device(t, "segments", k.wrap(t, in.Bytes()))
	return in.Bytes()
}

// singlesFollowSegments: the device has a queue, so what comes behind segments goes there as well, from the first ones of a tick on and before
// they are through, in that tick and the next.
func singlesFollowSegments(t *testing.T, u *tunnel, n0, n1 *progtest.Fixture) {
	bothFamilies(t, n0, n1, func(t *testing.T, v6 bool) {
		for _, kind := range segmented {
			k := u.know(t, n0, fromPod(n0.A, kind, at(n1.B.Addr(v6), podPort)))
			want := atPod(hop(k.in), n1.B)
			k.entry, _ = n1.Flow(t, k.key)
			k.entry.Mtu = uint16(len(k.inner) - pkt.L3)
			n1.Put(n1.Flows, k.key, k.entry)
			k.age(t)
			k.segments(t)
			k.device(t, kind.String()+" behind the first segments of a tick", k.frame)
			n1.Run(t, k.overlay, k.segments(t))
			k.device(t, kind.String()+" behind segments", k.frame)
			k.age(t)
			k.device(t, kind.String()+" in the next tick", k.frame)
			k.outlive(t)
			k.taken(t, kind.String()+" two ticks later", k.frame, want)
			k.taken(t, kind.String()+" goes on", k.frame, want)
		}
	})
}
