// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// filterPrefix begins the name of every tc filter that pkg/datapath makes.
const filterPrefix = "margay/"

// sysctlsName is the file under the run directory in which pkg/datapath keeps the value that each setting had before it changed it.
const sysctlsName = "sysctls.json"

// mountsName is the file beside it with the mount points at which pkg/datapath found no bpffs and mounted one.
const mountsName = "mounts.json"

// conflistItems finds the conflists. An edited one goes too: it names a plugin that goes.
func conflistItems(o *options, m *manifest) []item {
	paths := slices.Collect(maps.Keys(m.Conflists))
	return fileItems(o, "conflist", append(paths, o.conflistPath()))
}

// binaryItems finds what was installed, here or by a run whose list is lost, and the temporary files of a run that was killed.
func binaryItems(o *options, m *manifest) []item {
	paths := slices.Clone(m.Binaries)
	for _, name := range plugins {
		paths = append(paths, filepath.Join(o.cniBinDir, name))
	}
	dirs := []string{o.cniBinDir, o.cniConfDir, o.stateDir}
	if o.binDir != "" {
		dirs = append(dirs, o.binDir)
		for _, name := range tools {
			paths = append(paths, filepath.Join(o.binDir, name))
		}
	}
	items := fileItems(o, "binary", paths)
	for _, path := range paths {
		dirs = append(dirs, filepath.Dir(path))
	}
	slices.Sort(dirs)
	for _, dir := range slices.Compact(dirs) {
		// The pattern is fixed and sound, so Glob has no error to report.
		left, _ := filepath.Glob(o.at(filepath.Join(dir, tempPrefix+"*"+tempSuffix)))
		for _, path := range left {
			items = append(items, item{"temporary file", path, func() error { return removeFile(path) }})
		}
	}
	return items
}

// manifestItems finds the directories that were made for the files, the innermost first, and the state directory with the list of what was
// installed. The list goes as late as it can, because an interrupted run reads it again.
func manifestItems(o *options, m *manifest) []item {
	var items, above []item
	for _, dir := range slices.Backward(m.Directories) {
		if dir == filepath.Clean(o.stateDir) {
			continue
		}
		if _, err := os.Lstat(o.at(dir)); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		it := item{"directory", dir + " (if empty)", func() error { return removeEmptyDir(o.at(dir)) }}
		if strings.HasPrefix(o.stateDir, dir+"/") {
			above = append(above, it)
		} else {
			items = append(items, it)
		}
	}
	items = append(items, treeItems("state directory", o.at(o.stateDir), o.stateDir)...)
	return append(items, above...)
}

// removeEmptyDir leaves a directory alone in which somebody has put something.
func removeEmptyDir(path string) error {
	if left, err := os.ReadDir(path); err == nil && len(left) > 0 {
		return errKept
	}
	return removeFile(path)
}

// fileItems returns those of the node's paths that exist, each once.
func fileItems(o *options, kind string, paths []string) []item {
	slices.Sort(paths)
	var items []item
	for _, path := range slices.Compact(paths) {
		if _, err := os.Lstat(o.at(path)); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		items = append(items, item{kind, path, func() error { return removeFile(o.at(path)) }})
	}
	return items
}

// pinItems finds every pin, one line each: they are what keeps maps, programs and links alive.
func pinItems(o *options) ([]item, error) {
	var items []item
	dir := o.at(o.bpffs)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && !d.IsDir() && !kernelsOwn(d) {
			items = append(items, item{"pin", path, func() error { return removeFile(path) }})
		}
		return err
	})
	if err != nil {
		return items, fmt.Errorf("list pins: %w", err)
	}
	if _, err := os.Lstat(dir); err == nil {
		items = append(items, item{"pin directory", o.bpffs, func() error { return removePinDir(dir) }})
	}
	return items, nil
}

// removePinDir empties the directory and removes it. Where it is a mount point itself, mountItems does the last step.
func removePinDir(dir string) error {
	children, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, c := range children {
		if !kernelsOwn(c) {
			errs = append(errs, os.RemoveAll(filepath.Join(dir, c.Name())))
		}
	}
	return errors.Join(append(errs, ignore(removeFile(dir), unix.EBUSY))...)
}

// kernelsOwn tells the two iterators, maps.debug and progs.debug, that the kernel puts into every bpffs and that nobody can remove.
func kernelsOwn(d fs.DirEntry) bool {
	return strings.HasSuffix(d.Name(), ".debug")
}

// mountItems finds the bpffs mounts that were made for the pins.
func mountItems(o *options) ([]item, error) {
	mounts, err := remembered(o, mountsName)
	var items []item
	for _, path := range slices.Sorted(maps.Keys(mounts)) {
		items = append(items, item{"bpffs", path + " (if nobody else uses it)", func() error {
			return unmountUnused(o.at(path), filepath.Clean(path) == filepath.Clean(o.bpffs))
		}})
	}
	return items, err
}

// unmountUnused unmounts a bpffs in which nobody has pinned anything, and removes the mount point if that was ours too.
func unmountUnused(path string, ours bool) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return ignore(err, unix.ENOENT)
	}
	if fs.Type == unix.BPF_FS_MAGIC {
		left, err := os.ReadDir(path)
		if err != nil {
			return err
		}
		if len(slices.DeleteFunc(left, kernelsOwn)) > 0 {
			return errKept
		}
		if err := ignore(unix.Unmount(path, 0), unix.EINVAL); err != nil {
			return fmt.Errorf("unmount: %w", err)
		}
	}
	if !ours {
		return nil
	}
	return removeFile(path)
}

// remembered reads one of the files in which pkg/datapath keeps what it changed, nil where there is none.
func remembered(o *options, name string) (map[string]string, error) {
	file := o.at(filepath.Join(o.runDir, name))
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read what was changed: %w", err)
	}
	var before map[string]string
	if err := json.Unmarshal(data, &before); err != nil {
		return nil, fmt.Errorf("decode what was changed, %s: %w", file, err)
	}
	return before, nil
}

// treeItems is a directory of ours with everything in it, at path, which the node calls name.
func treeItems(kind, path, name string) []item {
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return []item{{kind, name, func() error { return os.RemoveAll(path) }}}
}

// sysctlItems finds the kernel settings that were changed, to set them back.
func sysctlItems(o *options) ([]item, error) {
	before, err := remembered(o, sysctlsName)
	if err != nil {
		return nil, err
	}
	var items []item
	var errs []error
	for _, key := range slices.Sorted(maps.Keys(before)) {
		setting := strings.TrimPrefix(key, "/proc/sys/")
		if !filepath.IsLocal(setting) {
			errs = append(errs, fmt.Errorf("%s names %q, which is no kernel setting", sysctlsName, key))
			continue
		}
		value := strings.TrimSpace(before[key])
		items = append(items, item{"changed setting", setting + ", back to " + cmp.Or(value, "nothing"), func() error {
			return restoreSysctl(filepath.Join(o.sysctlDir, setting), value)
		}})
	}
	return items, errors.Join(errs...)
}

// restoreSysctl writes a setting unless it has that value. One that is gone went with its device.
func restoreSysctl(path, value string) error {
	have, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if strings.TrimSpace(string(have)) == value {
		return nil
	}
	// The end of line makes it a write even where the value is that there is none.
	return os.WriteFile(path, []byte(value+"\n"), 0)
}
