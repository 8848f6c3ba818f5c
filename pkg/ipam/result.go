// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// Assigned is one leased address.
type Assigned struct {
	// Address has its subnet's prefix length.
	Address netip.Prefix
	// Gateway is the range's gateway.
	Gateway netip.Addr
}

// Assignment is what Add gives.
type Assignment struct {
	// IPs has one address of each range set, in the configuration's order.
	IPs []Assigned
	// Routes are ipam.routes.
	Routes []*types.Route
	// DNS is the content of ipam.resolvConf; empty without it.
	DNS types.DNS
	// Repeated says that the attachment held these addresses already.
	Repeated bool
}

// Result returns the assignment as a CNI result of version 1.1.0; types.PrintResult converts it to older ones.
func (a *Assignment) Result() *types100.Result {
	r := &types100.Result{CNIVersion: types100.ImplementedSpecVersion, Routes: a.Routes, DNS: a.DNS}
	for _, ip := range a.IPs {
		addr := ip.Address.Addr()
		r.IPs = append(r.IPs, &types100.IPConfig{
			Address: net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(ip.Address.Bits(), addr.BitLen())},
			Gateway: ip.Gateway.AsSlice(),
		})
	}
	return r
}

// readResolvConf reads a resolver configuration in the format of resolv.conf(5). No path means no DNS in the result.
func readResolvConf(path string) (types.DNS, error) {
	var dns types.DNS
	if path == "" {
		return dns, nil
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return dns, failf(types.ErrIOFailure, "read ipam.resolvConf: %v", err)
	}
	for line := range strings.Lines(string(data)) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		switch fields[0] { // comment lines begin with another word
		case "nameserver":
			dns.Nameservers = append(dns.Nameservers, fields[1])
		case "domain":
			dns.Domain = fields[1]
		case "search":
			dns.Search = append(dns.Search, fields[1:]...)
		case "options":
			dns.Options = append(dns.Options, fields[1:]...)
		}
	}
	return dns, nil
}
