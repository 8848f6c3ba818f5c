// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// manifestName is the file under the state directory. It tells an edited conflist from one of an older version, and what to remove again.
const manifestName = "install.json"

// manifest is what margay-install has put on this node. Paths are the node's.
type manifest struct {
	// Version of the binaries that were installed last.
	Version string `json:"version"`
	// Binaries that were installed, in any version and any directory.
	Binaries []string `json:"binaries"`
	// Conflists that were installed, with the SHA-256 of what was written: another content has been edited since.
	Conflists map[string]string `json:"conflists"`
	// Directories that were made for these files, the outermost first; removed again when they are empty.
	Directories []string `json:"directories"`
}

// loadManifest returns an empty manifest where there is none.
func loadManifest(o *options) (*manifest, error) {
	m := &manifest{Conflists: map[string]string{}}
	path := o.at(filepath.Join(o.stateDir, manifestName))
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return m, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read what was installed: %w", err)
	}
	if err := json.Unmarshal(data, m); err != nil {
		return nil, fmt.Errorf("decode %s (remove it if it is damaged): %w", path, err)
	}
	if m.Conflists == nil {
		m.Conflists = map[string]string{}
	}
	return m, nil
}

// save writes the manifest, which is part of what it lists.
func (m *manifest) save(o *options) error {
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return fmt.Errorf("encode what was installed: %w", err)
	}
	_, err = writeFile(o.at(filepath.Join(o.stateDir, manifestName)), append(data, '\n'), 0o644)
	return err
}

// ensureDir makes a directory of the node and remembers what had to be made for it.
func (m *manifest) ensureDir(o *options, dir string) error {
	made, err := makeDir(o.root, filepath.Clean(dir))
	m.Directories = append(m.Directories, made...)
	if err != nil {
		return fmt.Errorf("make %s: %w", dir, err)
	}
	return nil
}

func (m *manifest) addBinary(path string) {
	if !slices.Contains(m.Binaries, path) {
		m.Binaries = append(m.Binaries, path)
	}
}
