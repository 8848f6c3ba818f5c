// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"net/netip"
	"slices"

	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/margay-cni/margay/pkg/link"
)

// adoptInterface finds both ends of the interface that an earlier plugin of the list made. The host's end is found by the ifindex that the
// pod's end names as its peer: names differ from plugin to plugin, and prevResult need not list the host's end at all.
func (a *addition) adoptInterface(context.Context) (err error) {
	prev, err := a.conf.prevResult()
	if err != nil {
		return err
	}
	if a.record.Addresses = interfaceAddresses(prev, a.args.IfName, a.args.Netns); len(a.record.Addresses) == 0 {
		return fail(codeAdopt, nil, "prevResult has no address for interface %s: margay must come after a plugin that gives it one", a.args.IfName)
	}
	if a.podIf, err = a.podLink.Device(a.args.IfName); err != nil {
		return fail(codeAdopt, err, "look up interface %s, which an earlier plugin should have made", a.args.IfName)
	}
	if a.hostIf, err = hostEnd(a.hostLink, a.podIf); err != nil {
		return err
	}
	a.mtu = a.podIf.MTU
	a.result = a.conf.PrevResult
	return nil
}

// hostEnd returns the other end of a pod's veth interface, in the namespace of c.
func hostEnd(c *link.Socket, pod link.Device) (link.Device, error) {
	if pod.Kind != "veth" || pod.Peer == 0 {
		return link.Device{}, fail(codeAdopt, nil, "interface %s is of kind %s: only veth pairs can be adopted", pod.Name, pod.Kind)
	}
	host, err := c.DeviceByIndex(pod.Peer)
	if err != nil {
		return link.Device{}, fail(codeAdopt, err, "look up the other end of interface %s", pod.Name)
	}
	// An ifindex means something only together with its namespace: the device must point back.
	if host.Kind != "veth" || host.Peer != pod.Index {
		return link.Device{}, fail(codeAdopt, nil, "the other end of interface %s is not in the plugin's network namespace", pod.Name)
	}
	return host, nil
}

// interfaceAddresses returns a result's addresses of one interface in one namespace. Plugins may leave the index out where there is only
// one interface that it could be.
func interfaceAddresses(r *types100.Result, ifName, sandbox string) []netip.Addr {
	var out []netip.Addr
	for _, ip := range r.IPs {
		if ip.Interface != nil {
			i := *ip.Interface
			if i < 0 || i >= len(r.Interfaces) || r.Interfaces[i].Name != ifName || r.Interfaces[i].Sandbox != sandbox {
				continue
			}
		}
		if a, ok := netip.AddrFromSlice(ip.Address.IP); ok && !slices.Contains(out, a.Unmap()) {
			out = append(out, a.Unmap())
		}
	}
	return out
}
