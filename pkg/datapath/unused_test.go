// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
)

// After an upgrade the programs of the build before go, but not while a device still carries one of them.
func TestUnusedProgramsAreRemoved(t *testing.T) {
	t.Parallel()
	ns, cfg := place(t)
	before := ensure(t, ns, cfg)
	var pod, nic int
	inNS(t, ns, func() error {
		for name, index := range map[string]*int{"pod": &pod, "nic": &nic} {
			a := netlink.NewLinkAttrs()
			a.Name = name
			if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: a, PeerName: name + "-peer"}); err != nil {
				return err
			}
			l, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			*index = l.Attrs().Index
		}
		if err := before.AttachPod(pod); err != nil {
			return err
		}
		return before.AttachNetdev(nic)
	})
	// What an upgrade does is another name of the directory.
	old := filepath.Join(cfg.BPFFS, "progs", "0123456789abcdef")
	must(t, os.Rename(cfg.ProgramDir(), old))
	now := ensure(t, ns, cfg)

	remove := func(age time.Duration, want ...string) {
		t.Helper()
		inNS(t, ns, func() error {
			got, err := RemoveUnusedPrograms(context.Background(), cfg, age)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("removed builds (-want +got):\n%s", diff)
			}
			return err
		})
	}
	remove(0)
	inNS(t, ns, func() error { return now.AttachPod(pod) })
	remove(0) // the NIC still has it
	inNS(t, ns, func() error { return now.AttachNetdev(nic) })
	remove(time.Hour) // an old plugin may still be at work
	remove(0, "0123456789abcdef")
	remove(0)
	if _, err := os.Stat(old); !os.IsNotExist(err) {
		t.Errorf("programs of the build before: %v, want none", err)
	}
	inNS(t, ns, func() error {
		if err := now.PodAttached(pod); err != nil {
			t.Errorf("PodAttached = %v, want nil", err)
		}
		d, err := Open(cfg)
		if err != nil {
			return err
		}
		return d.Close()
	})
}
