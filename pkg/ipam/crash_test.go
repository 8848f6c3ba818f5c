// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// crash stands for a kill: it leaves the call by panic, and what the kernel does for a killed process (closing files, which gives the
// lock back) is done by the test.
type crash struct{ step string }

// crasher stops a call ahead of its nth step that changes a file; a write is two steps, the second one after its first half.
type crasher struct {
	left  int
	files []*os.File
}

func (k *crasher) step(name string) {
	if k.left--; k.left < 0 {
		panic(crash{name})
	}
}

type crashDevice struct {
	device
	k *crasher
}

func (d crashDevice) WriteAt(p []byte, at int64) (int, error) {
	name := fmt.Sprintf("write of %d bytes at %d", len(p), at)
	d.k.step(name)
	half := len(p) / 2
	if n, err := d.device.WriteAt(p[:half], at); err != nil {
		return n, err
	}
	d.k.step("second half of " + name)
	n, err := d.device.WriteAt(p[half:], at+int64(half))
	return half + n, err
}

// crashAt runs f with a copy of c that crashes ahead of step n, and says at which step that was, or "" if f ended before.
func crashAt(c *Config, n int, f func(*Config) error) (step string, err error) {
	k := &crasher{left: n}
	broken := *c
	broken.sys.before = k.step
	broken.sys.device = func(d device) device {
		k.files = append(k.files, d.(*os.File))
		return crashDevice{d, k}
	}
	defer func() {
		if r := recover(); r != nil {
			step = r.(crash).step
		}
		for _, f := range k.files {
			f.Close()
		}
		if step != "" {
			err = dropLock(c)
		}
	}()
	return "", f(&broken)
}

