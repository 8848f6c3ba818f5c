// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/pins"
)

// However many call Ensure at once, in however many processes: one loads, and all get the same objects.
func TestEnsureConcurrently(t *testing.T) {
	t.Parallel()
	ns, cfg := place(t)
	raw, err := json.Marshal(cfg)
	must(t, err)
	var mu sync.Mutex
	got := map[string]int{}
	note := func(id string) { mu.Lock(); got[id]++; mu.Unlock() }

	var wg sync.WaitGroup
	ns.Do(func() {
		for range 3 {
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), ensureVar+"="+string(raw))
			var out, errs strings.Builder
			cmd.Stdout, cmd.Stderr = &out, &errs
			must(t, cmd.Start())
			wg.Go(func() {
				if err := cmd.Wait(); err != nil {
					t.Errorf("Ensure in another process: %v: %s", err, errs.String())
					return
				}
				note(strings.TrimSpace(out.String()))
			})
		}
	})
	for range 5 {
		wg.Go(func() {
			ns.Do(func() {
				d, err := Ensure(context.Background(), cfg)
				if err != nil {
					t.Errorf("Ensure: %v", err)
					return
				}
				defer d.Close()
				note(identify(d))
			})
		})
	}
	wg.Wait()
	if len(got) != 1 {
		t.Errorf("callers got %d different datapaths, want one: %v", len(got), got)
	}
}

// What a crash may leave is repaired by the next call, and what is in the maps stays.
func TestEnsureRepairs(t *testing.T) {
	t.Parallel()
	ns, cfg := place(t)
	d := ensure(t, ns, cfg)
	key, want := pins.PendingKeyOf("default", "web", ""), bpf.Pending{Identity: 77}
	must(t, d.Maps.Pending.Put(&key, &want))
	partial := cfg.ProgramDir() + "-partial"
	for _, tt := range []struct {
		name  string
		crash func() error
	}{
		{"after the maps, before the programs", func() error { return os.RemoveAll(cfg.ProgramDir()) }},
		{"between two programs", func() error {
			return errors.Join(os.Rename(cfg.ProgramDir(), partial), os.Remove(filepath.Join(partial, bpf.ProgToPod)))
		}},
		{"before the programs' directory got its name", func() error { return os.Rename(cfg.ProgramDir(), partial) }},
		{"with a program lost", func() error { return os.Remove(filepath.Join(cfg.ProgramDir(), bpf.ProgSweepFlows)) }},
		{"between two maps", func() error {
			return errors.Join(os.RemoveAll(cfg.ProgramDir()), os.Remove(pins.MapPath(cfg, "flows")), os.Remove(pins.MapPath(cfg, "policy")))
		}},
		{"with a temporary record", func() error {
			return errors.Join(os.RemoveAll(cfg.ProgramDir()), os.WriteFile(filepath.Join(cfg.Run, "sysctls.json.tmp"), []byte("{"), 0o600))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			must(t, tt.crash())
			if _, err := Open(cfg); !errors.Is(err, ErrNotLoaded) {
				t.Errorf("Open() = %v, want ErrNotLoaded", err)
			}
			d := ensure(t, ns, cfg)
			got, ok, err := d.LookupPending(key)
			if err != nil || !ok || got != want {
				t.Errorf("LookupPending() = %+v, %v, %v, want %+v", got, ok, err, want)
			}
			if _, err := os.Stat(partial); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s is still there", partial)
			}
			if visited, _, err := d.SweepFlows(context.Background()); err != nil || visited != 0 {
				t.Errorf("SweepFlows() = %d, %v, want an empty table", visited, err)
			}
		})
	}
}

func TestIncompatibleMapIsNamed(t *testing.T) {
	t.Parallel()
	ns, cfg := place(t)
	ensure(t, ns, cfg).Close()
	must(t, os.RemoveAll(cfg.ProgramDir()))
	path := pins.MapPath(cfg, "endpoints")
	must(t, os.Remove(path))
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 4, ValueSize: 32, MaxEntries: 1})
	must(t, err)
	defer m.Close()
	must(t, m.Pin(path))
	ns.Do(func() { _, err = Ensure(context.Background(), cfg) })
	if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "layout") {
		t.Errorf("Ensure() = %v, want an error that names %s and its layout", err, path)
	}
	if _, err := ebpf.LoadPinnedMap(path, nil); err != nil {
		t.Errorf("the foreign map is gone: %v", err)
	}
}

// A size counts when the map is made; a running map keeps its own.
func TestSizes(t *testing.T) {
	t.Parallel()
	ns, cfg := place(t)
	cfg.Sizes = map[string]uint32{"flows": 1024, "endpoints": 7}
	d := ensure(t, ns, cfg)
	if got := d.Maps.Flows.MaxEntries(); got != 1024 {
		t.Errorf("flows holds %d entries, want 1024", got)
	}
	must(t, os.RemoveAll(cfg.ProgramDir()))
	cfg.Sizes["endpoints"] = 9
	d = ensure(t, ns, cfg)
	if got := d.Maps.Endpoints.MaxEntries(); got != 7 {
		t.Errorf("endpoints holds %d entries after a new configuration, want the 7 that it was made with", got)
	}
}

