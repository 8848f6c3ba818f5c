// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/pins"
)

// NodeDevices are the indexes of the devices with programs that live as long as the node, not with a pod.
type NodeDevices struct {
	Netdevs []int // AttachNetdev
	Overlay int   // AttachOverlay; 0: none
	// HostPeer is the service end of the host's pair (AttachHost), with which the loopback device goes; 0: none.
	HostPeer int
}

// LinkChange is what LinkNodeDevices did to a side of a device, and why.
type LinkChange struct {
	Ifindex int
	Program string
	// What is LinkAttached, LinkRepaired or LinkYielded.
	What string
}

// What may happen to a link.
const (
	LinkAttached = "attached"
	// LinkRepaired: somebody had detached it from a device that stayed.
	LinkRepaired = "attached again, somebody had detached it"
	// LinkYielded: somebody else's program has come to this side of the device.
	LinkYielded = "taken off, somebody else has a program there"
)

// hookLinks are the tcx links that this process has open, by place. They end with it, in whatever way it ends.
type hookLinks struct {
	mu   sync.Mutex
	open map[hookPlace]link.Link
	// probed says that supported is known.
	probed, supported bool
}

// hookPlace is one side of a device.
type hookPlace struct {
	ifindex int
	parent  uint32
}

func (p hookPlace) attachType() ebpf.AttachType {
	if p.parent == netlink.HANDLE_MIN_INGRESS {
		return ebpf.AttachTCXIngress
	}
	return ebpf.AttachTCXEgress
}

// LinkNodeDevices attaches the programs of these devices once more, as tcx links: the kernel runs them before the filters, by a shorter way,
// and no filter after a verdict. A link is made only above a filter with the same program, which is in force as soon as the link is not, and
// only where nobody else has a filter or a tcx program on that side of the device: it would hide a filter of theirs, or they would not see
// what it took. Each new link, and each that is closed, waits for a grace period under RTNL, 7 to 14 ms.
//
// The links are this process's: they end with Close, and with the process. The calling thread is in the devices' network namespace. Kernel 6.6;
// on older ones it does nothing.
func (d *Datapath) LinkNodeDevices(want NodeDevices) (changes []LinkChange, err error) {
	d.links.mu.Lock()
	defer d.links.mu.Unlock()
	if ok, err := d.hasTCX(); !ok || err != nil {
		return nil, err
	}
	var errs []error
	wanted := want.hooks()
	for _, ifindex := range slices.Sorted(maps.Keys(wanted)) {
		for _, hook := range d.hooks(wanted[ifindex]) {
			what, err := d.link(ifindex, hook)
			if err != nil && !isGone(err) {
				errs = append(errs, fmt.Errorf("link %s to device %d: %w", hook.Program, ifindex, err))
			}
			if what != "" {
				changes = append(changes, LinkChange{Ifindex: ifindex, Program: hook.Program, What: what})
			}
		}
	}
	return changes, errors.Join(errs...)
}

// HasTCX says whether the kernel has tcx links.
func (d *Datapath) HasTCX() (bool, error) {
	d.links.mu.Lock()
	defer d.links.mu.Unlock()
	return d.hasTCX()
}

// hasTCX asks the kernel once: it is to attach to a device that cannot be.
func (d *Datapath) hasTCX() (bool, error) {
	if d.links.probed {
		return d.links.supported, nil
	}
	made, err := link.AttachTCX(link.TCXOptions{
		Interface: math.MaxInt32, Program: d.progs[bpf.ProgFromNetdev], Attach: ebpf.AttachTCXIngress,
	})
	switch {
	case err == nil:
		return false, errors.Join(errors.New("the kernel attaches to a device that does not exist"), made.Close())
	case !errors.Is(err, ebpf.ErrNotSupported) && !isGone(err):
		return false, fmt.Errorf("ask whether the kernel has tcx: %w", err)
	}
	d.links.probed, d.links.supported, d.links.open = true, isGone(err), map[hookPlace]link.Link{}
	return d.links.supported, nil
}

// UnlinkOthers closes the links to all other devices: those that are gone, that have moved to another network namespace, and that are not
// the node's any more.
func (d *Datapath) UnlinkOthers(want NodeDevices) error {
	d.links.mu.Lock()
	defer d.links.mu.Unlock()
	var errs []error
	for place := range d.links.open {
		if !want.has(place.ifindex) {
			errs = append(errs, d.links.close(place))
		}
	}
	return errors.Join(errs...)
}

