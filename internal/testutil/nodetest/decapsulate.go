// SPDX-License-Identifier: Apache-2.0

package nodetest

import (
	"fmt"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// ProgramsDecapsulate tells whether the programs take the outer headers off a packet of a known flow on the kernel at hand: off any from
// BPF_F_ADJ_ROOM_DECAP_L3_IPV6 on (Linux 6.3), before that off IPv4 to a pod.
func ProgramsDecapsulate(t testing.TB, v6, toPod bool) bool {
	t.Helper()
	anything, err := kernelDecapsulates()
	if err != nil {
		t.Fatal(err)
	}
	return anything || (!v6 && toPod)
}

// kernelDecapsulates asks the kernel for the flag, once.
var kernelDecapsulates = sync.OnceValues(func() (bool, error) {
	const ethernet, outer, ofMAC, decapsulate = 14, 50, 1, 1 << 8
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "Dual BSD/GPL", Instructions: asm.Instructions{
		asm.Mov.Imm(asm.R2, -outer), asm.Mov.Imm(asm.R3, ofMAC), asm.Mov.Imm(asm.R4, decapsulate), asm.FnSkbAdjustRoom.Call(), asm.Return(),
	}})
	if err != nil {
		return false, fmt.Errorf("load a program that decapsulates: %w", err)
	}
	defer prog.Close()
	frame := make([]byte, ethernet+outer+60)
	frame[12], frame[ethernet] = 0x08, 0x45
	ret, err := prog.Run(&ebpf.RunOptions{Data: frame})
	if err != nil {
		return false, fmt.Errorf("run a program that decapsulates: %w", err)
	}
	return ret == 0, nil
})
