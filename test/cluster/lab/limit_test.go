// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"
)

// TestLimit: the limit is raised once, and put back by the last cluster only, unless somebody else has set it meanwhile.
func TestLimit(t *testing.T) {
	dir := t.TempDir()
	l := limit{setting: filepath.Join(dir, "setting"), enough: 4096, saved: filepath.Join(dir, "saved"), users: filepath.Join(dir, "cluster-*")}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	want := func(step string, n int, saved bool) {
		t.Helper()
		now, err := l.read()
		must(err)
		if _, err := os.Stat(l.saved); now != n || (err == nil) != saved {
			t.Errorf("%s: limit %d, saved file %v; want %d, %v", step, now, err == nil, n, saved)
		}
	}
	up := func(name string) {
		t.Helper()
		must(os.WriteFile(filepath.Join(dir, "cluster-"+name), nil, 0o600))
		must(l.raise())
	}
	down := func(name string) {
		t.Helper()
		must(os.Remove(filepath.Join(dir, "cluster-"+name)))
		must(l.restore())
	}
	set := func(n int) { must(os.WriteFile(l.setting, []byte(strconv.Itoa(n)+"\n"), 0o600)) }

	set(128)
	must(l.restore())
	want("no cluster yet", 128, false)
	up("a")
	want("one cluster", 4096, true)
	up("b")
	down("a")
	want("the first of two clusters ended", 4096, true)
	must(l.restore())
	want("down once more", 4096, true)
	down("b")
	want("the last cluster ended", 128, false)

	up("a")
	set(9000)
	down("a")
	want("somebody else has set it", 9000, false)
	up("a")
	want("it was enough", 9000, true)
	down("a")
	want("it was enough, the cluster ended", 9000, false)

	set(128)
	up("a")
	set(128) // by somebody else
	up("b")
	want("raised again", 4096, true)
	down("a")
	down("b")
	want("the last cluster ended again", 128, false)
}
