// SPDX-License-Identifier: Apache-2.0

package endpoint

import (
	"fmt"
	"net/netip"
	"strings"
)

// HostPort is a port of the node that leads to a pod: one frontend of the map services.
type HostPort struct {
	// Protocol is "tcp", "udp" or "sctp".
	Protocol string `json:"protocol"`
	// Host is where clients ask: the unspecified address of a family stands for every address of the node in it.
	Host netip.AddrPort `json:"host"`
	// Pod is where the pod listens, an address of the same family.
	Pod netip.AddrPort `json:"pod"`
	// ID is the frontend's service id, from the range that belongs to hostPorts.
	ID uint32 `json:"id"`
}

// protocolNumbers are IP's, by the names in records.
var protocolNumbers = map[string]uint8{"tcp": 6, "udp": 17, "sctp": 132}

// ProtocolNumber returns IP's number of the protocol, 0 for a name that is none.
func (p HostPort) ProtocolNumber() uint8 { return protocolNumbers[p.Protocol] }

// String is the frontend as a person writes it: "TCP *:8080 (IPv4)", "UDP 192.0.2.1:53".
func (p HostPort) String() string {
	protocol := strings.ToUpper(p.Protocol)
	switch a := p.Host.Addr(); {
	case a == netip.IPv4Unspecified():
		return fmt.Sprintf("%s *:%d (IPv4)", protocol, p.Host.Port())
	case a == netip.IPv6Unspecified():
		return fmt.Sprintf("%s *:%d (IPv6)", protocol, p.Host.Port())
	}
	return protocol + " " + p.Host.String()
}

// SameFrontend says whether both are reached at the same place.
func (p HostPort) SameFrontend(o HostPort) bool {
	return p.Protocol == o.Protocol && p.Host == o.Host
}

// ServicesFile is the file in the run directory that names service ids: one JSON object from the id, in decimal, to "namespace/name:port".
// The agent writes it.
const ServicesFile = "services.json"
