// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// savedFile is a JSON file in the run directory that is replaced by rename, and only when its content changes. It belongs to one goroutine.
type savedFile struct {
	path string
	// written is the digest of what the file holds, if that is known. Contents are large: they are not kept.
	written [sha256.Size]byte
	known   bool
}

// save makes the file hold v and reports whether it had to be written.
func (f *savedFile) save(v any) (bool, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return false, fmt.Errorf("encode %s: %w", f.path, err)
	}
	return f.hold(append(data, '\n'))
}

// hold makes the file hold data and reports whether it had to be written.
func (f *savedFile) hold(data []byte) (bool, error) {
	if !f.known {
		before, err := os.ReadFile(f.path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false, fmt.Errorf("compare %s: %w", f.path, err)
		}
		f.written, f.known = sha256.Sum256(before), err == nil
	}
	sum := sha256.Sum256(data)
	if f.known && sum == f.written {
		return false, nil
	}
	f.known = false
	if err := replaceFile(f.path, data); err != nil {
		return false, err
	}
	f.written, f.known = sum, true
	return true, nil
}

// load decodes the file into v. It wraps fs.ErrNotExist when there is none.
func (f *savedFile) load(v any) error {
	data, err := os.ReadFile(f.path)
	if err != nil {
		return fmt.Errorf("load: %w", err)
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("decode %s: %w", f.path, err)
	}
	return nil
}

// replaceFile writes a temporary file beside path and renames it: a reader, or a kill, never meets half of it. There is no fsync: the
// run directory does not outlive the kernel whose maps it describes.
func replaceFile(path string, data []byte) (err error) {
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("replace %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("replace %s: %w", path, err), os.Remove(tmp.Name()))
		}
	}()
	if _, err := tmp.Write(data); err != nil {
		return errors.Join(err, tmp.Close())
	}
	if err := tmp.Chmod(0o644); err != nil {
		return errors.Join(err, tmp.Close())
	}
	if err := tmp.Close(); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}
