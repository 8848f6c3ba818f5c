// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/pkg/dump"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/link"
)

// podAttacher attaches the programs of a pod's host-side device (pkg/datapath implements it).
type podAttacher interface {
	AttachPod(ifindex int) error
	// PodAttached returns nil when both programs of this build are there.
	PodAttached(ifindex int) error
}

// netdevAttacher attaches the program of a node's device (pkg/datapath implements it).
type netdevAttacher interface {
	AttachNetdev(ifindex int) error
	DetachNetdev(ifindex int) error
	NetdevAttached(ifindex int) error
}

// overlayAttacher attaches the programs of the overlay device (pkg/datapath implements it).
type overlayAttacher interface {
	AttachOverlay(ifindex int) error
	OverlayAttached(ifindex int) error
}

// hostAttacher attaches the programs between the host's own sockets and services (pkg/datapath implements it).
type hostAttacher interface {
	AttachHost(peer int) error
	HostAttached(peer int) error
}

// Attacher is what the node watcher needs of the datapath.
type Attacher interface {
	podAttacher
	netdevAttacher
	overlayAttacher
	hostAttacher
}

// Delays of the node watcher.
const (
	// surveyPause is the least time between two readings of the node's network: pods that start in a row cause one.
	surveyPause = 50 * time.Millisecond
	// vethPause is how old a veth device must be before its address makes it a device of the node. Another plugin gives its pod's device
	// an address just before Margay, behind it in the chain, adopts the pod.
	vethPause = time.Second
)

var errPodDevice = errors.New("the device carries a pod's programs")

// nodeWatcher owns the attachments: from_netdev and to_netdev on the devices of the node, from_overlay and to_overlay on the overlay device,
// and the repair of what pods should have. It makes the overlay device, the pair by which the host reaches services, and the kernel's routes
// to other nodes and to services as the pipeline wants them, and tells the pipeline what the node's addresses and routes are.
type nodeWatcher struct {
	attach Attacher
	// links is nil where there are to be none.
	links   Linker
	log     *slog.Logger
	devices []string
	// vxlan is the overlay device, without its MTU.
	vxlan   link.VXLAN
	network network
	// encapsulation and routeTo, which asks the kernel's routes, say who encapsulates what pods send to other nodes.
	encapsulation Encapsulation
	routeTo       func(local, remote netip.Addr) ([]netlink.Route, error)
	// rules is the node's netfilter; nil leaves it alone.
	rules   notracker
	resync  time.Duration
	records mailbox[[]*endpoint.Record]
	wants   mailbox[*wantedNetwork]
	publish func(nodeFacts)
	report  func(pods []string)

	read func() (*survey, error)
	now  func() time.Time

	pods []*endpoint.Record
	// raise sends the flows of these pods' devices through the slow path; vanished are devices of records that are gone.
	raise    func(ifindexes ...int) error
	vanished map[int]bool
	attached map[int]string // by ifindex: name of the device that we attached to
	// inherited says that the attachments of a predecessor are in attached.
	inherited bool
	seen      map[int]time.Time // by ifindex: since when we know a device; zero for those there at the start
	last      nodeFacts
	// want is what the pipeline wants of the network, nil before it knows; overlay the overlay device that carries our programs, 0 = none.
	want    *wantedNetwork
	overlay int
	// host is the index of link.HostDevice once the programs are where what is sent there arrives, 0 = not so; hostPeer of its other end.
	host, hostPeer int
	// under is how the programs reach the other nodes.
	under underlay
	// overlayErr, routesErr, hostErr and mtuErrs are what keeps the network from being as wanted.
	overlayErr, routesErr, hostErr error
	mtuErrs                        []string
	// notrackErr is why conntrack may know the overlay's packets.
	notrackErr error
	// linksErr is why there are no links.
	linksErr error
}

