// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/privileged"
)

// The kernel's own clock stands in for the CPU's counters, which many virtual machines do not have.
func TestCounter(t *testing.T) {
	privileged.Require(t)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	c, err := newCounter(unix.PERF_TYPE_SOFTWARE, unix.PERF_COUNT_SW_TASK_CLOCK)
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	work := func(n int) func() error {
		return func() error {
			for range n {
				unix.Getppid()
			}
			return nil
		}
	}
	few, err1 := c.count(work(10))
	many, err2 := c.count(work(100_000))
	if err := errors.Join(err1, err2); err != nil || few <= 0 || many < 10*few {
		t.Errorf("counted %v for 10 calls, %v for 100000, %v", few, many, err)
	}
}

func TestNoCounter(t *testing.T) {
	privileged.Require(t)
	if c, err := newCounter(unix.PERF_TYPE_SOFTWARE, 1<<40); !errors.Is(err, errNoCounter) {
		t.Errorf("counter of an event that is none: %v, %v, want %v", c, err, errNoCounter)
	}
	called := false
	if n, err := (*counter)(nil).count(func() error { called = true; return nil }); n != 0 || err != nil || !called {
		t.Errorf("count without a counter = %v, %v, called %v", n, err, called)
	}
}
