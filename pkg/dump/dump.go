// SPDX-License-Identifier: Apache-2.0

// Package dump repeats netlink dumps. The kernel answers one in parts, and marks it as interrupted when somebody changed the table between two
// parts: entries may then be missing or there twice. It keeps no state.
package dump

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
)

// attempts bounds how often a dump is made. Each fails only when somebody changed the table meanwhile.
const attempts = 32

// Whole calls list until the dump that it makes is consistent, and returns that. The error wraps netlink.ErrDumpInterrupted when none of many
// in a row was; other errors are list's.
func Whole[T any](list func() ([]T, error)) ([]T, error) {
	var err error
	for range attempts {
		var out []T
		if out, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return out, err
		}
	}
	return nil, fmt.Errorf("%w (%d times in a row)", err, attempts)
}
