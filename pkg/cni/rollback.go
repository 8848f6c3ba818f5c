// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"errors"
	"fmt"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
)

// rollback is what has to be undone when ADD fails, in the order in which it was done.
type rollback struct {
	undo []undoStep
	// failed says that something could not be undone.
	failed bool
}

type undoStep struct {
	what string
	do   func() error
}

// add registers how to undo a step. Register it before the step if the step can fail half-way and undoing nothing is harmless.
func (r *rollback) add(what string, do func() error) {
	r.undo = append(r.undo, undoStep{what, do})
}

// run undoes everything, last step first, if *err says that ADD failed. What cannot be undone is added to the error's details: the
// runtime calls DEL after a failed ADD, which tries again.
func (r *rollback) run(err *error) {
	if *err == nil {
		return
	}
	var faults []error
	for _, u := range slices.Backward(r.undo) {
		if undoErr := u.do(); undoErr != nil {
			faults = append(faults, fmt.Errorf("undo: %s: %w", u.what, undoErr))
		}
	}
	if len(faults) == 0 {
		return
	}
	r.failed = true
	e := asError(*err)
	details := errors.Join(faults...).Error()
	if e.Details != "" {
		details = e.Details + "\n" + details
	}
	*err = types.NewError(e.Code, e.Msg, details)
}
