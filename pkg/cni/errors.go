// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/containernetworking/cni/pkg/types"
)

// Error codes of our own; docs/cni-errors.md says for each what it means and how to cure it. Numbers are never reused.
// 100 is pkg/ipam's: no such lease.
const (
	codeDatapath      = 101 // the datapath cannot be loaded or opened
	codeInterface     = 102 // CNI_IFNAME exists in the namespace already
	codeDevice        = 103 // the kernel refused a device, address, route or neighbour entry
	codeAttach        = 104 // programs could not be attached
	codeRegister      = 105 // the endpoint could not be registered
	codeAdopt         = 106 // the earlier plugin's interface cannot be adopted
	codeIPAM          = 107 // the IPAM plugin failed without a code, or its result is unusable
	codeCheckMismatch = 108 // CHECK: something that ADD did is no longer so
	codeHostPort      = 109 // a hostPort could not be registered
)

// fail makes a CNI error: what was being done and how to cure it as msg, the whole chain of causes as details. A cause that already is a
// CNI error keeps its own code, and an expired deadline is always code 11: the next attempt may well succeed.
func fail(code uint, err error, format string, args ...any) error {
	msg := fmt.Sprintf(format, args...)
	var known *types.Error
	if errors.As(err, &known) {
		return types.NewError(known.Code, msg+": "+known.Msg, known.Details)
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		code = types.ErrTryAgainLater
	}
	if err == nil {
		return types.NewError(code, msg, "")
	}
	return types.NewError(code, msg, err.Error())
}

// asError returns err as what CNI prints: a plain error here is a bug, and so says its code.
func asError(err error) *types.Error {
	var known *types.Error
	if errors.As(err, &known) {
		return known
	}
	return types.NewError(types.ErrInternal, err.Error(), "this error has no code of its own: please report it")
}

// fileCode returns the code for a failed file operation under the run directory.
func fileCode(err error) uint {
	var pathErr *fs.PathError
	if errors.As(err, &pathErr) {
		return types.ErrIOFailure
	}
	return codeRegister
}
