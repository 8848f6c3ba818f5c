// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/privileged"
)

func TestDoRunsInsideAndComesBack(t *testing.T) {
	privileged.Require(t)
	ns := netnstest.New(t)
	before, err := os.Readlink(currentPath)
	if err != nil {
		t.Fatal(err)
	}
	var inside string
	fault := errors.New("told so")
	err = Do(ns.Path(), func() error {
		inside, _ = os.Readlink(currentPath)
		return fault
	})
	if !errors.Is(err, fault) {
		t.Errorf("Do() = %v, want the function's own error", err)
	}
	if inside == before {
		t.Errorf("Do() ran in %s, the namespace it was called from", inside)
	}
	for range 100 { // every thread that Do may have used
		if after := <-readLink(); after != before {
			t.Fatalf("a thread is in %s after Do(), want %s", after, before)
		}
	}
}

func readLink() chan string {
	out := make(chan string)
	go func() {
		s, _ := os.Readlink(currentPath)
		out <- s
	}()
	return out
}

func TestOpenAndExists(t *testing.T) {
	privileged.Require(t)
	ns := netnstest.New(t)
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		path   string
		exists bool
		open   error
	}{
		"namespace":          {ns.Path(), true, nil},
		"own":                {"/proc/self/ns/net", true, nil},
		"missing":            {filepath.Join(t.TempDir(), "x"), false, fs.ErrNotExist},
		"below a file":       {filepath.Join(plain, "x"), false, nil},
		"process gone":       {"/proc/4194304/ns/net", false, fs.ErrNotExist},
		"plain file":         {plain, false, ErrNotNamespace},
		"empty path of DEL":  {"", false, fs.ErrNotExist},
		"directory of files": {t.TempDir(), false, ErrNotNamespace},
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := Exists(c.path); got != c.exists || err != nil {
				t.Errorf("Exists() = %v, %v, want %v", got, err, c.exists)
			}
			h, err := Open(c.path)
			if c.open != nil && !errors.Is(err, c.open) {
				t.Errorf("Open() = %v, want %v", err, c.open)
			}
			if c.exists != (err == nil) {
				t.Errorf("Open() = %v, want success %v", err, c.exists)
			}
			if h != nil {
				_ = h.Close()
			}
		})
	}
}

func TestSame(t *testing.T) {
	privileged.Require(t)
	a, b := netnstest.New(t), netnstest.New(t)
	for name, c := range map[string]struct {
		x, y string
		want bool
	}{
		"itself": {a.Path(), a.Path(), true},
		"other":  {a.Path(), b.Path(), false},
	} {
		t.Run(name, func(t *testing.T) {
			x, err := Open(c.x)
			if err != nil {
				t.Fatal(err)
			}
			defer x.Close()
			y, err := Open(c.y)
			if err != nil {
				t.Fatal(err)
			}
			defer y.Close()
			if got, err := x.Same(y); got != c.want || err != nil {
				t.Errorf("Same() = %v, %v, want %v", got, err, c.want)
			}
		})
	}
}

// A namespace made for a test must be empty and gone afterwards, or tests see each other.
func TestNetnstest(t *testing.T) {
	privileged.Require(t)
	var path string
	t.Run("inside", func(t *testing.T) {
		ns := netnstest.New(t)
		path = ns.Path()
		ns.Do(func() {
			links, err := netlink.LinkList()
			if err != nil || len(links) != 1 || links[0].Attrs().Name != "lo" {
				t.Errorf("LinkList() = %v, %v, want lo alone", links, err)
			}
		})
	})
	if got, err := Exists(path); got || err != nil {
		t.Errorf("Exists() after the test = %v, %v, want false", got, err)
	}
}