// dropLock closes the lock files that a crashed call left open in this process.
func dropLock(c *Config) error {
	want, err := filepath.EvalSymlinks(filepath.Join(c.dir(), "lock"))
	if err != nil {
		return err
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	for _, fd := range fds {
		if got, err := os.Readlink("/proc/self/fd/" + fd.Name()); err != nil || got != want {
			continue
		}
		var n int
		if _, err := fmt.Sscan(fd.Name(), &n); err != nil {
			return err
		}
		// The crashed call's os.File still owns the descriptor, so unlock instead of closing it under its feet.
		if err := flockFd(n); err != nil {
			return err
		}
	}
	return nil
}

// scenario is one call and the state that it meets.
type scenario struct {
	name  string
	setUp func(t *testing.T, c *Config)
	call  func(ctx context.Context, c *Config) error
}

func scenarios(wider, other string) []scenario {
	addPods := func(n int) func(*testing.T, *Config) {
		return func(t *testing.T, c *Config) {
			for i := range n {
				add(t, c, pod(i))
			}
		}
	}
	addOne := func(n int) func(context.Context, *Config) error {
		return func(ctx context.Context, c *Config) error {
			_, err := Add(ctx, c, pod(n))
			return err
		}
	}
	return []scenario{
		{"first Add", addPods(0), addOne(0)},
		{"Add", addPods(3), addOne(3)},
		{"Add that reuses", func(t *testing.T, c *Config) {
			addPods(253)(t, c)
			for i := range 5 {
				del(t, c, pod(i+7))
			}
		}, addOne(300)},
		{"Add that makes the file grow", addPods(minLeases), addOne(300)},
		{"Add with edited ranges", func(t *testing.T, c *Config) {
			addPods(4)(t, c)
			del(t, c, pod(2))
		}, func(ctx context.Context, c *Config) error {
			p, err := parsePlan([][]rangeConf{{{Subnet: wider}}})
			if err != nil {
				return err
			}
			edited := *c
			edited.plan = p
			return addOne(9)(ctx, &edited)
		}},
		{"Add that replaces a lease", addPods(3), func(ctx context.Context, c *Config) error {
			p, err := parsePlan([][]rangeConf{{{Subnet: other}}})
			if err != nil {
				return err
			}
			edited := *c
			edited.plan = p
			return addOne(1)(ctx, &edited)
		}},
		{"Del", addPods(3), func(ctx context.Context, c *Config) error { return Del(ctx, c, pod(1)) }},
		{"Del of the last", addPods(1), func(ctx context.Context, c *Config) error { return Del(ctx, c, pod(0)) }},
		{"GC", addPods(4), func(ctx context.Context, c *Config) error {
			_, err := GC(ctx, c, []Attachment{pod(2)})
			return err
		}},
		{"Add after a reboot", addPods(3), func(ctx context.Context, c *Config) error {
			next := *c
			next.sys.bootID = func() [16]byte { return [16]byte{1} }
			return addOne(5)(ctx, &next)
		}},
	}
}

// TestCrashAtEveryStep stops each call ahead of and in the middle of each of its writes. The next call must find the leases from before
// or from after (GC, which is a row of transactions, may also stop between two of them), and repeating the call must succeed.
func TestCrashAtEveryStep(t *testing.T) {
	for _, fam := range []struct{ name, subnet, wider, other string }{
		{"IPv4", "10.1.0.0/24", "10.1.0.0/23", "10.9.0.0/24"},
		{"IPv6", "fd00::/120", "fd00::/64", "fd00:9::/64"},
	} {
		for _, sc := range scenarios(fam.wider, fam.other) {
			t.Run(fam.name+"/"+sc.name, func(t *testing.T) {
				base := conf(t, t.TempDir(), subnet(fam.subnet), nil)
				sc.setUp(t, base)
				before := leaseSet(t, base)
				for n := 0; ; n++ {
					c := copyState(t, base)
					step, err := crashAt(c, n, func(c *Config) error { return sc.call(t.Context(), c) })
					if err != nil {
						t.Fatalf("step %d: %v", n, err)
					}
					if step == "" {
						if n < 3 {
							t.Errorf("only %d steps to crash at", n)
						}
						return
					}
					if sc.name == "Add after a reboot" {
						c.sys.bootID = func() [16]byte { return [16]byte{1} }
						before = nil // whatever was there is void
					}
					middle := leaseSet(t, c)
					verify(t, c)
					if err := sc.call(t.Context(), c); err != nil {
						t.Fatalf("call after a crash at %s: %v", step, err)
					}
					after := leaseSet(t, c)
					verify(t, c)
					between := sc.name == "GC" && isSubset(after, middle) && isSubset(middle, before)
					if !between && !slices.Equal(middle, before) && !slices.Equal(middle, after) {
						t.Fatalf("crash at %s left\n%v\nwant as before\n%v\nor as after\n%v", step, middle, before, after)
					}
				}
			})
		}
	}
}

func isSubset(a, b []string) bool {
	return !slices.ContainsFunc(a, func(s string) bool { return !slices.Contains(b, s) })
}

func leaseSet(t *testing.T, c *Config) []string {
	t.Helper()
	ls, err := Leases(t.Context(), c)
	if err != nil {
		t.Fatalf("Leases: %v", err)
	}
	var out []string
	for _, l := range ls {
		out = append(out, l.ContainerID+" "+joinAddrs(l.Addresses))
	}
	return out
}

// copyState gives a copy of c and its files in a directory of its own.
func copyState(t *testing.T, c *Config) *Config {
	t.Helper()
	out := *c
	out.RunDir = t.TempDir()
	if err := os.MkdirAll(out.dir(), 0o700); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(c.dir(), "state"))
	if errors.Is(err, os.ErrNotExist) {
		return &out
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(out.dir(), "state"), data, 0o600); err != nil {
		t.Fatal(err)
	}
	return &out
}

