// SPDX-License-Identifier: Apache-2.0

// Package netns opens network namespaces by path and runs functions inside them. It knows nothing of devices (pkg/link) and keeps no
// state.
//
// A network namespace is a property of an operating system thread, and Go moves goroutines between threads at will. Do therefore runs
// its function in a fresh goroutine that is locked to its thread; goroutines started by that function are elsewhere again. Where a
// netlink socket is all that is needed, pkg/link binds one to an open namespace without any switching.
package netns

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// ErrNotNamespace is wrapped by the error about a path that is there, but is no namespace: for instance the empty file that stays behind
// when a bind mount is gone.
var ErrNotNamespace = errors.New("not a namespace")

// currentPath names the namespace of the calling thread, not of the process.
const currentPath = "/proc/thread-self/ns/net"

// Handle is an open network namespace. It keeps the namespace alive until it is closed.
type Handle struct {
	file *os.File
}

// Open opens the namespace at path. The error wraps fs.ErrNotExist when nothing is there and ErrNotNamespace when something else is.
func Open(path string) (*Handle, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return nil, errors.Join(fmt.Errorf("examine network namespace %s: %w", path, err), f.Close())
	}
	if st.Type != unix.NSFS_MAGIC {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, ErrNotNamespace), f.Close())
	}
	return &Handle{file: f}, nil
}

// Current opens the namespace of the calling goroutine's thread. Call it with the thread locked wherever threads may differ.
func Current() (*Handle, error) {
	return Open(currentPath)
}

// ID tells network namespaces of one machine apart: device and inode of their files. The kernel may give it to another one later.
// The zero ID stands for one that is not known.
type ID struct {
	Dev, Ino uint64
}

// String is the form of records.
func (id ID) String() string {
	return fmt.Sprintf("%d:%d", id.Dev, id.Ino)
}

// ParseID is the inverse of String; what is none is the zero ID.
func ParseID(s string) ID {
	var id ID
	if n, err := fmt.Sscanf(s, "%d:%d", &id.Dev, &id.Ino); n != 2 || err != nil || id.String() != s {
		return ID{}
	}
	return id
}

// Identify returns the ID of the namespace at path. The errors are Open's.
func Identify(path string) (id ID, err error) {
	h, err := Open(path)
	if err != nil {
		return ID{}, err
	}
	defer func() { err = errors.Join(err, h.Close()) }()
	return h.ID()
}

// Exists says whether path is a network namespace. A missing path and one whose bind mount is gone are both a plain false.
func Exists(path string) (bool, error) {
	if path == "" {
		return false, nil
	}
	var st unix.Statfs_t
	err := unix.Statfs(path, &st)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ESRCH):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("examine network namespace %s: %w", path, err)
	}
	return st.Type == unix.NSFS_MAGIC, nil
}

// FD returns the file descriptor, valid until Close.
func (h *Handle) FD() int {
	return int(h.file.Fd())
}

// Close releases the namespace.
func (h *Handle) Close() error {
	return h.file.Close()
}

// ID returns what tells the namespace from others.
func (h *Handle) ID() (ID, error) {
	var st unix.Stat_t
	if err := unix.Fstat(h.FD(), &st); err != nil {
		return ID{}, fmt.Errorf("examine network namespace %s: %w", h.file.Name(), err)
	}
	return ID{Dev: uint64(st.Dev), Ino: st.Ino}, nil
}

// Same says whether both handles are of one namespace.
func (h *Handle) Same(other *Handle) (bool, error) {
	a, err := h.ID()
	if err != nil {
		return false, err
	}
	b, err := other.ID()
	return a == b, err
}

// Do runs f inside the namespace and returns its error. The thread goes back to where it was afterwards; one that cannot is destroyed.
func (h *Handle) Do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := Current()
		if err != nil {
			runtime.UnlockOSThread()
			done <- err
			return
		}
		if err := unix.Setns(h.FD(), unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			done <- errors.Join(fmt.Errorf("enter network namespace %s: %w", h.file.Name(), err), home.Close())
			return
		}
		err = f()
		// Without the unlock the thread dies with this goroutine, and nobody meets it in the wrong namespace.
		if unix.Setns(home.FD(), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		done <- errors.Join(err, home.Close())
	}()
	return <-done
}

// Do runs f inside the namespace at path; see Handle.Do.
func Do(path string, f func() error) (err error) {
	h, err := Open(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.Close()) }()
	return h.Do(f)
}
