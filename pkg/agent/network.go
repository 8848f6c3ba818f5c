// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"

	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/link"
	"github.com/margay-cni/margay/pkg/netns"
	"github.com/margay-cni/margay/pkg/node"
)

// wantedNetwork is what the pipeline wants of devices and kernel routes. It is read-only.
type wantedNetwork struct {
	// overlay is nil when there is to be none.
	overlay *node.Overlay
	routes  []node.KernelRoute
	// tunnels are the ways to the other nodes, ordered by their numbers.
	tunnels []node.Tunnel
	// podMTU is that of pods' interfaces, bytes; 0 = not known.
	podMTU int
	// services are the routes to service addresses, nil before the services are known.
	services []link.ServiceRoute
	// hold says that the source cannot read everything: nothing is taken back.
	hold bool
}

// overlayMaker makes the overlay device, and deviceSetter changes devices; link.Conn does both.
type (
	overlayMaker interface {
		EnsureVXLAN(want link.VXLAN) (link.Device, error)
		SetUp(index int) error
		DeleteVXLANs() error
	}
	deviceSetter interface {
		SyncNodeRoutes(want []link.NodeRoute, keep bool) (changed int, err error)
		// SetPodMTU changes both ends of a pod's pair.
		SetPodMTU(r *endpoint.Record, mtu int) error
	}
	network interface {
		overlayMaker
		deviceSetter
		hostLinker
	}
)

// systemNetwork is the network namespace of the agent.
type systemNetwork struct{ *link.Conn }

// SetPodMTU changes the pod's end first: the host's end then still shows that it has to be done, should this be interrupted.
func (n systemNetwork) SetPodMTU(r *endpoint.Record, mtu int) error {
	ns, err := netns.Open(r.Netns)
	if err != nil {
		return err
	}
	defer func() { _ = ns.Close() }()
	pod, err := link.Dial(ns.FD())
	if err != nil {
		return err
	}
	defer pod.Close()
	inside, err := pod.Device(r.IfName)
	if err != nil {
		return err
	}
	if inside.Peer != r.HostIfindex {
		return fmt.Errorf("%s in the pod is not the other end of %s", r.IfName, r.HostIfName)
	}
	if err := pod.SetMTU(inside.Index, mtu); err != nil {
		return err
	}
	return n.SetMTU(r.HostIfindex, mtu)
}

// applyNetwork makes devices and routes what the pipeline wants and reports whether it changed something, so that the survey is out of date.
// With verify it looks at the kernel whatever the survey says.
func (w *nodeWatcher) applyNetwork(s *survey, verify bool) (changed bool) {
	w.mtuErrs = nil
	if w.want == nil {
		changed = w.adoptOverlay(s, verify)
		return w.adoptHost(s, verify) || changed
	}
	w.applyNotrack(verify)
	changed = w.applyOverlay(s, verify)
	if w.applyHost(s, verify) {
		changed = true
	}
	if w.syncRoutes(s, changed || verify) {
		changed = true
	}
	return w.followMTU(s) || changed
}

// adoptOverlay lets a predecessor's device work on while nobody knows whether it is wanted. An upgrade brings it this build's programs.
func (w *nodeWatcher) adoptOverlay(s *survey, verify bool) (changed bool) {
	if d := s.overlay(); d != nil && d.up {
		return w.attachOverlay(d.index, d.name, verify)
	}
	w.overlay = 0
	return false
}

// applyOverlay makes, changes or removes the overlay device. It goes up when the programs are on it: what it received before would reach
// the host's stack unjudged.
func (w *nodeWatcher) applyOverlay(s *survey, verify bool) (changed bool) {
	have := s.overlay()
	if w.want.overlay == nil {
		w.overlayErr = nil
		if w.want.hold {
			return w.adoptOverlay(s, verify)
		}
		if w.overlay = 0; have == nil {
			return false
		}
		if w.overlayErr = w.network.DeleteVXLANs(); w.overlayErr == nil {
			w.log.Info("there is no other node any more; overlay device is removed", "ifName", have.name)
		}
		return true
	}
	spec := w.vxlan
	spec.MTU = w.want.overlay.MTU
	fits := have != nil && have.up && have.name == spec.Name && have.index == w.overlay && (spec.MTU == 0 || have.mtu == spec.MTU)
	if fits && !verify {
		return false
	}
	d, err := w.network.EnsureVXLAN(spec)
	if err != nil {
		w.failOverlay(err)
		return true
	}
	if have == nil || have.index != d.Index {
		w.log.Info("overlay device is made", "ifName", d.Name, "port", spec.Port, "mtu", d.MTU)
		w.overlay, changed = 0, true
	} else if have.mtu != d.MTU {
		w.log.Info("overlay device has another MTU", "ifName", d.Name, "mtu", d.MTU)
		changed = true
	}
	if w.attachOverlay(d.Index, d.Name, true) {
		changed = true
	}
	if w.overlay == 0 || d.Up {
		return changed
	}
	if err := w.network.SetUp(d.Index); err != nil {
		w.failOverlay(err)
	}
	return true
}

