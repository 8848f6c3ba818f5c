// SPDX-License-Identifier: Apache-2.0

package pins_test

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/privileged"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/pins"
)

// load makes a datapath.
func load(t *testing.T) (pins.Config, *datapath.Datapath) {
	t.Helper()
	privileged.Require(t)
	ns := netnstest.New(t)
	dir := t.TempDir()
	cfg := pins.Config{BPFFS: filepath.Join(dir, "bpf"), Run: filepath.Join(dir, "run"), Sizes: map[string]uint32{"endpoint_epochs": 64}}
	t.Cleanup(func() {
		if err := unix.Unmount(cfg.BPFFS, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount bpffs: %v", err)
		}
	})
	var (
		d   *datapath.Datapath
		err error
	)
	ns.Do(func() { d, err = datapath.Ensure(context.Background(), cfg) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return cfg, d
}

func open(t *testing.T, cfg pins.Config) *pins.Pods {
	t.Helper()
	p, err := pins.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	})
	return p
}

func openFiles(t *testing.T) int {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(files)
}

// What is written by system calls of our own is what a library reads, and the other way round.
func TestEntriesAreTheKernels(t *testing.T) {
	cfg, d := load(t)
	p := open(t, cfg)
	for _, s := range []string{"10.0.0.5", "fd00::5"} {
		a := netip.MustParseAddr(s)
		key := bpf.NewAddr(a)
		want := bpf.Endpoint{Ifindex: 77, Identity: 3, PolicyId: [2]uint32{4, 5}, Mac: [6]uint8{2, 1}, HostMac: [6]uint8{2, 2}}
		if _, ok, err := p.LookupEndpoint(a); ok || err != nil {
			t.Errorf("LookupEndpoint(%s) before = %v, %v, want none", a, ok, err)
		}
		if err := p.PutEndpoint(a, want); err != nil {
			t.Fatal(err)
		}
		var got bpf.Endpoint
		if err := d.Maps.Endpoints.Lookup(&key, &got); err != nil || got != want {
			t.Errorf("the kernel has %+v, %v, want %+v", got, err, want)
		}
		var epoch, outside uint32
		if err := errors.Join(d.Maps.EndpointEpochs.Lookup(uint32(77%64), &epoch), d.Maps.EndpointEpochs.Lookup(bpf.EpochSlotOutside, &outside)); err != nil || epoch == 0 || outside == 0 {
			t.Errorf("epochs = %d, %d, %v, want both raised", epoch, outside, err)
		}
		want.Identity = 9
		if err := d.Maps.Endpoints.Update(&key, &want, ebpf.UpdateAny); err != nil {
			t.Fatal(err)
		}
		if got, ok, err := p.LookupEndpoint(a); !ok || err != nil || got != want {
			t.Errorf("LookupEndpoint(%s) = %+v, %v, %v, want %+v", a, got, ok, err, want)
		}
		if err := p.DeleteEndpoint(a, 78); err != nil {
			t.Error(err)
		}
		if _, ok, _ := p.LookupEndpoint(a); !ok {
			t.Errorf("DeleteEndpoint(%s) with another device has deleted the entry", a)
		}
		for range 2 {
			if err := p.DeleteEndpoint(a, 77); err != nil {
				t.Error(err)
			}
			if _, ok, err := p.LookupEndpoint(a); ok || err != nil {
				t.Errorf("LookupEndpoint(%s) after DeleteEndpoint = %v, %v, want none", a, ok, err)
			}
		}
	}
}

// A pin that is missing is noticed, one that has other sizes is not used, and no attempt leaves a file open.
func TestOpenRefuses(t *testing.T) {
	cfg, _ := load(t)
	open(t, cfg)
	before := openFiles(t)
	program := filepath.Join(cfg.ProgramDir(), bpf.ProgToPod)
	for _, path := range []string{program, pins.MapPath(cfg, "endpoints"), pins.MapPath(cfg, "endpoint_epochs"), pins.MapPath(cfg, "pending")} {
		aside := path + "-aside"
		if err := os.Rename(path, aside); err != nil {
			t.Fatal(err)
		}
		if _, err := pins.Open(cfg); !errors.Is(err, pins.ErrNotLoaded) || !strings.Contains(err.Error(), path) {
			t.Errorf("Open() without %s = %v, want ErrNotLoaded and its name", path, err)
		}
		if err := os.Rename(aside, path); err != nil {
			t.Fatal(err)
		}
	}
	path := pins.MapPath(cfg, "pending")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 16, ValueSize: 4096, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(m.Pin(path), m.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := pins.Open(cfg); err == nil || errors.Is(err, pins.ErrNotLoaded) || !strings.Contains(err.Error(), "layout") {
		t.Errorf("Open() with a map of another layout = %v, want an error that says so", err)
	}
	if after := openFiles(t); after != before {
		t.Errorf("%d files are open, want the %d of before", after, before)
	}
}
