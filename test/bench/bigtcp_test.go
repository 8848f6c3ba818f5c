// SPDX-License-Identifier: Apache-2.0

package main

import (
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/privileged"
	"github.com/margay-cni/margay/pkg/netns"
)

func TestPacketSizes(t *testing.T) {
	privileged.Require(t)
	path := netnstest.New(t).Path()
	err := netns.Do(path, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "eth0"
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "other"})
	})
	if err != nil {
		t.Fatal(err)
	}
	s, err := packetSizes(path)
	if err != nil {
		t.Fatal(err)
	}
	if s.gso != defaultPacketSize || s.big() {
		t.Errorf("as the kernel makes it: %+v, big %v, want %d and not", s, s.big(), defaultPacketSize)
	}
	want := deviceSizes{gso: 150_000, gro: 150_000, gso4: s.gso4, gro4: s.gro4}
	if s.gso4 > 0 { // Linux 6.3 and newer
		want.gso4, want.gro4 = 140_000, 140_000
	}
	if err := want.set(path); err != nil {
		t.Fatal(err)
	}
	if got, err := packetSizes(path); err != nil || got != want || !got.big() {
		t.Errorf("set to %+v: %+v, big %v, %v", want, got, got.big(), err)
	}
}