func (w *nodeWatcher) failOverlay(err error) {
	if w.overlayErr == nil || w.overlayErr.Error() != err.Error() {
		w.log.Error("overlay device is not as it should be", "ifName", w.vxlan.Name, "err", err)
	}
	w.overlayErr, w.overlay = err, 0
}

// attachOverlay makes sure that the device carries its programs, and that w.overlay says so.
func (w *nodeWatcher) attachOverlay(index int, name string, verify bool) (changed bool) {
	if w.overlay == index && !verify {
		return false
	}
	missing := w.attach.OverlayAttached(index)
	if missing != nil {
		there := present(index)
		if err := w.attach.AttachOverlay(index); err != nil {
			w.failOverlay(err)
			return true
		}
		if w.overlay == index {
			w.log.Warn("programs of the overlay device were removed by somebody and are attached again", "ifName", name, "err", missing,
				"present", there)
		} else {
			w.log.Info("from_overlay and to_overlay attached", "ifName", name)
		}
	}
	w.overlay, w.overlayErr = index, nil
	return missing != nil
}

// syncRoutes brings the kernel's routes to other nodes to what is wanted.
func (w *nodeWatcher) syncRoutes(s *survey, verify bool) (changed bool) {
	want := make([]link.NodeRoute, 0, len(w.want.routes))
	differs := verify
	for _, r := range w.want.routes {
		n := link.NodeRoute{Dst: r.Prefix}
		switch r.Kind {
		case node.ViaOverlay:
			if w.overlay == 0 {
				continue // what there was went with the device
			}
			n.Device, n.Source = w.overlay, r.Source
		case node.ViaNode:
			n.Device, n.Gateway = r.Device, r.Gateway
		}
		want = append(want, n)
		differs = differs || !s.nodeRoutes[n]
	}
	if !differs && (w.want.hold || len(s.nodeRoutes) == len(want)) {
		w.routesErr = nil
		return false
	}
	count, err := w.network.SyncNodeRoutes(want, w.want.hold)
	if err != nil && (w.routesErr == nil || w.routesErr.Error() != err.Error()) {
		w.log.Error("routes to other nodes are not as they should be", "err", err)
	}
	if count > 0 {
		w.log.Info("routes to other nodes changed", "routes", count)
	}
	w.routesErr = err
	return count > 0
}

// followMTU gives the pods whose MTU the node decides the node's present one.
func (w *nodeWatcher) followMTU(s *survey) (changed bool) {
	if w.want.podMTU == 0 || w.want.hold {
		return false
	}
	devices := make(map[int]*device, len(s.devices))
	for i := range s.devices {
		devices[s.devices[i].index] = &s.devices[i]
	}
	for _, r := range w.pods {
		d := devices[r.HostIfindex]
		if !r.FollowMTU || r.Adopted || d == nil || d.name != r.HostIfName || d.mtu == w.want.podMTU {
			continue
		}
		if err := w.network.SetPodMTU(r, w.want.podMTU); err != nil {
			w.mtuErrs = append(w.mtuErrs, fmt.Sprintf("%s: its MTU stays %d: %v", r.HostIfName, d.mtu, err))
			continue
		}
		w.log.Info("pod's MTU follows the node's", "ifName", r.HostIfName, "pod", r.Namespace+"/"+r.Name, "mtu", w.want.podMTU)
		changed = true
	}
	return changed
}

// overlayStatus is the overlay device as the status shows it.
func (w *nodeWatcher) overlayStatus(s *survey) *DeviceStatus {
	d := s.overlay()
	if d == nil {
		return nil
	}
	status := &DeviceStatus{Name: d.name, Ifindex: d.index, Reason: "other nodes"}
	if w.overlayErr != nil {
		status.Error = w.overlayErr.Error()
	}
	return status
}

// networkProblems are what keeps the network from being as wanted, for the status.
func (w *nodeWatcher) networkProblems() (out []string) {
	if w.overlayErr != nil {
		out = append(out, fmt.Sprintf("overlay device %s: %v", w.vxlan.Name, w.overlayErr))
	}
	if w.routesErr != nil {
		out = append(out, "routes to other nodes: "+oneLine(w.routesErr))
	}
	if w.hostErr != nil {
		out = append(out, "services for the node's own sockets: "+oneLine(w.hostErr))
	}
	return out
}

// oneLine is the first of joined errors, and how many others there are.
func oneLine(err error) string {
	var joined interface{ Unwrap() []error }
	if errors.As(err, &joined) && len(joined.Unwrap()) > 1 {
		return fmt.Sprintf("%v, and %d more", joined.Unwrap()[0], len(joined.Unwrap())-1)
	}
	return err.Error()
}