// Linked says whether a tcx link to the device runs one of the given programs of this build, whoever made it. Like LinkNodeDevices it
// looks in the calling thread's network namespace.
func (d *Datapath) Linked(ifindex int, programs ...string) bool {
	for _, name := range programs {
		for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
			running, err := tcxPrograms(hookPlace{ifindex, parent})
			if err != nil || d.progs[name] == nil {
				continue
			}
			info, err := d.progs[name].Info()
			if err != nil {
				continue
			}
			if id, ok := info.ID(); ok && slices.ContainsFunc(running, func(p link.AttachedProgram) bool { return p.ID == id }) {
				return true
			}
		}
	}
	return false
}

func (n NodeDevices) has(ifindex int) bool {
	return slices.Contains(n.Netdevs, ifindex) || ifindex == n.Overlay || n.HostPeer != 0 && (ifindex == n.HostPeer || ifindex == loopback)
}

// hooks are the sides of the devices, by index. A device that is gone has none.
func (n NodeDevices) hooks() map[int][]hookPoint {
	out := map[int][]hookPoint{}
	for _, ifindex := range n.Netdevs {
		if hooks, err := netdevHooksOf(ifindex); err == nil {
			out[ifindex] = hooks
		}
	}
	if n.Overlay != 0 {
		out[n.Overlay] = overlayHooks
	}
	if n.HostPeer != 0 {
		out[n.HostPeer], out[loopback] = hostHooks, loopbackHooks
	}
	return out
}

// link makes one side of a device as it should be, and says what it did.
func (d *Datapath) link(ifindex int, hook pins.Hook) (what string, err error) {
	place := hookPlace{ifindex, hook.Parent}
	before := d.links.open[place]
	alive, err := isAlive(before)
	if err != nil {
		return "", err
	}
	alone, err := isAlone(place, hook, before)
	switch {
	case err != nil:
		return "", err
	case alive && alone:
		return "", nil
	case !alone && before == nil:
		return "", nil
	case !alone:
		return LinkYielded, d.links.close(place)
	}
	if err := pins.Attached(ifindex, hook); err != nil {
		if errors.Is(err, pins.ErrNotAttached) {
			err = nil // the filter comes first
		}
		return "", err
	}
	if err := d.links.close(place); err != nil {
		return "", err
	}
	made, err := link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: d.progs[hook.Program], Attach: place.attachType()})
	if err != nil {
		return "", err
	}
	d.links.open[place] = made
	if before != nil {
		return LinkRepaired, nil
	}
	return LinkAttached, nil
}

// isAlive says whether a link, nil for none, still runs on a device.
func isAlive(l link.Link) (bool, error) {
	if l == nil {
		return false, nil
	}
	info, err := l.Info()
	if err != nil {
		return false, err
	}
	return info.TCX() != nil && info.TCX().Ifindex != 0, nil
}

// isAlone says whether nothing but our filter and our link is on that side of a device.
func isAlone(place hookPlace, hook pins.Hook, own link.Link) (bool, error) {
	others, err := pins.Others(place.ifindex, hook)
	if others || err != nil {
		return false, err
	}
	running, err := tcxPrograms(place)
	if err != nil || len(running) == 0 {
		return true, err
	}
	if own == nil {
		return false, nil
	}
	info, err := own.Info()
	if err != nil {
		return false, err
	}
	return !slices.ContainsFunc(running, func(p link.AttachedProgram) bool {
		id, ok := p.LinkID()
		return !ok || id != info.ID
	}), nil
}

// isGone says that there is no such device, or no program on it.
func isGone(err error) bool { return errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) }

// tcxPrograms are everybody's on one side of a device, in the order in which they run.
func tcxPrograms(place hookPlace) ([]link.AttachedProgram, error) {
	found, err := link.QueryPrograms(link.QueryOptions{Target: place.ifindex, Attach: place.attachType()})
	if err != nil {
		if isGone(err) {
			err = nil
		}
		return nil, err
	}
	return found.Programs, nil
}

// close closes a link, if there is one. The filter below it is in force from then on.
func (l *hookLinks) close(place hookPlace) error {
	own := l.open[place]
	if own == nil {
		return nil
	}
	delete(l.open, place)
	if err := own.Close(); err != nil {
		return fmt.Errorf("close the link to device %d: %w", place.ifindex, err)
	}
	return nil
}

func (l *hookLinks) closeAll() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var errs []error
	for place := range l.open {
		errs = append(errs, l.close(place))
	}
	return errors.Join(errs...)
}
