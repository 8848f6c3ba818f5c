// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// binaries are what is in /usr/bin of the image, and all that is executable there: there is no shell.
var binaries = []string{"margay", "margay-agent", "margay-install", "margay-ipam", "margay-loader", "margayctl"}

// directories exist in the image. What the DaemonSet mounts is made by the runtime.
var directories = []string{"run/", "usr/", "usr/bin/", "usr/share/", "usr/share/licenses/", "usr/share/licenses/margay/", "var/"}

// varRun is as on every node: container runtimes name pods' namespaces below /var/run, and mount them below /run.
const varRun, varRunTarget = "var/run", "../run"

// licences are files of the repository that go with the binaries.
var licences = []string{"LICENSE", "bpf/LICENSE", "bpf/LICENSE.GPL-2.0"}

const labels = "org.opencontainers.image."

// build makes the image: one layer, and a configuration that names what is in it.
func build(o options) (v1.Image, error) {
	architecture, err := architectureOf(o.bin)
	if err != nil {
		return nil, err
	}
	content, err := layerTar(o)
	if err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil },
		tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, fmt.Errorf("make the layer: %w", err)
	}
	created := v1.Time{Time: o.created}
	base := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	image, err := mutate.Append(base, mutate.Addendum{
		Layer:   layer,
		History: v1.History{Created: created, CreatedBy: "make image", Comment: "static binaries"},
	})
	if err != nil {
		return nil, fmt.Errorf("add the layer: %w", err)
	}
	file, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.Created, file.OS, file.Architecture = created, "linux", architecture
	file.Config = v1.Config{
		Entrypoint: []string{"/usr/bin/margay-agent"},
		Env:        []string{"PATH=/usr/bin"},
		User:       "0:0",
		WorkingDir: "/",
		Labels: map[string]string{
			labels + "title":         "Margay",
			labels + "description":   "Kubernetes CNI plugin with an eBPF dataplane: pod network, services and network policy",
			labels + "version":       o.version,
			labels + "revision":      o.commit,
			labels + "created":       o.created.Format("2006-01-02T15:04:05Z"),
			labels + "licenses":      "Apache-2.0 AND (GPL-2.0-only OR BSD-2-Clause)",
			labels + "source":        "https://github.com/margay-cni/margay",
			labels + "documentation": "https://github.com/margay-cni/margay/tree/main/docs",
			labels + "vendor":        "The Margay authors",
		},
	}
	return mutate.ConfigFile(image, file)
}

// layerTar makes the file system: sorted, owned by root, of one time, nothing writable for anybody but root, and binaries for nobody.
func layerTar(o options) ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	add := func(name string, mode int64, content []byte) error {
		h := &tar.Header{Name: name, Mode: mode, Size: int64(len(content)), ModTime: o.created, Format: tar.FormatPAX}
		if h.Typeflag = tar.TypeReg; strings.HasSuffix(name, "/") {
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		_, err := w.Write(content)
		return err
	}
	for _, name := range directories {
		if err := add(name, 0o755, nil); err != nil {
			return nil, err
		}
	}
	link := &tar.Header{Name: varRun, Linkname: varRunTarget, Typeflag: tar.TypeSymlink, Mode: 0o777, ModTime: o.created, Format: tar.FormatPAX}
	if err := w.WriteHeader(link); err != nil {
		return nil, err
	}
	for _, name := range binaries {
		content, err := os.ReadFile(filepath.Join(o.bin, name))
		if err != nil {
			return nil, fmt.Errorf("%w (make build makes it)", err)
		}
		if err := add("usr/bin/"+name, 0o555, content); err != nil {
			return nil, err
		}
	}
	for _, from := range licences {
		content, err := os.ReadFile(filepath.Join(o.source, from))
		if err != nil {
			return nil, err
		}
		if err := add("usr/share/licenses/margay/"+strings.ReplaceAll(from, "/", "-"), 0o444, content); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// architectureOf returns the one architecture that all binaries are for. A binary that needs a dynamic loader is refused: the image has none.
func architectureOf(dir string) (string, error) {
	known := map[elf.Machine]string{elf.EM_X86_64: "amd64", elf.EM_AARCH64: "arm64"}
	found := ""
	for _, name := range binaries {
		path := filepath.Join(dir, name)
		f, err := elf.Open(path)
		if err != nil {
			return "", fmt.Errorf("look at %s (make build makes it): %w", path, err)
		}
		defer f.Close()
		architecture, ok := known[f.Machine]
		if !ok {
			return "", fmt.Errorf("%s is for %v, want one of amd64 and arm64", path, f.Machine)
		}
		for _, p := range f.Progs {
			if p.Type == elf.PT_INTERP {
				return "", fmt.Errorf("%s is linked dynamically, and the image has no loader: build it with CGO_ENABLED=0", path)
			}
		}
		if found != "" && architecture != found {
			return "", fmt.Errorf("%s is for %s, others are for %s", path, architecture, found)
		}
		found = architecture
	}
	return found, nil
}
