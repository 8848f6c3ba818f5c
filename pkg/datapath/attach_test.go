// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/pins"
)

const missing = 9999 // no device has this index

// device makes a device in the calling thread's namespace.
func device(t *testing.T, name string) int {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	veth := netlink.NewVeth(attrs)
	veth.PeerName = name + "-peer"
	must(t, netlink.LinkAdd(veth))
	l, err := netlink.LinkByName(name)
	must(t, err)
	return l.Attrs().Index
}

// filters lists what is on a device: "ingress margay/from_pod".
func filters(t *testing.T, ifindex int) (found []string) {
	t.Helper()
	for side, parent := range map[string]uint32{"ingress": netlink.HANDLE_MIN_INGRESS, "egress": netlink.HANDLE_MIN_EGRESS} {
		list, err := netlink.FilterList(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: ifindex}}, parent)
		must(t, err)
		for _, f := range list {
			name := f.Type()
			if b, ok := f.(*netlink.BpfFilter); ok {
				name = b.Name
			}
			found = append(found, fmt.Sprintf("%s %s", side, name))
		}
	}
	return found
}

func wantFilters(t *testing.T, when string, ifindex int, want ...string) {
	t.Helper()
	count := func(list []string) map[string]int {
		n := map[string]int{}
		for _, s := range list {
			n[s]++
		}
		return n
	}
	if diff := cmp.Diff(count(want), count(filters(t, ifindex))); diff != "" {
		t.Errorf("filters %s (-want +got):\n%s", when, diff)
	}
}

func TestAttachPod(t *testing.T) {
	t.Parallel()
	ns, cfg := place(t)
	d := ensure(t, ns, cfg)
	_, elsewhere := place(t)
	other := ensure(t, ns, elsewhere) // other programs, as another build has them
	ns.Do(func() {
		dev := device(t, "pod")
		if err := d.PodAttached(dev); !errors.Is(err, pins.ErrNotAttached) {
			t.Errorf("PodAttached() before = %v, want ErrNotAttached", err)
		}
		both := []string{"ingress margay/from_pod", "egress margay/to_pod"}
		for range 2 {
			must(t, d.AttachPod(dev))
			must(t, d.PodAttached(dev))
			wantFilters(t, "after AttachPod", dev, both...)
		}
		if err := other.PodAttached(dev); !errors.Is(err, pins.ErrNotAttached) {
			t.Errorf("PodAttached() of another build = %v, want ErrNotAttached", err)
		}
		must(t, other.AttachPod(dev))
		must(t, other.PodAttached(dev))
		wantFilters(t, "after another build's AttachPod", dev, both...)
		for range 2 {
			must(t, d.DetachPod(dev))
			wantFilters(t, "after DetachPod", dev)
		}
		if err := d.AttachPod(missing); err == nil {
			t.Error("AttachPod() to no device = nil, want an error")
		}
		must(t, d.DetachPod(missing))
		if err := d.PodAttached(missing); !errors.Is(err, pins.ErrNotAttached) {
			t.Errorf("PodAttached() of no device = %v, want ErrNotAttached", err)
		}
	})
}

func TestAttachNetdev(t *testing.T) {
	t.Parallel()
	ns, cfg := place(t)
	d := ensure(t, ns, cfg)
	ns.Do(func() {
		dev := device(t, "nic")
		for range 2 {
			must(t, d.AttachNetdev(dev))
			must(t, d.NetdevAttached(dev))
			wantFilters(t, "after AttachNetdev", dev, "ingress margay/from_netdev", "egress margay/to_netdev")
		}
		must(t, d.DetachNetdev(dev))
		wantFilters(t, "after DetachNetdev", dev)
	})
}

func TestAttachOverlay(t *testing.T) {
	t.Parallel()
	ns, cfg := place(t)
	d := ensure(t, ns, cfg)
	ns.Do(func() {
		dev := device(t, "overlay")
		if err := d.OverlayAttached(dev); !errors.Is(err, pins.ErrNotAttached) {
			t.Errorf("OverlayAttached() before = %v, want ErrNotAttached", err)
		}
		for range 2 {
			must(t, d.AttachOverlay(dev))
			must(t, d.OverlayAttached(dev))
			wantFilters(t, "after AttachOverlay", dev, "ingress margay/from_overlay", "egress margay/to_overlay")
		}
		if err := d.NetdevAttached(dev); !errors.Is(err, pins.ErrNotAttached) {
			t.Errorf("NetdevAttached() of the overlay device = %v, want ErrNotAttached", err)
		}
	})
}

