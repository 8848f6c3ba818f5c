// SPDX-License-Identifier: Apache-2.0

package endpoint

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
)

// Version is the record layout that this build writes. A reader refuses a newer one.
const Version = 1

const (
	dirName   = "endpoints"
	extension = ".json"
	// A temporary file starts with a dot: List ignores it, and no attachment's name can collide with it.
	tempPrefix = "."
	tempSuffix = ".tmp"
)

// ErrName is wrapped by every error about a container ID or interface name that cannot be part of a file name.
var ErrName = errors.New("not usable in a file name")

// Bounds of CNI_CONTAINERID (what a file name may hold) and CNI_IFNAME (what the kernel takes).
const (
	maxContainerID = 220
	maxIfName      = 15
)

// Store is the directory of records of one node. It is safe for use by several processes as long as no two of them write the same
// attachment at once; the CNI plugin's attachment lock sees to that.
type Store struct {
	dir string
}

// NewStore returns the store under the run directory (architecture default: /run/margay). Nothing is created before the first Save.
func NewStore(run string) *Store {
	return &Store{dir: filepath.Join(run, dirName)}
}

// Dir returns the directory that holds the records; it need not exist.
func (s *Store) Dir() string {
	return s.dir
}

// CheckName reports whether an attachment's names are safe to build a file name from. The error wraps ErrName.
func CheckName(containerID, ifName string) error {
	if len(containerID) > maxContainerID || !isContainerID(containerID) {
		return fmt.Errorf("container ID %q: %w", containerID, ErrName)
	}
	if ifName == "" || len(ifName) > maxIfName || ifName == "." || ifName == ".." || strings.ContainsAny(ifName, "/:\x00 \t\n\v\f\r") {
		return fmt.Errorf("interface name %q: %w", ifName, ErrName)
	}
	return nil
}

// isContainerID is the rule of the CNI specification, section 2: alphanumeric, then also "_", "." and "-".
// Written out because the plugin runs for a few milliseconds and should not compile a pattern in them.
func isContainerID(s string) bool {
	for i, c := range []byte(s) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case i > 0 && (c == '_' || c == '.' || c == '-'):
		default:
			return false
		}
	}
	return s != ""
}

// Path returns the file that holds the attachment's record.
func (s *Store) Path(containerID, ifName string) (string, error) {
	if err := CheckName(containerID, ifName); err != nil {
		return "", err
	}
	return filepath.Join(s.dir, containerID+"-"+ifName+extension), nil
}

// tempPath is the same for every Save of one attachment, so that Delete also removes what a killed Save left behind.
func tempPath(path string) string {
	return filepath.Join(filepath.Dir(path), tempPrefix+filepath.Base(path)+tempSuffix)
}

// Save writes r, replacing an older record of the same attachment at once. It sets r.Version. There is no fsync: the run directory does
// not outlive the boot, and neither do the pods.
func (s *Store) Save(r *Record) (err error) {
	path, err := s.Path(r.ContainerID, r.IfName)
	if err != nil {
		return err
	}
	r.Version = Version
	data, err := r.encode()
	if err != nil {
		return fmt.Errorf("encode record: %w", err)
	}
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		return fmt.Errorf("make record directory: %w", err)
	}
	temp := tempPath(path)
	defer func() {
		if err != nil {
			err = errors.Join(err, removeIfThere(temp))
		}
	}()
	if err := os.WriteFile(temp, data, 0o644); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	if err := os.Rename(temp, path); err != nil {
		return fmt.Errorf("put record in place: %w", err)
	}
	return nil
}

// Load returns the attachment's record. The error wraps fs.ErrNotExist when there is none.
func (s *Store) Load(containerID, ifName string) (*Record, error) {
	path, err := s.Path(containerID, ifName)
	if err != nil {
		return nil, err
	}
	return ReadFile(path)
}

// ReadFile returns the record in one file, for readers that watch the directory.
func ReadFile(path string) (*Record, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read record: %w", err)
	}
	var r Record
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("decode record %s: %w", path, err)
	}
	if r.Version > Version {
		return nil, fmt.Errorf("record %s has layout %d, newer than %d", path, r.Version, Version)
	}
	if err := CheckName(r.ContainerID, r.IfName); err != nil {
		return nil, fmt.Errorf("record %s: %w", path, err)
	}
	if want := r.ContainerID + "-" + r.IfName + extension; filepath.Base(path) != want {
		return nil, fmt.Errorf("record %s is about the attachment of %s", path, want)
	}
	return &r, nil
}

// List returns every readable record, ordered by file name, and joins what was wrong with the others: a damaged record hides nothing but
// itself. A missing directory is an empty list.
func (s *Store) List() ([]*Record, error) {
	entries, err := os.ReadDir(s.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list records: %w", err)
	}
	var (
		records []*Record
		faults  []error
	)
	sort.Slice(entries, func(i, j int) bool { return entries[i].Name() < entries[j].Name() })
	for _, e := range entries {
		if IsTemporary(e.Name()) || e.IsDir() || filepath.Ext(e.Name()) != extension {
			continue
		}
		r, err := ReadFile(filepath.Join(s.dir, e.Name()))
		switch {
		case errors.Is(err, fs.ErrNotExist): // deleted since the directory was read
		case err != nil:
			faults = append(faults, err)
		default:
			records = append(records, r)
		}
	}
	return records, errors.Join(faults...)
}

// IsTemporary says whether a file in the directory is a Save in progress (or one that was killed), which readers ignore.
func IsTemporary(name string) bool {
	return strings.HasPrefix(name, tempPrefix)
}

// Delete removes the attachment's record and what a killed Save left of it. Nothing there is success.
func (s *Store) Delete(containerID, ifName string) error {
	path, err := s.Path(containerID, ifName)
	if err != nil {
		return err
	}
	return errors.Join(removeIfThere(tempPath(path)), removeIfThere(path))
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove record: %w", err)
	}
	return nil
}
