// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

const (
	// lockTimeout bounds the wait for the lock where the caller's context has no deadline of its own.
	lockTimeout = 30 * time.Second
	// lockPoll is how often Config.PollLock tries.
	lockPoll = 5 * time.Millisecond
	// lockTries bounds how often the directory may be removed under us (by an uninstall) while we wait.
	lockTries = 10
)

// lock takes the exclusive lock of the state in dir, making dir if it has to. Closing the file, which the kernel does for a killed
// process, gives the lock back.
func lock(ctx context.Context, dir string, poll bool) (*os.File, error) {
	path := filepath.Join(dir, "lock")
	for range lockTries {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("make lease directory: %w", err)
		}
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if errors.Is(err, fs.ErrNotExist) {
			continue // dir went away between the two calls
		}
		if err != nil {
			return nil, fmt.Errorf("open lock: %w", err)
		}
		if f, err = waitLock(ctx, f, poll); err != nil {
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		held, err := f.Stat()
		if err == nil {
			if named, err := os.Stat(path); err == nil && os.SameFile(held, named) {
				return f, nil
			}
		}
		f.Close() // the lock of a file that is no longer there protects nothing
	}
	return nil, fmt.Errorf("lock %s: it was removed %d times while we waited", path, lockTries)
}

// waitLock locks f or closes it. A blocked flock cannot be called off, so when ctx ends first, the goroutine that waits gives the lock
// back as soon as it gets it. With poll there is none.
func waitLock(ctx context.Context, f *os.File, poll bool) (*os.File, error) {
	err := flock(f, syscall.LOCK_EX|syscall.LOCK_NB)
	if err == nil {
		return f, nil
	}
	if !errors.Is(err, syscall.EWOULDBLOCK) {
		return nil, errors.Join(err, f.Close())
	}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, lockTimeout)
		defer cancel()
	}
	if poll {
		if err := pollLock(ctx, f); err != nil {
			return nil, errors.Join(err, f.Close())
		}
		return f, nil
	}
	done := make(chan error, 1)
	go func() { done <- flock(f, syscall.LOCK_EX) }()
	select {
	case err = <-done:
	case <-ctx.Done():
		go func() {
			<-done
			f.Close()
		}()
		return nil, ctx.Err()
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// pollLock tries to lock f until ctx ends.
func pollLock(ctx context.Context, f *os.File) error {
	for {
		if err := flock(f, syscall.LOCK_EX|syscall.LOCK_NB); !errors.Is(err, syscall.EWOULDBLOCK) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(lockPoll):
		}
	}
}

func flock(f *os.File, how int) error {
	for {
		// Fd would make the file blocking, which a regular file is anyway.
		if err := syscall.Flock(int(f.Fd()), how); err != syscall.EINTR {
			return err
		}
	}
}
