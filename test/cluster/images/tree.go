// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
)

// A tree is the content of a layer, by slash-separated paths without a leading slash. Parent directories need no entry.
type tree map[string]entry

// An entry is a symbolic link if link is set, a directory if its mode says so, and otherwise a file with the content of the file
// source on this machine, or, without a source, with content.
type entry struct {
	mode    fs.FileMode
	link    string
	source  string
	content []byte
}

// A layer is a written layer: its file and the SHA-256 of it, in hexadecimal.
type layer struct {
	path   string
	digest string
}

// layer writes the tree as a tar file. Order, owners and times are fixed, so that equal trees give equal digests.
func (t tree) layer(path string) (l layer, err error) {
	file, err := os.Create(path)
	if err != nil {
		return layer{}, err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	sum := sha256.New()
	w := tar.NewWriter(io.MultiWriter(file, sum))
	content := t.withParents()
	for _, name := range slices.Sorted(maps.Keys(content)) {
		if err := content[name].write(w, name); err != nil {
			return layer{}, fmt.Errorf("%s: %w", name, err)
		}
	}
	if err := w.Close(); err != nil {
		return layer{}, err
	}
	return layer{path: path, digest: hex.EncodeToString(sum.Sum(nil))}, nil
}

// withParents returns a copy of the tree in which every directory has an entry. Parents sort before what they contain.
func (t tree) withParents() tree {
	whole := maps.Clone(t)
	for name := range t {
		for dir := filepath.Dir(name); dir != "."; dir = filepath.Dir(dir) {
			if _, known := whole[dir]; !known {
				whole[dir] = entry{mode: fs.ModeDir | 0o755}
			}
		}
	}
	return whole
}

// write appends the entry to a tar file, owned by root and as old as the epoch.
func (e entry) write(w *tar.Writer, name string) error {
	switch {
	case e.link != "":
		return w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: e.link, Mode: 0o777, Format: tar.FormatPAX})
	case e.mode.IsDir():
		mode := int64(e.mode.Perm())
		if e.mode&fs.ModeSticky != 0 {
			mode |= 0o1000
		}
		return w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode, Format: tar.FormatPAX})
	case e.source == "":
		return writeFile(w, name, e.mode, bytes.NewReader(e.content), int64(len(e.content)))
	}
	file, err := os.Open(e.source)
	if err != nil {
		return err
	}
	defer file.Close() // only read from
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is no regular file", e.source)
	}
	return writeFile(w, name, e.mode, file, info.Size())
}

// writeFile appends a regular file of size bytes to a tar file.
func writeFile(w *tar.Writer, name string, mode fs.FileMode, content io.Reader, size int64) error {
	header := &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: int64(mode.Perm()), Format: tar.FormatPAX}
	if err := w.WriteHeader(header); err != nil {
		return err
	}
	_, err := io.Copy(w, content)
	return err
}
