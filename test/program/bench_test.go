// SPDX-License-Identifier: Apache-2.0

package program

import (
	"testing"

	"github.com/cilium/ebpf"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
)

// BenchmarkToNetdev measures what the program adds to a packet that leaves the node, beside 10 000 masqueraded flows.
func BenchmarkToNetdev(b *testing.B) {
	f := progtest.New(b)
	f.Masquerade(nodetest.NodeAddrs...)
	for i := range 10000 {
		open := fromPod(f.A, pkt.UDP, outside(false))
		open.Src = at(open.Src.Addr(), uint16(2000+i))
		f.Run(b, progtest.FromPod(f.A), open.Bytes())
	}
	forwarded := f.ToNetdev()
	forwarded.Ingress = f.A.Ifindex
	segment := fromHost(pkt.TCP, outside(false))
	segment6 := fromHost(pkt.TCP, outside(true))
	datagram := fromHost(pkt.UDP, outside(false))
	datagram.Src = at(datagram.Src.Addr(), 1999) // no pod has it: what moves would move again, because a run sees what the last one left
	for _, bb := range []struct {
		name string
		hook progtest.Hook
		in   pkt.Packet
	}{
		{"forwarded", forwarded, data(segment)},
		{"TCP segment, IPv4", f.ToNetdev(), data(segment)},
		{"TCP segment, IPv6", f.ToNetdev(), data(segment6)},
		{"SYN", f.ToNetdev(), segment},
		{"datagram", f.ToNetdev(), datagram},
	} {
		b.Run(bb.name, func(b *testing.B) {
			f.NS.Do(func() {
				in := bb.in.Bytes()
				_, err := f.Program(bb.hook.Program).Run(&ebpf.RunOptions{
					Data: in, DataOut: make([]byte, 256), Context: progtest.Context(bb.hook), Repeat: uint32(b.N),
				})
				if err != nil {
					b.Fatal(err)
				}
			})
		})
	}
}

// BenchmarkNewFlowToOutside measures a pod's first packet, with masquerade and without.
func BenchmarkNewFlowToOutside(b *testing.B) {
	for _, masquerade := range []bool{false, true} {
		b.Run(map[bool]string{false: "own address", true: "masqueraded"}[masquerade], func(b *testing.B) {
			f := progtest.New(b)
			if masquerade {
				f.Masquerade(nodetest.NodeAddrs...)
			}
			in := fromPod(f.A, pkt.UDP, outside(false)).Bytes()
			opts := &ebpf.RunOptions{Data: in, DataOut: make([]byte, 256), Context: progtest.Context(progtest.FromPod(f.A))}
			f.NS.Do(func() {
				for i := 0; b.Loop(); i++ {
					own := 2000 + i%60000
					in[pkt.L4v4], in[pkt.L4v4+1] = byte(own>>8), byte(own)
					if _, err := f.Program("from_pod").Run(opts); err != nil {
						b.Fatal(err)
					}
				}
			})
		})
	}
}
