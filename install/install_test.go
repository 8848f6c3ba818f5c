// SPDX-License-Identifier: Apache-2.0

package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/conf"
)

// node is a node's root directory, with binaries beside it to install from.
type node struct {
	t            *testing.T
	root, source string
}

func newNode(t *testing.T) *node {
	n := &node{t: t, root: t.TempDir(), source: t.TempDir()}
	for _, name := range append(append([]string{}, plugins...), tools...) {
		n.write(filepath.Join(n.source, name), "binary "+name, 0o755)
	}
	return n
}

func (n *node) write(path, content string, mode fs.FileMode) {
	n.t.Helper()
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		n.t.Fatal(err)
	}
}

// at returns where a path of the node is for the test.
func (n *node) at(path string) string { return filepath.Join(n.root, path) }

// run runs margay-install against the node and returns its exit code and everything it printed.
func (n *node) run(args ...string) (int, string) {
	n.t.Helper()
	var out strings.Builder
	code := run(n.t.Context(), append([]string{"--root", n.root, "--source-dir", n.source}, args...), &out, &out)
	return code, out.String()
}

// ok is run, for what must succeed.
func (n *node) ok(args ...string) string {
	n.t.Helper()
	code, out := n.run(args...)
	if code != exitOK {
		n.t.Fatalf("margay-install %v = exit code %d, want %d:\n%s", args, code, exitOK, out)
	}
	return out
}

// tree returns every file and directory below the node's root: path → mode and content.
func (n *node) tree() map[string]string {
	n.t.Helper()
	found := map[string]string{}
	err := filepath.WalkDir(n.root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		text := info.Mode().String()
		var on unix.Statfs_t
		if err := unix.Statfs(path, &on); err != nil {
			return err
		}
		if info.Mode().IsRegular() && on.Type != unix.BPF_FS_MAGIC { // a pinned map's file is a dump of it, or an error
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			text += " " + string(content)
		}
		found[strings.TrimPrefix(path, n.root)] = text
		return nil
	})
	if err != nil {
		n.t.Fatal(err)
	}
	return found
}

func (n *node) content(path string) string {
	n.t.Helper()
	content, err := os.ReadFile(n.at(path))
	if err != nil {
		n.t.Fatal(err)
	}
	return string(content)
}

const conflistPath = "/etc/cni/net.d/10-margay.conflist"

func TestInstall(t *testing.T) {
	n := newNode(t)
	n.ok("--bin-dir", "/usr/local/bin")
	want := map[string]string{conflistPath: "-rw-r--r-- " + string(conf.Conflist)}
	for _, name := range plugins {
		want["/opt/cni/bin/"+name] = "-rwxr-xr-x binary " + name
	}
	for _, name := range tools {
		want["/usr/local/bin/"+name] = "-rwxr-xr-x binary " + name
	}
	got := n.tree()
	for path, text := range got {
		if strings.HasPrefix(text, "d") || path == "/var/lib/margay/install.json" {
			delete(got, path)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("installed files (-want +got):\n%s", diff)
	}
}

func TestInstallWithoutBinDir(t *testing.T) {
	n := newNode(t)
	for _, name := range tools {
		if err := os.Remove(filepath.Join(n.source, name)); err != nil {
			t.Fatal(err)
		}
	}
	n.ok()
	if _, err := os.Stat(n.at("/opt/cni/bin/margay")); err != nil {
		t.Error(err)
	}
}

// TestInstallAgain: equal files are not touched, so that nothing that watches them wakes up.
func TestInstallAgain(t *testing.T) {
	n := newNode(t)
	n.ok("--bin-dir", "/usr/local/bin")
	before := n.inodes()
	out := n.ok("--bin-dir", "/usr/local/bin")
	if diff := cmp.Diff(before, n.inodes()); diff != "" {
		t.Errorf("files that the second run wrote (-before +after):\n%s", diff)
	}
	if strings.Contains(out, "installed ") || strings.Count(out, "unchanged ") != 7 {
		t.Errorf("second run printed, want six times unchanged:\n%s", out)
	}
}

// inodes tells a rewritten file from an untouched one.
func (n *node) inodes() map[string]string {
	n.t.Helper()
	found := map[string]string{}
	for path := range n.tree() {
		info, err := os.Lstat(n.at(path))
		if err != nil {
			n.t.Fatal(err)
		}
		found[path] = info.ModTime().String()
	}
	return found
}

// TestInstallOverRunningBinary: the new file replaces the old one's name; whoever runs or reads the old one keeps it whole.
func TestInstallOverRunningBinary(t *testing.T) {
	n := newNode(t)
	n.ok()
	old, err := os.Open(n.at("/opt/cni/bin/margay"))
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	n.write(filepath.Join(n.source, "margay"), "binary of the next version", 0o755)
	n.ok()
	content := make([]byte, 64)
	read, err := old.Read(content)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := string(content[:read]), "binary margay"; got != want {
		t.Errorf("open old file holds %q, want %q", got, want)
	}
	if got, want := n.content("/opt/cni/bin/margay"), "binary of the next version"; got != want {
		t.Errorf("installed file holds %q, want %q", got, want)
	}
}

func TestInstallConflist(t *testing.T) {
	const older = `{"name": "old", "plugins": [{"type": "margay"}]}`
	const edited = `{"name": "edited", "plugins": [{"type": "margay"}]}`
	shipped := string(conf.Conflist)
	tests := []struct {
		name     string
		prepare  func(n *node)
		args     []string
		want     string
		wantLine string
	}{
		{"none there", func(*node) {}, nil, shipped, "installed     " + conflistPath},
		{"the same there", func(n *node) { n.put(shipped) }, nil, shipped, "unchanged     " + conflistPath},
		{"installed by an older version", func(n *node) { n.install(older) }, nil, shipped, "installed     " + conflistPath},
		{"edited", func(n *node) { n.install(older); n.put(edited) }, nil, edited, "kept          " + conflistPath},
		{"somebody else's", func(n *node) { n.put(edited) }, nil, edited, "kept          " + conflistPath},
		{"edited, with force", func(n *node) { n.install(older); n.put(edited) }, []string{"--force"}, shipped, "installed     " + conflistPath},
		{"kept twice", func(n *node) { n.install(older); n.put(edited); n.ok() }, nil, edited, "kept          " + conflistPath},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t)
			tt.prepare(n)
			out := n.ok(tt.args...)
			if got := n.content(conflistPath); got != tt.want {
				t.Errorf("conflist = %s, want %s", got, tt.want)
			}
			if !strings.Contains(out, tt.wantLine) {
				t.Errorf("printed\n%s\nwant a line that begins %q", out, tt.wantLine)
			}
		})
	}
}

