// SPDX-License-Identifier: Apache-2.0

// Image packs Margay's binaries into an OCI image, without a container engine and without a network. The result is a tar file that
// `ctr --namespace k8s.io images import` and `docker load` take. Equal binaries and flags make equal bytes: every time in it is given.
package main

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

// options are the command line.
type options struct {
	bin     string // directory of the binaries
	source  string // the repository, for the licences
	output  string
	tags    []string
	version string
	commit  string
	created time.Time
}

func parse(args []string, stderr io.Writer) (options, error) {
	var o options
	f := flag.NewFlagSet("image", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&o.bin, "bin", "bin", "`directory` of the binaries")
	f.StringVar(&o.source, "source", ".", "`directory` of the repository, where the licences are")
	f.StringVar(&o.output, "output", "margay-image.tar", "`file` to write")
	f.StringVar(&o.version, "version", "unknown", "version of the binaries")
	f.StringVar(&o.commit, "commit", "", "commit that they are built from")
	f.Func("tag", "NAME:TAG of the image; may be repeated", func(s string) error {
		o.tags = append(o.tags, s)
		if !strings.Contains(s, ":") {
			return errors.New("want NAME:TAG")
		}
		_, err := name.NewTag(s)
		return err
	})
	o.created = time.Unix(0, 0).UTC()
	f.Func("created", "RFC 3339 time at which the image was made (default 1970)", func(s string) (err error) {
		o.created, err = time.Parse(time.RFC3339, s)
		o.created = o.created.UTC()
		return err
	})
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if f.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	if len(o.tags) == 0 {
		return o, errors.New("--tag NAME:TAG is required")
	}
	return o, nil
}

// run is main without the process.
func run(args []string, stdout, stderr io.Writer) int {
	o, err := parse(args, stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		fmt.Fprintln(stderr, "image:", err)
		return 2
	}
	if err := pack(o); err != nil {
		fmt.Fprintln(stderr, "image:", err)
		return 1
	}
	fmt.Fprintf(stdout, "%s: %s\n", o.output, strings.Join(o.tags, ", "))
	return 0
}

// pack writes the image, whole or not at all.
func pack(o options) (err error) {
	image, err := build(o)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(o.output), 0o755); err != nil {
		return err
	}
	temp, err := os.CreateTemp(filepath.Dir(o.output), ".image-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(temp.Name()))
		}
	}()
	err = archive(temp, image, o.tags)
	if err := errors.Join(err, temp.Chmod(0o644), temp.Close()); err != nil {
		return fmt.Errorf("write %s: %w", o.output, err)
	}
	return os.Rename(temp.Name(), o.output)
}

// archive writes the image as `docker save` does. The library's own writer keeps the tags in a map, whose order differs from run to run.
func archive(to io.Writer, image v1.Image, tags []string) error {
	config, err := image.RawConfigFile()
	if err != nil {
		return err
	}
	entry := tarball.Descriptor{Config: "config.json", RepoTags: slices.Sorted(slices.Values(tags))}
	w := tar.NewWriter(to)
	if err := put(w, entry.Config, config); err != nil {
		return err
	}
	layers, err := image.Layers()
	if err != nil {
		return err
	}
	for _, layer := range layers {
		digest, err := layer.Digest()
		if err != nil {
			return err
		}
		r, err := layer.Compressed()
		if err != nil {
			return err
		}
		content, err := io.ReadAll(r)
		if err := errors.Join(err, r.Close()); err != nil {
			return err
		}
		file := digest.Hex + ".tar.gz"
		entry.Layers = append(entry.Layers, file)
		if err := put(w, file, content); err != nil {
			return err
		}
	}
	manifest, err := json.Marshal(tarball.Manifest{entry})
	if err != nil {
		return err
	}
	return errors.Join(put(w, "manifest.json", manifest), w.Close())
}

func put(w *tar.Writer, name string, content []byte) error {
	if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o444, Size: int64(len(content)), Typeflag: tar.TypeReg}); err != nil {
		return err
	}
	_, err := w.Write(content)
	return err
}
