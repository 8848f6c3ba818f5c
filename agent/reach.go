// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"flag"
	"net/netip"
	"strconv"
	"strings"

	"github.com/margay-cni/margay/pkg/agent"
	"github.com/margay-cni/margay/pkg/node"
	"github.com/margay-cni/margay/pkg/state"
)

// reachFlags adds the flags about other nodes and what is outside the cluster.
func reachFlags(f *flag.FlagSet, o *options) {
	r := &o.reach
	*r = agent.Reach{
		Mode: node.VXLAN, VXLANDevice: agent.DefaultVXLANDevice, VXLANPort: agent.DefaultVXLANPort, VXLANVNI: agent.DefaultVXLANVNI,
		Encapsulation: agent.EncapsulationAuto, Masquerade: true,
	}
	f.Func("routing-mode", "how packets reach other nodes' pods: vxlan, direct or auto (default vxlan)", func(s string) (err error) {
		r.Mode, err = node.ParseMode(s)
		return err
	})
	f.StringVar(&r.VXLANDevice, "vxlan-device", r.VXLANDevice, "name of the overlay device")
	number(f, "vxlan-port", "UDP port of the overlay (default 8472)", 16, func(n uint64) { r.VXLANPort = uint16(n) })
	number(f, "vxlan-vni", "first of the overlay's three network numbers (default 28000)", 24, func(n uint64) { r.VXLANVNI = uint32(n) })
	f.Func("vxlan-encapsulation", "who encapsulates what pods send, and decapsulates: auto, the programs where they can, or device, the overlay device (default auto)", func(s string) (err error) {
		r.Encapsulation, err = agent.ParseEncapsulation(s)
		return err
	})
	f.BoolVar(&r.Masquerade, "masquerade", r.Masquerade, "let pods' traffic to outside the cluster leave with this node's address")
	f.Func("non-masquerade-cidrs", "comma-separated ranges outside the cluster to which pods keep their own address", func(s string) error {
		return prefixes(s, &r.NonMasquerade)
	})
	f.Func("egress-address", "[DEVICE=]ADDR: address that masqueraded traffic leaves with, by that device or any; may be repeated", func(s string) error {
		e, err := node.ParseEgressOverride(s)
		if err == nil {
			r.Egress = append(r.Egress, e)
		}
		return err
	})
	o.serviceReturn = state.ReturnTunnel
	f.Func("service-return", "how answers to clients that another node forwarded go back: tunnel, through it, or dsr, straight to the client (default tunnel)",
		func(s string) error {
			if o.serviceReturn = state.ServiceReturn(s); !o.serviceReturn.Known() {
				return errors.New("want tunnel or dsr")
			}
			return nil
		})
}

// prefixes reads a comma-separated list of ranges.
func prefixes(s string, into *[]netip.Prefix) error {
	*into = nil
	for part := range strings.SplitSeq(s, ",") {
		p, err := netip.ParsePrefix(strings.TrimSpace(part))
		if err != nil || p.Addr().Is4In6() {
			return errors.New("want CIDR[,CIDR]")
		}
		*into = append(*into, p.Masked())
	}
	return nil
}

// number adds a flag for a positive number of so many bits.
func number(f *flag.FlagSet, name, usage string, bits int, set func(uint64)) {
	f.Func(name, usage, func(s string) error {
		n, err := strconv.ParseUint(s, 10, bits)
		if err != nil || n == 0 {
			return errors.New("want a positive number of " + strconv.Itoa(bits) + " bits")
		}
		set(n)
		return nil
	})
}
