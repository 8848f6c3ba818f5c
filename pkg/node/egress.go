// SPDX-License-Identifier: Apache-2.0

package node

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Egress are the addresses that masqueraded traffic leaves a device with; zero where this node has none of the family.
type Egress struct {
	V4, V6 netip.Addr
}

// EgressOverride chooses such an address instead of the default.
type EgressOverride struct {
	// Device is its name; empty: every device.
	Device string
	Addr   netip.Addr
}

// ParseEgressOverride reads [DEVICE=]ADDR.
func ParseEgressOverride(s string) (EgressOverride, error) {
	device, text, named := strings.Cut(s, "=")
	if !named {
		device, text = "", s
	}
	a, err := netip.ParseAddr(text)
	if err != nil || a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() || (named && device == "") {
		return EgressOverride{}, fmt.Errorf("%q: want [DEVICE=]ADDR with a unicast address", s)
	}
	return EgressOverride{Device: device, Addr: a.Unmap()}, nil
}

// egress chooses the addresses for each device: what is configured for it, what is configured for all, its own first one that new
// connections may start from, and at last the node's primary one. Index 0 has what serves the devices that are not the node's ways out, such
// as another container runtime's bridge.
func (b *compilation) egress() {
	for _, d := range append([]Device{{}}, b.machine.Devices...) {
		var e Egress
		for _, f := range []struct {
			out *netip.Addr
			v6  bool
		}{{&e.V4, false}, {&e.V6, true}} {
			for _, from := range [][]netip.Addr{b.overridesOf(d), b.overrides(""), d.Usable, b.result.Own} {
				if *f.out = first(from, f.v6); f.out.IsValid() {
					break
				}
			}
		}
		if e != (Egress{}) {
			b.result.Egress[d.Index] = e
		}
	}
	for _, o := range b.egressOverrides {
		if !slices.Contains(b.machine.Addresses, o.Addr) {
			b.problem(b.name, "egress address %s is on no device of this machine: answers come back only if somebody routes it here", o.Addr)
		}
	}
}

// overridesOf is what is configured for the device itself.
func (b *compilation) overridesOf(d Device) []netip.Addr {
	if d.Name == "" {
		return nil
	}
	return b.overrides(d.Name)
}

func (b *compilation) overrides(device string) (out []netip.Addr) {
	for _, o := range b.egressOverrides {
		if o.Device == device {
			out = append(out, o.Addr)
		}
	}
	return out
}
