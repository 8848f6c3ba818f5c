// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"math/bits"
	"strings"

	"github.com/margay-cni/margay/pkg/state"
)

// Lengths of a portPrefix: the protocol's bits, and both fields' bits.
const (
	protocolBits = 8
	portBits     = 24
)

// portPrefix is the part of a Key that says which protocols and ports match.
type portPrefix struct {
	protocol state.Protocol
	port     uint16
	bits     uint8
}

// namedPort is a port that the destination pod resolves (contract rows N8 and C6).
type namedPort struct {
	name     string
	protocol state.Protocol // 0: whichever the pod gives the name
}

// rangePrefixes returns the fewest prefixes that hold exactly the ports from low to high.
func rangePrefixes(protocol state.Protocol, low, high uint16) []portPrefix {
	var out []portPrefix
	for at, end := uint32(low), uint32(high); at <= end; {
		size := uint32(1) << bits.TrailingZeros32(at|1<<16)
		for at+size-1 > end {
			size >>= 1
		}
		length := portBits - uint8(bits.TrailingZeros32(size))
		out = append(out, portPrefix{protocol: protocol, port: uint16(at), bits: length})
		at += size
	}
	return out
}

// ancestor returns the prefix of the given length that holds p. It must not be longer than p.
func (p portPrefix) ancestor(length uint8) portPrefix {
	switch {
	case length == 0:
		return portPrefix{}
	case length <= protocolBits:
		return portPrefix{protocol: p.protocol, bits: protocolBits}
	}
	return portPrefix{protocol: p.protocol, port: p.port &^ (0xffff >> (length - protocolBits)), bits: length}
}

// coveredBy reports whether set has a shorter prefix that holds p.
func (p portPrefix) coveredBy(set map[portPrefix]uint32) bool {
	if p.bits == 0 || len(set) == 0 {
		return false
	}
	if _, ok := set[portPrefix{}]; ok {
		return true
	}
	for length := uint8(protocolBits); length < p.bits; length++ {
		if _, ok := set[p.ancestor(length)]; ok {
			return true
		}
	}
	return false
}

func (p portPrefix) String() string {
	switch {
	case p.bits == 0:
		return "all"
	case p.bits == protocolBits:
		return p.protocol.String()
	case p.bits == portBits:
		return fmt.Sprintf("%s/%d", p.protocol, p.port)
	}
	return fmt.Sprintf("%s/%d-%d", p.protocol, p.port, p.port|0xffff>>(p.bits-protocolBits))
}

func (n namedPort) String() string {
	return fmt.Sprintf("%s/%q", n.protocol, n.name)
}

// resolve returns the ports that a pod with these container ports gives the names.
func resolve(names []namedPort, ports []state.ContainerPort) []portPrefix {
	var out []portPrefix
	for _, n := range names {
		for _, p := range ports {
			if p.Name == n.name && (p.Protocol == n.protocol || n.protocol == 0) {
				out = append(out, portPrefix{protocol: p.Protocol, port: p.Port, bits: portBits})
			}
		}
	}
	return out
}

// joinStrings joins the String forms of a list.
func joinStrings[T fmt.Stringer](list []T) string {
	var b strings.Builder
	for i, v := range list {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(v.String())
	}
	return b.String()
}
