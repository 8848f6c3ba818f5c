// SPDX-License-Identifier: Apache-2.0

// Package eventtest writes events into a ring buffer the way the datapath's programs do: from a BPF program that the kernel runs.
// User space cannot write there.
package eventtest

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"github.com/margay-cni/margay/pkg/bpf"
)

// Emit writes the events, in their order, into the ring buffer.
func Emit(t testing.TB, ring *ebpf.Map, events ...bpf.Event) {
	t.Helper()
	for _, e := range events {
		var raw bytes.Buffer
		if err := binary.Write(&raw, binary.NativeEndian, e); err != nil {
			t.Fatal(err)
		}
		EmitBytes(t, ring, raw.Bytes())
	}
}

// EmitBytes writes one sample, of a multiple of eight bytes, into the ring buffer.
func EmitBytes(t testing.TB, ring *ebpf.Map, sample []byte) {
	t.Helper()
	var insns asm.Instructions
	for off := 0; off < len(sample); off += 8 {
		word := int64(binary.NativeEndian.Uint64(sample[off:]))
		insns = append(insns,
			asm.LoadImm(asm.R1, word, asm.DWord),
			asm.StoreMem(asm.RFP, int16(off-len(sample)), asm.R1, asm.DWord),
		)
	}
	insns = append(insns,
		asm.LoadMapPtr(asm.R1, ring.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, int32(-len(sample))),
		asm.Mov.Imm(asm.R3, int32(len(sample))),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnRingbufOutput.Call(),
		asm.Return(),
	)
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SocketFilter, License: "GPL", Instructions: insns})
	if err != nil {
		t.Fatalf("load the program that writes an event: %v", err)
	}
	defer prog.Close()
	ret, err := prog.Run(&ebpf.RunOptions{Data: make([]byte, 64)})
	if err != nil || int32(ret) != 0 {
		t.Fatalf("write event: bpf_ringbuf_output = %d, %v", int32(ret), err)
	}
}
