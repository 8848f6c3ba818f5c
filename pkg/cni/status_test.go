// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/pkg/pins"
)

// STATUS says what ADD would: where nothing is loaded it depends on the loader, and where the datapath is there it does not.
func TestStatusNeedsTheLoaderUntilSomethingIsLoaded(t *testing.T) {
	n := newRealNode(t, false) // loaded
	built, conf := n.bin, n.conf(familyRanges["dual stack"], set("cniVersion", "1.1.0"))
	n.bin = t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Link(filepath.Join(built, "margay"), filepath.Join(n.bin, "margay")))
	loader := filepath.Join(n.bin, loaderName)
	want := func(when, command, code string) {
		t.Helper()
		cmd, out := n.start(command, "c1", netnstest.New(t).Path(), conf)
		err := cmd.Wait()
		if (err == nil) != (code == "") || !strings.Contains(out.String(), code) || (code != "" && !strings.Contains(out.String(), loaderName)) {
			t.Errorf("%s, %s = %v: %s; want code %q and the loader's name", when, command, err, out, code)
		}
	}
	want("loaded, without the loader", "STATUS", "")
	must(os.RemoveAll(pins.Config{BPFFS: n.bpffs}.ProgramDir()))
	before := n.state()
	want("not loaded, without the loader", "STATUS", `"code": 50`)
	want("not loaded, without the loader", "ADD", `"code": 101`)
	must(os.WriteFile(loader, nil, 0o644))
	want("not loaded, with a file that is no program", "STATUS", `"code": 50`)
	must(os.Remove(loader))
	must(os.Link(filepath.Join(built, loaderName), loader))
	want("not loaded, with the loader", "STATUS", "")
	if diff := cmp.Diff(before, n.state()); diff != "" {
		t.Errorf("STATUS and the failed ADD changed something (-before +after):\n%s", diff)
	}
	want("not loaded, with the loader", "ADD", "")
}
