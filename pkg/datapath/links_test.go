// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/pins"
)

// needTCX skips the test where the kernel has no tcx; there LinkNodeDevices must do nothing and say nothing.
func needTCX(t *testing.T, ns *netnstest.NS, d *Datapath) {
	t.Helper()
	ns.Do(func() {
		dev := device(t, "probe")
		must(t, d.AttachNetdev(dev))
		ok, err := d.HasTCX()
		must(t, err)
		changes, err := d.LinkNodeDevices(NodeDevices{Netdevs: []int{dev}})
		if !ok {
			if len(changes) != 0 || err != nil {
				t.Errorf("LinkNodeDevices() without tcx = %v, %v, want nothing", changes, err)
			}
			t.Skip("this kernel has no tcx (6.6)")
		}
		must(t, err)
		must(t, d.UnlinkOthers(NodeDevices{}))
	})
}

// running are the names of the tcx programs on both sides of a device, as far as they are d's; "?" for others.
func running(t *testing.T, d *Datapath, ifindex int) (out []string) {
	t.Helper()
	for _, side := range []struct {
		name   string
		parent uint32
	}{{"ingress", netlink.HANDLE_MIN_INGRESS}, {"egress", netlink.HANDLE_MIN_EGRESS}} {
		found, err := tcxPrograms(hookPlace{ifindex, side.parent})
		must(t, err)
		for _, p := range found {
			name := "?"
			for n, prog := range d.progs {
				info, err := prog.Info()
				must(t, err)
				if id, _ := info.ID(); id == p.ID {
					name = n
				}
			}
			out = append(out, side.name+" "+name)
		}
	}
	return out
}

func wantRunning(t *testing.T, when string, d *Datapath, ifindex int, want ...string) {
	t.Helper()
	if diff := cmp.Diff(want, running(t, d, ifindex), cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("tcx programs of device %d %s (-want +got):\n%s", ifindex, when, diff)
	}
}

// Links come above the filters of every kind of device, once, and go when the device is not wanted any more. The filters stay.
func TestLinkNodeDevices(t *testing.T) {
	t.Parallel()
	ns, cfg := place(t)
	d := ensure(t, ns, cfg)
	needTCX(t, ns, d)
	ns.Do(func() {
		nic, overlay, peer := device(t, "nic"), device(t, "overlay"), device(t, "svc")
		want := NodeDevices{Netdevs: []int{nic}, Overlay: overlay, HostPeer: peer}
		changes, err := d.LinkNodeDevices(want)
		if err != nil || len(changes) != 0 {
			t.Errorf("LinkNodeDevices() without filters = %v, %v, want nothing", changes, err)
		}
		must(t, errors.Join(d.AttachNetdev(nic), d.AttachOverlay(overlay), d.AttachHost(peer)))
		changes, err = d.LinkNodeDevices(want)
		must(t, err)
		if len(changes) != 6 || slices.ContainsFunc(changes, func(c LinkChange) bool { return c.What != LinkAttached }) {
			t.Errorf("LinkNodeDevices() = %v, want six links attached", changes)
		}
		wantRunning(t, "linked", d, nic, "ingress from_netdev", "egress to_netdev")
		wantRunning(t, "linked", d, overlay, "ingress from_overlay", "egress to_overlay")
		wantRunning(t, "linked", d, peer, "ingress from_host")
		wantRunning(t, "linked", d, loopback, "egress to_loopback")
		if !d.Linked(nic, bpf.ProgFromNetdev) || d.Linked(nic, bpf.ProgFromOverlay) || d.Linked(missing, bpf.ProgFromNetdev) {
			t.Error("Linked() does not tell the NIC's from_netdev from what is not there")
		}
		if changes, err = d.LinkNodeDevices(want); err != nil || len(changes) != 0 {
			t.Errorf("LinkNodeDevices() again = %v, %v, want nothing", changes, err)
		}
		must(t, d.UnlinkOthers(NodeDevices{Netdevs: []int{nic}}))
		wantRunning(t, "kept", d, nic, "ingress from_netdev", "egress to_netdev")
		for _, gone := range []int{overlay, peer, loopback} {
			wantRunning(t, "not wanted", d, gone)
		}
		must(t, errors.Join(d.NetdevAttached(nic), d.OverlayAttached(overlay), d.HostAttached(peer)))
	})
}

