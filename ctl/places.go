// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"

	"github.com/cilium/ebpf"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/flow"
	"github.com/margay-cni/margay/pkg/pins"
)

// Where an address is.
const (
	placeLocal  = "local"
	placeRemote = "remote"
)

// place is where an address is: on this node, on another one (whose address may be known), or, as the zero value, not known.
type place struct {
	location string
	node     netip.Addr
}

// places tells where addresses are, as the programs do: by the maps, and by the records of pods that are not in the maps. A map that is
// nil is not pinned here: the datapath is older.
type places struct {
	endpoints, nodeAddrs, routes, nodes *ebpf.Map

	names *flow.Names
	known map[netip.Addr]place
}

// openIfThere opens a map, or returns nil where it is not pinned: the datapath is older.
func openIfThere(s *source, name string) (*ebpf.Map, error) {
	if _, err := os.Stat(pins.MapPath(s.node, name)); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return s.openMap(name)
}

// openPlaces opens the maps that are there.
func openPlaces(s *source, names *flow.Names) (*places, error) {
	p := &places{names: names, known: map[netip.Addr]place{}}
	for name, m := range map[string]**ebpf.Map{
		"endpoints": &p.endpoints, "node_addrs": &p.nodeAddrs, "routes": &p.routes, "nodes": &p.nodes,
	} {
		var err error
		if *m, err = openIfThere(s, name); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// of returns where the address is.
func (p *places) of(a netip.Addr) (place, error) {
	at, ok := p.known[a]
	if ok {
		return at, nil
	}
	at, err := p.find(a)
	if err != nil {
		return place{}, fmt.Errorf("look up where %s is: %w", a, err)
	}
	p.known[a] = at
	return at, nil
}

func (p *places) find(a netip.Addr) (place, error) {
	if p.names.Pod(a) != "" {
		return place{location: placeLocal}, nil
	}
	var e bpf.Endpoint
	if ok, err := lookup(p.endpoints, bpf.NewAddr(a), &e); ok || err != nil {
		return place{location: placeLocal}, err
	}
	var flags uint32
	switch ok, err := lookup(p.nodeAddrs, bpf.NewAddr(a), &flags); {
	case err != nil:
		return place{}, err
	case ok && flags&bpf.NodeAddrLocal != 0:
		return place{location: placeLocal}, nil
	case ok && flags&bpf.NodeAddrRemote != 0:
		return p.remote(flags >> bpf.NodeAddrIndexShift)
	}
	var r bpf.Route
	switch ok, err := lookup(p.routes, bpf.NewRouteKey(netip.PrefixFrom(a, a.BitLen())), &r); {
	case err != nil || !ok:
		return place{}, err
	case r.Flags&bpf.RouteLocal != 0:
		return place{location: placeLocal}, nil
	case r.Node != 0:
		return p.remote(uint32(r.Node))
	}
	return place{}, nil
}

// remote is the node of that index; index 0 stands for one that is not known closer.
func (p *places) remote(index uint32) (place, error) {
	at := place{location: placeRemote}
	var n bpf.Node
	if index == 0 {
		return at, nil
	}
	ok, err := lookup(p.nodes, index, &n)
	if ok && n.Addr != (bpf.Addr{}) {
		at.node = n.Addr.Netip()
	}
	return at, err
}

// lookup reads the value of k into v and reports whether there is one; a map that is not pinned has none.
func lookup[K, V any](m *ebpf.Map, k K, v *V) (bool, error) {
	if m == nil {
		return false, nil
	}
	err := m.Lookup(&k, v)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return false, nil
	}
	return err == nil, err
}
