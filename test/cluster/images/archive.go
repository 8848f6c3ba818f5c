// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"runtime"
)

// An image is one set of layers, lowest first, with what is run from them, under one or more names.
type image struct {
	names      []string
	layers     []layer
	entrypoint []string
	command    []string
	user       string
}

// An archive is one file in the format of `docker save`.
type archive struct {
	file   string
	images []image
}

// names returns the names of all images of the archive.
func (a archive) names() []string {
	var names []string
	for _, i := range a.images {
		names = append(names, i.names...)
	}
	return names
}

// imageConfig is the part of the image specification's config that a runtime needs
// (https://github.com/opencontainers/image-spec/blob/main/config.md).
type imageConfig struct {
	Created      string `json:"created"`
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
	Config       struct {
		Entrypoint []string `json:",omitempty"`
		Cmd        []string `json:",omitempty"`
		Env        []string
		User       string `json:",omitempty"`
	} `json:"config"`
	RootFS struct {
		Type    string   `json:"type"`
		DiffIDs []string `json:"diff_ids"`
	} `json:"rootfs"`
}

// config returns the image's config as JSON.
func (i image) config() ([]byte, error) {
	c := imageConfig{Created: "1970-01-01T00:00:00Z", Architecture: runtime.GOARCH, OS: "linux"}
	c.Config.Entrypoint, c.Config.Cmd, c.Config.Env, c.Config.User = i.entrypoint, i.command, []string{path}, i.user
	c.RootFS.Type = "layers"
	for _, l := range i.layers {
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, "sha256:"+l.digest)
	}
	return json.Marshal(c)
}

// manifestEntry is one image in the manifest.json of a docker-archive.
type manifestEntry struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// write makes the file at path, whole or not at all. A layer of several images is stored once.
func (a archive) write(path string) (err error) {
	file, err := os.Create(path + ".new")
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, file.Close())
		if err == nil {
			err = os.Rename(file.Name(), path)
		}
		if err != nil {
			err = errors.Join(err, os.Remove(file.Name()))
		}
	}()
	w := tar.NewWriter(file)
	var manifest []manifestEntry
	stored := map[string]bool{}
	for _, i := range a.images {
		m, err := i.write(w, stored)
		if err != nil {
			return err
		}
		manifest = append(manifest, m)
	}
	content, err := json.Marshal(manifest)
	if err != nil {
		return err
	}
	if err := writeFile(w, "manifest.json", 0o644, bytes.NewReader(content), int64(len(content))); err != nil {
		return err
	}
	return w.Close()
}

// write appends the image's config, and those of its layers that are not yet stored, and returns its part of the manifest.
func (i image) write(w *tar.Writer, stored map[string]bool) (manifestEntry, error) {
	config, err := i.config()
	if err != nil {
		return manifestEntry{}, err
	}
	sum := sha256.Sum256(config)
	m := manifestEntry{Config: hex.EncodeToString(sum[:]) + ".json", RepoTags: i.names}
	if err := writeFile(w, m.Config, 0o644, bytes.NewReader(config), int64(len(config))); err != nil {
		return manifestEntry{}, err
	}
	for _, l := range i.layers {
		name := l.digest + ".tar"
		m.Layers = append(m.Layers, name)
		if stored[name] {
			continue
		}
		stored[name] = true
		if err := (entry{mode: 0o644, source: l.path}).write(w, name); err != nil {
			return manifestEntry{}, err
		}
	}
	return m, nil
}