// A process that ends, and a device that is deleted or moves to another namespace, leave no link behind.
func TestLinksEnd(t *testing.T) {
	t.Parallel()
	ns, cfg := place(t)
	d, second := ensure(t, ns, cfg), ensure(t, ns, cfg)
	needTCX(t, ns, d)
	elsewhere := netnstest.New(t)
	ns.Do(func() {
		nic, leaving, deleted := device(t, "nic"), device(t, "leaving"), device(t, "deleted")
		all := NodeDevices{Netdevs: []int{nic, leaving, deleted}}
		for _, i := range all.Netdevs {
			must(t, d.AttachNetdev(i))
		}
		_, err := d.LinkNodeDevices(all)
		must(t, err)
		must(t, netlink.LinkDel(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: deleted}}))
		must(t, netlink.LinkSetNsFd(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: leaving}}, fdOf(t, elsewhere)))
		must(t, d.UnlinkOthers(NodeDevices{Netdevs: []int{nic}}))
		if n := len(d.links.open); n != 2 {
			t.Errorf("%d links are open, want the two of the device that stays", n)
		}
		elsewhere.Do(func() {
			l, err := netlink.LinkByName("leaving")
			must(t, err)
			wantRunning(t, "in another namespace", d, l.Attrs().Index)
		})

		// A second process waits for the first to end, and has links as soon as it has.
		changes, err := second.LinkNodeDevices(NodeDevices{Netdevs: []int{nic}})
		if err != nil || len(changes) != 0 {
			t.Errorf("LinkNodeDevices() beside another process's links = %v, %v, want nothing", changes, err)
		}
		must(t, d.Close())
		wantRunning(t, "after Close", second, nic)
		must(t, second.NetdevAttached(nic))
		_, err = second.LinkNodeDevices(NodeDevices{Netdevs: []int{nic}})
		must(t, err)
		wantRunning(t, "of the second process", second, nic, "ingress from_netdev", "egress to_netdev")
	})
}

// What somebody detaches comes again, and is said to.
func TestDetachedLinkIsRepaired(t *testing.T) {
	t.Parallel()
	ns, cfg := place(t)
	d := ensure(t, ns, cfg)
	needTCX(t, ns, d)
	ns.Do(func() {
		nic := device(t, "nic")
		want := NodeDevices{Netdevs: []int{nic}}
		must(t, d.AttachNetdev(nic))
		_, err := d.LinkNodeDevices(want)
		must(t, err)
		must(t, d.links.open[hookPlace{nic, netlink.HANDLE_MIN_INGRESS}].Detach())
		wantRunning(t, "detached", d, nic, "egress to_netdev")
		changes, err := d.LinkNodeDevices(want)
		must(t, err)
		if diff := cmp.Diff([]LinkChange{{nic, bpf.ProgFromNetdev, LinkRepaired}}, changes); diff != "" {
			t.Errorf("LinkNodeDevices() after a detach (-want +got):\n%s", diff)
		}
		wantRunning(t, "repaired", d, nic, "ingress from_netdev", "egress to_netdev")
		// Without its filter a link stays: it is all that there is.
		must(t, d.DetachNetdev(nic))
		_, err = d.LinkNodeDevices(want)
		must(t, err)
		wantRunning(t, "without filters", d, nic, "ingress from_netdev", "egress to_netdev")
	})
}

// Where somebody else has a program there are filters only, whoever came first.
func TestLinksYield(t *testing.T) {
	t.Parallel()
	ns, cfg := place(t)
	d := ensure(t, ns, cfg)
	needTCX(t, ns, d)
	next, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "Dual BSD/GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
	})
	must(t, err)
	defer next.Close()
	for _, tt := range []struct {
		name string
		come func(t *testing.T, ifindex int) (leave func())
		also []string // tcx programs besides ours
	}{
		{"tcx", func(t *testing.T, ifindex int) func() {
			l, err := link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: next, Attach: ebpf.AttachTCXIngress})
			must(t, err)
			return func() { must(t, l.Close()) }
		}, []string{"ingress ?"}},
		{"filter", func(t *testing.T, ifindex int) func() {
			f := &netlink.BpfFilter{
				FilterAttrs: netlink.FilterAttrs{
					LinkIndex: ifindex, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Priority: pins.FilterPriority + 1, Protocol: unix.ETH_P_ALL,
				},
				Fd: next.FD(), Name: "foreign", DirectAction: true,
			}
			must(t, netlink.FilterAdd(f))
			return func() { must(t, netlink.FilterDel(f)) }
		}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ns.Do(func() {
				nic := device(t, tt.name)
				want := NodeDevices{Netdevs: []int{nic}}
				sync := func(change string) {
					t.Helper()
					var wanted []LinkChange
					if change != "" {
						wanted = append(wanted, LinkChange{nic, bpf.ProgFromNetdev, change})
					}
					changes, err := d.LinkNodeDevices(want)
					must(t, err)
					changes = slices.DeleteFunc(changes, func(c LinkChange) bool { return c.Program == bpf.ProgToNetdev })
					if diff := cmp.Diff(wanted, changes, cmpopts.EquateEmpty()); diff != "" {
						t.Errorf("LinkNodeDevices() (-want +got):\n%s", diff)
					}
				}
				must(t, d.AttachNetdev(nic))
				leave := tt.come(t, nic)
				sync("")
				wantRunning(t, "that somebody else was on first", d, nic, append(tt.also, "egress to_netdev")...)
				leave()
				sync(LinkAttached)
				leave = tt.come(t, nic)
				sync(LinkYielded)
				wantRunning(t, "that somebody else has come to", d, nic, append(tt.also, "egress to_netdev")...)
				sync("")
				leave()
				sync(LinkAttached)
			})
		})
	}
}

func fdOf(t *testing.T, ns *netnstest.NS) int {
	t.Helper()
	fd, err := unix.Open(ns.Path(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	must(t, err)
	t.Cleanup(func() { must(t, unix.Close(fd)) })
	return fd
}
