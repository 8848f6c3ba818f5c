// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/datapath"
)

// TestDropsOfDatapath: what the shipped program drops is what the totals and the live listing show.
func TestDropsOfDatapath(t *testing.T) {
	for _, f := range families() {
		t.Run(f.name, func(t *testing.T) {
			n := newNode(t, f)
			n.bpffs += "-real"
			netnstest.New(t).Do(func() { testDropsOfDatapath(t, n) })
		})
	}
}

func testDropsOfDatapath(t *testing.T, n *testNode) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	cfg := datapath.Config{BPFFS: n.bpffs, Run: n.run}
	d, err := datapath.Ensure(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	prog, err := ebpf.LoadPinnedProgram(filepath.Join(n.bpffs, "progs", d.Build(), bpf.ProgFromPod), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer prog.Close()
	// The client is registered, but on another device than the one that the packet comes from.
	n.addPod(t, "client", n.client, bpf.Endpoint{})
	if err := d.PutEndpoint(n.client, bpf.Endpoint{Ifindex: gone, Identity: 17}); err != nil {
		t.Fatal(err)
	}
	frame := synFrame(t, netip.AddrPortFrom(n.client, 40001), netip.AddrPortFrom(n.external, 443))
	if _, err := prog.Run(&ebpf.RunOptions{Data: frame}); err != nil {
		t.Fatal(err)
	}
	var totals dropList
	n.decode(t, &totals, "drops")
	if len(totals.Drops) != 1 || totals.Drops[0].Reason != "spoofed_address" || totals.Drops[0].Direction != "egress" || totals.Drops[0].Packets != 1 {
		t.Errorf("totals = %+v, want one packet with a spoofed address", totals.Drops)
	}
	out, errs, code := n.ctl(t, "drops", "--follow", "--since", "1m", "--count", "1", "--timeout", "10s")
	want := []string{"spoofed_address", "egress", "TCP", "default/client:40001", netip.AddrPortFrom(n.external, 443).String()}
	for _, w := range want {
		if code != 0 || errs != "" || !strings.Contains(out, w) {
			t.Errorf("drops --follow = %d, %q, %q; want a line with %q", code, out, errs, w)
		}
	}
}

// synFrame is a TCP SYN in Ethernet.
func synFrame(t *testing.T, src, dst netip.AddrPort) []byte {
	t.Helper()
	eth := &layers.Ethernet{SrcMAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, DstMAC: net.HardwareAddr{2, 0, 0, 0, 0, 2}}
	syn := &layers.TCP{SrcPort: layers.TCPPort(src.Port()), DstPort: layers.TCPPort(dst.Port()), SYN: true, Window: 64240}
	var ip gopacket.SerializableLayer
	if src.Addr().Is4() {
		eth.EthernetType = layers.EthernetTypeIPv4
		v4 := &layers.IPv4{
			Version: 4, TTL: 64, Protocol: layers.IPProtocolTCP, SrcIP: src.Addr().AsSlice(), DstIP: dst.Addr().AsSlice(),
		}
		ip = v4
		_ = syn.SetNetworkLayerForChecksum(v4)
	} else {
		eth.EthernetType = layers.EthernetTypeIPv6
		v6 := &layers.IPv6{
			Version: 6, HopLimit: 64, NextHeader: layers.IPProtocolTCP, SrcIP: src.Addr().AsSlice(), DstIP: dst.Addr().AsSlice(),
		}
		ip = v6
		_ = syn.SetNetworkLayerForChecksum(v6)
	}
	buf := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, eth, ip, syn); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}