// run surveys the node at the start, at every change and at every tick, until ctx ends. changes and removals are fed by subscribe.
func (w *nodeWatcher) run(ctx context.Context, changes mailbox[struct{}], removals <-chan int) error {
	w.attached, w.seen = map[int]string{}, map[int]time.Time{}
	// The records say which devices are pods'.
	select {
	case <-ctx.Done():
		return nil
	case w.pods = <-w.records:
	}
	w.report(w.checkPods(w.pods)) // also what an upgrade brings: pods still carry the programs of the build before
	tick := time.NewTicker(w.resync)
	defer tick.Stop()
	again := time.NewTimer(0)
	defer again.Stop()
	for {
		whole := false
		select {
		case <-ctx.Done():
			return nil
		case records := <-w.records:
			known := w.pods
			w.pods = records
			w.checkPods(newPods(known, records))
		case w.want = <-w.wants:
			whole = true
		case <-changes:
		case <-again.C:
		case index := <-removals:
			w.checkRemoved(index, removals)
			if !pause(ctx, surveyPause) {
				return nil
			}
			continue
		case <-tick.C:
			whole = true
		}
		fresh := w.survey(whole)
		if whole {
			w.report(append(w.checkPods(w.pods), w.mtuErrs...))
		}
		if fresh {
			again.Reset(vethPause)
		}
		if !pause(ctx, surveyPause) {
			return nil
		}
	}
}

// pause lets events gather; it returns false when ctx ends.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// survey reads the node's network, attaches and detaches from_netdev, and publishes what changed. With verify it also looks whether the
// program is still on the devices. It reports whether to look again soon: a device is too young to be judged, or the
// network is not as wanted.
func (w *nodeWatcher) survey(verify bool) bool {
	s, err := w.read()
	if err != nil {
		w.log.Error("the node's network cannot be read", "err", err)
		return true
	}
	if w.applyNetwork(s, verify) {
		if s, err = w.read(); err != nil {
			w.log.Error("the node's network cannot be read", "err", err)
			return true
		}
	}
	w.noteVanished(s)
	c := chooser{patterns: w.devices, pods: map[int]bool{}, fresh: w.fresh(s)}
	for _, r := range w.pods {
		c.pods[r.HostIfindex] = true
	}
	addrs, chosen, machine := s.facts(c)
	w.detach(s, chosen)
	w.unlink()
	for i := range chosen {
		d := &chosen[i]
		if err := w.attachNetdev(*d, verify); err != nil {
			d.Error = err.Error()
			w.log.Error("from_netdev cannot be attached", "ifName", d.Name, "err", err)
		}
	}
	facts := nodeFacts{
		addrs: addrs, routes: s.fingerprint(), devices: chosen, machine: machine, overlay: w.overlay, host: w.host,
		underlay: w.readUnderlay(s), overlayDevice: w.overlayStatus(s), problems: w.networkProblems(), ordered: s.ordered(chosen),
	}
	facts.problems = append(facts.problems, w.notrackProblems()...)
	if !reflect.DeepEqual(facts, w.last) {
		w.last = facts
		w.publish(facts)
	}
	if verify {
		w.link() // last, because it waits
	}
	return len(c.fresh) > 0 || len(w.networkProblems()) > 0
}

// fresh returns the veth devices that appeared a moment ago. What is there at the start is old enough.
func (w *nodeWatcher) fresh(s *survey) map[int]bool {
	var (
		now   = w.now()
		first = len(w.seen) == 0
		fresh = map[int]bool{}
		there = make(map[int]time.Time, len(s.devices))
	)
	for _, d := range s.devices {
		since, ok := w.seen[d.index]
		if !ok && !first {
			since = now
		}
		there[d.index] = since
		if d.kind == "veth" && now.Sub(since) < vethPause {
			fresh[d.index] = true
		}
	}
	w.seen = there
	return fresh
}

// detach takes from_netdev off devices that are not the node's any more: one that turned out to be a pod's, or lost its address, and at
// the start whatever a predecessor thought otherwise of.
func (w *nodeWatcher) detach(s *survey, chosen []DeviceStatus) {
	if !w.inherited {
		w.inherited = true
		for _, d := range s.devices {
			if w.attach.NetdevAttached(d.index) == nil {
				w.attached[d.index] = d.name
			}
		}
	}
	for index, name := range w.attached {
		if slices.ContainsFunc(chosen, func(d DeviceStatus) bool { return d.Ifindex == index }) {
			continue
		}
		there := slices.ContainsFunc(s.devices, func(d device) bool { return d.index == index })
		if there {
			if err := w.attach.DetachNetdev(index); err != nil {
				w.log.Error("from_netdev cannot be detached", "ifName", name, "err", err)
				continue
			}
			w.log.Info("device is no longer the node's; from_netdev is detached", "ifName", name)
		}
		delete(w.attached, index)
	}
}