// A container whose /proc/sys cannot be written has the node's somewhere else. What is remembered has the usual name.
func TestSettingsAreWrittenElsewhere(t *testing.T) {
	t.Parallel()
	ns, cfg := place(t)
	procSys := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(procSys, "net/ipv4"), 0o755))
	must(t, os.MkdirAll(filepath.Join(procSys, "net/ipv6/conf/all"), 0o755))
	inNS(t, ns, func() error { return os.WriteFile(sysctlForward4, []byte("0"), 0) })
	cfg.ProcSys = procSys
	ensure(t, ns, cfg).Close()
	for _, name := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
		if got, err := os.ReadFile(filepath.Join(procSys, name)); err != nil || string(got) != "1" {
			t.Errorf("%s = %q, %v, want 1", name, got, err)
		}
	}
	if diff := cmp.Diff(map[string]string{sysctlForward4: "0", sysctlForward6: "0"}, recorded(t, cfg, "sysctls.json")); diff != "" {
		t.Errorf("sysctls.json (-want +got):\n%s", diff)
	}
	inNS(t, ns, func() error {
		if got, err := readSysctl(sysctlForward4); err != nil || got != "0" {
			t.Errorf("%s = %s, %v, want it untouched", sysctlForward4, got, err)
		}
		return nil
	})
}

// What Ensure changes on the machine it writes down, with the value from before Margay, and never twice.
func TestChangesAreRemembered(t *testing.T) {
	t.Parallel()
	ns, cfg := place(t)
	inNS(t, ns, func() error { return os.WriteFile(sysctlForward4, []byte("0"), 0) })
	ensure(t, ns, cfg).Close()
	want := map[string]string{sysctlForward4: "0", sysctlForward6: "0"}
	if diff := cmp.Diff(want, recorded(t, cfg, "sysctls.json")); diff != "" {
		t.Errorf("sysctls.json (-want +got):\n%s", diff)
	}
	mounts := map[string]string{cfg.BPFFS: "bpf"}
	if diff := cmp.Diff(mounts, recorded(t, cfg, "mounts.json")); diff != "" {
		t.Errorf("mounts.json (-want +got):\n%s", diff)
	}

	// Somebody turns one off, and the programs are loaded anew: on again, and the record is the first one.
	must(t, os.RemoveAll(cfg.ProgramDir()))
	inNS(t, ns, func() error { return os.WriteFile(sysctlForward4, []byte("0"), 0) })
	must(t, remember(cfg, "sysctls.json", sysctlForward4, "7"))
	ensure(t, ns, cfg).Close()
	if diff := cmp.Diff(want, recorded(t, cfg, "sysctls.json")); diff != "" {
		t.Errorf("sysctls.json after a second load (-want +got):\n%s", diff)
	}
	inNS(t, ns, func() error {
		for _, path := range []string{sysctlForward4, sysctlForward6} {
			if v, err := readSysctl(path); err != nil || v != "1" {
				t.Errorf("%s = %s, %v, want 1", path, v, err)
			}
		}
		return nil
	})

	// A bpffs that was there is not ours to unmount.
	other := Config{BPFFS: filepath.Join(cfg.BPFFS, "second"), Run: t.TempDir()}
	ensure(t, ns, other).Close()
	if got := recorded(t, other, "mounts.json"); len(got) != 0 {
		t.Errorf("mounts.json = %v, want none: the bpffs was mounted already", got)
	}
}

func inNS(t *testing.T, ns *netnstest.NS, f func() error) {
	t.Helper()
	var err error
	ns.Do(func() { err = f() })
	must(t, err)
}

func recorded(t *testing.T, cfg Config, file string) map[string]string {
	t.Helper()
	got := map[string]string{}
	b, err := os.ReadFile(filepath.Join(cfg.Run, file))
	if errors.Is(err, fs.ErrNotExist) {
		return got
	}
	must(t, err)
	must(t, json.Unmarshal(b, &got))
	return got
}

// Check answers for a machine without Margay as for one with it, and changes nothing.
func TestCheck(t *testing.T) {
	t.Parallel()
	ns, cfg := place(t)
	must(t, pins.Check(cfg))
	for _, dir := range []string{cfg.BPFFS, cfg.Run} {
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("Check has made %s", dir)
		}
	}
	ensure(t, ns, cfg)
	must(t, pins.Check(cfg))
}

// Ensure does not wait for a lock longer than its context.
func TestEnsureGivesUpOnTheLock(t *testing.T) {
	t.Parallel()
	_, cfg := place(t)
	must(t, os.MkdirAll(cfg.Run, 0o755))
	unlock, err := lock(context.Background(), filepath.Join(cfg.Run, "datapath.lock"))
	must(t, err)
	defer unlock()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if _, err := Ensure(ctx, cfg); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "datapath.lock") {
		t.Errorf("Ensure() = %v, want the deadline and the lock's name", err)
	}
}
