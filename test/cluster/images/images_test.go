// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestParseLdd(t *testing.T) {
	tests := []struct {
		name, listed string
		want         []string
		fault        string
	}{
		{"libraries and linker", "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f1)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f2)\n",
			[]string{"/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"}, ""},
		{"missing library", "\tlibnone.so.1 => not found\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f2)\n", nil, "libnone.so.1"},
		{"static", "\tstatically linked\n", nil, "no file"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseLdd(tt.listed)
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("parseLdd (-want +got):\n%s", diff)
			}
			if (err != nil) != (tt.fault != "") || err != nil && !strings.Contains(err.Error(), tt.fault) {
				t.Errorf("parseLdd error = %v, want one that names %q", err, tt.fault)
			}
		})
	}
}

// unpack returns the headers, by name and without sizes, and the contents of a tar file.
func unpack(t *testing.T, content []byte) (map[string]string, map[string][]byte) {
	t.Helper()
	headers, files := map[string]string{}, map[string][]byte{}
	for r := tar.NewReader(bytes.NewReader(content)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return headers, files
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Uid != 0 || h.Gid != 0 || h.ModTime.Unix() != 0 {
			t.Errorf("%s: owner %d:%d, time %v; want root and the epoch", h.Name, h.Uid, h.Gid, h.ModTime)
		}
		headers[h.Name] = strings.TrimSpace(fmt.Sprintf("%c %04o %s", h.Typeflag, h.Mode, h.Linkname))
		if files[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}

// sample is a tree with one entry of each kind. Its file lies in a directory of the test.
func sample(t *testing.T) tree {
	t.Helper()
	source := filepath.Join(t.TempDir(), "source")
	if err := os.WriteFile(source, []byte("from a file"), 0o600); err != nil {
		t.Fatal(err)
	}
	return tree{
		"usr/bin/tool": {mode: 0o755, source: source},
		"etc/group":    {mode: 0o644, content: []byte("root")},
		"bin/sh":       {link: "bash"},
		"tmp":          {mode: fs.ModeDir | fs.ModeSticky | 0o777},
	}
}

// TestArchive reads an archive of two images that share a layer as a runtime would: names, config, layers and their digests must fit
// together, and a second packing must give the same bytes.
func TestArchive(t *testing.T) {
	dir := t.TempDir()
	l, err := sample(t).layer(filepath.Join(dir, "layer.tar"))
	if err != nil {
		t.Fatal(err)
	}
	a := archive{"two.tar", []image{
		{names: []string{"example.org/a:1", "example.org/b:1"}, layers: []layer{l}, entrypoint: []string{"/tool"}, command: []string{"pause"}},
		{names: []string{"example.org/c:1"}, layers: []layer{l}, user: "65535:65535"},
	}}
	path := filepath.Join(dir, a.file)
	if err := a.write(path); err != nil {
		t.Fatal(err)
	}
	packed, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	_, files := unpack(t, packed)
	var manifest []manifestEntry
	if err := json.Unmarshal(files["manifest.json"], &manifest); err != nil {
		t.Fatal(err)
	}
	if len(manifest) != 2 || len(files) != 4 {
		t.Fatalf("%d images in %d files, want 2 in 4: two configs, one layer, the manifest", len(manifest), len(files))
	}
	for i, m := range manifest {
		if diff := cmp.Diff(a.images[i].names, m.RepoTags); diff != "" {
			t.Errorf("names (-want +got):\n%s", diff)
		}
		var c imageConfig
		if err := json.Unmarshal(files[m.Config], &c); err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(files[m.Layers[0]])
		if want := []string{"sha256:" + hex.EncodeToString(sum[:])}; !cmp.Equal(want, c.RootFS.DiffIDs) {
			t.Errorf("diff_ids = %v, want %v", c.RootFS.DiffIDs, want)
		}
	}
	headers, contents := unpack(t, files[manifest[0].Layers[0]])
	want := map[string]string{
		"bin/": "5 0755", "bin/sh": "2 0777 bash", "etc/": "5 0755", "etc/group": "0 0644", "tmp/": "5 1777", "usr/": "5 0755",
		"usr/bin/": "5 0755", "usr/bin/tool": "0 0755",
	}
	if diff := cmp.Diff(want, headers); diff != "" {
		t.Errorf("layer (-want +got):\n%s", diff)
	}
	if got := string(contents["usr/bin/tool"]); got != "from a file" {
		t.Errorf("content of usr/bin/tool = %q", got)
	}

	again, err := sample(t).layer(filepath.Join(dir, "again.tar"))
	if err != nil {
		t.Fatal(err)
	}
	if again.digest != l.digest {
		t.Errorf("digest of an equal tree = %s, want %s", again.digest, l.digest)
	}
}

// TestArchiveFailureLeavesNothing: a layer that vanished must not leave half an archive that would then be imported.
func TestArchiveFailureLeavesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "broken.tar")
	a := archive{"broken.tar", []image{{names: []string{"example.org/a:1"}, layers: []layer{{path: "/nonexistent", digest: "00"}}}}}
	if err := a.write(path); err == nil {
		t.Error("write with a missing layer succeeded")
	}
	if left, err := filepath.Glob(path + "*"); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v (%v)", left, err)
	}
}

// TestPause: the program must go on until it is told to leave, and then leave at once and without an error.
func TestPause(t *testing.T) {
	built, err := buildPause(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		t.Run(signal.String(), func(t *testing.T) {
			cmd := exec.Command(built["pause"].source)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			time.Sleep(50 * time.Millisecond) // it blocks its signals in this time
			if err := cmd.Process.Signal(syscall.SIGCHLD); err != nil {
				t.Error(err)
			}
			select {
			case err := <-ended:
				t.Fatalf("ended by itself or by SIGCHLD: %v", err)
			case <-time.After(200 * time.Millisecond):
			}
			if err := cmd.Process.Signal(signal); err != nil {
				t.Error(err)
			}
			select {
			case err := <-ended:
				if err != nil {
					t.Errorf("ended with %v, want exit status 0", err)
				}
			case <-time.After(10 * time.Second):
				err := cmd.Process.Kill()
				t.Errorf("runs on for 10 s after the signal (killed: %v)", err)
			}
		})
	}
}
