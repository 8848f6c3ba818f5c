// SPDX-License-Identifier: Apache-2.0

package netfilter

import (
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"
)

// TestUnsupported: what a kernel without nf_tables says is told from what can be mended.
func TestUnsupported(t *testing.T) {
	for name, tc := range map[string]struct {
		err  error
		want bool
	}{
		"no netfilter netlink":                     {unix.EPROTONOSUPPORT, true},
		"a query to a subsystem that is not there": {unix.EINVAL, true},
		"a transaction with it":                    {unix.EOPNOTSUPP, true},
		"an expression that is not there":          {unix.ENOENT, true},
		"no privilege":                             {unix.EPERM, false},
		"no memory":                                {unix.ENOMEM, false},
		"busy":                                     {unix.EBUSY, false},
	} {
		got := unsupported(fmt.Errorf("write: %w", tc.err))
		if errors.Is(got, ErrUnsupported) != tc.want || !errors.Is(got, tc.err) {
			t.Errorf("%s: unsupported(%v) = %v, want ErrUnsupported: %v", name, tc.err, got, tc.want)
		}
		if (notThere(got) == nil) != tc.want {
			t.Errorf("%s: notThere(%v) = %v", name, got, notThere(got))
		}
	}
	if err := unsupported(nil); err != nil {
		t.Errorf("unsupported(nil) = %v", err)
	}
}
