// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/spf13/cobra"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/flow"
)

// Ways to another node.
const (
	modeOverlay = "overlay"
	modeDirect  = "direct"
)

// nodeInfo is another node, as the maps have it.
type nodeInfo struct {
	Index uint32 `json:"index"`
	Name  string `json:"name,omitempty"`
	// Tunnel is the outer address of the overlay, Local this node's; absent where the overlay does not reach the node.
	Tunnel netip.Addr `json:"tunnel,omitzero"`
	Local  netip.Addr `json:"local,omitzero"`
	// MTU is the largest packet that can be encapsulated on the way there, in bytes.
	MTU uint32 `json:"mtu,omitempty"`
	// Device is the underlay's device by which the programs send what they encapsulate; absent where the overlay device encapsulates.
	Device string `json:"device,omitempty"`
	// Modes are how its prefixes are reached: "overlay", "direct", or both.
	Modes []string `json:"modes,omitempty"`
	// PodCIDRs are the prefixes of its pods, with those of single pods outside its ranges.
	PodCIDRs  []netip.Prefix `json:"podCIDRs"`
	Addresses []netip.Addr   `json:"addresses"`
}

// selfInfo is this node.
type selfInfo struct {
	Name        string         `json:"name,omitempty"`
	RoutingMode string         `json:"routingMode,omitempty"`
	PodMTU      int            `json:"podMTU,omitempty"`
	PodCIDRs    []netip.Prefix `json:"podCIDRs"`
	Addresses   []netip.Addr   `json:"addresses"`
	// NonMasquerade are ranges outside the cluster to which pods keep their address.
	NonMasquerade []netip.Prefix `json:"nonMasquerade"`
	Masquerade    bool           `json:"masquerade"`
	// Overlay is the overlay device, absent where there is none; VNI the first of its network numbers.
	Overlay string `json:"overlay,omitempty"`
	VNI     uint32 `json:"vni,omitempty"`
	Port    uint16 `json:"port,omitempty"`
}

type nodeList struct {
	Self  selfInfo   `json:"self"`
	Nodes []nodeInfo `json:"nodes"`
}

func newNodes(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "nodes",
		Short: "List the other nodes and how they are reached",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			s := a.source()
			defer s.close()
			var maps nodeMaps
			for name, m := range map[string]**ebpf.Map{
				"nodes": &maps.nodes, "routes": &maps.routes, "node_addrs": &maps.addrs, "node_state": &maps.state,
			} {
				var err error
				if *m, err = s.openMap(name); err != nil {
					return err
				}
			}
			devs, err := listDevices()
			if err != nil {
				return err
			}
			list, err := collectNodes(maps, a.names(), devs)
			if err != nil {
				return err
			}
			if err := list.Self.read(a.node.Run); err != nil {
				fmt.Fprintf(a.errs, "margayctl: some of this node is not known: %v\n", err)
			}
			return a.show(list)
		},
	}
}

// nodeMaps are the maps about nodes.
type nodeMaps struct {
	nodes, routes, addrs, state *ebpf.Map
}

// collectNodes joins what the maps say about each index, ordered by index.
func collectNodes(m nodeMaps, names *flow.Names, devs devices) (nodeList, error) {
	list := nodeList{Self: selfInfo{PodCIDRs: []netip.Prefix{}, Addresses: []netip.Addr{}, NonMasquerade: []netip.Prefix{}}}
	byIndex := map[uint32]*nodeInfo{}
	node := func(index uint32) *nodeInfo {
		if byIndex[index] == nil {
			byIndex[index] = &nodeInfo{Index: index, Name: names.Node(index), PodCIDRs: []netip.Prefix{}, Addresses: []netip.Addr{}}
		}
		return byIndex[index]
	}
	err := errors.Join(
		flow.Entries(m.nodes, func(index uint32, v bpf.Node) bool {
			if v.Addr != (bpf.Addr{}) {
				n := node(index)
				n.Tunnel, n.Local, n.MTU = v.Addr.Netip(), v.Local.Netip(), uint32(v.Mtu)
				if v.Ifindex != 0 {
					n.Device = devs.name(int(v.Ifindex))
				}
			}
			return true
		}),
		flow.Entries(m.routes, func(k bpf.RouteKey, v bpf.Route) bool {
			prefix, err := k.Prefix()
			switch {
			case err != nil:
			case v.Node != 0:
				node(uint32(v.Node)).addRoute(prefix, v.Flags)
			case v.Flags&bpf.RouteLocal != 0:
				list.Self.PodCIDRs = append(list.Self.PodCIDRs, prefix)
			case v.Flags&bpf.RouteNoMasquerade != 0:
				list.Self.NonMasquerade = append(list.Self.NonMasquerade, prefix)
			}
			return true
		}),
		flow.Entries(m.addrs, func(a bpf.Addr, flags uint32) bool {
			if flags&bpf.NodeAddrRemote != 0 {
				n := node(flags >> bpf.NodeAddrIndexShift)
				n.Addresses = append(n.Addresses, a.Netip())
			} else if flags&bpf.NodeAddrLocal != 0 {
				list.Self.Addresses = append(list.Self.Addresses, a.Netip())
			}
			return true
		}),
		flow.Entries(m.state, func(_ uint32, v bpf.NodeState) bool {
			list.Self.Masquerade = v.Flags&bpf.NodeMasquerade != 0
			if v.OverlayIfindex != 0 {
				list.Self.Overlay, list.Self.VNI, list.Self.Port = devs.name(int(v.OverlayIfindex)), v.Vni, bpf.Port16(v.OverlayPort)
			}
			return true
		}),
	)
	sortPrefixes(list.Self.PodCIDRs, list.Self.NonMasquerade)
	slices.SortFunc(list.Self.Addresses, netip.Addr.Compare)
	list.Nodes = make([]nodeInfo, 0, len(byIndex))
	for _, n := range byIndex {
		sortPrefixes(n.PodCIDRs)
		slices.SortFunc(n.Addresses, netip.Addr.Compare)
		slices.Sort(n.Modes)
		list.Nodes = append(list.Nodes, *n)
	}
	slices.SortFunc(list.Nodes, func(a, b nodeInfo) int { return cmp.Compare(a.Index, b.Index) })
	return list, err
}

