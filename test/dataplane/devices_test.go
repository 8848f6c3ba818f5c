// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/nodetest"
)

// addTun makes a device without link layer in a node's namespace, with from_l3_netdev attached, and leads packets for the prefixes to it.
// What leaves by it is read from the returned file, and what is written there comes in.
func addTun(t *testing.T, n *nodetest.Node, to []netip.Prefix) *os.File {
	t.Helper()
	var tun *os.File
	n.NS.Do(func() {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		wantNoError(t, "open /dev/net/tun", err)
		req, err := unix.NewIfreq("tun0")
		wantNoError(t, "name the device", err)
		req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		wantNoError(t, "make a tun device", unix.IoctlIfreq(fd, unix.TUNSETIFF, req))
		tun = os.NewFile(uintptr(fd), "tun0")
		l, err := netlink.LinkByName("tun0")
		wantNoError(t, "find the device", err)
		wantNoError(t, "set up", netlink.LinkSetUp(l))
		for _, p := range to {
			dst := &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
			wantNoError(t, "route", netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: dst}))
		}
		wantNoError(t, "attach", n.DP.AttachNetdev(l.Attrs().Index))
	})
	t.Cleanup(func() { tun.Close() })
	return tun
}

// carry moves packets from one tun device to the other until that is closed, and counts them.
func carry(from, to *os.File, count *atomic.Int64) {
	buf := make([]byte, 65536)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		if _, err := to.Write(buf[:n]); err == nil {
			count.Add(1)
		}
	}
}

// TestRow22_DeviceWithoutLinkLayer: pods of two nodes talk through devices whose packets have no Ethernet header (WireGuard and IPIP look
// the same to a program), and the node's own traffic through them is untouched.
func TestRow22_DeviceWithoutLinkLayer(t *testing.T) {
	t.Parallel()
	c := nodetest.NewCluster(t, 2, nodetest.ClusterOptions{Direct: true})
	n0, n1 := c.Nodes[0], c.Nodes[1]
	a, b := n0.AddPod("a"), n1.AddPod("b")
	nodetest.Serve(t, b.NS, "b", 8080)
	nodetest.Serve(t, n1.NS, "node1", 9090)
	var carried atomic.Int64
	tun0, tun1 := addTun(t, n0, n1.PodRanges()), addTun(t, n1, n0.PodRanges())
	go carry(tun0, tun1, &carried)
	go carry(tun1, tun0, &carried)
	families(t, func(t *testing.T, v6 bool) {
		pa, before := party{a.NS, a.Addr(v6)}, carried.Load()
		wantTalk(t, "pod to pod", pa, netip.AddrPortFrom(b.Addr(v6), 8080), "b")
		if n := carried.Load() - before; n < 10 {
			t.Errorf("%d packets went through the device, want all of them", n)
		}
		wantTalk(t, "node to pod", party{n0.NS, family(n0.Addrs, v6)}, netip.AddrPortFrom(b.Addr(v6), 8080), "b")
		wantTalk(t, "pod to node", pa, netip.AddrPortFrom(family(n1.Addrs, v6), 9090), "node1")
	})
}

// TestRow23_BridgeInsideThePod: a virtual machine behind a bridge inside the pod, with the pod's address and MAC (as KubeVirt's bridge
// binding does it), is reached, and talks.
func TestRow23_BridgeInsideThePod(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a, b := n.AddPod("a"), n.AddPod("b")
	vm := netnstest.New(t)
	vmFile, err := os.Open(vm.Path())
	wantNoError(t, "open the namespace", err)
	defer vmFile.Close()
	a.NS.Do(func() {
		eth0, err := netlink.LinkByName("eth0")
		wantNoError(t, "find eth0", err)
		for _, addr := range a.Addrs {
			dst := &netlink.Addr{IPNet: &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(addr.BitLen(), addr.BitLen())}}
			wantNoError(t, "take the address away", netlink.AddrDel(eth0, dst))
		}
		wantNoError(t, "give eth0 another MAC", netlink.LinkSetHardwareAddr(eth0, net.HardwareAddr{2, 0, 0, 0, 0, 1}))
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "br0"
		wantNoError(t, "make the bridge", netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}))
		attrs = netlink.NewLinkAttrs()
		attrs.Name = "tap0"
		veth := netlink.NewVeth(attrs)
		veth.PeerName, veth.PeerNamespace, veth.PeerHardwareAddr = "eth0", netlink.NsFd(int(vmFile.Fd())), a.MAC
		wantNoError(t, "make the machine's device", netlink.LinkAdd(veth))
		br, err := netlink.LinkByName("br0")
		wantNoError(t, "find the bridge", err)
		for _, name := range []string{"eth0", "tap0", "br0"} {
			l, err := netlink.LinkByName(name)
			wantNoError(t, "find "+name, err)
			if name != "br0" {
				wantNoError(t, "enslave "+name, netlink.LinkSetMaster(l, br))
			}
			wantNoError(t, "set up "+name, netlink.LinkSetUp(l))
		}
	})
	vm.Do(func() {
		l, err := netlink.LinkByName("eth0")
		wantNoError(t, "find the machine's device", err)
		wantNoError(t, "set up", netlink.LinkSetUp(l))
		for i, addr := range a.Addrs {
			ipnet := &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(addr.BitLen(), addr.BitLen())}
			wantNoError(t, "address", netlink.AddrAdd(l, &netlink.Addr{IPNet: ipnet, Flags: unix.IFA_F_NODAD}))
			gw := []net.IP{{169, 254, 1, 1}, net.ParseIP("fe80::1")}[i]
			all := &net.IPNet{IP: make(net.IP, len(addr.AsSlice())), Mask: net.CIDRMask(0, addr.BitLen())}
			wantNoError(t, "neighbour", netlink.NeighAdd(&netlink.Neigh{LinkIndex: l.Attrs().Index, IP: gw, HardwareAddr: a.HostMAC,
				State: netlink.NUD_PERMANENT}))
			wantNoError(t, "route", netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: all, Gw: gw, Flags: int(netlink.FLAG_ONLINK)}))
		}
	})
	// The bridge forwards only after it has seen its ports' carrier.
	b.NS.Do(func() { nodetest.Await(t, a.Addrs...) })
	nodetest.Serve(t, vm, "machine", 8080)
	nodetest.Serve(t, b.NS, "b", 8080)
	families(t, func(t *testing.T, v6 bool) {
		wantTalk(t, "pod to machine", party{b.NS, b.Addr(v6)}, netip.AddrPortFrom(a.Addr(v6), 8080), "machine")
		wantTalk(t, "machine to pod", party{vm, a.Addr(v6)}, netip.AddrPortFrom(b.Addr(v6), 8080), "b")
	})
}
