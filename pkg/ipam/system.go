// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// system is what the package asks of the machine. Tests replace parts of it to control time and to stop a call between two steps.
type system struct {
	// boottime is CLOCK_BOOTTIME: like the state it starts with the boot, and it neither jumps nor stands still in suspend.
	boottime func() time.Duration
	clock    func() time.Time
	bootID   func() [16]byte
	// before is called ahead of each step that changes a file, with the step's name.
	before func(step string)
	// device wraps the state file.
	device func(device) device
	// maxReleased is explained at order.
	maxReleased uint32
}

// device is the part of os.File with which the state is read and written.
type device interface {
	io.ReaderAt
	io.WriterAt
}

func realSystem() system {
	return system{
		boottime: boottime,
		clock:    time.Now,
		bootID:   bootID,
		before:   func(string) {},
		device:   func(d device) device { return d },

		maxReleased: 1 << 16,
	}
}

func boottime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0 // cannot fail on any kernel that runs BPF; 0 only makes every released address count as cooling down
	}
	return time.Duration(ts.Nano())
}

// bootID returns the kernel's boot id, zero where /proc does not tell: then a state is never void.
func bootID() [16]byte {
	var id [16]byte
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return id
	}
	n := 0
	for _, c := range data {
		var digit byte
		switch {
		case '0' <= c && c <= '9':
			digit = c - '0'
		case 'a' <= c && c <= 'f':
			digit = c - 'a' + 10
		default:
			continue
		}
		if n < 32 {
			id[n/2] = id[n/2]<<4 | digit
			n++
		}
	}
	return id
}

// nsID tells one network namespace from another that later got the same path. The zero value means unknown.
type nsID struct {
	dev, ino uint64
}

func statNetns(path string) (nsID, error) {
	if path == "" {
		return nsID{}, nil
	}
	fi, err := os.Stat(path)
	if err != nil {
		return nsID{}, err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return nsID{}, nil
	}
	return nsID{dev: uint64(st.Dev), ino: st.Ino}, nil
}

// netnsExists says whether the namespace that the lease was made for may still be there. In doubt it says yes: an address that is
// kept too long is a nuisance, one that is leased twice is an outage.
func (l *Lease) netnsExists() bool {
	id, err := statNetns(l.Netns)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return false
	}
	return err != nil || l.ns == nsID{} || id == nsID{} || id == l.ns
}
