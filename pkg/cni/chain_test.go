// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/pins"
)

// The chain as clusters have it: our interface, then the plugins that change it.
func TestFirstOfAChain(t *testing.T) {
	node := newRealNode(t, true)
	for name, own := range map[string]bool{"margay-ipam": true, "host-local": false} {
		t.Run(name, func(t *testing.T) {
			forFamilies(t, func(t *testing.T, ranges []string) {
				n := node.in(t)
				first := n.margay(ranges)
				if !own {
					first["ipam"] = n.hostLocal(ranges)
				}
				chain := []map[string]any{first,
					{"type": "portmap", "capabilities": map[string]any{"portMappings": true}, "snat": true},
					{"type": "bandwidth", "capabilities": map[string]any{"bandwidth": true}},
					{"type": "tuning", "sysctl": map[string]string{"net.ipv4.conf.eth0.arp_filter": "1"}, "mtu": 1400}}
				l := n.list("1.0.0", chain...)
				a, b := netnstest.New(t), netnstest.New(t)
				before := n.state()
				rtA, rtB := runtimeConf("a", a), runtimeConf("b", b)
				rtA.CapabilityArgs = map[string]any{
					"portMappings": []map[string]any{{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}},
					"bandwidth":    map[string]any{"ingressRate": 1e9, "ingressBurst": 1e9},
				}
				r := n.addList(l, rtA)
				n.addList(l, rtB)
				n.checkShaped(r.Interfaces[0].Name)
				for _, address := range resultAddresses(r) {
					talk(t, n.ns, a, address)
					talk(t, b, a, address)
				}
				n.checkList(l, rtA)
				n.delList(l, rtA)
				n.delList(l, rtB)
				if diff := cmp.Diff(before, n.state()); diff != "" {
					t.Errorf("state (-want +got):\n%s", diff)
				}
				if left, _ := filepath.Glob(filepath.Join(n.cache, "host-local", "net", "*.*.*.*")); len(left) != 0 {
					t.Errorf("host-local still has %v", left)
				}
			})
		})
	}
}

// Policy on top of another plugin's interface.
func TestBehindAnotherPlugin(t *testing.T) {
	node := newRealNode(t, true)
	for name, first := range map[string]map[string]any{
		"bridge": {"type": "bridge", "bridge": "br0", "isGateway": true},
		"ptp":    {"type": "ptp"},
	} {
		t.Run(name, func(t *testing.T) {
			forFamilies(t, func(t *testing.T, ranges []string) {
				n := node.in(t)
				maker := map[string]any{"ipam": n.hostLocal(ranges)}
				for k, v := range first {
					maker[k] = v
				}
				l := n.list("1.0.0", maker, n.margay(nil, unset("ipam")))
				a, b := netnstest.New(t), netnstest.New(t)
				for _, ns := range []*netnstest.NS{n.ns, a, b} {
					noDAD(t, ns) // else the reference plugins wait for it
				}
				before := n.state()
				r := n.addList(l, runtimeConf("a", a))
				n.addList(l, runtimeConf("b", b))
				addresses := resultAddresses(r)
				if got := n.pinnedEndpoints(); len(got) != 2*len(addresses) {
					t.Errorf("endpoints = %v, want both pods' addresses", got)
				}
				n.ns.Do(func() {
					d, err := datapath.Open(pins.Config{BPFFS: n.bpffs, Run: n.run})
					if err != nil {
						t.Fatal(err)
					}
					defer d.Close()
					for _, address := range addresses {
						e, ok, err := d.LookupEndpoint(address)
						if err != nil || !ok || e.Flags != 1 {
							t.Errorf("endpoint %s = %+v, %v, %v, want flag ADOPTED", address, e, ok, err)
						}
						if err := d.PodAttached(int(e.Ifindex)); err != nil {
							t.Errorf("PodAttached(%d) = %v, want nil", e.Ifindex, err)
						}
					}
				})
				for _, address := range addresses {
					talk(t, b, a, address)
					talk(t, n.ns, a, address)
				}
				n.checkList(l, runtimeConf("a", a))
				n.delList(l, runtimeConf("a", a))
				n.delList(l, runtimeConf("b", b))
				n.ns.Do(func() { // bridge never removes what it made
					if br, err := netlink.LinkByName("br0"); err == nil {
						if err := netlink.LinkDel(br); err != nil {
							t.Error(err)
						}
					}
				})
				if diff := cmp.Diff(before, n.state()); diff != "" {
					t.Errorf("state (-want +got):\n%s", diff)
				}
			})
		})
	}
}

// checkShaped wants bandwidth's token bucket on the device: it found the host's end in our result.
func (n *realNode) checkShaped(device string) {
	n.t.Helper()
	n.ns.Do(func() {
		l, err := netlink.LinkByName(device)
		if err != nil {
			n.t.Fatal(err)
		}
		qdiscs, err := netlink.QdiscList(l)
		if err != nil || !slices.ContainsFunc(qdiscs, func(q netlink.Qdisc) bool { return q.Type() == "tbf" }) {
			n.t.Errorf("qdiscs of %s = %v, %v, want a tbf", device, qdiscs, err)
		}
	})
}

// noDAD switches duplicate address detection off for devices to come.
func noDAD(t *testing.T, ns *netnstest.NS) {
	t.Helper()
	ns.Do(func() {
		for _, f := range []string{"all", "default"} {
			if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+f+"/accept_dad", []byte("0"), 0); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// bandwidth limits what a pod sends by redirecting it on the host's end to another device, from which it would come back behind from_pod:
// past the source check and past policy. Our clsact qdisc sits where bandwidth wants its own, so it refuses, loudly. That must stay so.
func TestBandwidthOfWhatAPodSendsIsRefused(t *testing.T) {
	n := newRealNode(t, true)
	l := n.list("1.0.0", n.margay([]string{range4}), map[string]any{"type": "bandwidth", "egressRate": 1000000, "egressBurst": 1000000})
	pod := netnstest.New(t)
	before := n.state()
	n.ns.Do(func() {
		if _, err := n.cni().AddNetworkList(context.Background(), l, runtimeConf("a", pod)); err == nil || !strings.Contains(err.Error(), "qdisc") {
			t.Errorf("ADD = %v, want bandwidth's refusal", err)
		}
	})
	n.delList(l, runtimeConf("a", pod))
	if diff := cmp.Diff(before, n.state()); diff != "" {
		t.Errorf("state after DEL (-want +got):\n%s", diff)
	}
}
