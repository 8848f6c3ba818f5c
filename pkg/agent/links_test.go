// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/endpoint"
)

// fakeLinker has links to devices, and attaches them one round after another.
type fakeLinker struct {
	linked []int
	calls  int
	err    error
	// detached are devices whose links somebody has detached.
	detached []int
}

func ifindexes(d datapath.NodeDevices) []int {
	all := slices.Clone(d.Netdevs)
	for _, i := range []int{d.Overlay, d.HostPeer} {
		if i != 0 {
			all = append(all, i)
		}
	}
	return all
}

func (f *fakeLinker) LinkNodeDevices(want datapath.NodeDevices) (changes []datapath.LinkChange, err error) {
	f.calls++
	if f.err != nil {
		return nil, f.err
	}
	for _, i := range ifindexes(want) {
		switch {
		case slices.Contains(f.detached, i):
			changes = append(changes, datapath.LinkChange{Ifindex: i, What: datapath.LinkRepaired})
		case !slices.Contains(f.linked, i):
			f.linked = append(f.linked, i)
			changes = append(changes, datapath.LinkChange{Ifindex: i, What: datapath.LinkAttached})
		}
	}
	f.detached = nil
	return changes, nil
}

func (f *fakeLinker) UnlinkOthers(want datapath.NodeDevices) error {
	f.linked = slices.DeleteFunc(f.linked, func(i int) bool { return !slices.Contains(ifindexes(want), i) })
	return nil
}

func (f *fakeLinker) want(t *testing.T, when string, want ...int) {
	t.Helper()
	if diff := cmp.Diff(want, f.linked, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("linked devices %s (-want +got):\n%s", when, diff)
	}
}

// Links come at whole rounds, to devices that have been the node's for some seconds, and go as soon as a device is not.
func TestDevicesAreLinked(t *testing.T) {
	f := &fakeLinker{}
	w, net, clock, published := watchRig(fakeAttacher{})
	w.links = f
	net.devices = []device{nic(2, "eth0", "device"), nic(3, "eth1", "veth")}
	w.survey(false)
	f.want(t, "before the first whole round")
	w.publish = func(nodeFacts) {
		if f.calls > 1 {
			t.Error("links come before what has changed is published")
		}
	}
	w.survey(true)
	f.want(t, "that were there at the start", 2, 3)
	w.publish = func(n nodeFacts) { *published = append(*published, n) }

	net.devices = append(net.devices, nic(4, "eth2", "device"))
	w.survey(true)
	*clock = clock.Add(linkPause - time.Millisecond)
	w.survey(true)
	f.want(t, "while one is young", 2, 3)
	*clock = clock.Add(time.Millisecond)
	w.survey(false)
	f.want(t, "without a whole round", 2, 3)
	w.survey(true)
	f.want(t, "when all are old enough", 2, 3, 4)

	// Device 3 turns out to be a pod's, 2 is gone.
	w.pods = []*endpoint.Record{{HostIfName: "eth1", HostIfindex: 3}}
	net.devices = net.devices[1:]
	w.survey(false)
	f.want(t, "after some have gone", 4)
	// It comes again, and is young again.
	net.devices = append(net.devices, nic(2, "eth0", "device"))
	w.survey(true)
	f.want(t, "after one has come again", 4)
	*clock = clock.Add(linkPause)
	w.survey(true)
	f.want(t, "when it is old enough", 4, 2)
}

// What keeps links from being made is said once, and hides nothing else; what somebody does to them is said each time.
func TestLinksAreReported(t *testing.T) {
	f := &fakeLinker{err: errors.New("no room")}
	w, net, _, published := watchRig(fakeAttacher{})
	var out strings.Builder
	w.log, w.links = slog.New(slog.NewTextHandler(&out, nil)), f
	net.devices = []device{nic(2, "eth0", "device")}
	for range 3 {
		w.survey(true)
	}
	if n := strings.Count(out.String(), "no room"); n != 1 {
		t.Errorf("the error was logged %d times, want once:\n%s", n, out.String())
	}
	if last := (*published)[len(*published)-1]; len(last.problems) != 0 || last.devices[0].Error != "" {
		t.Errorf("published %+v, want no problem: the filters are there", last)
	}
	f.err = nil
	w.survey(true)
	for range 2 {
		f.detached = []int{2}
		w.survey(true)
	}
	if n := strings.Count(out.String(), "somebody had detached it"); n != 2 || strings.Count(out.String(), "level=WARN") != 3 {
		t.Errorf("two detached links were logged %d times:\n%s", n, out.String())
	}
}

// With links switched off nobody asks for any.
func TestNoLinks(t *testing.T) {
	w, net, _, _ := watchRig(fakeAttacher{})
	net.devices = []device{nic(2, "eth0", "device")}
	w.survey(true)
	net.devices = nil
	w.survey(true)
}
