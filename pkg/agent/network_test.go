// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/link"
	"github.com/margay-cni/margay/pkg/node"
)

// fakeNetwork makes devices and routes in a survey.
type fakeNetwork struct {
	*survey
	attach fakeAttacher
	next   int
	// fail is what the operation of that name fails with; bare says that a device was brought up without its programs.
	fail map[string]error
	bare bool
	ops  []string
	mtus map[string]int
}

func (f *fakeNetwork) op(name string) error {
	f.ops = append(f.ops, name)
	return f.fail[name]
}

func (f *fakeNetwork) EnsureVXLAN(want link.VXLAN) (link.Device, error) {
	if err := f.op("ensure"); err != nil {
		return link.Device{}, err
	}
	d := f.overlay()
	if d == nil {
		f.next++
		f.devices = append(f.devices, device{index: f.next, name: want.Name, kind: "vxlan", ethernet: true, overlay: true})
		d = f.overlay()
	}
	d.mtu = want.MTU
	return link.Device{Index: d.index, Name: d.name, MTU: d.mtu, Up: d.up}, nil
}

func (f *fakeNetwork) SetUp(index int) error {
	if err := f.op("up"); err != nil {
		return err
	}
	f.bare = f.bare || f.attach[index] != "overlay"
	f.overlay().up = true
	return nil
}

func (f *fakeNetwork) DeleteVXLANs() error {
	if err := f.op("delete"); err != nil {
		return err
	}
	f.devices = slices.DeleteFunc(f.devices, func(d device) bool { return d.overlay })
	return nil
}

func (f *fakeNetwork) SyncNodeRoutes(want []link.NodeRoute, keep bool) (changed int, err error) {
	if err := f.op("routes"); err != nil {
		return 0, err
	}
	wanted := map[link.NodeRoute]bool{}
	for _, r := range want {
		if wanted[r] = true; !f.nodeRoutes[r] {
			f.nodeRoutes[r] = true
			changed++
		}
	}
	for r := range f.nodeRoutes {
		if !wanted[r] && !keep {
			delete(f.nodeRoutes, r)
			changed++
		}
	}
	return changed, nil
}

func (f *fakeNetwork) SetPodMTU(r *endpoint.Record, mtu int) error {
	if err := f.op("mtu " + r.Name); err != nil {
		return err
	}
	f.mtus[r.Name] = mtu
	for i := range f.devices {
		if f.devices[i].index == r.HostIfindex {
			f.devices[i].mtu = mtu
		}
	}
	return nil
}

// networkRig is a node watcher over a fake network with one NIC, and the facts that it published last.
func networkRig() (*nodeWatcher, *fakeNetwork, func() nodeFacts) {
	f := fakeAttacher{}
	w, net, _, published := watchRig(f)
	net.devices = []device{nic(2, "eth0", "device")}
	net.nodeRoutes = map[link.NodeRoute]bool{}
	n := &fakeNetwork{survey: net, attach: f, next: 10, fail: map[string]error{}, mtus: map[string]int{}}
	w.network, w.vxlan = n, link.VXLAN{Name: "margay.vxlan", Port: 8472}
	return w, n, func() nodeFacts { return (*published)[len(*published)-1] }
}

func wantsOverlay() *wantedNetwork {
	return &wantedNetwork{
		overlay: &node.Overlay{MTU: 1450}, podMTU: 1450,
		routes: []node.KernelRoute{
			{Prefix: netip.MustParsePrefix("10.1.0.0/24"), Kind: node.Unreachable},
			{Prefix: netip.MustParsePrefix("10.2.0.0/24"), Kind: node.ViaOverlay, Source: netip.MustParseAddr("192.0.2.2")},
			{Prefix: netip.MustParsePrefix("fd00:3::/64"), Kind: node.ViaNode, Gateway: netip.MustParseAddr("2001:db8::3"), Device: 2},
		},
	}
}