// Other people's filters on the device stay, with the qdisc: of other kinds, of other numbers, and of the usual ones.
func TestForeignFiltersStay(t *testing.T) {
	t.Parallel()
	ns, cfg := place(t)
	d := ensure(t, ns, cfg)
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	must(t, err)
	defer prog.Close()
	ns.Do(func() {
		for i, prio := range []uint16{pins.FilterPriority, 2, 50} {
			dev := device(t, fmt.Sprintf("pod%d", i))
			must(t, netlink.QdiscAdd(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
				LinkIndex: dev, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
			}}))
			for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
				must(t, netlink.FilterAdd(&netlink.BpfFilter{
					FilterAttrs: netlink.FilterAttrs{LinkIndex: dev, Parent: parent, Handle: 1, Priority: prio, Protocol: unix.ETH_P_ALL},
					Fd:          prog.FD(), Name: "foreign", DirectAction: true,
				}))
			}
			foreign := []string{"ingress foreign", "egress foreign"}
			must(t, d.AttachPod(dev))
			must(t, d.PodAttached(dev))
			wantFilters(t, "after AttachPod", dev, append(foreign, "ingress margay/from_pod", "egress margay/to_pod")...)
			must(t, d.DetachPod(dev))
			wantFilters(t, "after DetachPod", dev, foreign...)
		}
	})
}

func TestEndpoints(t *testing.T) {
	t.Parallel()
	ns, cfg := place(t)
	d := ensure(t, ns, cfg)
	for _, s := range []string{"10.0.0.1", "fd00::1"} {
		a := netip.MustParseAddr(s)
		want := bpf.Endpoint{Ifindex: 5, Identity: 42, PolicyId: [2]uint32{16, 17}, Mac: [6]uint8{2, 0, 0, 0, 0, 1}}
		before := epochOf(t, d, 5)
		must(t, d.PutEndpoint(a, want))
		got, ok, err := d.LookupEndpoint(a)
		if err != nil || !ok || got != want {
			t.Errorf("LookupEndpoint(%s) = %+v, %v, %v, want %+v", a, got, ok, err, want)
		}
		if after := epochOf(t, d, 5); after == before {
			t.Errorf("PutEndpoint(%s) left the epoch at %d", a, after)
		}
		before = epochOf(t, d, 5)
		must(t, d.DeleteEndpoint(a, 6))
		if _, ok, _ := d.LookupEndpoint(a); !ok {
			t.Errorf("DeleteEndpoint(%s, 6) removed the entry of device 5", a)
		}
		if after := epochOf(t, d, 5); after != before {
			t.Errorf("DeleteEndpoint(%s, 6) raised the epoch of device 5", a)
		}
		must(t, d.DeleteEndpoint(a, 5))
		if _, ok, err := d.LookupEndpoint(a); ok || err != nil {
			t.Errorf("LookupEndpoint(%s) after DeleteEndpoint = %v, %v, want none", a, ok, err)
		}
		if after := epochOf(t, d, 5); after == before {
			t.Errorf("DeleteEndpoint(%s, 5) left the epoch at %d", a, after)
		}
		must(t, d.DeleteEndpoint(a, 5))
		must(t, d.PutEndpoint(a, want))
		must(t, d.DeleteEndpoint(a, 0)) // 0: whoever has it
		if _, ok, _ := d.LookupEndpoint(a); ok {
			t.Errorf("DeleteEndpoint(%s, 0) left the entry", a)
		}
	}
}

// A full map is reported with its name and what to do.
func TestFullMapIsNamed(t *testing.T) {
	t.Parallel()
	ns, cfg := place(t)
	cfg.Sizes = map[string]uint32{"endpoints": 1}
	d := ensure(t, ns, cfg)
	must(t, d.PutEndpoint(netip.MustParseAddr("10.0.0.1"), bpf.Endpoint{Ifindex: 1}))
	err := d.PutEndpoint(netip.MustParseAddr("10.0.0.2"), bpf.Endpoint{Ifindex: 2})
	if err == nil || !errors.Is(err, unix.E2BIG) {
		t.Fatalf("PutEndpoint() into a full map = %v, want E2BIG", err)
	}
	if want := "map endpoints is full with 1 entries"; len(err.Error()) < len(want) || err.Error()[:len(want)] != want {
		t.Errorf("PutEndpoint() into a full map = %v, want it to begin with %q", err, want)
	}
}

func epochOf(t *testing.T, d *Datapath, ifindex uint32) (epoch uint32) {
	t.Helper()
	must(t, d.Maps.EndpointEpochs.Lookup(ifindex, &epoch))
	return epoch
}

// Names may be glued together differently: the key must tell.
func TestPendingKeyOf(t *testing.T) {
	seen := map[bpf.PendingKey][3]string{}
	for _, id := range [][3]string{
		{"a", "b", "c"}, {"ab", "", "c"}, {"a", "bc", ""}, {"", "", ""}, {"a", "", ""}, {"", "a", ""}, {"", "", "a"}, {"b", "a", "c"},
	} {
		key := pins.PendingKeyOf(id[0], id[1], id[2])
		if other, ok := seen[key]; ok {
			t.Errorf("pins.PendingKeyOf(%q) = pins.PendingKeyOf(%q)", id, other)
		}
		seen[key] = id
		if key != pins.PendingKeyOf(id[0], id[1], id[2]) {
			t.Errorf("pins.PendingKeyOf(%q) is not the same twice", id)
		}
	}
}
