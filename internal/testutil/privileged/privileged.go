// SPDX-License-Identifier: Apache-2.0

// Package privileged decides what a test that needs root does without it: skip on a developer's machine, fail in CI
// (REQUIRE_PRIVILEGED=1), so that a skip can never hide there.
package privileged

import (
	"os"
	"testing"
)

// Require skips or fails t unless it runs as root.
func Require(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("REQUIRE_PRIVILEGED") == "1" {
		t.Fatal("REQUIRE_PRIVILEGED=1, but the test does not run as root")
	}
	t.Skip("needs root; REQUIRE_PRIVILEGED=1 makes this a failure")
}
