// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Temporary files stand beside their target, because a rename across directories is not seen as a change by every runtime. Their suffix is
// none that a runtime reads as configuration.
const (
	tempPrefix = ".margay-install-"
	tempSuffix = ".tmp"
)

// writeFile makes path hold content with mode, whole or not at all: temporary file, fsync, rename, fsync of the directory. A program that
// runs from the old file keeps it. It reports whether anything had to be written.
func writeFile(path string, content []byte, mode fs.FileMode) (changed bool, err error) {
	same, err := holds(path, content, mode)
	if err != nil || same {
		return false, err
	}
	temp, err := os.CreateTemp(filepath.Dir(path), tempPrefix+"*"+tempSuffix)
	if err != nil {
		return false, fmt.Errorf("make a temporary file for %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, removeFile(temp.Name()))
		}
	}()
	_, err = temp.Write(content)
	err = errors.Join(err, temp.Chmod(mode), temp.Sync(), temp.Close())
	if err != nil {
		return false, fmt.Errorf("write a temporary file for %s: %w", path, err)
	}
	if err := os.Rename(temp.Name(), path); err != nil {
		return false, fmt.Errorf("put %s in place: %w", path, err)
	}
	return true, syncDir(filepath.Dir(path))
}

// holds reports whether path is a regular file with exactly this content and mode.
func holds(path string, content []byte, mode fs.FileMode) (bool, error) {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look at %s: %w", path, err)
	}
	if !info.Mode().IsRegular() || info.Mode().Perm() != mode || info.Size() != int64(len(content)) {
		return false, nil
	}
	have, err := os.ReadFile(path)
	if err != nil {
		return false, fmt.Errorf("compare with %s: %w", path, err)
	}
	return bytes.Equal(have, content), nil
}

// syncDir makes a rename in dir survive a power failure.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("open %s to sync it: %w", dir, err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	return nil
}

// removeFile removes a file; one that is not there is success.
func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// makeDir makes dir and its parents, below root, and returns those that it made, the outermost first, as paths of the node.
func makeDir(root, dir string) (made []string, err error) {
	path := filepath.Join(root, dir)
	if _, err := os.Stat(path); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if parent := filepath.Dir(dir); parent != dir {
		if made, err = makeDir(root, parent); err != nil {
			return made, err
		}
	}
	if err := os.Mkdir(path, 0o755); errors.Is(err, fs.ErrExist) {
		return made, nil // somebody else made it meanwhile: theirs
	} else if err != nil {
		return made, err
	}
	return append(made, dir), nil
}

func digest(content []byte) string {
	sum := sha256.Sum256(content)
	return hex.EncodeToString(sum[:])
}
