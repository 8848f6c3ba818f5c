// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// maxFile is the largest file that is read, in bytes.
const maxFile = 16 << 20

// list returns the names of the directory's manifests, sorted.
func list(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read the directory of manifests: %w", err)
	}
	names := []string{}
	for _, e := range entries {
		if isManifest(e.Name()) && !e.IsDir() {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	return names, nil
}

func isManifest(name string) bool {
	switch filepath.Ext(name) {
	case ".yaml", ".yml", ".json":
		return !strings.HasPrefix(name, ".")
	}
	return false
}

// read returns a file's text and whether somebody has it open for writing. Links are followed.
func read(dir, name string) (data []byte, writing bool, err error) {
	// Without O_NONBLOCK a named pipe would hold up everything.
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, false, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, false, err
	}
	if !info.Mode().IsRegular() {
		return nil, false, errors.New("is no regular file")
	}
	// Asked before reading: a writer who finishes in between causes an event, and with it another look.
	writing = openForWriting(f)
	if data, err = io.ReadAll(io.LimitReader(f, maxFile+1)); err != nil {
		return nil, false, err
	}
	if len(data) > maxFile {
		return nil, false, fmt.Errorf("is larger than %d MiB", maxFile>>20)
	}
	return data, writing, nil
}

// openForWriting asks the kernel for a read lease, which it refuses while the file is open for writing (fcntl(2), F_SETLEASE), and
// gives it back at once. Any other refusal, as on filesystems without leases, says nothing.
func openForWriting(f *os.File) bool {
	_, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_RDLCK)
	if err == nil {
		_, _ = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_UNLCK)
	}
	return errors.Is(err, unix.EAGAIN)
}
