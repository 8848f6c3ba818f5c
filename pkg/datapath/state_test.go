// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"testing"

	"github.com/cilium/ebpf"

	"github.com/margay-cni/margay/pkg/bpf"
)

func TestVerdictEventsLeaveTheRestOfTheStateAlone(t *testing.T) {
	t.Parallel()
	ns, cfg := place(t)
	d := ensure(t, ns, cfg)
	var zero uint32
	want := bpf.NodeState{Flags: bpf.NodeMasquerade, OverlayIfindex: 7, Vni: 28000, OverlayPort: bpf.Port16(8472)}
	must(t, d.Maps.NodeState.Update(&zero, &want, ebpf.UpdateAny))
	for _, on := range []bool{true, true, false, false} {
		must(t, d.SetVerdictEvents(on))
		if want.Flags = bpf.NodeMasquerade; on {
			want.Flags |= bpf.NodeVerdictEvents
		}
		var got bpf.NodeState
		must(t, d.Maps.NodeState.Lookup(&zero, &got))
		if got != want {
			t.Errorf("node_state after SetVerdictEvents(%v) = %+v, want %+v", on, got, want)
		}
	}
}
