// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"maps"
	"slices"
	"time"

	"github.com/margay-cni/margay/pkg/datapath"
)

// Linker attaches the programs of the node's own devices once more, by a way that costs a packet less and the node's network configuration
// some milliseconds each (pkg/datapath implements it). What it cannot do changes nothing: the filters are there.
type Linker interface {
	LinkNodeDevices(want datapath.NodeDevices) ([]datapath.LinkChange, error)
	// UnlinkOthers undoes it for all other devices.
	UnlinkOthers(want datapath.NodeDevices) error
}

// linkPause is how long a device must have been the node's before it is linked. What comes and goes sooner costs nothing, and another
// plugin's interface that a pod's ADD adopts has no link that would hide from_pod.
const linkPause = 5 * time.Second

// nodeDevices are the devices that carry the node's programs, or of the NICs only those that have done so for long enough.
func (w *nodeWatcher) nodeDevices(old bool) datapath.NodeDevices {
	d := datapath.NodeDevices{Overlay: w.overlay}
	if w.host != 0 {
		d.HostPeer = w.hostPeer
	}
	for _, index := range slices.Sorted(maps.Keys(w.attached)) {
		if !old || w.now().Sub(w.seen[index]) >= linkPause {
			d.Netdevs = append(d.Netdevs, index)
		}
	}
	return d
}

// unlink takes the links off devices that do not carry the node's programs any more. It goes before anything else that waits.
func (w *nodeWatcher) unlink() {
	if w.links == nil {
		return
	}
	if err := w.links.UnlinkOthers(w.nodeDevices(false)); err != nil {
		w.log.Error("tcx links cannot be taken off", "err", err)
	}
}

// link makes the links that are missing.
func (w *nodeWatcher) link() {
	if w.links == nil {
		return
	}
	changes, err := w.links.LinkNodeDevices(w.nodeDevices(true))
	for _, c := range changes {
		log := w.log.Info
		if c.What == datapath.LinkRepaired {
			log = w.log.Warn
		}
		log("tcx link of a node's device", "program", c.Program, "ifindex", c.Ifindex, "now", c.What)
	}
	if err != nil && (w.linksErr == nil || w.linksErr.Error() != err.Error()) {
		w.log.Warn("programs of the node's devices are filters only, tcx links cannot be made", "err", err)
	}
	w.linksErr = err
}
