// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"io"
	"net"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/margay-cni/margay/pkg/jsonwrite"
)

// printTo prints a result in the form of that version of the specification. The library can do this for every version, and takes a thirtieth of
// an ADD: it encodes, decodes and encodes again. So the forms of the current versions are written here; a test compares them with the library's.
func printTo(out io.Writer, r types.Result, version string) error {
	if ours, ok := r.(*types100.Result); ok && (version == "1.0.0" || version == "1.1.0") {
		text, err := encodeResult(ours, version)
		if err != nil {
			return err
		}
		_, err = out.Write(text)
		return err
	}
	converted, err := r.GetAsVersion(version)
	if err != nil {
		return err
	}
	return converted.PrintTo(out)
}

func encodeResult(r *types100.Result, version string) ([]byte, error) {
	var o jsonwrite.Object
	o.String("cniVersion", version)
	var interfaces, ips, routes [][]byte
	for _, i := range r.Interfaces {
		interfaces = append(interfaces, encodeInterface(i))
	}
	for _, ip := range r.IPs {
		ips = append(ips, encodeIP(ip))
	}
	for _, route := range r.Routes {
		routes = append(routes, encodeRoute(route))
	}
	for _, list := range []struct {
		name   string
		values [][]byte
	}{{"interfaces", interfaces}, {"ips", ips}, {"routes", routes}} {
		if len(list.values) > 0 {
			o.Raw(list.name, jsonwrite.List(list.values...))
		}
	}
	if !r.DNS.IsEmpty() {
		if err := o.Any("dns", r.DNS); err != nil {
			return nil, err
		}
	}
	return append(o.Bytes(), '\n'), nil
}

func encodeInterface(i *types100.Interface) []byte {
	var o jsonwrite.Object
	o.String("name", i.Name)
	o.OmitString("mac", i.Mac)
	o.OmitInt("mtu", i.Mtu)
	o.OmitString("sandbox", i.Sandbox)
	o.OmitString("socketPath", i.SocketPath)
	o.OmitString("pciID", i.PciID)
	return o.Bytes()
}

func encodeIP(ip *types100.IPConfig) []byte {
	var o jsonwrite.Object
	if ip.Interface != nil {
		o.Int("interface", *ip.Interface)
	}
	o.String("address", ip.Address.String())
	o.OmitString("gateway", ipText(ip.Gateway))
	return o.Bytes()
}

func encodeRoute(r *types.Route) []byte {
	var o jsonwrite.Object
	o.String("dst", r.Dst.String())
	o.OmitString("gw", ipText(r.GW))
	o.OmitInt("mtu", r.MTU)
	o.OmitInt("advmss", r.AdvMSS)
	o.OmitInt("priority", r.Priority)
	if r.Table != nil {
		o.Int("table", *r.Table)
	}
	if r.Scope != nil {
		o.Int("scope", *r.Scope)
	}
	return o.Bytes()
}

// ipText is empty for no address.
func ipText(ip net.IP) string {
	if len(ip) == 0 {
		return ""
	}
	return ip.String()
}
