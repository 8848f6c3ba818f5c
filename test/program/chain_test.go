// SPDX-License-Identifier: Apache-2.0

package program

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/bpf/object"
)

// flowTable compares the whole flow table. Times, epochs and checksum differences are held by other tests, by what they do.
func flowTable(t *testing.T, f *progtest.Fixture, want map[bpf.FlowKey]bpf.Flow) {
	t.Helper()
	ignore := cmpopts.IgnoreFields(bpf.Flow{}, "LastSeen", "Tick", "RouteEpoch", "EndpointEpoch", "ServiceEpoch", "CsumDiff")
	if diff := cmp.Diff(want, f.AllFlows(t), ignore); diff != "" {
		t.Errorf("flow table (-want +got):\n%s", diff)
	}
}

func TestPodToPod(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range kinds {
			f.ClearFlows(t)
			open := fromPod(f.A, kind, at(f.B.Addr(v6), podPort))
			name := kind.String()
			redirected(t, f, name+" opens", progtest.FromPod(f.A), open, atPod(open, f.B))
			seen := bpf.FlowTCPSyn
			if kind != pkt.TCP {
				seen = 0
			}
			flowTable(t, f, map[bpf.FlowKey]bpf.Flow{
				key(open): {
					InIfindex: uint32(f.A.Ifindex), OutIfindex: uint32(f.B.Ifindex), InMac: [6]byte(f.A.MAC),
					DstMac: [6]byte(f.B.MAC), SrcMac: [6]byte(f.B.HostMAC),
					Action: bpf.FlowToPod, Flags: bpf.FlowInPod, Tcp: seen, Xlate: key(open),
				},
				key(open).Reverse(): {
					InIfindex: uint32(f.B.Ifindex), OutIfindex: uint32(f.A.Ifindex), InMac: [6]byte(f.B.MAC),
					DstMac: [6]byte(f.A.MAC), SrcMac: [6]byte(f.A.HostMAC),
					Action: bpf.FlowToPod, Flags: bpf.FlowInPod | bpf.FlowReply, Xlate: key(open).Reverse(),
				},
			})
			back := answer(atPod(open, f.B))
			redirected(t, f, name+" is answered", progtest.FromPod(f.B), back, atPod(back, f.A))
			redirected(t, f, name+" goes on", progtest.FromPod(f.A), data(open), atPod(data(open), f.B))
		}
	})
}

func TestPodToOutside(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range kinds {
			f.ClearFlows(t)
			open := fromPod(f.A, kind, at(of(nodetest.ClientAddrs, v6), 443))
			name := kind.String()
			redirected(t, f, name+" opens", progtest.FromPod(f.A), open, hop(open))
			back := answer(hop(open))
			back.SrcMAC, back.DstMAC = routerMAC, nodeMAC
			redirected(t, f, name+" is answered", f.FromNetdev(), back, atPod(back, f.A))
			redirected(t, f, name+" goes on", progtest.FromPod(f.A), data(open), hop(data(open)))
			got, ok := f.Flow(t, key(open))
			if !ok || got.Action != bpf.FlowToNetdev || got.OutIfindex != uint32(f.ClientDevice) {
				t.Errorf("%s: entry = %+v, %v, want out by device %d", name, got, ok, f.ClientDevice)
			}
		}
	})
}

func TestOutsideToPod(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range kinds {
			f.ClearFlows(t)
			open := fromClient(kind, at(f.B.Addr(v6), podPort))
			name := kind.String()
			redirected(t, f, name+" opens", f.FromNetdev(), open, atPod(open, f.B))
			back := answer(atPod(open, f.B))
			redirected(t, f, name+" is answered", progtest.FromPod(f.B), back, hop(back))
			redirected(t, f, name+" goes on", f.FromNetdev(), data(open), atPod(data(open), f.B))
			// The answers leave by the device that the opener came in on.
			got, ok := f.Flow(t, key(open).Reverse())
			if !ok || got.Action != bpf.FlowToNetdev || got.OutIfindex != uint32(f.ClientDevice) || got.Flags != bpf.FlowReply|bpf.FlowInPod {
				t.Errorf("%s: answers' entry = %+v, %v, want out by device %d", name, got, ok, f.ClientDevice)
			}
		}
	})
}

