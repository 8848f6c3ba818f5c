// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/privileged"
)

// ensureVar makes the test binary a second process that calls Ensure with the configuration in it.
const ensureVar = "MARGAY_TEST_ENSURE"

func TestMain(m *testing.M) {
	if raw := os.Getenv(ensureVar); raw != "" {
		os.Exit(ensureProcess(raw))
	}
	os.Exit(m.Run())
}

func ensureProcess(raw string) int {
	var cfg Config
	if err := json.Unmarshal([]byte(raw), &cfg); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	d, err := Ensure(context.Background(), cfg)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println(identify(d))
	return 0
}

// identify names the kernel's objects behind an opened datapath.
func identify(d *Datapath) string {
	ids := map[string]uint32{}
	for name, p := range d.progs {
		if info, err := p.Info(); err == nil {
			id, _ := info.ID()
			ids[name] = uint32(id)
		}
	}
	for name, m := range d.Maps.fields() {
		if info, err := (*m).Info(); err == nil {
			id, _ := info.ID()
			ids[name] = uint32(id)
		}
	}
	b, _ := json.Marshal(ids)
	return string(b)
}

// place makes a network namespace and directories for a datapath that nothing is in yet.
func place(t *testing.T) (*netnstest.NS, Config) {
	t.Helper()
	privileged.Require(t)
	ns := netnstest.New(t)
	cfg := Config{BPFFS: filepath.Join(t.TempDir(), "bpf"), Run: filepath.Join(t.TempDir(), "run")}
	t.Cleanup(func() {
		if err := unix.Unmount(cfg.BPFFS, unix.MNT_DETACH); err != nil && !os.IsNotExist(err) && err != unix.EINVAL {
			t.Errorf("unmount bpffs: %v", err)
		}
	})
	return ns, cfg
}

// ensure calls Ensure in the namespace; it must succeed.
func ensure(t *testing.T, ns *netnstest.NS, cfg Config) *Datapath {
	t.Helper()
	var d *Datapath
	var err error
	ns.Do(func() { d, err = Ensure(context.Background(), cfg) })
	must(t, err)
	t.Cleanup(func() { d.Close() })
	return d
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
