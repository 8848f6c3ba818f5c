// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/datapath"
)

const (
	denyAll     = bpf.PolicyFirst // a policy without entries allows nothing
	firstSource = 1024            // source port of the first filled-in flow
	sourcePorts = 60_000          // flows per destination port
)

// lab is a datapath of its own, with a flow table of the size that the packet measurements want, over the devices of three pods.
type lab struct {
	*labPods
	bench    *bench
	dp       *datapath.Datapath
	fromPod  *ebpf.Program
	floor    floorPrograms
	counter  *counter     // of instructions; nil: none here
	filled   map[int]int  // family → flows in the table
	template [2]*bpf.Flow // by family: the entry of every filled-in flow, but for its ports
}

// labPods are what the packets of a lab come from and go to: a sends to b, and what policy allows denied is nothing.
type labPods struct {
	a, b, denied                      place
	aMACs, bMACs, deniedMACs          *added
	aIfindex, bIfindex, deniedIfindex int
}

func (n *node) labPods(ctx context.Context) (*labPods, error) {
	p := &labPods{}
	for _, pod := range []struct {
		name    string
		at      *place
		macs    **added
		ifindex *int
	}{
		{"lab-a", &p.a, &p.aMACs, &p.aIfindex}, {"lab-b", &p.b, &p.bMACs, &p.bIfindex}, {"lab-denied", &p.denied, &p.deniedMACs, &p.deniedIfindex},
	} {
		var err error
		if *pod.at, *pod.macs, err = n.pod(ctx, pod.name); err != nil {
			return nil, err
		}
		dev, err := net.InterfaceByName((*pod.macs).hostName)
		if err != nil {
			return nil, err
		}
		*pod.ifindex = dev.Index
	}
	return p, nil
}

// newLab makes a datapath, named so below the node's directory, whose flow table has so many entries: two for a flow.
func newLab(ctx context.Context, b *bench, pods *labPods, name string, flowEntries uint32) (_ *lab, err error) {
	l := &lab{labPods: pods, bench: b, filled: map[int]int{}}
	cfg := datapath.Config{
		BPFFS: filepath.Join(b.node.dir, name, "bpf"), Run: filepath.Join(b.node.dir, name, "run"), Sizes: map[string]uint32{"flows": flowEntries},
	}
	if l.dp, err = datapath.Ensure(ctx, cfg); err != nil {
		return nil, err
	}
	path := filepath.Join(cfg.BPFFS, "progs", l.dp.Build(), bpf.ProgFromPod)
	if l.fromPod, err = ebpf.LoadPinnedProgram(path, nil); err != nil {
		return nil, fmt.Errorf("open from_pod: %w", err)
	}
	spec, err := loadFloor()
	if err != nil {
		return nil, err
	}
	spec.Maps["flows"].MaxEntries = l.dp.Maps.Flows.MaxEntries()
	options := ebpf.CollectionOptions{MapReplacements: map[string]*ebpf.Map{"flows": l.dp.Maps.Flows}}
	if err := spec.LoadAndAssign(&l.floor, &options); err != nil {
		return nil, fmt.Errorf("load the floor program: %w", err)
	}
	return l, l.register()
}

func (l *lab) close() error {
	return errors.Join(l.fromPod.Close(), l.floor.Close(), l.dp.Close())
}

// register writes the pods into the maps, and a service in front of b.
func (l *lab) register() (err error) {
	put := func(p place, macs *added, ifindex int, egress uint32) {
		for _, addr := range p.addrs {
			err = errors.Join(err, l.dp.PutEndpoint(addr, bpf.Endpoint{
				Ifindex: uint32(ifindex), Identity: bpf.IdentityPodUnknown, PolicyId: [2]uint32{egress, bpf.PolicyNone},
				Mac: macs.mac, HostMac: macs.hostMAC,
			}))
		}
	}
	put(l.a, l.aMACs, l.aIfindex, bpf.PolicyNone)
	put(l.b, l.bMACs, l.bIfindex, bpf.PolicyNone)
	put(l.denied, l.deniedMACs, l.deniedIfindex, denyAll)
	for i, f := range families {
		err = errors.Join(err, addService(l.dp, uint32(i+1), netip.AddrPortFrom(f.vip, 80), netip.AddrPortFrom(l.b.addr(f.v6), serverPort)))
	}
	return err
}

