// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"

	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/pkg/netns"
)

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