// TestDamagedStateIsRepaired overwrites each cell of a state, one at a time. No lease may change its address, none but the overwritten
// one may be lost, and the calls after it must work.
func TestDamagedStateIsRepaired(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		base := conf(t, t.TempDir(), subnet(fam.subnet)+`,"releaseCooldown":0`, nil)
		for i := range fam.addrs {
			add(t, base, pod(i))
		}
		del(t, base, pod(1))
		before := leaseSet(t, base)
		fi, err := os.Stat(filepath.Join(base.dir(), "state"))
		if err != nil {
			t.Fatal(err)
		}
		cells := int(fi.Size() / cellSize)
		for n := range cells {
			if n >= journalCell && n < firstCell && n%50 != 2 {
				continue // the journal is empty; a few of its cells will do
			}
			c := copyState(t, base)
			path := filepath.Join(c.dir(), "state")
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if strings.Trim(string(data[n*cellSize:(n+1)*cellSize]), "\x00") == "" && n%100 != 0 {
				continue // unused; a few of them will do
			}
			copy(data[n*cellSize:], strings.Repeat("\xa5", cellSize))
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
			a, err := Add(t.Context(), c, pod(20))
			if err != nil {
				t.Fatalf("Add with cell %d overwritten: %v", n, err)
			}
			after := leaseSet(t, c)
			lost := 0
			for _, l := range before {
				if !slices.Contains(after, l) {
					lost++
				}
				if a := " " + a.IPs[0].Address.Addr().String(); strings.HasSuffix(l, a) && slices.Contains(after, l) {
					t.Errorf("cell %d overwritten: Add gave%s, which is held by %s", n, a, l)
				}
			}
			if lost > 1 {
				t.Errorf("cell %d overwritten: %d leases are lost (-before +after):\n%s", n, lost, cmp.Diff(before, after))
			}
		}
	})
}

// TestUnreadableStateIsReplaced: nothing in the file can be made sense of.
func TestUnreadableStateIsReplaced(t *testing.T) {
	for _, tc := range []struct{ name, content string }{
		{"empty", ""}, {"short", "margay"}, {"noise", strings.Repeat("noise", 10000)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := conf(t, t.TempDir(), subnet("10.1.0.0/24"), nil)
			if err := os.MkdirAll(c.dir(), 0o700); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(c.dir(), "state")
			if err := os.WriteFile(path, []byte(tc.content), 0o600); err != nil {
				t.Fatal(err)
			}
			del(t, c, pod(0))
			if err := os.WriteFile(path, []byte(tc.content), 0o600); err != nil {
				t.Fatal(err)
			}
			if got := add(t, c, pod(0)); got != "10.1.0.2" {
				t.Errorf("Add = %s, want 10.1.0.2", got)
			}
			if kept, err := os.ReadFile(path + ".damaged"); err != nil || string(kept) != tc.content {
				t.Errorf("damaged state is kept as %q, %v", kept, err)
			}
			verify(t, c)
		})
	}
}

// TestFullDiskLeavesNothing fails every write in turn, as a full disk does.
func TestFullDiskLeavesNothing(t *testing.T) {
	c := conf(t, t.TempDir(), subnet("10.1.0.0/24"), nil)
	full := *c
	full.sys.device = func(d device) device { return fullDevice{d} }
	_, err := Add(t.Context(), &full, pod(0))
	wantCode(t, err, 5, "no space")
	if entries, _ := os.ReadDir(c.dir()); len(entries) != 1 || entries[0].Name() != "lock" {
		t.Errorf("after an Add on a full disk there is %v, want the lock only", entries)
	}
	add(t, c, pod(0))
	_, err = Add(t.Context(), &full, pod(1))
	wantCode(t, err, 5, "no space")
	if n := leaseCountOf(t, c); n != 1 {
		t.Errorf("%d leases, want 1", n)
	}
	verify(t, c)
}

type fullDevice struct{ device }

func (fullDevice) WriteAt([]byte, int64) (int, error) {
	return 0, errors.New("no space left on device")
}

// TestOrderOfReleaseSurvivesRebuild: growth and repair keep the queue.
func TestOrderOfReleaseSurvivesRebuild(t *testing.T) {
	ck := &clock{now: time.Hour}
	dir := t.TempDir()
	c := conf(t, dir, subnet("10.1.0.0/29")+`,"releaseCooldown":0`, ck)
	for i := range 5 {
		add(t, c, pod(i))
	}
	for _, i := range []int{4, 1, 3} {
		del(t, c, pod(i))
		ck.now++
	}
	s, err := openStore(t.Context(), c, c.plan)
	if err == nil {
		err = errors.Join(s.refit(c.plan), s.close())
	}
	if err != nil {
		t.Fatal(err)
	}
	verify(t, c)
	for i, want := range []string{"10.1.0.6", "10.1.0.3", "10.1.0.5"} {
		if got := add(t, c, pod(10+i)); got != want {
			t.Errorf("Add %d = %s, want %s", i, got, want)
		}
	}
}
