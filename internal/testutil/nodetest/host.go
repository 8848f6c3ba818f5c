// SPDX-License-Identifier: Apache-2.0

package nodetest

import (
	"net/netip"
	"os"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/link"
)

// ServiceRanges are where the tests' ClusterIPs are from: IPv4, IPv6.
var ServiceRanges = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd00:96::/112")}

// serviceMTU is what fits the ways to every backend: the overlay over IPv6 has the least room.
const serviceMTU = 1500 - outerSize6

// ServeHost lets the node's own sockets reach services, with routes to ServiceRanges and to the further addresses. Every device gets the
// strict reverse path filter that distributions come with.
func (n *Node) ServeHost(further ...netip.Addr) {
	n.t.Helper()
	n.NS.Do(func() {
		for _, device := range []string{"all", "default"} {
			n.must(os.WriteFile("/proc/sys/net/ipv4/conf/"+device+"/rp_filter", []byte("1"), 0))
		}
		c, err := link.Dial(-1)
		n.must(err)
		defer c.Close()
		host, service, err := c.EnsureHostPair()
		n.must(err)
		n.must(n.DP.AttachHost(service.Index))
		var routes []link.ServiceRoute
		for i, r := range ServiceRanges {
			routes = append(routes, link.ServiceRoute{Dst: r, Source: n.Addrs[i], MTU: serviceMTU})
		}
		for _, a := range further {
			source := n.Addrs[map[bool]int{true: 1}[a.Is6()]]
			routes = append(routes, link.ServiceRoute{Dst: netip.PrefixFrom(a, a.BitLen()), Source: source, MTU: serviceMTU})
		}
		_, err = c.SyncServiceRoutes(host.Index, routes, false)
		n.must(err)
		n.must(link.SyncCarrier(link.HostDevice))
		n.Put(n.DP.Maps.EgressAddrs, uint32(host.Index), bpf.EgressAddrs{V4: bpf.NewAddr(n.Addrs[0]), V6: bpf.NewAddr(n.Addrs[1])})
		var zero uint32
		var state bpf.NodeState
		n.must(n.DP.Maps.NodeState.Lookup(&zero, &state))
		state.HostIfindex = uint32(host.Index)
		state.Flags |= bpf.NodeLocalhostIPv4 | bpf.NodeLocalhostIPv6
		n.Put(n.DP.Maps.NodeState, zero, state)
	})
}
