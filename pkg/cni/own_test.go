// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
)

// DEL that names the plugin's own namespace is refused with the CNI library's code unless the runtime allows it, and leaves nothing all the same.
func TestDelInTheOwnNamespace(t *testing.T) {
	for override, want := range map[string]uint{"": 8, "0": 8, "yes": 8, "1": 0, "true": 0, "TRUE": 0, "tRuE": 0} {
		t.Run("override "+override, func(t *testing.T) {
			forFamilies(t, func(t *testing.T, ranges []string) {
				n, pod := newNode(t), netnstest.New(t)
				before := n.state()
				args := cmdArgs("c1", pod.Path(), n.conf(ranges))
				args = n.withPrev(args, n.mustAdd(args))
				args.Netns, args.NetnsOverride = n.ns.Path(), override
				for range 2 {
					if err := n.del(args); code(err) != want {
						t.Errorf("DEL = %v, want code %d", err, want)
					}
				}
				n.eventually(before)
			})
		})
	}
}

// Without a record, a DEL behind another plugin that names the plugin's own namespace does not take the node's device of that name for the pod's.
func TestDelInTheOwnNamespaceSparesTheNodesDevices(t *testing.T) {
	n := newNode(t)
	var peer netlink.Link
	n.ns.Do(func() {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "eth0"
		err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "peer"})
		if err == nil {
			peer, err = netlink.LinkByName("peer")
		}
		if err != nil {
			t.Fatal(err)
		}
	})
	if err := n.plane.AttachPod(peer.Attrs().Index); err != nil {
		t.Fatal(err)
	}
	if err := n.del(cmdArgs("c1", n.ns.Path(), n.conf(nil, unset("ipam")))); code(err) != 8 {
		t.Errorf("DEL = %v, want code 8", err)
	}
	if diff := cmp.Diff(map[int]bool{peer.Attrs().Index: true}, n.plane.attached); diff != "" {
		t.Errorf("devices with programs (-want +got):\n%s", diff)
	}
}
