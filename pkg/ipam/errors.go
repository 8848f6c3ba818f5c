// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"context"
	"errors"
	"fmt"

	"github.com/containernetworking/cni/pkg/types"
)

// ErrNoLease is the CNI error code with which Check says that an attachment holds no lease, or other addresses than prevResult says.
const ErrNoLease uint = 100

// errDamaged says that the state's index contradicts itself. It never leaves the package: the state is rebuilt from its records.
var errDamaged = errors.New("lease state is damaged")

// failf makes a CNI error. The message is one line for a person; an error among args ends up in it as text.
func failf(code uint, format string, args ...any) *types.Error {
	return types.NewError(code, fmt.Sprintf(format, args...), "")
}

// asCNI gives every error that leaves the package a code: its own, 11 when time ran out, else 5 because all that is left is I/O.
func asCNI(doing string, err error) error {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*types.Error](err); ok {
		return e
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return types.NewError(types.ErrTryAgainLater, doing+": "+err.Error(), "another process holds the lock of the lease state")
	}
	return types.NewError(types.ErrIOFailure, doing+": "+err.Error(), "")
}
