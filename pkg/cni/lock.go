// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/endpoint"
)

// Another command about the same attachment takes milliseconds; one that holds the lock longer than this hangs in the kernel or in an IPAM
// plugin, and waiting on would only hide it.
const lockTimeout = 15 * time.Second

// lockAttachment makes commands about one attachment exclude each other, also after a kill: the kernel releases the lock with the process.
// The file is removed by unlock, so an idle node has none.
func lockAttachment(ctx context.Context, run, containerID, ifName string) (unlock func() error, err error) {
	if err := endpoint.CheckName(containerID, ifName); err != nil {
		return nil, fail(types.ErrInvalidEnvironmentVariables, err, "CNI_CONTAINERID or CNI_IFNAME cannot be used")
	}
	dir := filepath.Join(run, "locks")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fail(types.ErrIOFailure, err, "make the lock directory; is %s writable and not full?", run)
	}
	path := filepath.Join(dir, containerID+"-"+ifName)
	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		f, err := tryLock(path)
		if err != nil {
			return nil, fail(types.ErrIOFailure, err, "lock %s", path)
		}
		if f != nil {
			return func() error { return errors.Join(os.Remove(path), f.Close()) }, nil
		}
		select {
		case <-ctx.Done():
			return nil, fail(types.ErrTryAgainLater, ctx.Err(),
				"another command for container %s, interface %s is still running; see who holds %s", containerID, ifName, path)
		case <-time.After(pause):
		}
	}
}

// tryLock returns nil without an error when somebody else has the lock. The holder removes the file before it lets go, so whoever gets the
// lock must look whether the file that it locked is still the one at path.
func tryLock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, f.Close()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("flock: %w", err), f.Close())
	}
	var locked, current unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &locked); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	err = unix.Stat(path, &current)
	if errors.Is(err, fs.ErrNotExist) || err == nil && (current.Ino != locked.Ino || current.Dev != locked.Dev) {
		return nil, f.Close()
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
