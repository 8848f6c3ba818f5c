// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/bpf"
)

const (
	serverPort = 8080
	// Issue: an established packet costs at most one and a half times the floor.
	establishedTarget = 1.5
)

var families = []struct {
	name string
	v6   bool
	vip  netip.Addr
}{
	{"IPv4", false, netip.MustParseAddr("10.96.0.10")},
	{"IPv6", true, netip.MustParseAddr("fd00:96::10")},
}

// benchPackets measures from_pod by test runs, beside the floor program on the same flow table and packets.
func benchPackets(ctx context.Context, b *bench) (err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := pinThread()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.SchedSetaffinity(0, &home)) }()
	pods, err := b.node.labPods(ctx)
	if err != nil {
		return err
	}
	counter, err := newInstructionCounter()
	if errors.Is(err, errNoCounter) {
		b.report.note("Instructions per packet: not counted here, the CPU shows this machine no counter for them.")
	} else if err != nil {
		return err
	} else {
		defer func() { err = errors.Join(err, counter.close()) }()
	}
	for _, table := range []struct {
		name    string
		entries uint32
		flows   []int
		all     bool // everything; otherwise only established flows
	}{
		{"lab", 1 << 19, []int{1, 1000, 100_000}, true}, // two families, two entries each, and room
		{"large-lab", 1 << 22, []int{1_000_000}, false},
	} {
		if b.smoke && !table.all {
			continue // filling it takes longer than all the rest
		}
		l, err := newLab(ctx, b, pods, table.name, table.entries)
		if err != nil {
			return err
		}
		l.counter = counter
		if err := errors.Join(l.measureAll(table.flows, table.all), l.close()); err != nil {
			return err
		}
	}
	return nil
}

// measureAll measures with more and more flows in the table, and then the rest with as many as there are by then.
func (l *lab) measureAll(flows []int, rest bool) error {
	if rest {
		if err := l.note(); err != nil {
			return err
		}
	}
	for i := range families {
		for _, n := range flows {
			if err := l.established(i, n); err != nil {
				return err
			}
		}
		if err := errors.Join(l.unchanged(i), l.alone(i, flows[len(flows)-1])); err != nil {
			return err
		}
		if !rest {
			continue
		}
		for _, step := range []func(int) error{l.nat, l.deny, l.newFlow, l.newServiceFlow} {
			if err := step(i); err != nil {
				return err
			}
		}
	}
	return nil
}

// pinThread keeps the calling thread on the machine's last CPU and returns where it was allowed to run before.
func pinThread() (home unix.CPUSet, err error) {
	home, last, err := lastCPU()
	if err != nil {
		return home, err
	}
	return home, unix.SchedSetaffinity(0, &last)
}

// lastCPU returns where the calling thread may run, and the last CPU of these alone: where everything is measured.
func lastCPU() (home, last unix.CPUSet, err error) {
	if err := unix.SchedGetaffinity(0, &home); err != nil {
		return home, last, fmt.Errorf("read CPU affinity: %w", err)
	}
	for cpu := range len(home) * 64 {
		if home.IsSet(cpu) {
			last.Zero()
			last.Set(cpu)
		}
	}
	return home, last, nil
}

// established measures packets of known flows, picked at random out of so many.
func (l *lab) established(family, flows int) error {
	f := families[family]
	if err := l.fill(family, flows); err != nil {
		return err
	}
	name := fmt.Sprintf("established, %s, %d flows", f.name, flows)
	if flows == 1 {
		name = fmt.Sprintf("established, %s, 1 flow", f.name)
	}
	m := l.measure(fmt.Sprintf("packet.established.%s.%d", idOf(f.name), flows), name)
	m.Target = establishedTarget
	return l.alternate(m, maxRepeat, actRedirect, func() ([]byte, error) { return l.packet(family, rand.IntN(flows), false) })
}

// alone measures one packet of a flow that was not seen for long: entry and program are in no near cache.
func (l *lab) alone(family, flows int) error {
	f := families[family]
	id := fmt.Sprintf("packet.alone.%s.%d", idOf(f.name), flows)
	m := l.measure(id, fmt.Sprintf("established, %s, one packet alone, of %d flows", f.name, flows))
	return l.alternatePackets(m, 1, actRedirect, l.aIfindex, func() (packet, floor []byte, err error) {
		// Two flows: the second program to meet a flow would find its entry in the cache.
		if packet, err = l.packet(family, rand.IntN(flows), false); err != nil {
			return nil, nil, err
		}
		floor, err = l.packet(family, rand.IntN(flows), false)
		return packet, floor, err
	})
}

// nat measures a packet of a known flow to a ClusterIP. The rewritten packet is a packet of a second flow, which rewrites it back.
func (l *lab) nat(family int) error {
	f := families[family]
	src, vip := netip.AddrPortFrom(l.a.addr(f.v6), 7), netip.AddrPortFrom(f.vip, 80)
	if err := l.open(src, vip); err != nil {
		return err
	}
	key := bpf.NewFlowKey(unix.IPPROTO_TCP, src, vip)
	there, err := l.repeatable(key)
	if err != nil {
		return err
	}
	back := there
	back.Xlate, back.CsumDiff = key, ^there.CsumDiff
	if err := l.dp.Maps.Flows.Put(there.Xlate, back); err != nil {
		return fmt.Errorf("write flow: %w", err)
	}
	m := l.measure("packet.nat."+idOf(f.name), fmt.Sprintf("established, %s, to a ClusterIP", f.name))
	return l.alternate(m, maxRepeat, actRedirect, func() ([]byte, error) {
		return tcpPacket(l.aMACs.mac, l.aMACs.hostMAC, src, vip, false)
	})
}