func TestOverlayIsMadeKeptAndRemoved(t *testing.T) {
	w, n, facts := networkRig()
	w.survey(true)
	if len(n.ops) > 0 {
		t.Errorf("operations before anything is wanted = %v, want none", n.ops)
	}
	w.want = wantsOverlay()
	w.survey(true)
	d := n.overlay()
	if d == nil || !d.up || d.mtu != 1450 || n.attach[d.index] != "overlay" || n.bare {
		t.Fatalf("overlay device = %+v with %v, want one that went up with its programs on", d, n.attach)
	}
	wantRoutes := map[link.NodeRoute]bool{
		{Dst: netip.MustParsePrefix("10.1.0.0/24")}:                                                            true,
		{Dst: netip.MustParsePrefix("10.2.0.0/24"), Device: d.index, Source: netip.MustParseAddr("192.0.2.2")}: true,
		{Dst: netip.MustParsePrefix("fd00:3::/64"), Device: 2, Gateway: netip.MustParseAddr("2001:db8::3")}:    true,
	}
	if diff := cmp.Diff(fmt.Sprint(wantRoutes), fmt.Sprint(n.nodeRoutes)); diff != "" {
		t.Errorf("kernel routes (-want +got):\n%s", diff)
	}
	if f := facts(); f.overlay != d.index || len(f.problems) > 0 || len(f.machine.Devices) != 1 {
		t.Errorf("facts = %+v, want the overlay device, and one NIC", f)
	}
	n.ops = nil
	if again := w.survey(false); again || len(n.ops) > 0 {
		t.Errorf("the next survey = %v with operations %v, want nothing to do", again, n.ops)
	}

	// Somebody removes the programs, then the device.
	delete(n.attach, d.index)
	w.checkRemoved(d.index, make(chan int))
	if n.attach[d.index] != "overlay" {
		t.Errorf("programs of the overlay device = %q, want them again", n.attach[d.index])
	}
	first := d.index
	n.devices = slices.DeleteFunc(n.devices, func(d device) bool { return d.overlay })
	n.nodeRoutes = map[link.NodeRoute]bool{{Dst: netip.MustParsePrefix("10.1.0.0/24")}: true}
	w.survey(false)
	if d = n.overlay(); d == nil || d.index == first || facts().overlay != d.index || len(n.nodeRoutes) != 3 || n.bare {
		t.Errorf("after its removal: device %+v, facts %+v, routes %v, want all of it anew", d, facts(), n.nodeRoutes)
	}

	// While the source is incomplete nothing goes.
	w.want = &wantedNetwork{hold: true}
	w.survey(true)
	if n.overlay() == nil || len(n.nodeRoutes) != 3 || facts().overlay == 0 {
		t.Errorf("held: device %+v, routes %v, want them as before", n.overlay(), n.nodeRoutes)
	}
	w.want = &wantedNetwork{}
	w.survey(true)
	if n.overlay() != nil || len(n.nodeRoutes) != 0 || facts().overlay != 0 {
		t.Errorf("unwanted: device %+v, routes %v, overlay %d, want nothing", n.overlay(), n.nodeRoutes, facts().overlay)
	}
}

// An agent that starts finds its predecessor's device: it works on before the source has spoken, with this build's programs.
func TestOverlayOfAPredecessorWorksOn(t *testing.T) {
	w, n, facts := networkRig()
	n.devices = append(n.devices, device{index: 9, name: "margay.vxlan", kind: "vxlan", ethernet: true, overlay: true, up: true, mtu: 1450})
	w.survey(true)
	if n.attach[9] != "overlay" || facts().overlay != 9 {
		t.Errorf("programs on the device = %q, overlay in the facts = %d, want this build's on 9", n.attach[9], facts().overlay)
	}
	w.want = wantsOverlay()
	w.survey(true)
	if d := n.overlay(); d == nil || d.index != 9 || facts().overlay != 9 {
		t.Errorf("device = %+v, want the predecessor's", d)
	}
}

func TestNetworkFaultsAreReportedAndTriedAgain(t *testing.T) {
	for _, op := range []string{"ensure", "up", "routes"} {
		t.Run(op, func(t *testing.T) {
			w, n, facts := networkRig()
			n.fail[op] = errors.New("no such luck")
			w.want = wantsOverlay()
			if again := w.survey(true); !again {
				t.Errorf("survey() = false, want it soon again")
			}
			if f := facts(); len(f.problems) != 1 || !strings.Contains(f.problems[0], "no such luck") || (op != "routes" && f.overlay != 0) {
				t.Errorf("facts = %+v, want the problem, and no overlay that does not work", f)
			}
			for r := range n.nodeRoutes {
				if r.Dst == netip.MustParsePrefix("10.2.0.0/24") && r.Device == 0 {
					t.Errorf("another node's range is unreachable because the overlay is missing, want no route")
				}
			}
			delete(n.fail, op)
			if again := w.survey(false); again || facts().overlay == 0 || len(n.nodeRoutes) != 3 {
				t.Errorf("later: survey() = %v, facts %+v, routes %v, want everything there", again, facts(), n.nodeRoutes)
			}
		})
	}
}

func TestPodsFollowTheMTU(t *testing.T) {
	w, n, _ := networkRig()
	for i, r := range []*endpoint.Record{
		{Name: "follows", FollowMTU: true}, {Name: "configured"}, {Name: "adopted", Adopted: true, FollowMTU: true},
		{Name: "gone", FollowMTU: true}, {Name: "stuck", FollowMTU: true}, {Name: "fits", FollowMTU: true},
	} {
		r.HostIfindex, r.HostIfName = 20+i, fmt.Sprint("mgy", i)
		w.pods = append(w.pods, r)
		mtu := 1500
		if r.Name == "fits" {
			mtu = 1450
		}
		if r.Name != "gone" {
			n.devices = append(n.devices, device{index: r.HostIfindex, name: r.HostIfName, kind: "veth", ethernet: true, mtu: mtu})
		}
	}
	n.fail["mtu stuck"] = errors.New("no namespace")
	w.want = wantsOverlay()
	w.want.hold = true
	w.survey(true)
	if len(n.mtus) > 0 {
		t.Errorf("MTUs set while the source is incomplete = %v, want none", n.mtus)
	}
	w.want = wantsOverlay()
	w.survey(true)
	if diff := cmp.Diff(map[string]int{"follows": 1450}, n.mtus); diff != "" {
		t.Errorf("MTUs set (-want +got):\n%s", diff)
	}
	if len(w.mtuErrs) != 1 || !strings.Contains(w.mtuErrs[0], "no namespace") {
		t.Errorf("reported = %q, want the pod whose MTU could not be set", w.mtuErrs)
	}
}
