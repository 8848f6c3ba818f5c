// SPDX-License-Identifier: Apache-2.0

// Package netnstest makes network namespaces for tests, each bound to a file in the test's own temporary directory and gone when the
// test ends. It needs root: call privileged.Require first.
package netnstest

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// NS is a network namespace that lives until the test ends (or Delete), loopback up.
type NS struct {
	t    testing.TB
	path string
	gone bool
}

// New makes a namespace.
func New(t testing.TB) *NS {
	t.Helper()
	path := filepath.Join(t.TempDir(), "net")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := create(path); err != nil {
		t.Fatalf("make network namespace: %v", err)
	}
	ns := &NS{t: t, path: path}
	t.Cleanup(ns.Delete)
	return ns
}

// create binds a fresh namespace to path. Its thread goes home again: the first thread of a process would not end with its goroutine, and keep
// the namespace alive as long as the process lives.
func create(path string) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			done <- err
			return
		}
		err = bindFresh(path)
		if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back == nil {
			runtime.UnlockOSThread()
		} else {
			err = errors.Join(err, back)
		}
		done <- errors.Join(err, home.Close())
	}()
	return <-done
}

// bindFresh leaves the thread in the new namespace.
func bindFresh(path string) error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	return unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
}

// Path returns the file that the namespace is bound to, as CNI_NETNS wants it.
func (n *NS) Path() string {
	return n.path
}

// Delete unmounts the namespace and removes its file before the test ends, as a container runtime does. The second call does nothing.
func (n *NS) Delete() {
	if n.gone {
		return
	}
	n.gone = true
	if err := unix.Unmount(n.path, unix.MNT_DETACH); err != nil {
		n.t.Errorf("unmount network namespace %s: %v", n.path, err)
	}
	if err := os.Remove(n.path); err != nil {
		n.t.Errorf("remove network namespace: %v", err)
	}
}

// Do runs f inside the namespace, on the calling goroutine, so f may call t.Fatal and start processes. Goroutines that f starts run
// outside. A fuzz target may call it: so it is no t.Helper, which a testing.F refuses there.
func (n *NS) Do(f func()) {
	runtime.LockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		n.t.Fatalf("open current network namespace: %v", err)
	}
	target, err := os.Open(n.path)
	if err != nil {
		runtime.UnlockOSThread()
		_ = home.Close()
		n.t.Fatalf("open network namespace: %v", err)
	}
	defer func() {
		_ = target.Close()
		if err := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); err != nil {
			n.t.Errorf("leave network namespace: %v", err) // the thread stays locked and ends with the test
		} else {
			runtime.UnlockOSThread()
		}
		_ = home.Close()
	}()
	if err := unix.Setns(int(target.Fd()), unix.CLONE_NEWNET); err != nil {
		n.t.Fatalf("enter network namespace: %v", err)
	}
	f()
}