// deny measures a connection attempt that egress policy refuses.
func (l *lab) deny(family int) error {
	f := families[family]
	src, dst := netip.AddrPortFrom(l.denied.addr(f.v6), 7), netip.AddrPortFrom(l.b.addr(f.v6), serverPort)
	m := l.measure("packet.deny."+idOf(f.name), fmt.Sprintf("new flow, %s, denied by policy", f.name))
	packet, err := tcpPacket(l.deniedMACs.mac, l.deniedMACs.hostMAC, src, dst, true)
	if err != nil {
		return err
	}
	floor, err := l.packet(family, 0, false)
	if err != nil {
		return err
	}
	return l.alternatePackets(m, maxRepeat, actShot, l.deniedIfindex, func() ([]byte, []byte, error) { return packet, floor, nil })
}

// newFlow measures the first packet of a connection between two pods: every one a new connection, so every one alone.
func (l *lab) newFlow(family int) error {
	f := families[family]
	return l.first(family, "packet.new."+idOf(f.name), fmt.Sprintf("new flow, %s, one packet alone", f.name),
		netip.AddrPortFrom(l.b.addr(f.v6), serverPort+1))
}

// newServiceFlow is newFlow to a ClusterIP.
func (l *lab) newServiceFlow(family int) error {
	f := families[family]
	return l.first(family, "packet.new_service."+idOf(f.name), fmt.Sprintf("new flow, %s, to a ClusterIP, one packet alone", f.name),
		netip.AddrPortFrom(f.vip, 80))
}

func (l *lab) first(family int, id, name string, dst netip.AddrPort) error {
	src := l.a.addr(families[family].v6)
	port := uint16(1000)
	return l.alternatePackets(l.measure(id, name), 1, actRedirect, l.aIfindex, func() (packet, floor []byte, err error) {
		port++
		if packet, err = tcpPacket(l.aMACs.mac, l.aMACs.hostMAC, netip.AddrPortFrom(src, port), dst, true); err != nil {
			return nil, nil, err
		}
		floor, err = l.packet(family, rand.IntN(100_000), false)
		return packet, floor, err
	})
}

// measure begins a measurement of this section.
func (l *lab) measure(id, name string) *measurement {
	return &measurement{ID: id, Section: "One packet through from_pod", Name: name, Unit: "ns", Reference: "floor program"}
}

// alternate measures both programs on the same packets.
func (l *lab) alternate(m *measurement, repeat uint32, verdict int, next func() ([]byte, error)) error {
	return l.alternatePackets(m, repeat, verdict, l.aIfindex, func() ([]byte, []byte, error) {
		packet, err := next()
		return packet, packet, err
	})
}

// alternatePackets measures from_pod on one packet, the floor program on another, in turns; each round yields one value for each. Where
// the CPU counts instructions, those of long batches are measured as well.
func (l *lab) alternatePackets(m *measurement, repeat uint32, verdict, ifindex int, next func() (packet, floor []byte, err error)) error {
	instructions := *m
	instructions.ID, instructions.Name, instructions.Unit, instructions.Target = m.ID+".instructions", m.Name+", instructions", "", 0
	for range l.bench.choose(25, 11, 1) {
		var ours, floors, ourCounts, floorCounts []float64
		for range l.bench.rounds(200, 5) {
			packet, floor, err := next()
			if err != nil {
				return err
			}
			ns, count, err := l.batch(l.fromPod, packet, ifindex, repeat, verdict)
			if err != nil {
				return fmt.Errorf("%s: %w", m.Name, err)
			}
			ours, ourCounts = append(ours, ns), append(ourCounts, count)
			if ns, count, err = l.batch(l.floor.FloorProgram, floor, ifindex, repeat, actOK); err != nil {
				return fmt.Errorf("%s: floor program: %w", m.Name, err)
			}
			floors, floorCounts = append(floors, ns), append(floorCounts, count)
		}
		m.add(middleMean(ours), middleMean(floors))
		instructions.add(middleMean(ourCounts), middleMean(floorCounts))
	}
	l.bench.report.add(m)
	if l.counter != nil && repeat == maxRepeat {
		l.bench.report.add(&instructions)
	}
	return nil
}

// batch sends a packet through a program repeat times and returns the nanoseconds, and where they are counted the instructions, of one
// time. Another verdict than the last one's is an error: something else was measured.
func (l *lab) batch(prog *ebpf.Program, packet []byte, ifindex int, repeat uint32, verdict int) (ns, instructions float64, err error) {
	instructions, err = l.counter.count(func() error {
		got, mean, err := testRun(prog, packet, ifindex, repeat)
		if err == nil && got != verdict {
			err = fmt.Errorf("verdict %d, want %d", got, verdict)
		}
		ns = mean
		return err
	})
	return ns, instructions / float64(repeat), err
}

// note says what an empty program costs: the test run's own part of every figure.
func (l *lab) note() error {
	if err := l.fill(0, 1); err != nil {
		return err
	}
	packet, err := l.packet(0, 0, false)
	if err != nil {
		return err
	}
	var all, counts []float64
	for range l.bench.rounds(1000, 5) {
		ns, count, err := l.batch(l.floor.EmptyProgram, packet, l.aIfindex, maxRepeat, actOK)
		if err != nil {
			return err
		}
		all, counts = append(all, ns), append(counts, count)
	}
	also := ""
	if l.counter != nil {
		also = fmt.Sprintf(" and %.0f instructions", middleMean(counts))
	}
	l.bench.report.note("An empty program takes %.0f ns%s in the same test runs: that much of every packet figure is the test run itself.",
		middleMean(all), also)
	return nil
}
