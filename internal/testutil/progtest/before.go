// SPDX-License-Identifier: Apache-2.0

package progtest

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/pkg/bpf"
)

// Unprepared is the action of a run whose preparation the kernel has refused (Before).
const Unprepared = 99

// Before returns the hook with a preparation: helper calls that give the packet what a test run cannot, before the hook's program has it. Each
// call is in instructions of its own, with the packet in R6, and must return 0.
func (f *Fixture) Before(t testing.TB, h Hook, calls ...asm.Instructions) Hook {
	t.Helper()
	next, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { next.Close() })
	all := asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}
	for _, call := range calls {
		all = append(append(all, call...), asm.JNE.Imm(asm.R0, 0, "refused"))
	}
	all = append(all,
		asm.Mov.Reg(asm.R1, asm.R6), asm.LoadMapPtr(asm.R2, next.FD()), asm.Mov.Imm(asm.R3, 0), asm.FnTailCall.Call(),
		asm.Mov.Imm(asm.R0, Unprepared).WithSymbol("refused"), asm.Return(),
	)
	h.first, err = ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "Dual BSD/GPL", Instructions: all})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.first.Close() })
	if err := next.Put(uint32(0), f.progs[h.Program]); err != nil {
		t.Fatal(err)
	}
	return h
}

// Encapsulate are preparations: the frame's packet gets an IP and a UDP header in front, and the kernel notes that it is encapsulated.
func Encapsulate(headers []byte) []asm.Instructions {
	const ofMAC, fixedSegments, ipv4, ipv6, udp = 1, 1 << 0, 1 << 1, 1 << 2, 1 << 4 // BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_*
	family := ipv4
	if headers[0]>>4 == 6 {
		family = ipv6
	}
	size := int32(len(headers))
	store := asm.Instructions{}
	for off := 0; off < len(headers); off += 4 {
		word := int64(int32(binary.NativeEndian.Uint32(headers[off:])))
		store = append(store, asm.StoreImm(asm.RFP, int16(off)-int16(size), word, asm.Word))
	}
	return []asm.Instructions{{
		asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, size), asm.Mov.Imm(asm.R3, ofMAC),
		asm.Mov.Imm(asm.R4, int32(fixedSegments|family|udp)), asm.FnSkbAdjustRoom.Call(),
	}, append(store,
		asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, 14), asm.Mov.Reg(asm.R3, asm.RFP), asm.Add.Imm(asm.R3, -size),
		asm.Mov.Imm(asm.R4, size), asm.Mov.Imm(asm.R5, 0), asm.FnSkbStoreBytes.Call(),
	)}
}

// FromOverlay is the hook of what another node has sent through the overlay, under IPv4. It knows the outer source, the network number as the
// programs count it, and the group policy.
func (f *Fixture) FromOverlay(t testing.TB, node netip.Addr, vni uint32, group uint16) Hook {
	t.Helper()
	var state bpf.NodeState
	if err := f.DP.Maps.NodeState.Lookup(uint32(0), &state); err != nil {
		t.Fatal(err)
	}
	h := Hook{Program: bpf.ProgFromOverlay, Ifindex: int(state.OverlayIfindex), Ingress: int(state.OverlayIfindex)}
	const key, size, local = -48, 44, -48 + 28 // struct bpf_tunnel_key, and local_ipv4 in it: what a packet has as its source
	call := asm.Instructions{asm.Mov.Imm(asm.R1, 0)}
	for off := int16(key); off < 0; off += 8 {
		call = append(call, asm.StoreMem(asm.RFP, off, asm.R1, asm.DWord))
	}
	source := int64(binary.BigEndian.Uint32(node.AsSlice()))
	call = slices.Concat(call, asm.Instructions{
		asm.StoreImm(asm.RFP, key, int64(nodetest.OverlayVNI+vni), asm.Word),
		asm.LoadImm(asm.R1, source, asm.DWord), asm.StoreMem(asm.RFP, local, asm.R1, asm.Word),
		asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, key),
		asm.Mov.Imm(asm.R3, size), asm.Mov.Imm(asm.R4, 0), asm.FnSkbSetTunnelKey.Call(),
	})
	const option = -56 // struct vxlan_metadata
	return f.Before(t, h, call, asm.Instructions{
		asm.StoreImm(asm.RFP, option, int64(group), asm.Word),
		asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, option),
		asm.Mov.Imm(asm.R3, 4), asm.FnSkbSetTunnelOpt.Call(),
	})
}
