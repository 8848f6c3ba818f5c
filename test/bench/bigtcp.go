// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/pkg/netns"
)

const bigTCPSection = "Pod to pod on one node, with bigTCP"

// bigTCPTarget: more than the bare pair moves.
const bigTCPTarget = 1.05

// benchBigTCP measures streams between pods that may make packets beyond 64 KiB: beside a bare veth pair as the kernel makes it, and one with
// the same sizes.
func benchBigTCP(ctx context.Context, b *bench) (err error) {
	pods, bare, same := ends{name: "pod → pod"}, ends{name: "bare veth pair"}, ends{name: "bare veth pair, BIG TCP"}
	defer func() { pods.stop(); bare.stop(); same.stop() }()
	for _, end := range []struct {
		*place
		name string
	}{{&pods.client, "big-client"}, {&pods.server, "big-server"}} {
		if *end.place, _, err = b.node.podWith(ctx, end.name, map[string]any{"bigTCP": true}); err != nil {
			return err
		}
	}
	for i, e := range []*ends{&bare, &same} {
		if e.client, e.server, err = b.node.barePair(i + 2); err != nil {
			return fmt.Errorf("make a bare pair: %w", err)
		}
	}
	sizes, err := packetSizes(pods.client.path)
	if err != nil {
		return err
	}
	if !sizes.big() {
		return fmt.Errorf("a pod with bigTCP has packet sizes %+v", sizes)
	}
	if err := errors.Join(sizes.set(same.client.path), sizes.set(same.server.path), pods.start(), bare.start(), same.start()); err != nil {
		return err
	}
	var streams []kind
	for _, k := range kinds {
		if k.mode == modeThroughput || k.mode == modeStreams {
			k.id, k.target = "big."+k.id, bigTCPTarget
			streams = append(streams, k)
		}
	}
	for _, f := range families {
		if !f.v6 && sizes.gso4 <= defaultPacketSize {
			b.report.note("This kernel makes no IPv4 packets beyond 64 KiB (6.3 does).")
			continue
		}
		ours, small, large := pods.runner(f.v6), bare.runner(f.v6), same.runner(f.v6)
		if err := b.race(ctx, b.choose(30, 12, 1), streams, []*runner{ours, small, large}); err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
		err := errors.Join(
			pairing{bigTCPSection, idOf(f.name), f.name, ours, small, true, false}.compare(b.report, streams),
			pairing{bigTCPSection, idOf(f.name), f.name, ours, large, false, true}.compare(b.report, streams))
		if err != nil {
			return err
		}
	}
	return nil
}

// defaultPacketSize is the largest packet of several segments that a device takes by default, in bytes; more is BIG TCP.
const defaultPacketSize = 65536

// deviceSizes are the largest packets of several segments that a device takes and that are made of what it receives, in bytes.
type deviceSizes struct {
	gso, gro, gso4, gro4 int
}

// packetSizes returns those of eth0 in a namespace.
func packetSizes(path string) (s deviceSizes, err error) {
	err = netns.Do(path, func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return fmt.Errorf("find eth0: %w", err)
		}
		a := eth0.Attrs()
		s = deviceSizes{int(a.GSOMaxSize), int(a.GROMaxSize), int(a.GSOIPv4MaxSize), int(a.GROIPv4MaxSize)}
		return nil
	})
	return s, err
}

func (s deviceSizes) big() bool { return max(s.gso, s.gso4) > defaultPacketSize }

// set gives eth0 in a namespace these sizes.
func (s deviceSizes) set(path string) error {
	return netns.Do(path, func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return fmt.Errorf("find eth0: %w", err)
		}
		// The sizes of both families first: they lower or raise those of IPv4 as well.
		for _, step := range []struct {
			size int
			set  func(netlink.Link, int) error
		}{
			{s.gso, netlink.LinkSetGSOMaxSize}, {s.gro, netlink.LinkSetGROMaxSize},
			{s.gso4, netlink.LinkSetGSOIPv4MaxSize}, {s.gro4, netlink.LinkSetGROIPv4MaxSize},
		} {
			if step.size == 0 {
				continue // not a size that this kernel knows
			}
			if err := step.set(eth0, step.size); err != nil {
				return fmt.Errorf("set packet sizes %+v: %w", s, err)
			}
		}
		return nil
	})
}