func (n *nodeInfo) addRoute(prefix netip.Prefix, flags uint16) {
	n.PodCIDRs = append(n.PodCIDRs, prefix)
	mode := modeDirect
	if flags&bpf.RouteOverlay != 0 {
		mode = modeOverlay
	}
	if !slices.Contains(n.Modes, mode) {
		n.Modes = append(n.Modes, mode)
	}
}

func sortPrefixes(lists ...[]netip.Prefix) {
	for _, list := range lists {
		slices.SortFunc(list, netip.Prefix.Compare)
	}
}

// read adds what the agent has written down for the plugin. Without a file nothing is added.
func (i *selfInfo) read(run string) error {
	n, err := endpoint.ReadNode(run)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	i.Name, i.RoutingMode, i.PodMTU = n.Name, n.RoutingMode, n.MTU
	return err
}

func (l nodeList) print(w io.Writer) {
	s := l.Self
	fmt.Fprintf(w, "node        %s\n", cmp.Or(s.Name, "not known"))
	fmt.Fprintf(w, "addresses   %s\n", dash(shorten(texts(s.Addresses), 4)))
	fmt.Fprintf(w, "pods        %s\n", dash(shorten(texts(s.PodCIDRs), 4)))
	if s.RoutingMode != "" {
		mtu := "not known"
		if s.PodMTU != 0 {
			mtu = fmt.Sprint(s.PodMTU)
		}
		fmt.Fprintf(w, "routing     %s, MTU of pods %s\n", s.RoutingMode, mtu)
	}
	overlay := "none"
	if s.Overlay != "" {
		overlay = fmt.Sprintf("%s, UDP port %d, network numbers %d to %d", s.Overlay, s.Port, s.VNI, s.VNI+bpf.VNIDSR)
	}
	fmt.Fprintf(w, "overlay     %s\n", overlay)
	masquerade := "off"
	if s.Masquerade {
		masquerade = "on"
		if len(s.NonMasquerade) > 0 {
			masquerade += ", but not to " + shorten(texts(s.NonMasquerade), 4)
		}
	}
	fmt.Fprintf(w, "masquerade  %s\n\n", masquerade)
	if len(l.Nodes) == 0 {
		fmt.Fprintln(w, "no other nodes: the agent has not been told of any")
		return
	}
	t := newTable(">INDEX", "NAME", "TUNNEL", "PODS", "MODE", "ENCAPSULATED BY", ">MTU")
	for _, n := range l.Nodes {
		tunnel, by, mtu := "", "", ""
		if n.Tunnel.IsValid() {
			tunnel, by = n.Tunnel.String(), "device"
		}
		if n.Device != "" {
			by = "programs, " + n.Device
		}
		if n.MTU != 0 {
			mtu = fmt.Sprint(n.MTU)
		}
		t.add(fmt.Sprint(n.Index), dash(n.Name), dash(tunnel), dash(shorten(texts(n.PodCIDRs), 3)), dash(strings.Join(n.Modes, ",")), dash(by),
			dash(mtu))
	}
	t.print(w)
}

func texts[T fmt.Stringer](list []T) []string {
	out := make([]string, 0, len(list))
	for _, v := range list {
		out = append(out, v.String())
	}
	return out
}
