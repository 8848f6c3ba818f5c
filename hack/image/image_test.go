// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

const root = "../.."

// binDir makes a directory with a small program under every name that the image has.
func binDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	source := filepath.Join(dir, "main.go")
	if err := os.WriteFile(source, []byte("package main\n\nfunc main() { println(\"hello\") }\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	first := filepath.Join(dir, binaries[0])
	cmd := exec.Command("go", "build", "-trimpath", "-o", first, source)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH=amd64")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v: %s", cmd, err, out)
	}
	for _, b := range binaries[1:] {
		if err := os.Link(first, filepath.Join(dir, b)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// makeImage runs the program, and returns the file that it wrote.
func makeImage(t *testing.T, bin string) string {
	t.Helper()
	output := filepath.Join(t.TempDir(), "new", "image.tar")
	var out bytes.Buffer
	code := run([]string{"--bin", bin, "--source", root, "--output", output, "--tag", "margay-cni/margay:v1", "--tag", "margay-cni/margay:latest",
		"--version", "v1", "--commit", "0123abc", "--created", "2026-01-02T03:04:05+01:00"}, &out, &out)
	if code != 0 {
		t.Fatalf("image = exit code %d: %s", code, &out)
	}
	return output
}

func load(t *testing.T, file, tag string) v1.Image {
	t.Helper()
	ref, err := name.NewTag(tag)
	if err != nil {
		t.Fatal(err)
	}
	image, err := tarball.ImageFromPath(file, &ref)
	if err != nil {
		t.Fatalf("load %s: %v", tag, err)
	}
	return image
}

func TestContents(t *testing.T) {
	bin := binDir(t)
	file := makeImage(t, bin)
	image := load(t, file, "margay-cni/margay:latest")
	if err := validate.Image(image); err != nil {
		t.Error(err)
	}
	layers, err := image.Layers()
	if err != nil || len(layers) != 1 {
		t.Fatalf("layers = %v, %v, want one", layers, err)
	}
	content, err := layers[0].Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer content.Close()
	made := time.Date(2026, 1, 2, 2, 4, 5, 0, time.UTC)
	var got []string
	for r := tar.NewReader(content); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, strings.TrimSpace(fmt.Sprintf("%s %s %s", h.FileInfo().Mode(), h.Name, h.Linkname)))
		if h.Uid != 0 || h.Gid != 0 || !h.ModTime.Equal(made) {
			t.Errorf("%s: owner %d:%d, time %v, want root's, %v", h.Name, h.Uid, h.Gid, h.ModTime, made)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if base, ok := strings.CutPrefix(h.Name, "usr/bin/"); ok && base != "" {
			if want, err := os.ReadFile(filepath.Join(bin, base)); err != nil || !bytes.Equal(want, data) {
				t.Errorf("%s is not the binary (%v)", h.Name, err)
			}
		}
	}
	slices.Sort(got)
	want := []string{
		"-r--r--r-- usr/share/licenses/margay/LICENSE",
		"-r--r--r-- usr/share/licenses/margay/bpf-LICENSE",
		"-r--r--r-- usr/share/licenses/margay/bpf-LICENSE.GPL-2.0",
		"-r-xr-xr-x usr/bin/margay",
		"-r-xr-xr-x usr/bin/margay-agent",
		"-r-xr-xr-x usr/bin/margay-install",
		"-r-xr-xr-x usr/bin/margay-ipam", "-r-xr-xr-x usr/bin/margay-loader",
		"-r-xr-xr-x usr/bin/margayctl",
		"Lrwxrwxrwx var/run ../run",
		"drwxr-xr-x run/",
		"drwxr-xr-x usr/",
		"drwxr-xr-x usr/bin/",
		"drwxr-xr-x usr/share/",
		"drwxr-xr-x usr/share/licenses/",
		"drwxr-xr-x usr/share/licenses/margay/",
		"drwxr-xr-x var/",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
}

func TestConfig(t *testing.T) {
	file := makeImage(t, binDir(t))
	for _, tag := range []string{"margay-cni/margay:v1", "margay-cni/margay:latest"} {
		config, err := load(t, file, tag).ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		if config.OS != "linux" || config.Architecture != "amd64" {
			t.Errorf("%s: platform = %s/%s, want linux/amd64", tag, config.OS, config.Architecture)
		}
		if diff := cmp.Diff([]string{"/usr/bin/margay-agent"}, config.Config.Entrypoint); diff != "" || config.Config.Cmd != nil {
			t.Errorf("%s: entrypoint (-want +got), arguments %v:\n%s", tag, config.Config.Cmd, diff)
		}
		for key, want := range map[string]string{
			"title": "Margay", "version": "v1", "revision": "0123abc", "created": "2026-01-02T02:04:05Z",
			"licenses": "Apache-2.0 AND (GPL-2.0-only OR BSD-2-Clause)",
		} {
			if got := config.Config.Labels["org.opencontainers.image."+key]; got != want {
				t.Errorf("%s: label %s = %q, want %q", tag, key, got, want)
			}
		}
	}
	manifest, err := tarball.LoadManifest(func() (io.ReadCloser, error) { return os.Open(file) })
	if err != nil {
		t.Fatal(err)
	}
	var tags []string
	for _, m := range manifest {
		tags = append(tags, m.RepoTags...)
	}
	slices.Sort(tags)
	// A name with a registry's host in it would be another image than the one that the manifests name.
	if diff := cmp.Diff([]string{"margay-cni/margay:latest", "margay-cni/margay:v1"}, tags); diff != "" {
		t.Errorf("tags (-want +got):\n%s", diff)
	}
}

func TestReproducible(t *testing.T) {
	bin := binDir(t)
	first, err := os.ReadFile(makeImage(t, bin))
	if err != nil {
		t.Fatal(err)
	}
	again := binDir(t) // other times and inodes
	later := time.Now().Add(time.Hour)
	if err := os.Chtimes(filepath.Join(again, binaries[0]), later, later); err != nil {
		t.Fatal(err)
	}
	for range 5 { // tags are kept in a map
		second, err := os.ReadFile(makeImage(t, again))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(first, second) {
			t.Fatal("the same binaries and flags made another image")
		}
	}
}

func TestRefused(t *testing.T) {
	bin := binDir(t)
	for _, tt := range []struct {
		name   string
		damage func(path string) error
		want   string
	}{
		{"missing", os.Remove, "make build"},
		{"no program", func(path string) error {
			if err := os.Remove(path); err != nil {
				return err
			}
			return os.WriteFile(path, bytes.Repeat([]byte("#!/bin/sh\n"), 20), 0o755)
		}, "bad magic"},
		{"dynamic", func(path string) error {
			if err := os.Remove(path); err != nil {
				return err
			}
			self, err := filepath.EvalSymlinks("/bin/sh")
			if err != nil {
				return err
			}
			content, err := os.ReadFile(self)
			if err != nil {
				return err
			}
			return os.WriteFile(path, content, 0o755)
		}, "linked dynamically"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.damage(filepath.Join(bin, "margayctl")); err != nil {
				t.Fatal(err)
			}
			output := filepath.Join(t.TempDir(), "image.tar")
			var out bytes.Buffer
			code := run([]string{"--bin", bin, "--source", root, "--output", output, "--tag", "margay-cni/margay:v1"}, &out, &out)
			if code != 1 || !strings.Contains(out.String(), tt.want) {
				t.Errorf("image = exit code %d, %s, want 1 and %q", code, &out, tt.want)
			}
			if _, err := os.Stat(output); err == nil {
				t.Error("an image was written")
			}
			if err := os.WriteFile(filepath.Join(bin, "margayctl"), nil, 0o755); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestFlags(t *testing.T) {
	for _, args := range [][]string{{}, {"--tag", "Not A Tag"}, {"--tag", "margay-cni/margay"}, {"--tag", "a/b:c", "more"}, {"--created", "yesterday", "--tag", "a/b:c"}} {
		if code := run(args, io.Discard, io.Discard); code != 2 {
			t.Errorf("image %q = exit code %d, want 2", args, code)
		}
	}
}