// attachNetdev makes sure that the device carries from_netdev.
func (w *nodeWatcher) attachNetdev(d DeviceStatus, verify bool) error {
	_, known := w.attached[d.Ifindex]
	if known && !verify {
		return nil
	}
	missing := w.attach.NetdevAttached(d.Ifindex)
	if missing == nil {
		w.attached[d.Ifindex] = d.Name
		return nil
	}
	if w.attach.PodAttached(d.Ifindex) == nil {
		// Adopted a moment ago: its record is on the way. Our program would take the place of from_pod.
		return errPodDevice
	}
	if err := w.attach.AttachNetdev(d.Ifindex); err != nil {
		return err
	}
	w.attached[d.Ifindex] = d.Name
	if known {
		w.log.Warn("from_netdev was removed by somebody and is attached again", "ifName", d.Name, "err", missing,
			"present", present(d.Ifindex))
	} else {
		w.log.Info("from_netdev attached", "ifName", d.Name, "reason", d.Reason)
	}
	return nil
}

// checkRemoved looks after the devices that lost a filter: a pod without programs is a pod without policy, and cannot wait for the tick.
// index is the first of those that wait in removals; 0 stands for all devices.
func (w *nodeWatcher) checkRemoved(index int, removals <-chan int) {
	removed := map[int]bool{index: true}
	for range len(removals) {
		removed[<-removals] = true
	}
	var pods []*endpoint.Record
	for _, r := range w.pods {
		if removed[0] || removed[r.HostIfindex] {
			pods = append(pods, r)
		}
	}
	w.checkPods(pods)
	if removed[0] || (w.overlay != 0 && removed[w.overlay]) || (w.host != 0 && (removed[w.hostPeer] || removed[loopback])) {
		w.survey(true)
		return
	}
	for index := range w.attached {
		if removed[index] {
			w.survey(true)
			return
		}
	}
}

// newPods returns the records that are not among the known ones. What was removed from such a pod before its record came, nobody has
// looked after.
func newPods(known, records []*endpoint.Record) (fresh []*endpoint.Record) {
	seen := map[int]bool{}
	for _, r := range known {
		seen[r.HostIfindex] = true
	}
	for _, r := range records {
		if !seen[r.HostIfindex] {
			fresh = append(fresh, r)
		}
	}
	return fresh
}

// checkPods attaches again what somebody removed from the pods' devices, and returns what it could not.
func (w *nodeWatcher) checkPods(pods []*endpoint.Record) (wrong []string) {
	for _, r := range pods {
		l, err := netlink.LinkByIndex(r.HostIfindex)
		if err != nil || l.Attrs().Name != r.HostIfName {
			continue // gone; the pipeline collects the record
		}
		missing := w.attach.PodAttached(r.HostIfindex)
		if missing == nil {
			continue
		}
		there := present(r.HostIfindex)
		if err := w.attach.AttachPod(r.HostIfindex); err != nil {
			wrong = append(wrong, fmt.Sprintf("%s: %v; present: %v", r.HostIfName, err, there))
			w.log.Error("pod's programs cannot be attached", "ifName", r.HostIfName, "err", err, "present", there)
			continue
		}
		w.log.Warn("pod's programs were removed by somebody and are attached again", "ifName", r.HostIfName,
			"pod", r.Namespace+"/"+r.Name, "err", missing, "present", there)
	}
	return wrong
}

// present names the tc filters on the device, so that a person sees who is in the way.
func present(ifindex int) []string {
	l, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		return nil
	}
	var out []string
	for hook, parent := range map[string]uint32{"ingress": netlink.HANDLE_MIN_INGRESS, "egress": netlink.HANDLE_MIN_EGRESS} {
		filters, err := dump.Whole(func() ([]netlink.Filter, error) { return netlink.FilterList(l, parent) })
		if err != nil {
			continue
		}
		for _, f := range filters {
			text := fmt.Sprintf("%s %s prio %d", hook, f.Type(), f.Attrs().Priority)
			if b, ok := f.(*netlink.BpfFilter); ok {
				text += " " + b.Name
			}
			out = append(out, text)
		}
	}
	slices.Sort(out)
	return out
}
