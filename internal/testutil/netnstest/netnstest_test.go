// SPDX-License-Identifier: Apache-2.0

package netnstest_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/privileged"
)

// TestNoThreadStays: whichever thread makes a namespace, the process's first one too, none is in it afterwards. What kept it alive would keep
// its devices as well.
func TestNoThreadStays(t *testing.T) {
	privileged.Require(t)
	home, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 64 {
		netnstest.New(t).Delete()
		threads, err := filepath.Glob("/proc/self/task/*/ns/net")
		if err != nil || len(threads) == 0 {
			t.Fatalf("threads = %q, %v", threads, err)
		}
		for _, thread := range threads {
			if is, err := os.Readlink(thread); err == nil && is != home {
				t.Fatalf("after %d namespaces %s is %s, want %s", i+1, thread, is, home)
			}
		}
	}
}
