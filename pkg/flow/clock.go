// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// Clock relates the programs' clock (CLOCK_MONOTONIC) to the wall clock at one instant.
type Clock struct {
	// Wall and Monotonic were read together.
	Wall      time.Time
	Monotonic time.Duration
}

// Now reads both clocks.
func Now() (Clock, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return Clock{}, fmt.Errorf("read the monotonic clock: %w", err)
	}
	return Clock{Wall: time.Now(), Monotonic: time.Duration(ts.Nano())}, nil
}

// Time converts a program's nanoseconds to wall clock time.
func (c Clock) Time(nanoseconds uint64) time.Time {
	return c.Wall.Add(time.Duration(nanoseconds) - c.Monotonic).Round(0)
}

// Age is how long before the clock was read the program's second lastSeen was; never negative.
func (c Clock) Age(lastSeen uint32) time.Duration {
	return max(0, c.Monotonic.Truncate(time.Second)-time.Duration(lastSeen)*time.Second)
}