// The node's own traffic with a pod goes by the stack, unchanged in both directions.
func TestNodeAndPod(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range kinds {
			f.ClearFlows(t)
			name := kind.String()
			open := fromClient(kind, at(f.B.Addr(v6), podPort))
			open = with(open, at(of(nodetest.NodeAddrs, v6), sport), open.Dst)
			passed(t, f, name+" from the node", progtest.ToPod(f.B), open, open)
			if got, _ := f.Flow(t, key(open)); got.Flags != bpf.FlowViaStack|bpf.FlowFromHost|bpf.FlowInNode {
				t.Errorf("%s from the node: flags = %v, want via_stack, from_host and in_node", name, object.FlowFlagNames(got.Flags))
			}
			back := answer(open)
			back.SrcMAC, back.DstMAC = f.B.MAC, f.B.HostMAC
			passed(t, f, name+" to the node", progtest.FromPod(f.B), back, back)

			f.ClearFlows(t)
			open = fromPod(f.A, kind, at(of(nodetest.NodeAddrs, v6), 10250))
			passed(t, f, name+" opens to the node", progtest.FromPod(f.A), open, open)
			back = answer(open)
			passed(t, f, name+" is answered by the node", progtest.ToPod(f.A), back, back)
		}
	})
}

// The hop limit is one less at the other end; a packet that has no hop left goes to the stack, which says so to its sender.
func TestHopLimit(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	families(t, f, func(t *testing.T, v6 bool) {
		for _, dst := range []struct {
			name string
			to   pkt.Packet
		}{
			{"pod", fromPod(f.A, pkt.UDP, at(f.B.Addr(v6), podPort))},
			{"outside", fromPod(f.A, pkt.UDP, at(of(nodetest.ClientAddrs, v6), 53))},
			{"service", fromPod(f.A, pkt.UDP, at(of(vips, v6), vipPort))},
		} {
			f.ClearFlows(t)
			for _, ttl := range []uint8{255, 2, 1, 0} {
				in := dst.to
				in.TTL = ttl
				if ttl <= 1 {
					passed(t, f, dst.name+", no hop left", progtest.FromPod(f.A), in, in)
					continue
				}
				out := hop(in)
				switch dst.name {
				case "pod":
					out = atPod(in, f.B)
				case "service":
					out = with(atPod(in, f.B), in.Src, at(f.B.Addr(v6), podPort))
				}
				redirected(t, f, dst.name, progtest.FromPod(f.A), in, out)
			}
		}
	})
}

// A packet that the stack hands to the pod takes no hop: hop limit 1 is enough for it, and its translation must not be skipped.
func TestLastHopFromTheStackIsTranslated(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	for i, v6 := range []bool{false, true} {
		service(f, uint32(2000+1000*i), at(of(vips, v6), 443), at(of(nodetest.NodeAddrs, v6), 6443))
	}
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
			open := fromPod(f.A, kind, at(of(vips, v6), 443))
			arrived := with(open, open.Src, at(of(nodetest.NodeAddrs, v6), 6443))
			passed(t, f, "to the node's own backend", progtest.FromPod(f.A), open, arrived)
			back := answer(arrived)
			for _, ttl := range []uint8{64, 1} {
				back.TTL = ttl
				passed(t, f, "answer", progtest.ToPod(f.A), back, with(back, open.Dst, open.Src))
			}
		}
	})
}

// IPv4 options and IPv6 extension headers are stepped over, translated behind and left as they are.
func TestOptionsAreKept(t *testing.T) {
	t.Parallel()
	f := progtest.New(t)
	servicesOn(f, f.B)
	families(t, f, func(t *testing.T, v6 bool) {
		for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP} {
			open := fromPod(f.A, kind, at(of(vips, v6), vipPort))
			arrived := with(atPod(open, f.B), open.Src, at(f.B.Addr(v6), podPort))
			in, want := pkt.WithOptions(open.Bytes(), 0), pkt.WithOptions(arrived.Bytes(), 0)
			f.Check(t, progtest.Case{Name: kind.String(), Hook: progtest.FromPod(f.A), In: in, WantAction: progtest.Redirect, WantOut: want})
		}
	})
}
