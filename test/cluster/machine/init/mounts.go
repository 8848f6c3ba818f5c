// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/test/cluster/machine"
)

// makeFileSystems replaces every mount that the machine inherited. Nothing is kept by accident: a copy of somebody else's mount would
// hold his network namespace or BPF file system alive. The real root is there, read-only and without what is mounted below it; the
// machine's disk is over /etc, /var, /opt, /root, /tmp and /usr/local, a new tmpfs on /run.
func makeFileSystems(dir string, spec machine.Spec) error {
	disk := filepath.Join(dir, machine.DiskDir)
	newRoot := filepath.Join(dir, "tree") // only a place to mount on
	if err := os.MkdirAll(newRoot, 0o755); err != nil {
		return err
	}
	if err := prepareDisk(disk); err != nil {
		return err
	}
	steps := []func() error{
		func() error { return mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") },
		func() error { return mount("/", newRoot, "", unix.MS_BIND, "") },
		func() error { return mount("", newRoot, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "") },
		func() error { return mountDisk(disk, newRoot) },
		func() error { return mountKernel(newRoot, spec) },
		func() error { return keep(newRoot, spec.Keep) },
		func() error { return pivot(newRoot) },
		func() error { return writeFiles(spec.Files) },
		func() error { return shadowSysctls(spec.Sysctls) },
		// Kubelet and containerd want shared propagation.
		func() error { return mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "") },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func mount(source, target, fstype string, flags uintptr, data string) error {
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		return fmt.Errorf("mount %s (%s %s %s): %w", target, source, fstype, data, err)
	}
	return nil
}

var (
	plain    = []string{"var", "opt", "root", "tmp"}
	overlaid = []string{"etc", "usr/local"}
)

// prepareDisk makes the directories of a new machine's disk; those of a machine that starts again are there.
func prepareDisk(disk string) error {
	dirs := []string{"root", "var/lib", "var/log", "var/tmp", "var/cache", "opt/cni/bin", "tmp"}
	for _, o := range overlaid {
		dirs = append(dirs, upper(o), work(o))
	}
	for _, d := range dirs {
		if err := os.MkdirAll(filepath.Join(disk, d), 0o755); err != nil {
			return err
		}
	}
	for _, d := range []string{"tmp", "var/tmp"} {
		if err := os.Chmod(filepath.Join(disk, d), 0o777|fs.ModeSticky); err != nil {
			return err
		}
	}
	if err := os.Symlink("/run", filepath.Join(disk, "var/run")); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

func upper(name string) string { return "upper/" + strings.ReplaceAll(name, "/", "-") }

func work(name string) string { return "work/" + strings.ReplaceAll(name, "/", "-") }

func mountDisk(disk, root string) error {
	for _, name := range plain {
		if err := mount(filepath.Join(disk, name), filepath.Join(root, name), "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	for _, name := range overlaid {
		data := fmt.Sprintf("lowerdir=/%s,upperdir=%s,workdir=%s", name, filepath.Join(disk, upper(name)), filepath.Join(disk, work(name)))
		if err := mount("overlay", filepath.Join(root, name), "overlay", 0, data); err != nil {
			return err
		}
	}
	return mount("tmpfs", filepath.Join(root, "run"), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755")
}

// mountKernel mounts what the kernel shows, each of the machine's own namespaces.
func mountKernel(root string, spec machine.Spec) error {
	const safe = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	in := func(path string) string { return filepath.Join(root, path) }
	steps := []func() error{
		func() error { return mount("proc", in("/proc"), "proc", safe, "") },
		func() error { return mount("/dev", in("/dev"), "", unix.MS_BIND|unix.MS_REC, "") },
		func() error { return mount("sysfs", in("/sys"), "sysfs", safe, "") },
		func() error { return mount("bpf", in("/sys/fs/bpf"), "bpf", safe, "mode=700") },
	}
	if len(spec.Cgroups) > 0 {
		steps = append(steps, func() error { return mountCgroups(root, spec.Cgroups) })
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func mountCgroups(root string, hierarchies []machine.Hierarchy) error {
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := mount("tmpfs", filepath.Join(root, "/sys/fs/cgroup"), "tmpfs", flags, "mode=755"); err != nil {
		return err
	}
	for _, h := range hierarchies {
		target := filepath.Join(root, h.Path)
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		if err := mount(h.Type, target, h.Type, flags, h.Options); err != nil {
			return err
		}
	}
	return nil
}

// keep shows directories of the real machine at their own paths, whatever is mounted over them.
func keep(root string, paths []string) error {
	for _, path := range paths {
		target := filepath.Join(root, path)
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		if err := mount(path, target, "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	return nil
}

// pivot makes root the root directory and drops every older mount.
func pivot(root string) error {
	if err := os.Chdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot to %s: %w", root, err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount the real root: %w", err)
	}
	return os.Chdir("/")
}

func writeFiles(files map[string]string) error {
	for path, content := range files {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// shadowSysctls mounts files of our own over the machine-wide settings that kubelet would change: it reads what it wants to read, and
// the real machine stays as it is.
func shadowSysctls(values map[string]string) error {
	for name, value := range values {
		file := filepath.Join("/run/sysctl", strings.ReplaceAll(name, "/", "."))
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file, []byte(value+"\n"), 0o644); err != nil {
			return err
		}
		if err := mount(file, filepath.Join("/proc/sys", name), "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	return nil
}
