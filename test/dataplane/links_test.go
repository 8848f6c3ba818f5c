// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/link"
)

// hook is a side of a device at which the device and the program see the same packets.
type hook struct {
	program *ebpf.Program
	name    string
	ifindex int
	egress  bool
}

// passes is how many packets have passed a hook, as the device counts and as the program does.
type passes struct{ Device, Program uint64 }

// nodeHooks returns the node's own devices, which have been attached to, and hooks of them.
func nodeHooks(t *testing.T, n *nodetest.Node) (devices datapath.NodeDevices, hooks []hook) {
	t.Helper()
	n.NS.Do(func() {
		overlay, err := netlink.LinkByName(nodetest.OverlayDevice)
		wantNoError(t, "find the overlay device", err)
		service, err := netlink.LinkByName(link.ServiceDevice)
		wantNoError(t, "find the host's pair", err)
		devices = datapath.NodeDevices{
			Netdevs: []int{n.ClientDevice}, Overlay: overlay.Attrs().Index, HostPeer: service.Attrs().Index,
		}
	})
	hooks = []hook{
		{nil, bpf.ProgFromNetdev, n.ClientDevice, false}, {nil, bpf.ProgToNetdev, n.ClientDevice, true},
		{nil, bpf.ProgFromOverlay, devices.Overlay, false}, {nil, bpf.ProgFromHost, devices.HostPeer, false},
	}
	for i := range hooks {
		var err error
		hooks[i].program, err = ebpf.LoadPinnedProgram(filepath.Join(n.Config.ProgramDir(), hooks[i].name), nil)
		wantNoError(t, "open "+hooks[i].name, err)
		t.Cleanup(func() { hooks[i].program.Close() })
	}
	return devices, hooks
}

func (h hook) count(t *testing.T, n *nodetest.Node) (p passes) {
	t.Helper()
	n.NS.Do(func() {
		l, err := netlink.LinkByIndex(h.ifindex)
		wantNoError(t, "read the device's counters", err)
		stats, err := h.program.Stats()
		wantNoError(t, "read the program's counters", err)
		p = passes{l.Attrs().Statistics.RxPackets, stats.RunCount}
		if h.egress {
			p.Device = l.Attrs().Statistics.TxPackets
		}
	})
	return p
}

