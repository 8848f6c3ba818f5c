// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"cmp"
	"slices"

	"github.com/margay-cni/margay/pkg/state"
)

// Problem is something about a file that a person should look at.
type Problem = state.Problem

// The severities of problems.
const (
	Error   = state.Error
	Warning = state.Warning
)

// Severity says what a problem does to its file.
type Severity = state.Severity

func sortProblems(problems []Problem) {
	slices.SortStableFunc(problems, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Message, b.Message))
	})
}

func hasErrors(problems []Problem) bool {
	return slices.ContainsFunc(problems, func(p Problem) bool { return p.Severity == Error })
}
