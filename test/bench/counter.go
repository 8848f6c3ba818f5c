// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// errNoCounter is returned where the CPU, or the hypervisor above it, offers no such counter.
var errNoCounter = errors.New("no such counter here")

// counter counts events that the kernel causes on the calling thread. The thread has to stay the same.
type counter struct{ fd int }

// newInstructionCounter counts the CPU's instructions.
func newInstructionCounter() (*counter, error) {
	return newCounter(unix.PERF_TYPE_HARDWARE, unix.PERF_COUNT_HW_INSTRUCTIONS)
}

func newCounter(kind uint32, event uint64) (*counter, error) {
	attr := unix.PerfEventAttr{Type: kind, Config: event, Bits: unix.PerfBitExcludeUser}
	attr.Size = uint32(unsafe.Sizeof(attr))
	fd, err := unix.PerfEventOpen(&attr, 0, -1, -1, unix.PERF_FLAG_FD_CLOEXEC)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOSYS) {
		return nil, errNoCounter
	}
	if err != nil {
		return nil, fmt.Errorf("open a performance counter: %w", err)
	}
	return &counter{fd}, nil
}

func (c *counter) close() error { return unix.Close(c.fd) }

// count returns how many events do caused. Without a counter it just does it.
func (c *counter) count(do func() error) (events float64, err error) {
	if c == nil {
		return 0, do()
	}
	before, err := c.read()
	if err != nil {
		return 0, err
	}
	if err := do(); err != nil {
		return 0, err
	}
	after, err := c.read()
	return float64(after - before), err
}

func (c *counter) read() (uint64, error) {
	var buf [8]byte
	if _, err := unix.Read(c.fd, buf[:]); err != nil {
		return 0, fmt.Errorf("read a performance counter: %w", err)
	}
	return binary.NativeEndian.Uint64(buf[:]), nil
}