// ranOnce waits until the programs have run as often during f as packets have passed their devices.
func ranOnce(t *testing.T, n *nodetest.Node, hooks []hook, f func()) {
	t.Helper()
	before := make([]passes, len(hooks))
	for i, h := range hooks {
		before[i] = h.count(t, n)
	}
	f()
	for i, h := range hooks {
		var d passes
		for range 100 {
			now := h.count(t, n)
			d = passes{now.Device - before[i].Device, now.Program - before[i].Program}
			if d.Device == d.Program {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
		if d.Device != d.Program || d.Device == 0 {
			t.Errorf("%s: %d packets have passed, and it has run %d times", h.name, d.Device, d.Program)
		}
	}
}

// TestProgramsRunOnceUnderLinks: a packet meets a program once, be that a filter, or a filter and a tcx link above it, and a dropped one is
// counted once. Where the kernel has no tcx the same holds of filters alone.
func TestProgramsRunOnceUnderLinks(t *testing.T) {
	c := nodetest.NewCluster(t, 2, nodetest.ClusterOptions{})
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	wantNoError(t, "switch program statistics on", err)
	defer stats.Close()
	n, other := c.Nodes[0], c.Nodes[1]
	n.ServeHost()
	a, b := n.AddPod("a"), other.AddPod("b")
	nodetest.Serve(t, a.NS, "a", 8080)
	nodetest.Serve(t, b.NS, "b", 8080)
	for i, vip := range vips {
		c.AddService(uint32(70+i), bpf.NewFrontendKey(unix.IPPROTO_UDP, vip, 80), 0, netip.AddrPortFrom(b.Addr(vip.Is6()), 8080))
	}
	devices, hooks := nodeHooks(t, n)
	traffic := func(t *testing.T, v6 bool) {
		t.Helper()
		for range 5 {
			got, err := nodetest.Ask(t, c.Client, "udp", netip.AddrPortFrom(a.Addr(v6), 8080))
			wantAnswer(t, "client to pod", got, err, "a "+family(nodetest.ClientAddrs, v6).String())
			got, err = nodetest.Ask(t, b.NS, "udp", netip.AddrPortFrom(a.Addr(v6), 8080))
			wantAnswer(t, "the other node's pod to pod", got, err, "a "+b.Addr(v6).String())
			got, err = nodetest.Ask(t, n.NS, "udp", netip.AddrPortFrom(family(vips, v6), 80))
			wantAnswer(t, "the node to a service", got, err, "b "+family(n.Addrs, v6).String())
		}
		dropped := dropsOf(n, "overlay_source")
		frame := pkt.Packet{
			Kind: pkt.UDP, TTL: 64, SrcMAC: b.HostMAC, DstMAC: b.MAC, Src: netip.AddrPortFrom(b.Addr(v6), 4000), Dst: netip.AddrPortFrom(a.Addr(v6), 8080),
		}.Bytes()
		for range 3 {
			encapsulate(t, c.Client, nodetest.ClientAddrs[0], n.Addrs[0], nodetest.OverlayVNI+bpf.VNIPods, frame)
		}
		for range 50 {
			if dropsOf(n, "overlay_source")-dropped >= 3 {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
		if got := dropsOf(n, "overlay_source") - dropped; got != 3 {
			t.Errorf("%d packets were counted as dropped, want the 3 that were", got)
		}
	}
	families(t, func(t *testing.T, v6 bool) {
		for _, step := range []struct {
			name string
			do   func() error
		}{
			{"filters", func() error { return nil }},
			{"filters and links", func() error { _, err := n.DP.LinkNodeDevices(devices); return err }},
			{"filters again", func() error { return n.DP.UnlinkOthers(datapath.NodeDevices{}) }},
		} {
			t.Run(step.name, func(t *testing.T) {
				n.NS.Do(func() { wantNoError(t, step.name, step.do()) })
				ranOnce(t, n, hooks, func() { traffic(t, v6) })
			})
		}
	})
}

// TestNoPacketPassesBetweenFilterAndLink: while links come and go above the filters, none of the packets that a program stops gets through.
func TestNoPacketPassesBetweenFilterAndLink(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a := n.AddPod("a")
	nodetest.Serve(t, a.NS, "a", 8080)
	n.IdentifyPod(a, identityA, policyA, policyA) // nothing is allowed
	stop := make(chan struct{})
	turns := make(chan int)
	go n.NS.Do(func() {
		count := 0
		for {
			select {
			case <-stop:
				turns <- count
				return
			default:
			}
			_, err := n.DP.LinkNodeDevices(datapath.NodeDevices{Netdevs: []int{n.ClientDevice}})
			if err == nil {
				err = n.DP.UnlinkOthers(datapath.NodeDevices{})
			}
			if err != nil {
				t.Error(err)
			}
			count++
		}
	})
	outside, pod := newWire(t, n.Client), newWire(t, a.NS)
	families(t, func(t *testing.T, v6 bool) {
		before := n.Drops(6)
		frame := pkt.Packet{
			Kind: pkt.UDP, TTL: 64, SrcMAC: outside.HardwareAddr, DstMAC: nodeMAC(t, n), Src: netip.AddrPortFrom(family(nodetest.ClientAddrs, v6), 4000),
			Dst: netip.AddrPortFrom(a.Addr(v6), 8080), Payload: []byte("let me through"),
		}.Bytes()
		sent := uint64(0)
		for end := time.Now().Add(time.Second); time.Now().Before(end); sent++ {
			outside.send(frame)
		}
		if pod.sees("let me through") {
			t.Error("a packet got to the pod that policy denies")
		}
		if got := n.Drops(6) - before; got != sent {
			t.Errorf("%d packets were dropped by policy, want the %d that were sent", got, sent)
		}
	})
	close(stop)
	if n := <-turns; n < 2 {
		t.Errorf("links came and went %d times, want more", n)
	}
}
