// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
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
	// written is what the file holds; nil = unknown.
	written []byte
}

// save makes the file hold v and reports whether it had to be written.
func (f *savedFile) save(v any) (bool, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return false, fmt.Errorf("encode %s: %w", f.path, err)
	}
	data = append(data, '\n')
	if f.written == nil {
		if f.written, err = os.ReadFile(f.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false, fmt.Errorf("compare %s: %w", f.path, err)
		}
	}
	if bytes.Equal(f.written, data) {
		return false, nil
	}
	f.written = nil
	if err := replaceFile(f.path, data); err != nil {
		return false, err
	}
	f.written = data
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
