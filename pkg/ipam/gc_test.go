// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/privileged"
)

func TestCheck(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		c := conf(t, t.TempDir(), subnet(fam.subnet), nil)
		wantCode(t, Check(t.Context(), c, pod(0), nil), ErrNoLease, "c0")
		a := netip.MustParseAddr(add(t, c, pod(0)))
		if err := Check(t.Context(), c, pod(0), nil); err != nil {
			t.Errorf("Check = %v, want nil", err)
		}
		if err := Check(t.Context(), c, pod(0), []netip.Addr{netip.MustParseAddr("192.0.2.1"), a}); err != nil {
			t.Errorf("Check with the address among others = %v, want nil", err)
		}
		wantCode(t, Check(t.Context(), c, pod(0), []netip.Addr{netip.MustParseAddr("192.0.2.1")}), ErrNoLease, "prevResult")
		wantCode(t, Check(t.Context(), c, pod(1), nil), ErrNoLease)
		other := pod(0)
		other.IfName = "net1"
		wantCode(t, Check(t.Context(), c, other, nil), ErrNoLease)
		del(t, c, pod(0))
		wantCode(t, Check(t.Context(), c, pod(0), nil), ErrNoLease)
	})
}

func TestGC(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		dir := t.TempDir()
		c := conf(t, dir, subnet(fam.subnet), nil)
		if r, err := GC(t.Context(), c, nil); err != nil || len(r.Freed)+len(r.Kept) != 0 {
			t.Errorf("GC without state = %+v, %v, want nothing", r, err)
		}
		alive, reused := pod(0), pod(1)
		alive.Netns, reused.Netns = filepath.Join(dir, "alive"), filepath.Join(dir, "reused")
		touch(t, alive.Netns)
		touch(t, reused.Netns)
		for _, at := range []Attachment{alive, reused, pod(2), pod(3)} {
			add(t, c, at)
		}
		// Another namespace at the same path: the new file exists before the old one goes, so it has another inode.
		touch(t, reused.Netns+".new")
		if err := os.Rename(reused.Netns+".new", reused.Netns); err != nil {
			t.Fatal(err)
		}
		r, err := GC(t.Context(), c, []Attachment{alive, reused, {ContainerID: "c2", IfName: "eth0"}})
		if got := names(r.Freed); err != nil || got != "c3" || len(r.Kept) != 0 {
			t.Fatalf("GC with c0, c1, c2 valid freed %q, kept %q, %v, want c3 and none", got, names(r.Kept), err)
		}
		r, err = GC(t.Context(), c, nil)
		if freed, kept := names(r.Freed), names(r.Kept); err != nil || freed != "c1 c2" || kept != "c0" {
			t.Fatalf("GC with an empty list freed %q, kept %q, %v, want \"c1 c2\" and c0", freed, kept, err)
		}
		// A list that has something in it counts, whether the namespace exists or not.
		r, err = GC(t.Context(), c, []Attachment{pod(9)})
		if got := names(r.Freed); err != nil || got != "c0" {
			t.Fatalf("GC with another one valid freed %q, %v, want c0", got, err)
		}
		verify(t, c)
	})
}

func names(ls []Lease) string {
	var out []string
	for _, id := range []string{"c0", "c1", "c2", "c3"} {
		for _, l := range ls {
			if l.ContainerID == id {
				out = append(out, id)
			}
		}
	}
	return strings.Join(out, " ")
}

func TestRebootVoidsLeases(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		c := conf(t, t.TempDir(), subnet(fam.subnet), nil)
		add(t, c, pod(0))
		next := *c
		next.sys.bootID = func() [16]byte { return [16]byte{1} }
		wantCode(t, Check(t.Context(), &next, pod(0), nil), ErrNoLease)
		if _, err := os.Stat(filepath.Join(c.dir(), "state")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("state of an earlier boot: %v, want it removed", err)
		}
		add(t, c, pod(0))
		if got := add(t, &next, pod(1)); got != fam.addrs[0] {
			t.Errorf("Add after a reboot = %s, want %s", got, fam.addrs[0])
		}
		if n := leaseCountOf(t, &next); n != 1 {
			t.Errorf("%d leases, want 1", n)
		}
	})
}

// TestFullTmpfs: with not a block left on /run, leases can still be taken from the reserved space and given back.
func TestFullTmpfs(t *testing.T) {
	privileged.Require(t)
	eachFamily(t, func(t *testing.T, fam family) {
		dir := t.TempDir()
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
			t.Fatalf("mount tmpfs: %v", err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(dir, 0); err != nil {
				t.Errorf("unmount tmpfs: %v", err)
			}
		})
		c := conf(t, dir, subnet(fam.subnet)+`,"releaseCooldown":0`, nil)
		add(t, c, pod(0))
		if err := os.WriteFile(filepath.Join(dir, "filler"), make([]byte, 2<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
			t.Fatalf("fill tmpfs = %v, want ENOSPC", err)
		}
		add(t, c, pod(1))
		del(t, c, pod(0))
		del(t, c, pod(1))
		verify(t, c)
		other := *c
		other.Network = "other"
		_, err := Add(t.Context(), &other, pod(0))
		wantCode(t, err, 5, "no space left on device")
	})
}
