// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/jsonwrite"
)

// Another command about the same attachment takes milliseconds; one that holds the lock longer than this hangs in the kernel or in an IPAM
// plugin, and waiting on would only hide it.
const lockTimeout = 15 * time.Second

// lockDir is below the run directory.
const lockDir = "locks"

// journal is what stands in an attachment's lock file while a command changes the attachment: whoever finds it there and gets the lock knows
// that the command was killed, or gave up, and that what it left belongs to nobody. ADD takes it away before it prints its result, so an
// attachment that a runtime was told of never has one from ADD; DEL's may be carried out by anybody, because nobody takes a DEL back.
type journal struct {
	Command     string `json:"command"` // ADD or DEL
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifName"`
	Netns       string `json:"netns,omitempty"`
	Network     string `json:"network"`
	// IPAMRun is the run directory of margay-ipam's leases, empty for the command's own; Adopted says that another plugin made the interface.
	IPAMRun string `json:"ipamRunDir,omitempty"`
	Adopted bool   `json:"adopted,omitempty"`
}

// attachmentLock is held while a command works on one attachment. The kernel gives it back with the process, however that ends.
type attachmentLock struct {
	file *os.File
	path string
	// journal is what is in the file: at first what an earlier command has left there; nil: nothing.
	journal *journal
}

// lockAttachment makes commands about one attachment exclude each other, also after a kill. An idle node has no lock files.
func lockAttachment(ctx context.Context, run, containerID, ifName string) (*attachmentLock, error) {
	if err := endpoint.CheckName(containerID, ifName); err != nil {
		return nil, fail(types.ErrInvalidEnvironmentVariables, err, "CNI_CONTAINERID or CNI_IFNAME cannot be used")
	}
	dir := filepath.Join(run, lockDir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fail(types.ErrIOFailure, err, "make the lock directory; is %s writable and not full?", run)
	}
	path := lockPath(run, containerID, ifName)
	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		l, err := tryLock(path)
		if err != nil {
			return nil, fail(types.ErrIOFailure, err, "lock %s", path)
		}
		if l != nil {
			return l, nil
		}
		select {
		case <-ctx.Done():
			return nil, fail(types.ErrTryAgainLater, ctx.Err(),
				"another command for container %s, interface %s is still running; see who holds %s", containerID, ifName, path)
		case <-time.After(pause):
		}
	}
}

func lockPath(run, containerID, ifName string) string {
	return filepath.Join(run, lockDir, containerID+"-"+ifName)
}

// tryLock returns nil without an error when somebody else has the lock. The holder removes the file before it lets go, so whoever gets the
// lock must look whether the file that it locked is still the one at path.
func tryLock(path string) (*attachmentLock, error) {
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
	l := &attachmentLock{file: f, path: path}
	if locked.Size > 0 {
		data, err := io.ReadAll(f)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("read what an earlier command left: %w", err), f.Close())
		}
		l.journal = parseJournal(data)
	}
	return l, nil
}

// parseJournal returns nil for what is none: a command was killed, or had no room, while it wrote it, and so before it changed anything.
func parseJournal(data []byte) *journal {
	var j journal
	if json.Unmarshal(data, &j) != nil || endpoint.CheckName(j.ContainerID, j.IfName) != nil {
		return nil
	}
	return &j
}

// encode writes what encoding/json would; see endpoint.Record.
func (j *journal) encode() []byte {
	var o jsonwrite.Object
	o.String("command", j.Command)
	o.String("containerID", j.ContainerID)
	o.String("ifName", j.IfName)
	o.OmitString("netns", j.Netns)
	o.String("network", j.Network)
	o.OmitString("ipamRunDir", j.IPAMRun)
	o.OmitTrue("adopted", j.Adopted)
	return o.Bytes()
}

// write makes j what is left if the command does not come to its end.
func (l *attachmentLock) write(j journal) error {
	data := j.encode()
	info, err := l.file.Stat()
	if err != nil {
		return err
	}
	// One write covers what an earlier command left: a kill leaves the one journal or the other.
	for int64(len(data)) < info.Size() {
		data = append(data, '\n')
	}
	if _, err := l.file.WriteAt(data, 0); err != nil {
		return err
	}
	l.journal = &j
	return nil
}

// clear says that there is nothing to undo any more.
func (l *attachmentLock) clear() error {
	if err := l.file.Truncate(0); err != nil {
		return err
	}
	l.journal = nil
	return nil
}

// release gives the lock back. The file stays where it has a journal.
func (l *attachmentLock) release() error {
	if l.journal != nil {
		return l.file.Close()
	}
	return errors.Join(os.Remove(l.path), l.file.Close())
}

// journal returns what an interrupted command of this attachment leaves behind.
func (at *attachment) journal(command string) journal {
	return journal{
		Command: command, ContainerID: at.args.ContainerID, IfName: at.args.IfName, Netns: at.args.Netns, Network: at.conf.Name,
		IPAMRun: at.leaseRun(), Adopted: at.conf.IPAM.Type == "",
	}
}