// addService writes a TCP service with one backend into the maps.
func addService(dp *datapath.Datapath, id uint32, frontend, backend netip.AddrPort) error {
	return errors.Join(
		dp.Maps.Backends.Put(bpf.BackendKey{List: id}, bpf.NewBackend(backend)),
		dp.Maps.ServiceBackends.Put(bpf.NewServiceBackend(id, backend), uint32(1)),
		dp.Maps.Services.Put(bpf.NewFrontendKey(unix.IPPROTO_TCP, frontend.Addr(), frontend.Port()),
			bpf.Service{Id: id, List: [2]uint32{id, id}, Count: [2]uint32{1, 1}}),
	)
}

// flow returns both ends of the filled-in flow i.
func (l *lab) flow(family, i int) (src, dst netip.AddrPort) {
	v6 := families[family].v6
	return netip.AddrPortFrom(l.a.addr(v6), uint16(firstSource+i%sourcePorts)), netip.AddrPortFrom(l.b.addr(v6), uint16(serverPort+100+i/sourcePorts))
}

// packet returns a segment of the filled-in flow i, from a to b.
func (l *lab) packet(family, i int, syn bool) ([]byte, error) {
	src, dst := l.flow(family, i)
	return tcpPacket(l.aMACs.mac, l.aMACs.hostMAC, src, dst, syn)
}

// open sends a flow's first packet, and one more, through from_pod.
func (l *lab) open(src, dst netip.AddrPort) error {
	for _, syn := range []bool{true, false} {
		packet, err := tcpPacket(l.aMACs.mac, l.aMACs.hostMAC, src, dst, syn)
		if err != nil {
			return err
		}
		if verdict, _, err := testRun(l.fromPod, packet, l.aIfindex, 1); err != nil || verdict != actRedirect {
			return fmt.Errorf("first packet from %s to %s: verdict %d, %w", src, dst, verdict, err)
		}
	}
	return nil
}

// repeatable changes a flow's entry so that a packet it has rewritten is one of the flow's again: it writes the sender's own MAC as the
// source. The instructions that run are the same.
func (l *lab) repeatable(key bpf.FlowKey) (f bpf.Flow, err error) {
	if err := l.dp.Maps.Flows.Lookup(key, &f); err != nil {
		return f, fmt.Errorf("look up flow: %w", err)
	}
	f.SrcMac = f.InMac
	if err := l.dp.Maps.Flows.Put(key, f); err != nil {
		return f, fmt.Errorf("write flow: %w", err)
	}
	return f, nil
}

// fill brings the table to so many flows of the family, both directions each: the program makes the first one, the others are copies.
func (l *lab) fill(family, flows int) error {
	src, dst := l.flow(family, 0)
	key := bpf.NewFlowKey(unix.IPPROTO_TCP, src, dst)
	if l.template[family] == nil {
		if err := l.open(src, dst); err != nil {
			return err
		}
		f, err := l.repeatable(key)
		if err != nil {
			return err
		}
		l.template[family] = &f
		l.filled[family] = 1
	}
	var back bpf.Flow
	if err := l.dp.Maps.Flows.Lookup(key.Reverse(), &back); err != nil {
		return fmt.Errorf("look up the flow's other direction: %w", err)
	}
	for l.filled[family] < flows {
		if err := l.fillSome(family, min(flows, l.filled[family]+fillAtOnce), back); err != nil {
			return err
		}
	}
	return nil
}

// fillAtOnce is how many flows one system call writes.
const fillAtOnce = 50_000

func (l *lab) fillSome(family, flows int, back bpf.Flow) error {
	var keys []bpf.FlowKey
	var values []bpf.Flow
	for ; l.filled[family] < flows; l.filled[family]++ {
		src, dst := l.flow(family, l.filled[family])
		there, here := *l.template[family], back
		there.Xlate = bpf.NewFlowKey(unix.IPPROTO_TCP, src, dst)
		here.Xlate = there.Xlate.Reverse()
		keys = append(keys, there.Xlate, here.Xlate)
		values = append(values, there, here)
	}
	if _, err := l.dp.Maps.Flows.BatchUpdate(keys, values, nil); err != nil {
		return fmt.Errorf("fill the flow table: %w", err)
	}
	return nil
}

// unchanged fails if a packet that was meant to find its flow took the slow path: that would have written the entry anew.
func (l *lab) unchanged(family int) error {
	for i := range l.filled[family] {
		src, dst := l.flow(family, i)
		var f bpf.Flow
		if err := l.dp.Maps.Flows.Lookup(bpf.NewFlowKey(unix.IPPROTO_TCP, src, dst), &f); err != nil {
			return fmt.Errorf("look up flow %d: %w", i, err)
		}
		if f.SrcMac != f.InMac {
			return fmt.Errorf("flow %d was judged again while it was measured", i)
		}
	}
	return nil
}