// put writes the node's conflist as a person does.
func (n *node) put(content string) {
	n.t.Helper()
	if err := os.MkdirAll(filepath.Dir(n.at(conflistPath)), 0o755); err != nil {
		n.t.Fatal(err)
	}
	n.write(n.at(conflistPath), content, 0o644)
}

// install runs margay-install with another conflist.
func (n *node) install(conflist string) {
	n.t.Helper()
	file := filepath.Join(n.t.TempDir(), "other.conflist")
	n.write(file, conflist, 0o600)
	n.ok("--conflist", file)
}

// TestConflistComesLast: a runtime that sees the conflist calls the plugin at once.
func TestConflistComesLast(t *testing.T) {
	n := newNode(t)
	// A directory in the place of the last binary lets the copying fail.
	if err := os.MkdirAll(n.at("/opt/cni/bin/margay-ipam"), 0o755); err != nil {
		t.Fatal(err)
	}
	if code, out := n.run(); code != exitFailed {
		t.Errorf("margay-install = exit code %d, want %d:\n%s", code, exitFailed, out)
	}
	for path := range n.tree() {
		if strings.HasSuffix(path, ".conflist") || strings.HasSuffix(path, tempSuffix) {
			t.Errorf("the failed run left %s", path)
		}
	}
}

func TestInstallRefuses(t *testing.T) {
	tests := []struct {
		name    string
		prepare func(n *node)
		args    []string
		want    int
		text    string
	}{
		{"missing binary", func(n *node) { os.Remove(filepath.Join(n.source, "margay-ipam")) }, nil, exitFailed, "find margay-ipam"},
		{"broken conflist", func(n *node) { n.write(filepath.Join(n.source, "c"), "{", 0o644) }, []string{"--conflist", "SOURCE/c"}, exitFailed, "decode the conflist"},
		{"conflist without name", func(n *node) { n.write(filepath.Join(n.source, "c"), "{}", 0o644) }, []string{"--conflist", "SOURCE/c"}, exitFailed, "no name"},
		{"conflist without us", func(n *node) { n.write(filepath.Join(n.source, "c"), `{"name":"n","plugins":[]}`, 0o644) }, []string{"--conflist", "SOURCE/c"}, exitFailed, "no plugin of type"},
		{"relative directory", func(*node) {}, []string{"--cni-bin-dir", "bin"}, exitUsage, "no absolute path"},
		{"all of bpffs", func(*node) {}, []string{"--bpffs", "/sys/fs/bpf"}, exitUsage, "a directory of its own"},
		{"all of /run", func(*node) {}, []string{"--run-dir", "/run"}, exitUsage, "a directory of its own"},
		{"argument", func(*node) {}, []string{"uninstall"}, exitUsage, "unexpected argument"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t)
			tt.prepare(n)
			before := n.tree()
			for i, arg := range tt.args {
				tt.args[i] = strings.Replace(arg, "SOURCE", n.source, 1)
			}
			code, out := n.run(tt.args...)
			if code != tt.want || !strings.Contains(out, tt.text) {
				t.Errorf("exit code %d and %q, want %d and %q", code, out, tt.want, tt.text)
			}
			if diff := cmp.Diff(before, n.tree()); diff != "" {
				t.Errorf("a refused run changed the node (-before +after):\n%s", diff)
			}
		})
	}
}

func TestInstallDryRun(t *testing.T) {
	n := newNode(t)
	before := n.tree()
	out := n.ok("--dry-run", "--bin-dir", "/usr/local/bin")
	if diff := cmp.Diff(before, n.tree()); diff != "" {
		t.Errorf("--dry-run changed the node (-before +after):\n%s", diff)
	}
	if got := strings.Count(out, "would install "); got != 7 {
		t.Errorf("--dry-run printed %d files, want 7:\n%s", got, out)
	}
}

func TestHelpAndVersion(t *testing.T) {
	n := newNode(t)
	if out := n.ok("--help"); !strings.Contains(out, "-cni-bin-dir") {
		t.Errorf("--help does not tell the flags:\n%s", out)
	}
	if out := n.ok("--version"); !strings.Contains(out, version) {
		t.Errorf("--version = %q, want %q in it", out, version)
	}
}
