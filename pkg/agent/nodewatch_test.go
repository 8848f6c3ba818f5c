// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/endpoint"
)

// fakeAttacher remembers which program is on which device. As in the kernel, one takes the other's place.
type fakeAttacher map[int]string

func (f fakeAttacher) set(i int, p string) error { f[i] = p; return nil }

func (f fakeAttacher) is(i int, p string) error {
	if f[i] != p {
		return errors.New("not attached")
	}
	return nil
}

func (f fakeAttacher) AttachPod(i int) error       { return f.set(i, "pod") }
func (f fakeAttacher) PodAttached(i int) error     { return f.is(i, "pod") }
func (f fakeAttacher) AttachNetdev(i int) error    { return f.set(i, "netdev") }
func (f fakeAttacher) NetdevAttached(i int) error  { return f.is(i, "netdev") }
func (f fakeAttacher) AttachOverlay(i int) error   { return f.set(i, "overlay") }
func (f fakeAttacher) OverlayAttached(i int) error { return f.is(i, "overlay") }
func (f fakeAttacher) AttachHost(i int) error      { return f.set(i, "host") }
func (f fakeAttacher) HostAttached(i int) error    { return f.is(i, "host") }
func (f fakeAttacher) DetachNetdev(i int) error {
	if f[i] == "netdev" {
		delete(f, i)
	}
	return nil
}

// watchRig is a node watcher over a network that the test changes.
func watchRig(f fakeAttacher) (*nodeWatcher, *survey, *time.Time, *[]nodeFacts) {
	net, clock, published := &survey{}, testEpoch, &[]nodeFacts{}
	w := &nodeWatcher{
		attach: f, log: slog.New(slog.DiscardHandler), attached: map[int]string{}, seen: map[int]time.Time{},
		read: func() (*survey, error) { return net, nil }, now: func() time.Time { return clock },
		publish: func(n nodeFacts) { *published = append(*published, n) }, report: func([]string) {},
		raise:   func(...int) error { return nil },
		routeTo: func(_, _ netip.Addr) ([]netlink.Route, error) { return nil, unix.ENETUNREACH },
	}
	return w, net, &clock, published
}

func nic(index int, name, kind string) device {
	return device{index: index, name: name, kind: kind, ethernet: true, addrs: []netip.Addr{netip.AddrFrom4([4]byte{192, 0, 2, byte(index)})}}
}

func TestNetdevsAreAttachedAndDetached(t *testing.T) {
	f := fakeAttacher{9: "netdev"}
	w, net, clock, published := watchRig(f)
	net.devices = []device{nic(2, "eth0", "device"), nic(3, "eth1", "veth"), {index: 9, name: "eth9", kind: "device", ethernet: true}}
	w.survey(false)
	if diff := cmp.Diff(fakeAttacher{2: "netdev", 3: "netdev"}, f); diff != "" {
		t.Errorf("programs at the start (-want +got):\n%s", diff)
	}
	w.survey(false)
	if len(*published) != 1 {
		t.Errorf("published %d times, want once: nothing changed", len(*published))
	}
	// A veth device that appears may become an adopted pod's.
	net.devices = append(net.devices, nic(4, "veth4", "veth"), nic(5, "veth5", "veth"))
	if again := w.survey(false); !again || f[4] != "" {
		t.Errorf("survey() = %v with %q on the fresh veth device, want true and nothing", again, f[4])
	}
	w.pods = []*endpoint.Record{{HostIfName: "veth4", HostIfindex: 4}}
	f[4] = "pod"
	f[6] = "pod"
	net.devices = append(net.devices, nic(6, "veth6", "veth"))
	w.survey(false)
	*clock = clock.Add(2 * vethPause)
	if again := w.survey(false); again {
		t.Errorf("survey() = true, want false: every device is old enough")
	}
	want := fakeAttacher{2: "netdev", 3: "netdev", 4: "pod", 5: "netdev", 6: "pod"}
	if diff := cmp.Diff(want, f); diff != "" {
		t.Errorf("programs later (-want +got):\n%s", diff)
	}
	// Device 3 turns out to be a pod's, 2 loses its address, 5 vanishes.
	w.pods = append(w.pods, &endpoint.Record{HostIfName: "eth1", HostIfindex: 3})
	net.devices[0].addrs = nil
	net.devices = slices.DeleteFunc(net.devices, func(d device) bool { return d.index == 5 })
	w.survey(false)
	delete(f, 5)
	if diff := cmp.Diff(fakeAttacher{4: "pod", 6: "pod"}, f); diff != "" {
		t.Errorf("programs at the end (-want +got):\n%s", diff)
	}
	if got := slices.Sorted(maps.Keys(w.attached)); len(got) != 0 {
		t.Errorf("devices thought attached = %v, want none", got)
	}
}

func TestRemovedProgramIsAttachedAgain(t *testing.T) {
	f := fakeAttacher{}
	w, net, _, _ := watchRig(f)
	net.devices = []device{nic(2, "eth0", "device")}
	w.survey(false)
	delete(f, 2)
	w.survey(true)
	if f[2] != "netdev" {
		t.Errorf("program on eth0 = %q, want from_netdev again", f[2])
	}
}

// TestVanishedDeviceRaisesItsEpoch: a pod's device that is gone before its record sends its flows through the slow path, once.
func TestVanishedDeviceRaisesItsEpoch(t *testing.T) {
	w, net, _, _ := watchRig(fakeAttacher{})
	var raised []int
	fail := false
	w.raise = func(indexes ...int) error {
		if fail {
			return errors.New("no")
		}
		raised = append(raised, indexes...)
		return nil
	}
	pod, other := nic(7, "mgy7", "veth"), nic(8, "mgy8", "veth")
	net.devices = []device{nic(2, "eth0", "device"), pod, other}
	w.pods = []*endpoint.Record{{HostIfindex: 7, HostIfName: "mgy7"}, {HostIfindex: 8, HostIfName: "mgy8"}}
	w.survey(false)
	if raised != nil {
		t.Fatalf("raised %v while every device is there", raised)
	}
	net.devices = []device{nic(2, "eth0", "device"), other}
	fail = true
	w.survey(false)
	fail = false
	w.survey(false)
	w.survey(false)
	if diff := cmp.Diff([]int{7}, raised); diff != "" {
		t.Errorf("devices raised after one is gone (-want +got):\n%s", diff)
	}
	// The index may come again, for another pod.
	net.devices = []device{nic(2, "eth0", "device"), pod, other}
	w.survey(false)
	net.devices = []device{nic(2, "eth0", "device"), other}
	w.survey(false)
	if diff := cmp.Diff([]int{7, 7}, raised); diff != "" {
		t.Errorf("devices raised after it is gone again (-want +got):\n%s", diff)
	}
}
