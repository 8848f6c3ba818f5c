// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/margay-cni/margay/pkg/link"
	"github.com/margay-cni/margay/pkg/node"
)

// Defaults of Reach. The port is not 4789, which some hypervisors keep for themselves.
const (
	DefaultVXLANDevice = "margay.vxlan"
	DefaultVXLANPort   = 8472
	DefaultVXLANVNI    = 28000
)

// maxVNI is the largest base of the network numbers, of which enum overlay_vni takes three; they have 24 bits.
const maxVNI = 1<<24 - 3

// Reach is how other nodes, and what is outside the cluster, are reached. Zero fields get the defaults.
type Reach struct {
	// Mode is the routing mode; default node.VXLAN.
	Mode node.Mode
	// VXLANDevice names the overlay device, VXLANPort is its UDP port, VXLANVNI the first of its network numbers.
	VXLANDevice string
	VXLANPort   uint16
	VXLANVNI    uint32
	// Encapsulation says who encapsulates; default EncapsulationAuto.
	Encapsulation Encapsulation
	// Masquerade makes pods' traffic to outside leave with this node's address, but for destinations in NonMasquerade. Egress says with which,
	// instead of the default.
	Masquerade    bool
	NonMasquerade []netip.Prefix
	Egress        []node.EgressOverride
}

// validate fills in the defaults and names everything that is wrong.
func (r *Reach) validate() error {
	r.Mode = cmp.Or(r.Mode, node.VXLAN)
	r.VXLANDevice = cmp.Or(r.VXLANDevice, DefaultVXLANDevice)
	r.VXLANPort = cmp.Or(r.VXLANPort, DefaultVXLANPort)
	r.VXLANVNI = cmp.Or(r.VXLANVNI, DefaultVXLANVNI)
	r.Encapsulation = cmp.Or(r.Encapsulation, EncapsulationAuto)
	var errs []error
	if _, err := node.ParseMode(string(r.Mode)); err != nil {
		errs = append(errs, err)
	}
	if _, err := ParseEncapsulation(string(r.Encapsulation)); err != nil {
		errs = append(errs, err)
	}
	if n := r.VXLANDevice; len(n) > 15 || strings.ContainsAny(n, "/: \t\n") || n == "." || n == ".." || isPodDevice(n) {
		errs = append(errs, fmt.Errorf("VXLAN device %q: want a device name of up to 15 characters that does not begin with %s", n, podDevicePrefix))
	}
	if r.VXLANVNI > maxVNI {
		errs = append(errs, fmt.Errorf("VXLAN network number %d: want 1 to %d", r.VXLANVNI, maxVNI))
	}
	return errors.Join(errs...)
}

// device is the overlay device of the node of that name, but for its MTU.
func (r *Reach) device(name string) link.VXLAN {
	return link.VXLAN{Name: r.VXLANDevice, Port: r.VXLANPort, MAC: link.OverlayMAC(name)}
}
